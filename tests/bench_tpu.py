"""The quantized products on TPUs, counted by the real compiler, as Markdown: python tests/bench_tpu.py [v5e v6e]

Scheduled bundles of one grid step, ours against a plain bfloat16 Pallas product with the same tiles. FLUX.1's shapes
have in common that tiles divide them, so that a ratio holds for all of them; steps and bytes from HBM are per shape.
"""
import importlib.metadata
import sys

import tpu

SHAPES = [(3072, 9216), (3072, 12288), (12288, 3072), (3072, 18432)]
ROWS = (256, 1024, 3072, 12288)
KERNELS = ("bfloat16", "nf4", "nf4 transposed", "int8")


def main(*chips):
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + "\n")
    print("| chip | rows | tile | " + " | ".join(KERNELS) + " | nf4 | transposed | int8 |\n|---|--:|---|" + "--:|" * 7)
    for chip in chips or tpu.TOPOLOGIES:
        jobs = [{"kernel": kernel, "rows": rows, "size": SHAPES[0]} for rows in ROWS[:3] for kernel in KERNELS
                if (chip, kernel) != ("v4", "int8")]
        answers = tpu.run(chip, jobs)
        for rows in ROWS[:3]:
            row = {a["kernel"]: a.get("bundles", a.get("error")) for a in answers if a["rows"] == rows}
            tile = next(a["tiles"] for a in answers if a["rows"] == rows)
            tile = f"{tile['rows']} x {tile['columns']} x {2 * tile['depth']}"
            counts = [row.get(kernel, "–") for kernel in KERNELS]
            ratios = [f"{n / counts[0]:.3f}" if isinstance(n, int) else "–" for n in counts[1:]]
            print(f"| {chip} | {rows} | {tile} | {' | '.join(map(str, counts))} | {' | '.join(ratios)} |", flush=True)
    print("\n| weight | bfloat16, bytes | nf4 | nested | int8 |\n|---|--:|--:|--:|--:|")
    for n_in, out in SHAPES:
        n = n_in * out
        sizes = (n // 2 + 4 * n // 64, n // 2 + n // 64 + 4 * n // 64 // 256, n + 4 * out)
        print(f"| {n_in} x {out} | {2 * n:,} | " + " | ".join(f"{size / (2 * n):.3f}" for size in sizes) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
