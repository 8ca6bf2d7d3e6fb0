"""Score the SAEs of nano's layers, and check attributions against ablations, as Markdown tables.

    python bench/scores.py --ckpts DIR                          # DIR/layer0 … layer11, as train.py writes them
    python bench/scores.py --ckpts DIR --what attribution

Without --ckpts, train SAEs for --steps steps in a temporary folder. "loss" runs `score.score` on renders of --n
held-out scenes at 8 noise levels, draws images in --drawn steps, and writes an eval.json into each checkpoint.
"attribution": for pairs of layers, attribute features that fire for a held-out caption to the features of an earlier
layer. Compare the attributions of up to 128 random features of these with the effect on the target of ablating each at
all tokens; and those of text tokens with the effect of emptying their T5 state. Correlations are means over targets.
"""
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "JAX_PLATFORMS": "cpu"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax.numpy as jnp
import numpy as np

import attribution
import data as sources
import flux
import sae
import score
import session

PAIRS = ((3, 6), (3, 8), (6, 8), (8, 10), (3, 10), (10, 11))


def train(folder: Path, layers: Sequence[int], steps: int) -> None:
    """Train an SAE for each layer with train.py."""
    for layer in layers:
        subprocess.run([sys.executable, ROOT / "train.py", "--model=nano", f"--layer={layer}", f"--steps={steps}",
                        f"--out={folder / f'layer{layer}'}"], check=True, stdout=subprocess.DEVNULL)


def loss_table(model: flux.Model, folder: Path, layers: Sequence[int], n: int, drawn: int) -> None:
    """Score the SAEs, write their eval.json, and print the tables."""
    scenes = sources.scenes()
    some = [scenes.sample(i) for i in range(n)]
    data = score.dataset(model, [scenes.caption(s) for s in some], [scenes.render(s, 128).image for s in some])
    found = {}
    for layer in layers:
        found[layer] = score.score(model, session.subject(model, folder / f"layer{layer}"), data, steps=drawn)
        file = folder / f"layer{layer}" / score.FILE
        score.write(file, found[layer])
        print(f"layer {layer}\n{score.table(found[layer])}", file=sys.stderr, flush=True)
    print("| layer | loss: model | spliced | zero | mean | recovered (zero) | (mean) | at t = 1 (zero) | (mean) | RMSE "
          "of images: spliced | zero | mean | FVU |\n|--:|" + "--:|" * 12)
    for layer, one in found.items():
        loss, first, image = one["loss"], one["loss_where_trained"], one["image"]
        cells = [*(f"{loss[v]:.3f}" for v in score.VARIANTS), *(show(loss[f"recovered_{v}"]) for v in ("zero", "mean")),
                 *(show(first[f"recovered_{v}"]) for v in ("zero", "mean")),
                 *(f"{image[v]['rmse']:.1f}" for v in score.VARIANTS[1:]), f"{one['sae']['fvu_standardized']:.3f}"]
        print(f"| {layer} | {' | '.join(cells)} |")
    times = [row["t"] for row in one["per_timestep"]]
    print(f"\n| layer | {' | '.join(f't = {t:.3f}' for t in times)} |\n|--:|{'--:|' * len(times)}")
    for layer, one in found.items():
        print(f"| {layer} | {' | '.join(show(row['recovered_mean']) for row in one['per_timestep'])} |")


def show(x: float | None) -> str:
    """Return a number as text, or a dash for None."""
    return "–" if x is None else f"{x:.3f}"


def attribution_table(model: flux.Model, folder: Path, captions: int = 4, targets: int = 4, most: int = 128) -> None:
    """Print the table of attributions, a row per pair of layers."""
    scenes = sources.scenes()
    texts = [scenes.caption(scenes.sample(i)) for i in range(captions)]
    print("| from layer | to layer | targets | Pearson | minimum | Spearman | slope | 10 largest, Pearson | "
          "text tokens, Pearson |\n|--:|--:|" + "--:|" * 7)
    rng = np.random.default_rng(0)
    for a, b in PAIRS:
        source, target = (session.subject(model, folder / f"layer{layer}") for layer in (a, b))
        rows = []
        for number, text in enumerate(texts):
            for feature in rng.permutation(firing(model, target, text, number))[:targets]:
                found = attribution.attribute(model, target, int(feature), text, source, number=number)
                some = np.sort(rng.permutation(len(found.features))[:most])
                effects = attribution.ablate(found, found.features[some])
                top = attribution.ablate(found, found.features[:10])
                words = attribution.ablate_tokens(found, model)
                rows.append([pearson(found.values[some], effects), spearman(found.values[some], effects),
                             found.values[some] @ effects / (found.values[some] @ found.values[some]),
                             pearson(found.values[:10], top), pearson(found.tokens, words)])
        mean, least = np.mean(rows, 0), np.min(rows, 0)
        print(f"| {a} | {b} | {len(rows)} | {mean[0]:.3f} | {least[0]:.3f} | {mean[1]:.3f} | {mean[2]:.2f} | "
              f"{mean[3]:.3f} | {mean[4]:.2f} |", flush=True)


def firing(model: flux.Model, target: session.Subject, text: str, number: int) -> np.ndarray:
    """Return the features that fire for this caption in the forward pass of `attribute`."""
    start = sources.beginning(model, [text], [number], np.array([1, 0], np.float32), (8, 8), 0)
    values, indices = sae.encode(target.params[0], target.cfg,
                                 flux.capture(model, start, layer=target.layer, site="img")[0])
    return np.unique(np.asarray(indices)[np.asarray(values) > 0])


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation."""
    return np.corrcoef(a, b)[0, 1]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation."""
    return pearson(a.argsort().argsort(), b.argsort().argsort())


def main(ckpts: str = "", what: str = "loss,attribution", n: int = 32, drawn: int = 4, steps: int = 400,
         layers: Sequence[int] | None = None, **unknown) -> None:
    """Print the tables that `what` names, for these layers or for all."""
    session.no_unknown_flags(unknown)
    layers = list(range(12)) if layers is None else np.atleast_1d(layers).tolist()
    what = what.split(",") if isinstance(what, str) else list(what)
    model = flux.load("nano", dtype=jnp.float32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(ckpts or temporary)
        if not ckpts:
            train(folder, layers, steps)
        if "loss" in what:
            loss_table(model, folder, layers, n, drawn)
        if "attribution" in what:
            attribution_table(model, folder)


if __name__ == "__main__":
    session.command(main)
