"""Measure what quantization costs and saves, as Markdown and a picture: python bench/nf4.py [picture.webp]

Sizes come from the shapes of FLUX.1-schnell and T5-XXL. Errors compare nano's velocity with and without quantization,
in float32. Rates are medians of decoding a [12288, 3072] weight to bfloat16 on this machine, into new memory (which the
system must clear first) and into reused memory. The first row only fills memory, with `jnp.full`. The picture shows
nano's images in bfloat16 above those in NF4, from the same noise.
"""
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

import flux
import mmdit
import quant
import session
import text
import weights

FORMATS = {"none": {}, "int8": {"name": "int8"}, "nf4": {"name": "nf4"}}
SHAPE = (12288, 3072)
CAPTIONS = ["a red cube", "a green cone", "a blue cylinder", "a small orange sphere"]


def main(picture: str | None = None) -> None:
    """Print the table, and draw the picture if a file is given."""
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, jax {jax.__version__}\n")
    exact = flux.load(ROOT / "nano", dtype=jnp.float32)
    print("| format | bits per weight | FLUX.1 | T5-XXL | error of nano's velocity | G weights/s | in reused memory |\n"
          "|---|--:|--:|--:|--:|--:|--:|")
    for label, options in FORMATS.items():
        put = quant.put(**options) if options else None
        bits = 8 * stored((4096, 4096), options) / 4096 ** 2
        sizes = [sum(leaf_bytes(path, tensor, prefix, options) for path, tensor in
                     jax.tree_util.tree_leaves_with_path(table)) / 1e9 for prefix, table in
                 (("transformer", mmdit.table(flux.Config())), ("t5", text.t5_table(text.T5Config())))]
        error = velocity_error(exact, flux.load(ROOT / "nano", dtype=jnp.float32, put=put)) if put else 0
        q = weight(options)
        decode = quant.dequantize if options else lambda one: jnp.full(SHAPE, one)
        rates = [decode_rate(decode, q, used) / 1e9 for used in (False, True)]
        print(f"| {label} | {bits:.2f} | {sizes[0]:.1f} GB | {sizes[1]:.1f} GB | {error:.1%} | {rates[0]:.2f} | "
              f"{rates[1]:.2f} |", flush=True)
    if picture:
        draw(picture)


def quantizer(options: dict) -> Callable:
    """Return the function of `quant` for a format."""
    return getattr(quant, options["name"])


def stored(shape: tuple[int, ...], options: dict) -> float:
    """Return the bytes of one weight [in, out], computed from narrow ones: quantizing a large one takes minutes."""
    if not options:
        return 2 * np.prod(shape)
    wide, narrow = (sum(leaf.nbytes for leaf in jax.tree.leaves(quantizer(options)(np.ones((shape[0], n), np.float32))))
                    for n in (512, 256))
    return wide + (wide - narrow) * (shape[1] - 512) / 256


def leaf_bytes(path: tuple, tensor: weights.Tensor, prefix: str, options: dict) -> float:
    """Return the bytes of a tensor of the table, over all its layers."""
    layers = len(tensor.numbers)
    name = f"{prefix}.{weights.path_name(path)}"
    coded = name.startswith(quant.QUANTIZED) and len(tensor.shape) == 2
    return layers * (stored(tensor.shape, options) if coded else 2 * np.prod(tensor.shape))


def velocity_error(exact: flux.Model, quantized: flux.Model) -> float:
    """Return the relative error of the quantized model's velocity."""
    rng = np.random.default_rng(0)
    words, pooled = flux.encode_text(exact, CAPTIONS * 2)
    times = np.linspace(1, 0.2, 8, dtype=np.float32)
    inputs = rng.standard_normal((8, 64, exact.cfg.in_channels), dtype=np.float32), words, pooled, times
    run = jax.jit(lambda params: flux.velocity(params, exact.cfg, *inputs, grid=(8, 8)))
    a, b = run(exact.params), run(quantized.params)
    return float(jnp.linalg.norm(b - a) / jnp.linalg.norm(a))


def weight(options: dict) -> Any:
    """Return a random quantized weight of SHAPE, or the scalar 1 without quantization."""
    if not options:
        return jnp.bfloat16(1)
    w = np.random.default_rng(0).standard_normal((SHAPE[0], 96), dtype=np.float32)
    return quantizer(options)(np.tile(w, (1, SHAPE[1] // 96)), dtype=jnp.bfloat16)


def decode_rate(decode: Callable, q: Any, used: bool, repeats: int = 9) -> float:
    """Return the decoded weights per second. used: write each result into the memory of the one before."""
    run = jax.jit(lambda old, q: decode(q), donate_argnums=0 if used else (), keep_unused=True)
    array, times = jnp.zeros(SHAPE, jnp.bfloat16), []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        array = run(array, q).block_until_ready()
        times.append(time.perf_counter() - start)
    return np.prod(SHAPE) / statistics.median(times[2:])


def draw(file: str) -> None:
    """Save the picture of both formats."""
    from PIL import Image
    rows = []
    for options in ({}, session.quantized("nf4")):
        model = flux.load(ROOT / "nano", **options)
        rows.append(np.concatenate(flux.generate(model, CAPTIONS, steps=4, size=model.size), 1))
    Image.fromarray(np.concatenate(rows)).save(file, quality=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
