"""What steering costs a denoising step of nano, as a Markdown table: python tests/bench_steer.py ckpt

One step (`flux.velocity`) of a batch of 8 at 128 x 128 pixels, as it is; with an addition at the SAE's layer, for which
nothing is encoded; with a feature scaled, for which the SAE encodes; and the encoder's product alone on those tokens.
All in turns, side by side, so that what else the machine does falls on all; medians.
"""
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

import flux
import kernels
import steer


def main(checkpoint="ckpt", rounds=60, batch=8):
    model = flux.load("nano", dtype=jnp.float32)
    ours = steer.load(checkpoint, model, prompts=16)
    start = flux.prepare(model, ["a red cube"] * batch, steps=1, size=128)
    place, params = ours.place, ours.params[0]
    where = {"grid": start.grid, "layer": place.layer, "site": place.site}
    x = flux.residual(model.params, model.cfg, start.latents, *flux.at(start, 0), **where)
    product = jax.jit(lambda p, x: kernels.preactivations(x.reshape(-1, x.shape[-1]), p["W_enc"].T, p["b_enc"]))

    def step(*changes):
        edits = steer.edits(model, start, changes)(0) if changes else ()
        return lambda: flux.velocity(model.params, model.cfg, start.latents, *flux.at(start, 0), grid=start.grid,
                                     edits=edits)

    runs = {"a step": step(), "with an addition": step(steer.Change(ours, 3, add=8)),
            "with a feature scaled": step(steer.Change(ours, 3, scale=2)),
            "the SAE's product alone": lambda: product(params, x)}
    times = {name: [] for name in runs}
    for _ in range(rounds + 3):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - begin)
    medians = {name: 1e3 * statistics.median(took[3:]) for name, took in times.items()}
    plain, _, scaled, alone = medians.values()
    print(f"{os.cpu_count()} CPUs, jax {jax.__version__}; layer {place.layer}, {ours.cfg.features:,} features, "
          f"{x.shape[0]} x {x.shape[1]} tokens, median of {rounds}\n\n| | ms | of a step |\n|---|--:|--:|")
    for name, took in (*medians.items(), ("scaled, besides the product", scaled - alone)):
        print(f"| {name} | {took:.1f} | {took / plain:.3f} |")
    print(f"\nadded to a step: {medians['with an addition'] / plain - 1:+.1%} by an addition, "
          f"{(scaled - alone) / plain - 1:+.1%} by scaling, besides the product")


if __name__ == "__main__":
    flux.command(main)
