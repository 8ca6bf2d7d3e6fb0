"""Steer nano's images toward a colour or a shape, and read what they show, as Markdown tables and a picture.

    python bench/steering.py ckpt3 ckpt5 ckpt8 --out docs/steering.webp     # SAEs of image tokens

For each colour and shape, take the feature whose maximum in an image predicts it best (AUROC on held-out scenes of one
to three objects, activations of a single step). Draw captions of one object that state another colour or shape, and add
the feature in every step, at every image token or only at the tokens that show the object in the unsteered image.
`nano/inverse.py` says what images and tokens show. Comparisons, with vectors of the same norm: a random feature; the
block's MLP neuron with the best AUROC, and a random neuron (their rows of the output weights, times the mean gate); and
the difference of the mean residuals with and without the attribute, as a probe with labels would find. An image without
an object takes no target and keeps nothing. Strengths are chosen per row on captions that are not reported. On these
captions the feature also decides the layer, and where vectors are added: everywhere, or at the object.
"""
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "JAX_PLATFORMS": "cpu"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "nano")]

import evaluate
import inverse
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import dash
import data
import flux
import mmdit
import sae
import session
import stats
import steer

COLORS, SHAPES, SIZE, BATCH = evaluate.COLORS, evaluate.SHAPES, evaluate.SIZE, 32
TARGETS = [(f"color: {word}", 1, i) for i, word in enumerate(COLORS)]
TARGETS += [(f"shape: {word}", 0, i) for i, word in enumerate(SHAPES)]           # name, column of labels, index
CHOOSE, REPORT = 5_000, 6_000                                    # first seeds of the captions; all are held out
METHODS = ("feature", "random feature", "neuron", "random neuron", "difference of means")
PLACES = ("everywhere", "at the object")


def main(*folders: str, n: int = 40, few: int = 12, scenes: int = 512, steps: int = 4, strengths: str = "4,8,16,32",
         out: str = "", **unknown) -> None:
    """Report --n captions. Choose layer and strengths on --few others, and features and neurons on --scenes."""
    session.no_unknown_flags(unknown)
    model, start = flux.load("nano", dtype=jnp.float32), time.monotonic()
    strengths = [float(s) for s in strengths.split(",")]
    chooser, reporter = (Pictures(model, first, count, steps) for first, count in ((CHOOSE, few), (REPORT, n)))
    found = {place: [] for place in PLACES}                      # rows of (scores, strength, directions)
    for folder in folders:
        directions = Directions(model, folder, scenes)
        for place, rows in found.items():
            strength, scores = best(chooser, directions, "feature", strengths, place)
            rows.append((scores, strength, directions))
            say = [f"{100 * x:.0f}" for x in scores]
            print(f"layer {directions.layer}, {place}: strength {strength:g}; became, stayed, both: colour {say[:3]}, "
                  f"shape {say[3:]}; {time.monotonic() - start:.0f} s", flush=True)
    for place, rows in found.items():
        _, strength, directions = max(rows, key=lambda row: kept(row[0]))
        chosen = {"feature": strength} | {m: best(chooser, directions, m, strengths, place)[0] for m in METHODS[1:]}
        print(f"\nlayer {directions.layer}, {place}, {n} captions, {steps} steps, jax {jax.__version__}\n")
        report(reporter, directions, chosen, place)
        if out and place == PLACES[-1]:
            picture(reporter, directions, strength, place, out)
    print(f"\n{time.monotonic() - start:.0f} seconds")


def best(pictures: "Pictures", directions: "Directions", method: str, strengths: Sequence[float],
         place: str) -> tuple[float, list[float]]:
    """Return (strength, its scores) for which most images take the target and keep the other attribute."""
    scores = {s: pictures.score(directions, method, s, place) for s in strengths}
    return max(scores.items(), key=lambda item: kept(item[1]))


def kept(scores: list[float]) -> float:
    """Return the sum of the two shares "both" in the result of `Pictures.score`."""
    return scores[2] + scores[5]


def report(pictures: "Pictures", directions: "Directions", chosen: dict[str, float], place: str) -> None:
    """Print what each method does at its chosen strength, and the features and neurons."""
    print("| method | strength | takes colour | shape stays | both | takes shape | colour stays | both |\n"
          "|---|" + "--:|" * 7)
    for method, strength in chosen.items():
        cells = [f"{x:.0%}" for x in pictures.score(directions, method, strength, place)]
        print(f"| {method} | {strength:g} | {' | '.join(cells)} |", flush=True)
    print("\n" + "\n".join(f"{name}: feature {f}, AUROC {a:.2f}; neuron {j}, {b:.2f}" for (name, *_), f, a, j, b in zip(
        TARGETS, directions.features, directions.aurocs, directions.neurons, directions.neuron_aurocs)))


class Directions:
    """The vectors [targets, D] that each of METHODS adds at strength 1. For each target all have the same norm: that of
    the feature's decoder row times its typical activation."""

    def __init__(self, model: flux.Model, folder: str, n: int):
        world = data.scenes()
        drawn = [world.sample(i) for i in range(n)]
        texts = [world.caption(scene) for scene in drawn]
        loaded = steer.load(folder, model, prompts=texts[:128])
        (W_dec,), self.layer = [np.asarray(p["W_dec"]) for p in loaded.params], loaded.layer
        names, labels = dash.scene_attributes(world, drawn)
        labels = labels[:, [names.index(name) for name, *_ in TARGETS]]
        features, neurons, means, gate = activations(model, loaded, texts)
        tell = [stats.auroc(values, labels) for values in (features, neurons)]      # [F, targets], [4 D, targets]
        self.features, self.neurons = (a.argmax(0) for a in tell)
        self.aurocs, self.neuron_aurocs = (a.max(0) for a in tell)
        alive = np.flatnonzero(loaded.fired)
        rng, rows = np.random.default_rng(0), gate * output_rows(model, self.layer)
        along = {"feature": W_dec[self.features], "neuron": rows[self.neurons],
                 "random feature": W_dec[rng.choice(alive, len(TARGETS), replace=False)],
                 "random neuron": rows[rng.choice(len(rows), len(TARGETS), replace=False)],
                 "difference of means": np.stack([means[on].mean(0) - means[~on].mean(0) for on in labels.T])}
        norm = loaded.typical[self.features, None] * np.linalg.norm(W_dec[self.features], axis=1, keepdims=True)
        self.of = {name: norm * v / np.linalg.norm(v, axis=1, keepdims=True) for name, v in along.items()}


def activations(model: flux.Model, loaded: session.Subject, texts: list[str]) -> tuple[np.ndarray, ...]:
    """Return, at pure noise, the maxima over image tokens of features [N, F] and of the block's neurons [N, 4 D], the
    mean residuals [N, D], and the MLP's mean gate [D]."""
    cfg, layer = model.cfg, loaded.layer
    double = layer < cfg.num_layers
    stream, name = ("double.img", "double.img.neurons") if double else ("single.img", "single.neurons")
    p = model.params["double"]["img"] if double else model.params["single"]
    place = layer if double else layer - cfg.num_layers
    rows, ends = [], {k: v for k, v in model.params.items() if k not in ("double", "single")}
    for i in range(0, len(texts), BATCH):
        noise = flux.draw_noise(0, data.DRAWN + i + np.arange(BATCH), (64, cfg.in_channels))
        start = flux.prepare(model, texts[i:i + BATCH], steps=1, size=SIZE, noise=noise)
        _, found = flux.velocity_and_values(model.params, cfg, start.latents, *flux.at(start, 0), grid=start.grid,
                                            layer=layer, names=(stream, name))
        x, neurons = found[stream], found[name][:, -64:]
        values, indices = sae.encode(loaded.params[0], loaded.cfg, x)
        top = jnp.zeros((BATCH, loaded.cfg.features)).at[jnp.arange(BATCH)[:, None, None], indices].max(values)
        mod = mmdit._begin(ends, cfg, start.latents, *flux.at(start, 0), grid=start.grid)[2]
        modulation = mod @ p["mod"]["w"][place] + p["mod"]["b"][place]                # its last D are the MLP's gate
        rows.append([np.asarray(a) for a in (top, neurons.max(1), x.mean(1), modulation[:, -cfg.width:])])
    features, neurons, means, gates = (np.concatenate(part) for part in zip(*rows))
    return features, neurons, means, gates.mean(0)


def output_rows(model: flux.Model, layer: int) -> np.ndarray:
    """Return the output weights [4 D, D] of the MLP neurons of a block's image stream, before the gate."""
    n = layer - model.cfg.num_layers
    if n < 0:
        return np.asarray(model.params["double"]["img"]["fc2"]["w"][layer])
    return np.asarray(model.params["single"]["out"]["w"][n])[model.cfg.width:]      # attention's rows come first


def added(name: str, x: jax.Array, each: tuple, shared: None) -> jax.Array:
    """Add vectors to the tokens that a mask selects, as the function of a `flux.Edit`."""
    vectors, where = each                                        # [B, D], [B, I]
    return x + (where[..., None] * vectors[:, None]).astype(x.dtype)


def object_tokens(seen: inverse.Seen, share: float = 0.3) -> np.ndarray:
    """Return a mask [B, 64] of the tokens that show an object on at least `share` of their cells. An image without such
    a token gets all its tokens."""
    shares = inverse.tokens(seen)["solid"].reshape(len(seen.shape), 64)
    return np.where(shares.max(1, keepdims=True) >= share, shares >= share, True)


class Pictures:
    """Captions of one object that state colour and shape, with what their images show."""

    def __init__(self, model: flux.Model, first: int, n: int, steps: int):
        world, self.model, self.network = data.scenes(), model, inverse.load()
        self.captions, self.said = [], []
        for scene in (world.sample(i, objects=1) for i in range(first, first + 20 * n)):
            caption = world.caption(scene)
            if all(evaluate.stated(caption, scene.solids[0])) and len(self.captions) < n:
                self.captions.append(caption)
                self.said.append(evaluate.labels_of(scene))
        self.start = flux.prepare(model, self.captions, steps=steps, size=SIZE, seed=first)
        D = model.cfg.width
        self.where = {"everywhere": np.ones((n, 64), bool)}
        self.plain = self.draw(np.arange(n), np.zeros((n, D)), 0, "everywhere")
        seen = inverse.read(self.network, self.plain)
        self.where["at the object"] = object_tokens(seen)
        self.seen = evaluate.verdicts(seen)                      # [n, 2]: shape, colour

    def draw(self, which: np.ndarray, vectors: np.ndarray, layer: int, place: str) -> np.ndarray:
        """Draw the captions `which` [m] with vectors [m, D] added to the image tokens of a place at a layer."""
        name = flux.residual_names(self.model.cfg, layer, "img")
        images = []
        for i in range(0, len(which), BATCH):
            part = np.resize(which[i:i + BATCH], BATCH)          # one shape, so one compiled program
            by = np.resize(vectors[i:i + BATCH], (BATCH, vectors.shape[1]))
            edit = flux.Edit(layer, name, added, (jnp.asarray(by, jnp.float32), jnp.asarray(self.where[place][part])))
            text, pooled, _ = self.start.condition
            start = flux.Start(self.start.latents[part], (text[part], pooled[part], None), self.start.sigmas,
                               self.start.grid)
            images.append(flux.decode(self.model, flux.sample(self.model, start, edits=lambda _, edit=edit: [edit]),
                                      start.grid)[:len(which) - i])
        return np.concatenate(images)

    def score(self, directions: "Directions", method: str, strength: float, place: str) -> list[float]:
        """Return the shares of images that take the target, that keep the other attribute, and that do both, first for
        colours, then for shapes [6]."""
        jobs = [(t, i) for t, (_, kind, value) in enumerate(TARGETS) for i in range(len(self.captions))
                if self.said[i][kind] != value and self.seen[i][kind] != value]
        targets, which = np.array(jobs).T
        images = self.draw(which, strength * directions.of[method][targets], directions.layer, place)
        now = evaluate.verdicts(inverse.read(self.network, images))
        kind = np.array([TARGETS[t][1] for t in targets])
        here = np.arange(len(now))
        became = now[here, kind] == np.array([TARGETS[t][2] for t in targets])
        stayed = (now[here, 1 - kind] == self.seen[which, 1 - kind]) & (now[here, 0] >= 0)
        return [float(x[kind == k].mean()) for k in (1, 0) for x in (became, stayed, became & stayed)]


def picture(pictures: "Pictures", directions: "Directions", strength: float, place: str, out: str,
            columns: Sequence[float] = (0, 0.5, 1, 2)) -> None:
    """Save a picture with a row (and its own caption) per target, and a column per factor of the strength."""
    rows, titles = [], []
    for t, (name, kind, value) in enumerate(TARGETS):
        turn = [i for i in range(len(pictures.captions)) if pictures.said[i][kind] != value]
        i = turn[t % len(turn)]
        vectors = strength * np.array(columns)[:, None] * directions.of["feature"][t]
        rows.append(pictures.draw(np.full(len(columns), i), vectors, directions.layer, place))
        titles.append(f"{pictures.captions[i]} + {name}")
    heads = ["unsteered", *(f"+{strength * c:g}" for c in columns[1:])]
    whole = np.stack(rows, 1)
    halves = [np.asarray(steer.sheet(whole[:, part], heads, titles[part], "")) for part in (slice(0, 6), slice(6, 12))]
    Image.fromarray(np.concatenate(halves, 1)).save(out, quality=88)


if __name__ == "__main__":
    session.command(main)
