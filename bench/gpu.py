"""Check and time the SAE where only a GPU can show a problem: python bench/gpu.py [--small]

Print the card and the versions, how often `sae.encode` of raw residuals chooses the same features as float64 on the
host, whether training steps give the same bits twice in one process and in another, and the median time of a step.
"""
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels
import sae

SMALL = "--small" in sys.argv
D, F, K, B = (96, 512, 8, 256) if SMALL else (3072, 16384, 32, 4096)
FOUND = {}


def main() -> None:
    """Run all checks, and write $OUT/gpu.json if OUT is set."""
    tell("device", f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for ratio in (5, 50, 300):
        agreement(ratio)
    for activation in sae.ACTIVATIONS:
        one, two = (trained(activation) for _ in range(2))
        tell(f"{activation}: same bits in one process", one == two)
        other = subprocess.run([sys.executable, __file__, f"--hash={activation}", *["--small"] * SMALL],
                               capture_output=True, text=True, check=True).stdout.split()[-1]
        tell(f"{activation}: same bits in another process", one == other)
    products()
    steps()
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "gpu.json").write_text(json.dumps(FOUND, indent=1))


def tell(name: str, value: Any) -> None:
    """Print a result, and keep it in FOUND."""
    FOUND[name] = value
    print(f"{name}: {value}", flush=True)


def residuals(rng: np.random.Generator, n: int, ratio: float) -> np.ndarray:
    """Return raw residuals [n, D] with a few large and many small directions, and a mean of about `ratio` standard
    deviations."""
    scale = np.exp(rng.standard_normal(D)).astype(np.float32)
    mixed = rng.standard_normal((n, 64)).astype(np.float32) @ rng.standard_normal((64, D)).astype(np.float32) / 8
    u = mixed + 0.5 * rng.standard_normal((n, D)).astype(np.float32)
    return scale * (u + ratio * rng.choice([-1, 1], D).astype(np.float32))


def agreement(ratio: float) -> None:
    """Tell which share of the chosen features float64 also chooses, for `encode` and for one HIGH precision product."""
    x = residuals(np.random.default_rng(ratio), 2 * B, ratio)
    cfg = sae.Config(d_in=D, features=F, k=K)
    params = sae.fold(sae.init(jax.random.key(0), cfg, x[:B]), cfg)
    x = x[B:]
    _, ours = sae.encode(params, cfg, x)
    high = kernels.topk(kernels.preactivations(x, params["W_enc"].T, params["b_enc"]), K)[1]
    W, b = (np.asarray(params[name], np.float64) for name in ("W_enc", "b_enc"))
    exact = np.concatenate([np.argpartition(-(x[i:i + 512].astype(np.float64) @ W + b), K - 1, 1)[:, :K]
                            for i in range(0, B, 512)])
    share = lambda found: np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(np.asarray(found), exact)])
    tell(f"mean / std {ratio}: agreement with float64", round(float(share(ours)), 6))
    tell(f"mean / std {ratio}: agreement of one product in HIGH", round(float(share(high)), 6))


def start(activation: str, tokens: int) -> tuple[sae.Config, sae.State, jax.Array]:
    """Return (cfg, state with 1 % of the features dead, batches)."""
    x = residuals(np.random.default_rng(1), 5 * tokens, 5)
    cfg = sae.Config(d_in=D, features=F, k=K, activation=activation, warmup=1)
    state = sae.init(jax.random.key(0), cfg, x[:tokens])
    dead = jnp.arange(F) % 100 == 0
    state = state._replace(since_fired=jnp.where(dead, cfg.dead_after + 1, 0))
    return cfg, state, jnp.asarray(x).reshape(5, tokens, D)


def trained(activation: str) -> str:
    """Return a hash of the state after five steps."""
    cfg, state, batches = start(activation, B // 2)
    step = jax.jit(sae.step, static_argnums=1)
    for x in batches:
        state, _ = step(state, cfg, x)
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def products() -> None:
    """Time each method for the gradient of the decoder's rows."""
    rng = np.random.default_rng(2)
    values, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((B, K), (B, D)))
    indices = jnp.asarray(np.argsort(rng.random((B, F)), 1)[:, :K] if SMALL else
                          np.stack([rng.choice(F, K, replace=False) for _ in range(B)]), jnp.int32)

    def dense(values, indices, x, algorithm):
        return lax.dot_general(kernels._scattered(values, indices, F), x, (((0,), (0,)), ((), ())), precision=algorithm)

    ways = {"scatter": scatter, "product, HIGH": partial(dense, algorithm=lax.Precision.HIGH)}
    if jax.devices()[0].platform == "gpu":
        ways["product, HIGHEST"] = partial(dense, algorithm=lax.Precision.HIGHEST)
        ways["product, three TF32"] = partial(dense, algorithm=lax.DotAlgorithmPreset.TF32_TF32_F32_X3)
        ways["product, three bfloat16"] = partial(dense, algorithm=lax.DotAlgorithmPreset.BF16_BF16_F32_X3)
    exact = None
    for name, way in ways.items():
        run = jax.jit(way)
        out = np.asarray(run(values, indices, x))
        exact = out if exact is None else exact
        error = float(np.abs(out - exact).max() / np.abs(exact).max())
        tell(f"outer, {B} tokens, {name}", f"{1000 * median(lambda run=run: run(values, indices, x)):.2f} ms, "
                                          f"error {error:.1e}")


def scatter(values: jax.Array, indices: jax.Array, x: jax.Array, features: int = F) -> jax.Array:
    """Compute the sum by scatters, as an earlier version did: the GPU's scheduler decides the order."""
    def add(total, part):
        value, index = part
        return total.at[index].add(value[:, None] * x), None

    return lax.scan(add, jnp.zeros((features, x.shape[1])), (values.T, indices.T))[0]


def steps() -> None:
    """Time a training step, with the present method and with scatters."""
    ours = kernels.PLAIN["scan"]
    for tokens in (B // 2, 2 * B):
        for name, outer in (("current", ours[2]), ("with scatters", scatter)):
            kernels.PLAIN["scan"] = (*ours[:2], outer)
            cfg, state, batches = start("topk", tokens)
            step = jax.jit(lambda state, x, cfg=cfg: sae.step(state, cfg, x))
            seconds = median(lambda step=step, state=state, x=batches[0]: step(state, x))
            tell(f"step, {tokens} tokens, {name}", f"{1000 * seconds:.2f} ms")
    kernels.PLAIN["scan"] = ours


def median(call: Callable, n: int = 20) -> float:
    """Return the median of the seconds that a call takes."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(3 if SMALL else n):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


if __name__ == "__main__":
    asked = [flag.partition("=")[2] for flag in sys.argv[1:] if flag.startswith("--hash=")]
    if asked:
        print(trained(asked[0]))
    else:
        main()
