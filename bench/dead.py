"""Count dead features on synthetic activations as difficult as FLUX's, standardized and raw, as a Markdown table.

    python bench/dead.py [--features 16384] [--steps 600] [--kinds "pca,std,scale,plain std,plain scale"]

The activations are sparse sums of a known dictionary, so there is something to find. They have the difficulties of
FLUX.1's: scales of the dimensions over four orders of magnitude, one direction with 58 % of the raw variance, means far
from zero, heavy tails. "scale" divides by one number, so that tokens have the mean square D: these are the raw
activations in another unit. The rest is the recipe of train.py for small models. "plain" removes what keeps features
alive there, AuxK and the restraint of the rate. "dead" features do not fire on 131,072 held-out tokens. "silent"
features did not fire in the last `dead_after` tokens (512,000 for 16,384 features), by the trainer's own counter.
"""
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import apply
import recipe as recipes
import sae
import session

BATCH, HELD_OUT = 2048, range(10 ** 6, 10 ** 6 + 32)             # tokens per step; numbers of the larger test batches
SHARE = 0.58                                                     # of the variance along one direction
STEP = jax.jit(sae.step, static_argnums=1, donate_argnums=0)


class Pathological:
    """A source of synthetic activations.

    In units of each dimension's own scale, a token is a sum of `active` of the directions `rows` [sources, D], drawn
    with power-law frequencies and multiplied by log-normal amplitudes. Scales are log-normal, from 0.01 to 100. One
    more direction, `line` [D], has a Student-t amplitude with 4 degrees of freedom. `mean` is 5 scales from zero.
    """

    def __init__(self, width: int = 256, sources: int = 32768, active: int = 24, seed: int = 0):
        r = np.random.default_rng(seed)
        rows = r.standard_normal((sources, width), dtype=np.float32)
        odds = (np.arange(sources) + 100.0) ** -0.7
        quantiles = np.array([statistics.NormalDist().inv_cdf((i + 0.5) / width) for i in range(width)])
        self.active, self.key = active, jax.random.key(seed)
        self.rows = jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        self.ends = jnp.asarray(np.cumsum(odds) / odds.sum(), jnp.float32)
        self.scale = jnp.asarray(10 ** r.permutation(2 * quantiles / quantiles[-1]), jnp.float32)
        self.mean = 5 * self.scale * r.standard_normal(width, dtype=np.float32)
        self.line = jnp.zeros(width)
        self.line = _dominant(np.cov(self.batch(0, 65536), rowvar=False), self.scale * r.standard_normal(width))

    def batch(self, number: int, tokens: int) -> jax.Array:
        """Return activations [tokens, D] float32, always the same for the same number."""
        world = self.rows, self.ends, self.scale, self.mean, self.line
        return _draw(world, jax.random.fold_in(self.key, number), tokens, self.active)


def _dominant(covariance, direction):
    """Scale `direction` [D] by bisection so that the first principal axis has SHARE of all variance."""
    line, low, high = np.asarray(direction, np.float64) / np.linalg.norm(direction), 0.0, 100 * np.trace(covariance)
    for _ in range(50):
        middle = (low + high) / 2
        variances = np.linalg.eigvalsh(covariance + middle * np.outer(line, line))
        low, high = (middle, high) if variances[-1] < SHARE * variances.sum() else (low, middle)
    return jnp.asarray(line * np.sqrt(low), jnp.float32)


@partial(jax.jit, static_argnums=(2, 3))
def _draw(world, key, tokens, active):
    rows, ends, scale, mean, line = world
    keys = jax.random.split(key, 3)
    chosen = jnp.searchsorted(ends, jax.random.uniform(keys[0], (active, tokens)))
    amplitudes = jnp.exp(jax.random.normal(keys[1], (active, tokens)) - 1)

    def add(total, column):
        return total + column[1][:, None] * rows[column[0]], None

    sums, _ = lax.scan(add, jnp.zeros((tokens, rows.shape[1])), (chosen, amplitudes))
    return scale * sums + mean + jax.random.t(keys[2], 4.0, (tokens, 1)) / np.sqrt(2) * line


def run(world: Pathological, kind: str, features: int, steps: int, k: int = 32) -> tuple[str, ...]:
    """Train and evaluate an SAE. Return the cells of its table row."""
    since, width, normalization = time.monotonic(), len(world.scale), kind.split()[-1]
    plain = {"aux_coefficient": 0.0, "restraint": float("inf")} if kind.startswith("plain") else {}
    cfg = sae.Config(d_in=width, features=features, k=k, lr=recipes.rate(features, k, width, "img", small=True),
                     normalization=normalization, **plain, **recipes.schedule(steps))
    state = sae.init(jax.random.key(0), cfg, np.asarray(world.batch(0, 65536)))
    for i in range(1, steps + 1):
        state, metrics = STEP(state, cfg, world.batch(i, BATCH))
    silent, seconds = float(metrics["dead"]), time.monotonic() - since
    found = apply.evaluate(sae.fold(state, cfg), cfg, (world.batch(i, 2 * BATCH) for i in HELD_OUT))
    return (f"{100 * found.dead:.2f}", f"{100 * silent:.2f}", f"{found.fvu_standardized:.3f}",
            f"{found.fvu:.3f}", f"{found.l0:.1f}", f"{seconds:.0f}")


def main(features: int = 16384, steps: int = 600, kinds: str = "pca,std,scale,plain std,plain scale",
         **unknown) -> None:
    """Print the table, a row for each of `kinds`."""
    session.no_unknown_flags(unknown)
    world = Pathological()
    x = np.asarray(world.batch(10 ** 7, 65536), np.float64)
    variances, stds = np.linalg.eigvalsh(np.cov(x, rowvar=False)), x.std(0)
    tails = np.mean(((x - x.mean(0)) / stds) ** 4)
    print(f"{x.shape[1]} dimensions: first axis {100 * variances[-1] / variances.sum():.0f} % of the variance, "
          f"stds from {stds.min():.2g} to {stds.max():.2g}, mean kurtosis {tails:.1f}; {features:,} features, "
          f"{steps} steps of {BATCH} tokens\n")
    print("| normalization | dead % | silent % | FVU (std.) | FVU (raw) | L0 | seconds |\n|---|" + "--:|" * 6)
    for name in kinds.split(","):
        print(f"| {name} | {' | '.join(run(world, name, features, steps))} |", flush=True)


if __name__ == "__main__":
    session.command(main)
