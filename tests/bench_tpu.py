"""The quantized products on TPUs, counted by the real compiler, as Markdown: python tests/bench_tpu.py [v5e v6e]

Scheduled bundles of one grid step, ours against a plain bfloat16 Pallas product with the same tiles. The tiles divide
all of FLUX.1's shapes: only the number of steps is another, and a ratio holds for all of them. Bytes are per shape.
"""
import importlib.metadata
import sys

import tpu

SHAPES = [(3072, 9216), (3072, 12288), (12288, 3072), (3072, 18432)]
ROWS = (256, 1024, 3072, 12288)


def main(*chips):
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + "\n")
    print("| chip | kernel | rows | tile | bundles | bfloat16 | ratio |\n|---|---|--:|---|--:|--:|--:|")
    for chip in chips or tpu.TOPOLOGIES:
        for kernel in ("nf4", "nf4 transposed", "int8"):
            if (chip, kernel) != ("v4", "int8"):
                compare(chip, kernel)
    print("\n| weight | bfloat16, bytes | nf4 | nested | int8 |\n|---|--:|--:|--:|--:|")
    for n_in, out in SHAPES:
        n = n_in * out
        sizes = (n // 2 + 4 * n // 64, n // 2 + n // 64 + 4 * n // 64 // 256, n + 4 * out)
        print(f"| {n_in} x {out} | {2 * n:,} | " + " | ".join(f"{size / (2 * n):.3f}" for size in sizes) + " |")


def compare(chip, kernel):
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


if __name__ == "__main__":
    main(*sys.argv[1:])
