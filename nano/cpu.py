"""What makes JAX fast on a CPU. A script calls `fast` before it imports jax; other devices ignore it."""
import os
from pathlib import Path


def fast(devices: int = 1) -> None:
    """Show JAX `devices` CPU devices. On a core with AMX, let oneDNN multiply float32 as bfloat16: five times as fast.

    Elsewhere oneDNN gains nothing, and crashes in Muon's products."""
    flags, about = f"--xla_force_host_platform_device_count={devices}", Path("/proc/cpuinfo")
    if about.exists() and "amx_bf16" in about.read_text():
        flags += (" --xla_cpu_use_onednn=true --xla_cpu_experimental_onednn_fusion_type="
                  "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")
    os.environ |= {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}


def mean(function, xs):
    """The mean of function(x) over the leading axis of `xs`, one x after the other.

    As a step's gradients of few examples at a time, all activations stay in a core's cache; of many at once, each
    passes through memory. On two Xeon cores train.py is 1.5 times as fast so, and inverse.py 2.3 times."""
    import jax
    import jax.numpy as jnp
    count = len(jax.tree.leaves(xs)[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                         jax.eval_shape(function, jax.tree.map(lambda x: x[0], xs)))
    sums, _ = jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, function(x)), None), zeros, xs)
    return jax.tree.map(lambda x: x / count, sums)
