"""What can be read from an SAE's features? Against what nano's own images show, token by token, as Markdown.

    python bench/readable.py ckpt/ other/ --n 512          # SAEs of nano, trained on pure noise
    python bench/readable.py ckpt/ --some 30 --out thirty.png         # and 30 random features, to name them by eye
    python bench/readable.py --untrained u/ && python train.py --model u/ --out v/
    python bench/readable.py v/ --images nano

The activations come from one step of held-out captions from pure noise, as in training, and the images from the same
noise. `nano/inverse.py` says what each token of such an image shows. For every alive feature and every attribute:
AUROC over all tokens, the token's value against whether half of the token or more shows the attribute. The best
attribute is chosen on the first half of the captions, and its AUROC is that on the second half. A feature that is high
only where an attribute is missing does not count. The closing table gives the share of what the SAE reads that the
noise draw explains, and how many features follow the prompt or the image.

--untrained FOLDER writes nano with an untrained transformer (see `truth.untrained`). An SAE of it shows what the
figures are for directions that mean nothing; with --images nano the truth is that of nano's images all the same.

Letters: N images, I tokens of an image, F features, A attributes.
"""
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "nano")]

import inverse
import jax.numpy as jnp
import numpy as np
import truth

import checkpoint
import data
import flux
import mmdit
import sae
import session
import weights

LEAST = 50                                                       # tokens with an attribute, else it is left out


def measured(model: flux.Model, painter: flux.Model, subject: session.Subject, network: dict, n: int, steps: int,
             batch: int = 32) -> dict:
    """Return {"halves": AUROC [F, A] of each half, "names" of the attributes, "images": [(images, values, indices)]}
    of n held-out captions. painter: the model that draws the images."""
    captions, _ = data.examples("scenes", None, True, n)
    halves, images = [Ranks(subject.cfg.features), Ranks(subject.cfg.features)], []
    for i in range(0, n, batch):
        start = flux.prepare(model, captions[i:i + batch], steps=steps, size=model.size,
                             numbers=data.DRAWN + np.arange(i, min(i + batch, n)))
        same = start if painter is model else replace(start, condition=flux.condition(painter, captions[i:i + batch]))
        drawn = flux.decode(painter, flux.sample(painter, same), start.grid)
        acts = flux.capture(model, flux.Start(start.latents, start.condition, start.sigmas[[0, -1]], start.grid),
                            layer=subject.layer, site="img").astype(jnp.float32)
        values, indices = map(np.asarray, sae.encode(subject.params[0], subject.cfg, acts[0]))   # pure noise is first
        shown = inverse.tokens(inverse.read(network, drawn), start.grid[0])
        labels = np.stack([share.reshape(len(drawn), -1) >= 0.5 for share in shown.values()], -1)
        halves[i >= n // 2].add(values, indices, labels)
        images.append((drawn, values, indices))
    return {"halves": [half.auroc() for half in halves], "names": list(shown), "images": images}


class Ranks:
    """Collect sparse values and labels, for areas under the ROC curve of every feature and attribute."""

    def __init__(self, features):
        self.features, self.fired, self.labels, self.n = features, [], [], 0

    def add(self, values, indices, labels):
        """Add tokens: values, indices [..., k], labels [..., A]. k may differ between calls."""
        k, A = values.shape[-1], labels.shape[-1]
        values, indices = values.reshape(-1, k), indices.reshape(-1, k)
        token, slot = np.nonzero(values > 0)
        self.fired.append((self.n + token, indices[token, slot], values[token, slot]))
        self.labels.append(labels.reshape(-1, A))
        self.n += len(values)

    def auroc(self):
        """Return [F, A]; NaN for features that never fire, and for attributes that are too rare."""
        token, feature, value = (np.concatenate(part) for part in zip(*self.fired))
        labels = np.concatenate(self.labels)
        n, total = self.n, labels.sum(0)
        order = np.lexsort((value, feature))
        token, feature, value = token[order], feature[order], value[order]
        out = np.full((self.features, labels.shape[1]), np.nan)
        known = (total >= LEAST) & (total <= n - LEAST)
        ends = np.searchsorted(feature, np.arange(self.features + 1))
        for f in range(self.features):
            here = token[ends[f]:ends[f + 1]]                    # rising values; all other tokens have 0
            if len(here):
                yes = labels[here]
                silent = n - len(here)
                rank = silent + 1 + np.arange(len(here))
                sums = rank @ yes + (total - yes.sum(0)) * (silent + 1) / 2
                out[f, known] = ((sums - total * (total + 1) / 2) / (total * (n - total)))[known]
        return out


def row(name: str, subject: session.Subject, found: dict, metadata: dict) -> str:
    """Return a line of the table."""
    first, second = found["halves"]
    known = ~np.isnan(first) & ~np.isnan(second)                 # features that fire, attributes that are there
    alive = known.any(1)
    best = np.where(known, first, -1).argmax(1)
    score = second[np.arange(len(best)), best][alive]
    end, run = metadata["evaluation"]["SAE"], metadata["run"]    # the closing table
    cells = [name, subject.layer, subject.cfg.features, f"{run['activation']} {run['k']}", run["without"],
             f"{end['fvu_standardized']:.3f}", int(alive.sum()), f"{end['variance_of_input']['noise']:.1%}",
             f"{end['variance']['follow_prompt_or_image'] / max(end['variance']['varying'], 1):.1%}",
             *(f"{np.mean(score >= least):.1%}" for least in (0.7, 0.8, 0.9))]
    return f"| {' | '.join(map(str, cells))} |"


def examples(found: dict, features: np.ndarray, file: str, columns: int = 8) -> None:
    """Save a sheet: a row per feature, its top images with the active tokens outlined by brightness."""
    from PIL import Image, ImageDraw
    images = np.concatenate([drawn for drawn, *_ in found["images"]])
    size, side = images.shape[1], int(found["images"][0][1].shape[1] ** 0.5)
    sheet = Image.new("RGB", (60 + columns * (size + 4), len(features) * (size + 4)), "white")
    for y, f in enumerate(features):
        dense = np.concatenate([(values * (indices == f)).sum(-1) for _, values, indices in found["images"]])  # [N, I]
        ImageDraw.Draw(sheet).text((4, y * (size + 4) + 4), str(f), "black")
        for x, i in enumerate(np.argsort(-dense.max(1), kind="stable")[:columns]):
            shade = 0.4 + 0.6 * dense[i].reshape(side, side) / max(dense.max(), 1e-9)
            shade = np.repeat(np.repeat(shade, size // side, 0), size // side, 1)[..., None]
            picture = Image.fromarray((images[i] * shade).astype(np.uint8))
            sheet.paste(picture, (60 + x * (size + 4), y * (size + 4)))
    sheet.save(file)


def write_untrained(folder: Path) -> None:
    """Write the bundled nano with an untrained transformer into a new folder."""
    shutil.copytree(ROOT / "nano", folder, ignore=shutil.ignore_patterns("work", "__pycache__", "README.md", "*.jpg"))
    model = truth.untrained(flux.load("nano", dtype=jnp.float32))
    file, = (folder / "transformer").glob("*.safetensors")
    weights.save_tensors(mmdit.table(model.cfg), model.params, file)


def main(*checkpoints: str, n: int = 512, steps: int = 1, images: str = "", some: int = 0, out: str = "readable.png",
         seed: int = 0, untrained: str = "", **unknown) -> None:
    """Print a table with a row per checkpoint. --some: how many random features to draw into --out."""
    session.no_unknown_flags(unknown)
    if untrained:
        return write_untrained(Path(untrained))
    network, opened = inverse.load(), {}
    load = lambda name: opened.setdefault(name, flux.load(name, dtype=jnp.float32))
    print("| SAE | layer | features | k | without | FVU | alive | noise | prompt or image | AUROC ≥ 0.7 | ≥ 0.8 "
          "| ≥ 0.9 |\n|---|--:|--:|---|---|" + "--:|" * 7)
    for folder in checkpoints or ("ckpt",):
        metadata = checkpoint.load_metadata(folder)
        model = load(metadata["model"])
        subject = session.subject(model, folder)
        found = measured(model, load(images) if images else model, subject, network, n, steps)
        print(row(Path(folder).name, subject, found, metadata), flush=True)
        if some:
            alive = np.flatnonzero(~np.isnan(found["halves"][0]).all(1))
            drawn = np.random.default_rng(seed).choice(alive, min(some, len(alive)), replace=False)
            examples(found, np.sort(drawn), out)


if __name__ == "__main__":
    session.command(main)
