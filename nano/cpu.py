"""What makes JAX fast on a CPU, for scripts that call it before they import jax. Other devices ignore it."""
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
