"""An SAE for every layer of nano by `python train.py`, as a Markdown table: python tests/bench_layers.py [--site img]

Each row is one run of the command with its defaults. FVU is on held-out prompts, standardized per dimension; PCA keeps
as many components as the SAE has active features; random features are the same SAE before its first step.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def bench(layer, site, flags):
    """(seconds, the closing table's rows) of one run."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        command = [sys.executable, ROOT / "train.py", "--model", "nano", "--layer", layer, "--site", site, *flags]
        subprocess.run([*map(str, command), "--out", f"{folder}/ckpt"], check=True, stderr=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, cwd=ROOT)
        seconds = time.monotonic() - start
        return seconds, json.loads(Path(folder, "ckpt", "cfg.json").read_text())["metadata"]["evaluation"]


def main(site="img", layers=range(12), flags=()):
    print("| layer | FVU | dead % | L0 | cosine | PCA | random features | seconds |\n|" + "---:|" * 8)
    for layer in layers:
        seconds, rows = bench(layer, site, flags)
        ours, pca, random = rows.values()
        cells = (f"{ours['fvu_standardized']:.3f}", f"{100 * ours['dead']:.1f}", f"{ours['l0']:.1f}",
                 f"{ours['cosine']:.3f}", f"{pca['fvu_standardized']:.3f}", f"{random['fvu_standardized']:.3f}",
                 f"{seconds:.0f}")
        print(f"| {layer} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*(sys.argv[2:3] if sys.argv[1:2] == ["--site"] else []))
