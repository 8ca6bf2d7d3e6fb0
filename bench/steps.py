"""Time a training step of a TopK SAE in fae and in other trainers on the same data, as Markdown: python bench/steps.py

    pip install eai-sparsify                                     # optional; SAELens is a test requirement

All use float32 and Adam. fae's row is the whole `sae.step` of train.py, with statistics, normalization and AuxK for 1 %
of dead features; the others have no dead features. SAELens' row is a step of its SAETrainer. sparsify's Trainer needs a
language model, so this file steps its SparseCoder as the Trainer does, with torch's Adam. The trainers take turns. The
columns are median seconds per step, ratios to fae, and thousands of page faults.
"""
import importlib.metadata
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import torch

import kernels
import sae

SIZES = [(3072, 16384, 32, 1024), (768, 16384, 32, 2048)]        # D, F, k, tokens
DEAD = 164                                                       # features: 1 % of them
PACKAGES = ("jax", "torch", "eai-sparsify", "sae-lens")


def main(rounds: int = 5) -> None:
    """Print the table."""
    print(f"{processor()}, {os.cpu_count()} CPUs; {', '.join(f'{name} {version(name)}' for name in PACKAGES)}\n")
    rows = {}
    for size in SIZES:
        x = activations(*size)
        steps = {name: make(x, *size) for name, make in TRAINERS.items()}
        measured = {name: [] for name, step in steps.items() if step}
        for i in range(int(rounds) + 1):
            for name in measured:
                measured[name].append(measure(steps[name], i))
        for name in TRAINERS:
            of = [statistics.median(values) for values in zip(*measured.get(name, [])[1:])]
            rows.setdefault(name, []).append(of or None)
    heads = [", ".join(map(str, size)) for size in SIZES]
    print(f"| D, F, k, tokens: | {' | | | '.join(heads)} | | |\n|---|{'--:|--:|--:|' * len(heads)}")
    for name, of in rows.items():
        cells = [f"{m[0]:.2f} s | {m[0] / ours[0]:.2f} | {m[1] / 1e3:.0f} k" if m else "not installed | |"
                 for m, ours in zip(of, rows["fae"])]
        print(f"| {name} | {' | '.join(cells)} |")


def measure(step: Callable, i: int) -> tuple[float, int]:
    """Return seconds and page faults: the pages of new memory that the system must clear."""
    start, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(i)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def processor() -> str:
    """Return the processor's name, on Linux the one in /proc/cpuinfo."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def activations(D: int, F: int, k: int, tokens: int) -> list[np.ndarray]:
    """Return two batches of sparse sums of random directions with noise, so that most features stay in use."""
    r = np.random.default_rng(0)
    directions = r.standard_normal((F // 4, D), dtype=np.float32) / D ** 0.5
    batches = []
    for _ in range(2):
        chosen = r.integers(0, F // 4, (tokens, k))
        weights = r.random((tokens, k, 1), dtype=np.float32)
        sums = np.stack([(directions[c] * w).sum(0) for c, w in zip(chosen, weights)])
        batches.append(sums + 0.02 * r.standard_normal((tokens, D), dtype=np.float32))
    return batches


def ours(x: list[np.ndarray], D: int, F: int, k: int, tokens: int, normalization: str = "pca") -> Callable:
    """Return a function of i that runs fae's step on batch i, as do the following functions for other trainers."""
    cfg = sae.Config(d_in=D, features=F, k=k, normalization=normalization)
    step = jax.jit(sae.step, static_argnums=1, donate_argnums=0)
    state = sae.init(jax.random.key(0), cfg, x[0])
    since_fired = jax.numpy.zeros_like(state.since_fired).at[:DEAD].set(cfg.dead_after)    # mid-run: AuxK works
    states, batches = [state._replace(since_fired=since_fired)], [jax.numpy.asarray(a) for a in x]

    def run(i):
        state, metrics = step(states.pop(), cfg, batches[i % 2])
        states.append(jax.block_until_ready((state, metrics))[0])

    return run


def encoder_alone(x: list[np.ndarray], D: int, F: int, k: int, tokens: int) -> Callable:
    """Run the encoder's product only."""
    r = np.random.default_rng(0)
    W, b = jax.numpy.asarray(r.standard_normal((F, D), dtype=np.float32)), jax.numpy.zeros(F)
    product, batches = jax.jit(kernels.preactivations), [jax.numpy.asarray(a) for a in x]
    return lambda i: product(batches[i % 2], W, b).block_until_ready()


def saelens(x: list[np.ndarray], D: int, F: int, k: int, tokens: int, rescale: bool = True) -> Callable:
    """Run SAELens' trainer."""
    from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    cfg = SAETrainerConfig(total_training_samples=10 ** 9, train_batch_size_samples=tokens, lr_end=3e-5,
                           logger=LoggingConfig(log_to_wandb=False))
    model = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=k, rescale_acts_by_decoder_norm=rescale))
    trainer, batches = SAETrainer(cfg=cfg, sae=model, data_provider=iter(())), [torch.from_numpy(a) for a in x]
    return lambda i: trainer.step(batches[i % 2])


def sparsify(x: list[np.ndarray], D: int, F: int, k: int, tokens: int) -> Callable | None:
    """Run sparsify's SparseCoder. Return None if it is not installed."""
    try:
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError:
        return None
    model, batches = SparseCoder(D, SparseCoderConfig(num_latents=F, k=k)), [torch.from_numpy(a) for a in x]
    optimizer, since_fired = torch.optim.Adam(model.parameters(), lr=1e-4), torch.zeros(F, dtype=torch.long)

    def run(i):
        model.set_decoder_norm_to_unit_norm()
        out = model(batches[i % 2], dead_mask=since_fired > 10 ** 7)
        (out.fvu + out.auxk_loss / 32).backward()
        model.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        fired = torch.zeros(F, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        since_fired.add_(tokens)[fired] = 0

    return run


TRAINERS = {"fae": ours, "fae, without rotation": partial(ours, normalization="std"),
            "the encoder's product alone": encoder_alone, "sparsify": sparsify, "SAELens": saelens,
            "SAELens, without rescaling": partial(saelens, rescale=False)}

if __name__ == "__main__":
    main(*sys.argv[1:])
