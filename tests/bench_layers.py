"""An SAE for every layer of nano, as `python train.py --layer N` trains it, as a Markdown table.

    python tests/bench_layers.py [--site img]

FVU is on held-out prompts, standardized per dimension; PCA keeps as many components as the SAE has active features;
random features are the same SAE before its first step. The runs go side by side in threads, and share what is the same
in all of them: one pass of the model catches every layer, so that the table costs a third of twelve separate runs.
"""
import contextlib
import io
import json
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "JAX_PLATFORMS": "cpu"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp

import flux
import train
from harvest import reap


class SharedCapture:
    """In place of `flux.capture` in one step: the first of the runs to ask computes all layers for the others."""

    def __init__(self, runs):
        self.runs, self.lock, self.kept = runs, threading.Lock(), {}

    def __call__(self, model, start, *, layer, site):
        assert len(start.sigmas) == 2, "one timestep"
        key = start.latents[:, 0, :4].tobytes()
        with self.lock:
            stacks, waiting = self.kept.pop(key, None) or (all_layers(model, start, site), self.runs)
            if waiting > 1:
                self.kept[key] = stacks, waiting - 1
        return stacks[layer][None]


def all_layers(model, start, site):
    """The residual streams [B, N, D] of every layer at `start`."""
    sites = ("txt", "img") if site == "both" else (site,)
    names = tuple(f"{kind}.{s}" for kind in ("double", "single") for s in sites)
    caught = _pass(model.params, model.cfg, start.latents, *start.condition, start.sigmas[0], start.grid, names)
    joined = [jnp.concatenate([caught[f"{kind}.{s}"] for s in sites], 2) for kind in ("double", "single")]
    return [layer for stack in joined for layer in stack]


@partial(jax.jit, static_argnums=(1, 7, 8))
def _pass(params, cfg, latents, text, pooled, guidance, sigma, grid, names):
    time = jnp.full(len(latents), sigma)
    run = reap(partial(flux.velocity, grid=grid), names)
    return run(params, cfg, latents, text, pooled, time, guidance)[1]


def main(site="img", **flags):
    folder = flux.resolve("nano")
    layers = range(flux.read_config("nano")[1].layers)
    flux.capture = SharedCapture(len(layers))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(len(layers)) as pool:
        def run(layer):
            train.main(model=str(folder), layer=layer, site=site, out=f"{out}/{layer}", **flags)
            return json.loads(Path(out, str(layer), "cfg.json").read_text())["metadata"]["evaluation"]

        with contextlib.redirect_stdout(io.StringIO()):
            results = list(pool.map(run, layers))
    print("| layer | FVU | dead % | L0 | cosine | PCA | random features |\n|" + "---:|" * 7)
    for layer, (ours, pca, random) in zip(layers, (rows.values() for rows in results)):
        cells = (f"{ours['fvu_standardized']:.3f}", f"{100 * ours['dead']:.1f}", f"{ours['l0']:.1f}",
                 f"{ours['cosine']:.3f}", f"{pca['fvu_standardized']:.3f}", f"{random['fvu_standardized']:.3f}")
        print(f"| {layer} | {' | '.join(cells)} |")
    print(f"\n{time.monotonic() - start:.0f} seconds for all")


if __name__ == "__main__":
    main(*(sys.argv[2:3] if sys.argv[1:2] == ["--site"] else []))
