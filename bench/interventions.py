"""Time interventions in a denoising step of nano, as a Markdown table: python bench/interventions.py ckpt

The rows are one step (`flux.velocity`) of a batch of 8 at 128 x 128 pixels without changes; with the residual
captured at the SAE's layer; with an addition there, which needs no encoding; with a scaled feature, which needs the
encoder; with the SAE's reconstruction spliced in; and, on the same tokens, the encoder's product alone, and encoder and
decoder alone. They take turns, so that other work on the machine slows all of them equally. Times are medians.
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
import sae
import score
import session
import steer


def main(checkpoint: str = "ckpt", rounds: int = 60, batch: int = 8) -> None:
    """Print the table for the SAE in a checkpoint folder."""
    model = flux.load("nano", dtype=jnp.float32)
    ours = steer.load(checkpoint, model, prompts=16)
    start = flux.prepare(model, ["a red cube"] * batch, steps=1, size=128)
    params = ours.params[0]
    where = {"grid": start.grid, "layer": ours.layer, "site": ours.site}
    x = flux.residual(model.params, model.cfg, start.latents, *flux.at(start, 0), **where)
    product = jax.jit(lambda p, x: kernels.preactivations(x.reshape(-1, x.shape[-1]), p["W_enc"].T, p["b_enc"]))
    width = sae.encode(params, ours.cfg, x)[0].shape[-1]         # the most features that fire on a token
    both = jax.jit(lambda p, x: sae.decode(p, ours.cfg, *sae.encode(p, ours.cfg, x, width)))
    args = model.params, model.cfg, start.latents, *flux.at(start, 0)
    names = ours.names

    def step(edits=()):
        return lambda: flux.velocity(*args, grid=start.grid, edits=edits)

    def changed(**by):
        return step(steer.edits(model, start, [steer.Change(ours, 3, **by)])(0))

    captured = lambda: flux.velocity_and_values(*args, grid=start.grid, layer=ours.layer, names=names)
    runs = {"a step": step(), "captured": captured,
            "an addition": changed(add=8), "a feature scaled": changed(scale=2),
            "spliced": step(score.edits(session.subject(model, checkpoint), "spliced", 1.0)),
            "the SAE's product alone": lambda: product(params, x), "the SAE alone": lambda: both(params, x)}
    times = {name: [] for name in runs}
    for _ in range(rounds + 3):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - begin)
    medians = {name: 1e3 * statistics.median(took[3:]) for name, took in times.items()}
    plain, captured, addition, scaled, spliced, alone, whole = medians.values()
    print(f"{os.cpu_count()} CPUs, jax {jax.__version__}; layer {ours.layer}, {ours.cfg.features:,} features, "
          f"{x.shape[0]} x {x.shape[1]} tokens, median of {rounds}\n\n| | ms | share of a step |\n|---|--:|--:|")
    for name, took in medians.items():
        print(f"| {name} | {took:.1f} | {took / plain:.3f} |")
    besides = {"capture": captured, "an addition": addition, "scaling, besides the product": scaled - alone,
               "splicing, besides the product": spliced - alone, "splicing, besides the SAE": spliced - whole}
    print("\nadded to a step: " + ", ".join(f"{took / plain - 1:+.1%} {name}" for name, took in besides.items()))


if __name__ == "__main__":
    session.command(main)
