"""Count the cost of our TPU kernels with the real compiler, as Markdown: python bench/bundles.py [v5e v6e]

Quantized products: scheduled bundles of one grid step, for our kernel and for a plain bfloat16 Pallas product with the
same tiles. The tiles divide all of FLUX.1's shapes: shapes differ only in the number of steps, so the ratio holds for
all. Bytes are per shape.

A sparse decoder, forward and backward, compared with the dense one, in cycles:
- dense: three products of B x F x D multiply-adds at the peak of the matrix unit (v5e: 4 units of 128 x 128, so 65,536
  per cycle; v6e 4 x 256 x 256; v4 and v5p 8 x 128 x 128), in bfloat16 and in the three passes of Precision.HIGH, which
  is about as precise as the kernels' float32. This is a lower bound: writing and reading [B, F] is not counted.
- kernels: bundles of each loop times its trips, plus the other bundles of a step times the steps, as if every branch
  were taken. There are n / 1024 + F / 256 visits, each with 7 entries on average outside of whole groups. On v4 and v5p
  two cores share the slices of D. HBM: time at peak bandwidth to read the rows twice, write their gradient, and move
  tokens and entries. The larger of both numbers counts, because rows are fetched while others are computed.
- sort: XLA's sort of (feature, place, value), and of (place, gradient) back: 1.05 cycles per entry each, from the trips
  of its loops for 262,144 entries on v5e. The lists of visits are not counted; they take less than 2 %.
"""
import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tpu

import kernels_tpu

SHAPES = [(3072, 9216), (3072, 12288), (12288, 3072), (3072, 18432)]
ROWS = (256, 1024, 3072, 12288)
SPARSE = [(4096, 16384, 3072, 32), (4096, 65536, 3072, 64)]      # tokens, F, D, k
SORT = 1.05
CORES = {"v4": 2, "v5p": 2}


def main(*chips: str) -> None:
    """Print the tables for these chips, or for all."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + "\n")
    print("| chip | kernel | rows | tile | bundles | bfloat16 | ratio |\n|---|---|--:|---|--:|--:|--:|")
    for chip in chips or tpu.TOPOLOGIES:
        for kernel in ("nf4", "nf4 transposed", "int8"):
            if (chip, kernel) != ("v4", "int8"):
                compare(chip, kernel)
    print("\n| chip | tokens, F, D, k | dense bfloat16 | dense HIGH | decode: bundles | HBM | gradients: bundles | HBM "
          "| sort | kernels | dense bfloat16 / kernels | HIGH |\n|---|---|" + "--:|" * 10)
    for chip in chips or tpu.TOPOLOGIES:
        for size in SPARSE:
            sparse(chip, *size)
    print("\n| weight | bfloat16, bytes | nf4 | int8 |\n|---|--:|--:|--:|")
    for n_in, out in SHAPES:
        n = n_in * out
        sizes = (n // 2 + 4 * n // 64, n + 4 * out)
        print(f"| {n_in} x {out} | {2 * n:,} | " + " | ".join(f"{size / (2 * n):.3f}" for size in sizes) + " |")


def compare(chip: str, kernel: str) -> None:
    """Print the rows of one quantized kernel beside the bfloat16 product."""
    ours = tpu.run(chip, [{"kernel": kernel, "rows": rows, "size": SHAPES[0]} for rows in ROWS])
    seen = {}
    for answer in ours:
        tile = tuple(answer["tiles"].values())
        if tile not in seen:
            plain = "bfloat16 transposed" if "transposed" in kernel else "bfloat16"
            job = {"kernel": plain, "rows": answer["rows"], "size": SHAPES[0], "tiles": tile}
            seen[tile] = tpu.run(chip, [job])[0]
        n, plain = answer.get("bundles"), seen[tile].get("bundles")
        if n is None or plain is None:
            print(f"| {chip} | {kernel} | {answer['rows']} | {answer.get('error') or seen[tile].get('error')} |")
            continue
        tile = " x ".join(map(str, tile[:3]))
        print(f"| {chip} | {kernel} | {answer['rows']} | {tile} | {n:,} | {plain:,} | {n / plain:.3f} |", flush=True)


def sparse(chip: str, B: int, F: int, D: int, k: int) -> None:
    """Print the row of the sparse decoder at one size."""
    answers = tpu.run(chip, [{"kernel": kernel, "rows": B, "size": (F, D), "k": k} for kernel in tpu.SPARSE])
    if errors := [answer["error"] for answer in answers if "error" in answer]:
        print(f"| {chip} | {errors[0]} |")
        return
    peak = kernels_tpu.CHIPS[chip]
    dense, counts, sort = 3 * B * F * D / peak.macs, [cycles(chip, answer) for answer in answers], 2 * SORT * B * k
    memory = [4 * (n * F * D + B * D + 4 * B * k) / peak.bandwidth for n in (1, 2)]
    total = sort + sum(map(max, counts, memory))
    cells = [dense, 3 * dense, counts[0], memory[0], counts[1], memory[1], sort, total]
    print(f"| {chip} | {B}, {F}, {D}, {k} | " + " | ".join(f"{cell / 1e6:.2f} M" for cell in cells)
          + f" | {dense / total:.1f} | {3 * dense / total:.1f} |", flush=True)


def cycles(chip: str, answer: dict) -> float:
    """Return bundles x trips of a sparse kernel on the busiest core."""
    (F, _), entries, tiles = answer["size"], answer["rows"] * answer["k"], answer["tiles"]
    chunks, blocks, tokens = (-(-n // size) for n, size in (
        (entries, kernels_tpu.ENTRIES), (F, kernels_tpu.ROWS), (answer["rows"], kernels_tpu.ROWS)))
    visits, tile = chunks + blocks - 1, kernels_tpu.ROWS // 8
    zeros = kernels_tpu.ROWS * tiles["pitch"] / 128              # loop trips to clear one block of rows
    apart = (kernels_tpu.GROUP - 1) / 2 * visits                 # entries before whole groups, and as many after
    walk = [apart, (entries - 2 * apart) / kernels_tpu.GROUP, apart]
    if answer["kernel"] == tpu.SPARSE[0]:
        trips = [tokens * zeros, blocks * tile, *walk, tokens * tile]
    else:
        trips = [tokens * tile, blocks * zeros, blocks * tile, *walk, blocks * tile, chunks * kernels_tpu.ENTRIES / 128]
    one = sum(n * body for n, body in zip(trips, answer["loops"], strict=True)) + (visits + tokens) * answer["step"]
    return one * -(-tiles["slices"] // CORES.get(chip, 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
