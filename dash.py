"""Show what every feature of an SAE means: a checkpoint → statistics, examples, and static HTML pages.

    python dash.py ckpt/                                   # → dash/index.html: open it in a browser, no server needed
    python dash.py ckpt/ --n 5000 --prompts captions.txt --out pages
    python dash.py ckpt/ --pages_only                      # the pages once more, from what was collected before
    python dash.py ckpt/ --steer 20                        # and what images become with a feature ablated, doubled, …

Copy it with `pages.py`, `templates/`, `session.py` and what these import. From Python,
without pages:

    found = dash.collect(model, params, cfg, prompts, folder, layer=3, site="img")
    found = dash.load("dash/collect")                      # the same, from `stats.safetensors` and `collect.json`
    found.density[7], found.top_image[7], found.top_map[7] # of feature 7

One streaming pass. Each prompt is drawn once, from noise of its own; its activations are those of that very noise, on
the path on which `train.py` trained. Memory holds features × kept examples, not tokens.

Letters: F features, N images, I image tokens, T text tokens, S positions of an example (timesteps × its site's tokens,
text before image), K top examples, Q examples of a quantile, B bins of the histogram.
"""
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

import checkpoint as saved
import data
import flux
import pages
import sae
import session
import shard
from session import Mistake

EDGES = np.concatenate([[0], 10 ** np.arange(-4, 4.01, 0.1)]).astype(np.float32)   # of the histogram's bins; last: more
KEPT, RESERVOIR, QUANTILES, SHOWN = 16, 32, 4, 4                 # top examples, random ones, groups of these, of each
BATCHED = 2 ** 22                                                # entries that wait until they join the older ones


# ---------------------------------------------------------------- what is collected


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps [..., S], of each only what is above zero, so that memory follows what fires. Indexed like an array of maps
    they become dense: `maps[7]`, `maps[7, 0]`, `maps[:, 0]`."""
    span: np.ndarray                                             # [..., 2]: where each begins and ends in those below
    position: np.ndarray                                         # [M] uint32
    value: np.ndarray                                            # [M] float32
    length: int                                                  # S

    def __getitem__(self, index):
        span = self.span[index]
        dense = np.zeros((*span.shape[:-1], self.length), np.float32)
        for at in np.ndindex(span.shape[:-1]):
            here = slice(*span[at])
            dense[at][self.position[here]] = self.value[here]
        return dense

    def kept(self):
        """The same maps without what belongs to none of them."""
        count = (self.span[..., 1] - self.span[..., 0]).reshape(-1)
        ends = np.cumsum(count)
        rows = np.repeat(self.span[..., 0].reshape(-1) - (ends - count), count) + np.arange(count.sum())
        span = np.stack([ends - count, ends], 1).reshape(self.span.shape)
        return Maps(span, self.position[rows], self.value[rows], self.length)


@dataclass(frozen=True)
class Collected:
    """Statistics of F features over all tokens of N images, as `stats.safetensors` and `collect.json` hold them.

    An example is one image with the activations of one feature at all S positions; its value is their maximum. Top
    examples come from K distinct images. A quantile's examples are drawn at random from a quarter, by value, of the
    images on which the feature fires, without the top ones (quarters of a uniform sample of 32 of them).
    Where there are fewer examples than room, image is -1 and value 0.
    """
    fired: np.ndarray                                            # [F] int64: positions at which it is above zero
    images: np.ndarray                                           # [F] int64: images on which it fires
    total: np.ndarray                                            # [F] float64: sum of its values
    maximum: np.ndarray                                          # [F] float32
    histogram: np.ndarray                                        # [F, B] int64: positions per bin from EDGES[b] on
    mean_map: np.ndarray                                         # [F, I] float32: mean value at each image token
    area: np.ndarray                                             # [F]: where it fires, mean share of tokens above zero
    concentration: np.ndarray                                    # [F]: 1 - (Σv)² / (I Σv²), mean; near 1 is one token
    spread: np.ndarray                                           # [F]: rms distance from its centre, in image sides
    top_value: np.ndarray                                        # [F, K] float32, falling
    top_image: np.ndarray                                        # [F, K] int32: place in `info["prompts"]`
    top_map: Maps                                                # [F, K, S]
    quantile_value: np.ndarray                                   # [F, 4, Q] float32; group 0 holds the largest
    quantile_image: np.ndarray                                   # [F, 4, Q] int32
    quantile_map: Maps                                           # [F, 4, Q, S]
    together: np.ndarray                                         # [F, 10] int32: fire most at the same positions, or -1
    together_jaccard: np.ndarray                                 # [F, 10]: positions of both ÷ positions of either
    nearest: np.ndarray                                          # [F, 10] int32: by cosine of decoder rows, or -1
    nearest_cosine: np.ndarray                                   # [F, 10] float32
    auroc: np.ndarray                                            # [F, A] float32: of info["attributes"], image-wise
    info: dict                                                   # prompts, model, layer, site, grid, tokens, ...

    @property
    def features(self):
        return len(self.fired)

    @property
    def layout(self):
        return Layout(**self.info["layout"])

    @property
    def density(self):
        """[F]: share of positions at which the feature is above zero."""
        return self.fired / max(self.info["tokens"], 1)

    @property
    def mean(self):
        """[F]: mean value where it is above zero."""
        return self.total / np.maximum(self.fired, 1)

    def best_attribute(self, feature):
        """(attribute of the scene, AUROC) that the feature predicts best, or None where no scene is known."""
        row = self.auroc[feature] if self.auroc.shape[1] else np.array([np.nan])
        if np.isnan(row).all():
            return None
        best = int(np.nanargmax(np.abs(row - 0.5)))
        return self.info["attributes"][best], float(row[best])


def load(folder):
    """What `collect` saved in `folder`. Raises ValueError where it is missing or damaged."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "collect.json").read_text(encoding="utf-8"))
        with safe_open(folder / "stats.safetensors", "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}       # noqa: SIM118 (no dict)
        maps = {name: Maps(*(arrays.pop(f"{name}.{part}") for part in PARTS), Layout(**info["layout"]).positions)
                for name in MAPS}
        return Collected(**arrays, **maps, info=info)
    except (*DAMAGED, AttributeError) as error:
        raise Mistake(f"{folder} holds no collected statistics that this version reads: {error}") from None


def save(folder, found):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in (*MAPS, "info")}
    arrays |= {f"{name}.{part}": getattr(getattr(found, name), part) for name in MAPS for part in PARTS}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "stats.safetensors")
    (folder / "collect.json").write_text(json.dumps(found.info))


DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError)        # what reading a file may raise
MAPS, PARTS = ("top_map", "quantile_map"), ("span", "position", "value")


class Counts:
    """The running state of the pass: arrays in a dict, so that a stopped run can save and restore them. The maps of the
    examples that are kept lie one behind the other in `position` and `value`, between those of others that had to go.
    """

    def __init__(self, F, layout):
        self.layout = layout
        self.a = {
            "fired": np.zeros(F, np.int64), "images": np.zeros(F, np.int64), "total": np.zeros(F),
            "maximum": np.zeros(F, np.float32), "histogram": np.zeros((F, len(EDGES)), np.int64),
            "map_sum": np.zeros((F, layout.image_tokens)), "shape_sum": np.zeros((F, 4)),
            # a F + b of features a < b that fire at one position, rising, and at how many they do
            "pair": np.zeros(0, np.min_scalar_type(F * F - 1)), "pair_count": np.zeros(0, np.int32)}
        self.a |= {"position": np.zeros(0, np.uint32), "value": np.zeros(0, np.float32),
                   "tokens": np.zeros(1, np.int64)}
        for kind, room in (("top", KEPT), ("some", RESERVOIR)):
            self.a |= {f"{kind}_key": np.full((F, room), -np.inf), f"{kind}_value": np.zeros((F, room), np.float32),
                       f"{kind}_image": np.full((F, room), -1, np.int32),
                       f"{kind}_span": np.zeros((F, room, 2), np.int64)}
        self.new, self.end = [], 0                               # (position, value) not yet in `a`; entries in all
        self.new_pairs, self.waiting = [], 0                     # likewise; entries that wait

    def add(self, number, values, indices, seed, real=None):
        """Count image `number`, values [S, k] and indices [S, k]; real [S] bool: the positions that count, all by
        default. Returns (features that fire, their maxima)."""
        on = values > 0 if real is None else (values > 0) & real[:, None]
        positions, slots = np.nonzero(on)
        value, feature = values[positions, slots], indices[positions, slots]
        order = np.argsort(feature, kind="stable")               # so that a feature's entries are one piece
        position, value, feature = positions[order].astype(np.uint32), value[order], feature[order]
        alive, starts, count = np.unique(feature, return_index=True, return_counts=True)      # far fewer than F
        peak = np.maximum.reduceat(value, starts) if len(alive) else np.zeros(0, np.float32)
        a = self.a
        a["tokens"] += self.layout.positions if real is None else real.sum()
        a["fired"][alive] += count
        a["images"][alive] += 1
        a["total"][alive] += np.add.reduceat(value, starts, dtype=np.float64) if len(alive) else 0
        a["maximum"][alive] = np.maximum(a["maximum"][alive], peak)
        np.add.at(a["histogram"], (feature, np.searchsorted(EDGES, value, "right") - 1), 1)
        self._count_pairs(on, indices)
        if self.layout.image_tokens:
            self._add_shapes(alive, np.repeat(np.arange(len(alive)), count), position, value)
        span = self.end + np.stack([starts, starts + count], 1)
        keys = np.random.default_rng((seed, number)).random(len(a["fired"]))[alive]
        kept = self._keep("top", alive, peak, peak, span, number)
        kept |= self._keep("some", alive, keys, peak, span, number)      # the largest random keys: a uniform sample
        if kept:
            self.new.append((position, value))
            self.end += len(value)
            if self.end > 2 * len(a["value"]) + BATCHED:
                self.settled()
        return alive, peak

    def settled(self):
        """The state as arrays alone, without the maps of examples that had to go."""
        a = self.a
        position, value = (np.concatenate([a[name], *parts]) for name, parts in zip(
            ("position", "value"), zip(*self.new) if self.new else ((), ())))
        span = np.concatenate([a["top_span"], a["some_span"]], 1)
        maps = Maps(span, position, value, self.layout.positions).kept()
        a |= {"position": maps.position, "value": maps.value, "top_span": maps.span[:, :KEPT],
              "some_span": maps.span[:, KEPT:]}
        self.new, self.end = [], len(maps.value)
        self._merge_pairs()
        return a

    def _count_pairs(self, on, indices):
        """Count the features that fire at the same positions, each pair once."""
        F, chunk = len(self.a["fired"]), max(1, BATCHED // on.shape[1] ** 2)
        for i in range(0, len(on), chunk):
            active, index = on[i:i + chunk], indices[i:i + chunk].astype(np.int64)
            both = active[:, :, None] & active[:, None, :] & (index[:, :, None] < index[:, None, :])
            pairs = (index[:, :, None] * F + index[:, None, :])[both]
            self.new_pairs.append(pairs.astype(self.a["pair"].dtype))
            self.waiting += len(pairs)
            if self.waiting > max(BATCHED, len(self.a["pair"]) // 4):
                self._merge_pairs()

    def _merge_pairs(self):
        pair, count = self.a["pair"], self.a["pair_count"]
        new, times = np.unique(np.concatenate([pair[:0], *self.new_pairs]), return_counts=True)
        self.new_pairs, self.waiting = [], 0
        at = np.searchsorted(pair, new)
        known = at < len(pair)
        known[known] = pair[at[known]] == new[known]
        count[at[known]] += times[known].astype(np.int32)
        at, new, times = at[~known], new[~known], times[~known]
        self.a["pair"] = np.insert(pair, at, new)
        self.a["pair_count"] = np.insert(count, at, times)

    def _add_shapes(self, alive, row, position, value):
        """Sums of area, concentration and spread over the images on whose image tokens the feature fires. row: which of
        `alive` each entry is of."""
        layout, I = self.layout, self.layout.image_tokens
        token = position.astype(np.int64) % (layout.text_tokens + I) - layout.text_tokens
        image = token >= 0
        place, inverse = np.unique(row[image] * I + token[image], return_inverse=True)
        v = np.bincount(inverse, value[image].astype(np.float64), len(place)) / layout.timesteps
        row, token = np.divmod(place, I)
        np.add.at(self.a["map_sum"], (alive[row], token), v)
        total = lambda weights: np.bincount(row, weights, len(alive))
        area, whole, squares = total(np.ones(len(v))), total(v), total(v * v)
        seen = area > 0
        y, x = np.divmod(token, layout.grid[1])
        variance = np.zeros(seen.sum())
        for centre in ((y + 0.5) / layout.grid[0], (x + 0.5) / layout.grid[1]):
            variance += total(v * centre ** 2)[seen] / whole[seen] - (total(v * centre)[seen] / whole[seen]) ** 2
        concentration = 1 - whole[seen] ** 2 / (I * squares[seen])
        self.a["shape_sum"][alive[seen]] += np.stack(
            [area[seen] / I, concentration, np.sqrt(variance.clip(0)), np.ones(len(variance))], 1)

    def _keep(self, kind, alive, keys, values, span, number):
        """Let an example take the place of the one with the smallest key, where its own is larger. Whether any did."""
        a = self.a
        smallest = a[f"{kind}_key"][alive].argmin(1)
        better = np.flatnonzero(keys > a[f"{kind}_key"][alive, smallest])
        at = alive[better], smallest[better]
        a[f"{kind}_key"][at], a[f"{kind}_value"][at] = keys[better], values[better]
        a[f"{kind}_image"][at], a[f"{kind}_span"][at] = number, span[better]
        return len(better) > 0

    def finish(self, W_dec, labels, maxima, info):
        """The `Collected` of what was counted. labels [N, A] and maxima [N, F] are for the AUROCs; A may be 0."""
        a, images = self.settled(), max(info["images"], 1)
        order = np.argsort(-a["top_key"], 1, kind="stable")
        top = {name: _take(a[f"top_{name}"], order) for name in ("value", "image", "span")}
        area, concentration, spread = (a["shape_sum"][:, :3] / np.maximum(a["shape_sum"][:, 3:], 1)).T
        together, jaccard = _together(a["pair"], a["pair_count"], a["fired"])
        nearest, cosine = _nearest(W_dec)
        value, image, span = self._quantiles(top["image"])
        maps = lambda span: Maps(span, a["position"], a["value"], self.layout.positions).kept()
        return Collected(
            a["fired"], a["images"], a["total"], a["maximum"], a["histogram"],
            (a["map_sum"] / images).astype(np.float32), area, concentration, spread,
            top["value"], top["image"], maps(top["span"]), value, image, maps(span), together, jaccard, nearest, cosine,
            auroc(maxima, labels), info | {"tokens": int(a["tokens"][0])})

    def _quantiles(self, top):
        """Values, images and spans of the random examples, [F, 4, Q], the largest quarter first."""
        a, F = self.a, len(top)
        key = np.where((a["some_image"][:, :, None] == top[:, None, :]).any(2), -np.inf, a["some_key"])
        value = np.zeros((F, QUANTILES, SHOWN), np.float32)
        image, span = np.full(value.shape, -1, np.int32), np.zeros((*value.shape, 2), np.int64)
        for f in np.flatnonzero((key > -np.inf).any(1)):
            below = np.flatnonzero(key[f] > -np.inf)
            below = below[np.argsort(-a["some_value"][f, below], kind="stable")]
            for q, part in enumerate(np.array_split(below, QUANTILES)):
                drawn = part[np.argsort(-key[f, part])[:SHOWN]]
                drawn = drawn[np.argsort(-a["some_value"][f, drawn], kind="stable")]
                value[f, q, :len(drawn)] = a["some_value"][f, drawn]
                image[f, q, :len(drawn)], span[f, q, :len(drawn)] = a["some_image"][f, drawn], a["some_span"][f, drawn]
        return value, image, span


@dataclass(frozen=True)
class Layout:
    """Where the positions of an example lie: timestep by timestep, text tokens, then image tokens in rows."""
    timesteps: int
    text_tokens: int                                             # 0 where the site has none
    grid: tuple[int, int]                                        # rows, columns of image tokens; (0, 0) likewise

    @property
    def image_tokens(self):
        return self.grid[0] * self.grid[1]

    @property
    def positions(self):
        return self.timesteps * (self.text_tokens + self.image_tokens)

    def image_part(self, maps):
        """maps [..., S] → [..., timesteps, I]."""
        return self.by_step(maps)[..., self.text_tokens:]

    def text_part(self, maps):
        """maps [..., S] → [..., timesteps, T]."""
        return self.by_step(maps)[..., :self.text_tokens]

    def by_step(self, maps):
        """maps [..., S] → [..., timesteps, tokens]."""
        return maps.reshape(*maps.shape[:-1], self.timesteps, self.text_tokens + self.image_tokens)


def _take(array, order):
    return np.take_along_axis(array, order.reshape(*order.shape, *[1] * (array.ndim - 2)), 1)


def _best(score, n=10):
    """Indices and values of the n largest in each row, falling; -1 where the value is not above zero."""
    n = min(n, score.shape[1])
    part = np.argpartition(-score, n - 1, 1)[:, :n]
    value = np.take_along_axis(score, part, 1)
    order = np.argsort(-value, 1, kind="stable")
    part, value = np.take_along_axis(part, order, 1), np.take_along_axis(value, order, 1)
    return np.where(value > 0, part, -1).astype(np.int32), value.astype(np.float32)


def _together(pair, count, fired, n=10):
    """The n features that fire most together with each, by Jaccard index, and this: positions of both over those of
    either. pair, count: as in `Counts`."""
    F = len(fired)
    index, value = np.full((F, min(n, F)), -1, np.int32), np.zeros((F, min(n, F)), np.float32)
    second = (pair % F).astype(np.uint32)
    starts = [*np.searchsorted(pair, (np.arange(F) * F).astype(pair.dtype)), len(pair)]
    rows = max(1, F * BATCHED // (len(pair) + 1))                # features at a time, so that few entries are sorted
    for f in range(F):
        if f % rows == 0:
            some = np.flatnonzero((second >= f) & (second < f + rows))
            some = some[np.argsort(second[some], kind="stable")]
            ends = np.searchsorted(second[some], np.arange(f, f + rows + 1))
        first, own = some[ends[f % rows]:ends[f % rows + 1]], slice(starts[f], starts[f + 1])
        others = np.concatenate([pair[first] // F, second[own]]).astype(np.int64)
        both = np.concatenate([count[first], count[own]])
        jaccard = both / (fired[f] + fired[others] - both)
        best = np.argsort(-jaccard, kind="stable")[:n]
        index[f, :len(best)], value[f, :len(best)] = others[best], jaccard[best]
    return index, value


def _nearest(W_dec, n=10):
    """The n features whose decoder rows are most like each feature's, and the cosines; no [F, F] is built."""
    W = np.asarray(W_dec, np.float32)
    norm, blocks, rows = np.maximum(np.linalg.norm(W, axis=1), 1e-30), [], max(1, 2 ** 23 // len(W))
    for i in range(0, len(W), rows):
        block = W[i:i + rows] @ W.T / norm / norm[i:i + rows, None]
        block[np.arange(len(block)), np.arange(i, i + len(block))] = -np.inf        # not a feature itself
        blocks.append(_best(block, n))
    index, value = (np.concatenate(part) for part in zip(*blocks))
    return index, value


def auroc(scores, labels):
    """Area under the ROC curve [F, A]: the chance that an image with the label scores above one without, ties half.

    scores [N, F], labels [N, A] bool; by the ranks' sum (Mann and Whitney 1947). NaN where one side has no image.
    """
    N, F = scores.shape if scores.size else (len(labels), scores.shape[1])
    out = np.full((F, labels.shape[1]), np.nan, np.float32)
    yes = labels.sum(0, dtype=np.float64)
    both = (yes > 0) & (yes < N)
    for f in range(F if both.any() else 0):
        _, place, count = np.unique(scores[:, f], return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[place]
        out[f, both] = (rank @ labels[:, both] - yes[both] * (yes[both] + 1) / 2) / (yes[both] * (N - yes[both]))
    return out


# ---------------------------------------------------------------- collecting


def collect(model, params, cfg, prompts, folder, *, layer, site, timesteps=1, steps=4, size=None, text_tokens=None,
            padding=True, seed=0, batch=16, attributes=(), labels=None, info=None, progress=None, stop=lambda: False):
    """Draw `prompts`, encode the activations of one layer, and keep statistics: a `Collected`, also saved in
    `folder`/collect, with the images in `folder`/images.

    model: of `flux.load`. params, cfg: of `checkpoint.load`, or `load_groups`. timesteps: at which activations are
    taken, as `train.py` does. padding: whether T5's padding counts as tokens. stop(): whether to save the state and
    end, with None. steps: in which the images are drawn. labels [N, A] bool: what is true of each prompt's scene, named
    by `attributes`. info: more for the JSON. progress: called with the number of prompts done. A stopped run goes on
    where its last state was saved, if all arguments are the same. Raises ValueError where activations are not finite.
    """
    folder, prompts, seed = Path(folder), list(prompts), int(seed)
    flux.residual_names(model.cfg, layer, site)
    size, text_tokens = size or min(256, model.size), text_tokens or model.text_tokens
    grid = flux.token_grid(model, size)
    params = [params] if isinstance(params, dict) else params
    layout = Layout(timesteps, text_tokens if site != "img" else 0, tuple(grid) if site != "txt" else (0, 0))
    labels = np.zeros((len(prompts), 0), bool) if labels is None else np.asarray(labels, bool)
    info = {**(info or {}), "kind": "fae dashboard", "layer": layer, "site": site, "layout": asdict(layout),
            "size": size, "steps": steps, "seed": seed, "first_noise": data.DRAWN, "images": len(prompts),
            "text_tokens": text_tokens, "padding": padding,
            "attributes": list(attributes), "prompts": prompts, "features": cfg.features, "edges": EDGES.tolist(),
            "words": model.words(prompts, text_tokens) if layout.text_tokens else []}
    counts = Counts(cfg.features, layout)
    counts.a["maxima"] = np.zeros((len(prompts) if labels.shape[1] else 0, cfg.features), np.float32)
    unfinished = Partial(folder, {**info, "weights": saved.fingerprint(params), "batch": batch})
    if (ended := unfinished.ended()) is not None:
        return ended
    done = unfinished.restore(counts.a)
    counts.end = len(counts.a["value"])
    for part in () if done else ("images", "steer"):             # of other prompts
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    shape = (grid[0] * grid[1], model.cfg.in_channels)
    while done < len(prompts):
        part = prompts[done:done + batch]
        full = part + part[-1:] * (batch - len(part))            # one shape, one compile
        noise = flux.draw_noise(seed, data.DRAWN + done + np.arange(batch), shape)
        options = {"size": size, "noise": noise, "text_tokens": text_tokens}
        acts = flux.capture(model, flux.prepare(model, full, steps=timesteps, **options), layer=layer, site=site)
        if not bool(jnp.isfinite(acts).all()):
            raise Mistake(f"activations of prompts {done} to {done + len(part) - 1} hold NaN or Inf")
        codes = (np.moveaxis(x, 1, 0).reshape(batch, layout.positions, -1)
                 for x in encode(params, cfg, acts.astype(jnp.float32), site, text_tokens))
        drawn = flux.generate(model, full, steps=steps, **options)
        real = [None] * len(part)
        if layout.text_tokens and not padding:
            real = np.tile(data.real_tokens(model, part, site, text_tokens, layout.image_tokens), (1, timesteps))
        for i, (values, indices, image, mask) in enumerate(zip(*codes, drawn, real), done):
            alive, peak = counts.add(i, values, indices, seed, mask)
            if labels.shape[1]:
                counts.a["maxima"][i, alive] = peak
            save_image(folder / "images" / f"{i}.webp", image)
        done += len(part)
        if (stopped := stop()) or unfinished.due():
            unfinished.save(counts.settled(), done)
        if progress:
            progress(done)
        if stopped:
            return None
    found = counts.finish(params[0]["W_dec"], labels, counts.a["maxima"], info | {"arguments": unfinished.arguments})
    save(folder / "collect", found)
    unfinished.remove()
    return found


def encode(params, cfg, acts, site, text_tokens):
    """acts [timesteps, B, N, D] → values, indices [timesteps, B, N, most features of a token], by each group's SAE."""
    groups = flux.token_groups(site, len(acts), text_tokens) if len(params) > 1 else [("", slice(None), slice(None))]
    if len(groups) != len(params):
        raise Mistake(f"the checkpoint has SAEs for {len(params)} groups of tokens; site {site} with {len(acts)} "
                         f"timestep(s) has {len(groups)}")
    found = [sae.encode(p, cfg, acts[t, ..., part, :]) for p, (_, t, part) in zip(params, groups)]
    shape = (*acts.shape[:3], max(values.shape[-1] for values, _ in found))
    both = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for (_, t, part), codes in zip(groups, found):
        for whole, some in zip(both, codes):
            whole[t, ..., part, :some.shape[-1]] = some
    return both


class Partial:
    """The state of an unfinished pass, in `folder`/partial.safetensors; it counts only for the same arguments."""

    def __init__(self, folder, arguments, seconds=60):
        self.folder, self.arrays = folder, folder / "partial.safetensors"
        self.seconds, self.saved = seconds, time.monotonic()
        self.arguments = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()

    def ended(self):
        """What a run with the same arguments collected, which was stopped only behind that, or None."""
        try:
            found = load(self.folder / "collect")
        except ValueError:
            return None
        return found if found.info.get("arguments") == self.arguments else None

    def restore(self, state):
        """Fill `state` with what was saved; returns the number of prompts done, 0 where nothing fits."""
        try:
            with safe_open(self.arrays, "np") as file:
                if file.metadata()["arguments"] != self.arguments:
                    return 0
                done = int(file.metadata()["done"])
                state.update({name: file.get_tensor(name) for name in state})
                return done
        except DAMAGED:                                          # none yet, or torn: begin anew
            return 0

    def due(self):
        return time.monotonic() - self.saved >= self.seconds

    def save(self, state, done):
        new = self.arrays.with_suffix(".new")
        # safetensors writes an array's memory as it lies there: a view would come back scrambled
        state = {name: np.ascontiguousarray(array) for name, array in state.items()}
        save_file(state, new, {"done": str(done), "arguments": self.arguments})
        os.replace(new, self.arrays)
        self.saved = time.monotonic()

    def remove(self):
        self.arrays.unlink(missing_ok=True)


def save_image(path, image):
    from PIL import Image
    Image.fromarray(image).save(path, quality=88, method=4)


def scene_attributes(scenes, drawn):
    """What is true of scenes of the nano world: names and a table [N, A]."""
    def of(scene):
        solids = scene.solids
        places = [scenes.project(scene.camera, solid.center) for solid in solids]
        row = {f"{kind}: {word}": any(getattr(solid, kind) == word for solid in solids)
               for kind, words in (("shape", scenes.SHAPES), ("color", scenes.COLORS), ("size", scenes.SIZES))
               for word in words}
        row |= {"position: left": any(x < 0.4 for x, _, _ in places),
                "position: right": any(x > 0.6 for x, _, _ in places),
                "depth: near": any(solid.position[1] < -0.4 for solid in solids),
                "depth: far": any(solid.position[1] > 0.4 for solid in solids)}
        row |= {f"light: {side}": scene.side == side for side in scenes.SIDES}
        return row | {f"objects: {n}": len(solids) == n for n in (1, 2, 3)}

    rows = [of(scene) for scene in drawn]
    return list(rows[0]), np.array([list(row.values()) for row in rows])


# ---------------------------------------------------------------- strips


def draw_strips(model, subject, found, folder, n, progress=lambda: None):
    """For each of the n liveliest features, those that fire on the most images, its best example once more, from the
    same noise, with its values multiplied by all of `pages.SCALES` but 1, as `folder`/7-2.webp. What is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    scales = [scale for scale in pages.SCALES if scale != 1]
    for f in liveliest(found, n):
        if not (folder / f"{f}-{scales[-1]}.webp").is_file():    # the last one says that all are there
            for scale, image in zip(scales, strip(model, subject, found, f, scales)):
                new = folder / ".new.webp"
                save_image(new, image)
                os.replace(new, folder / f"{f}-{scale}.webp")
        progress()


def liveliest(found, n):
    """The n features that fire on the most images; of these on the most tokens."""
    order = np.lexsort((-found.fired, -found.images))[:n]
    return [int(f) for f in order if found.fired[f]]


def strip(model, subject, found, f, scales):
    """The images uint8 [scales, H, W, 3] of a feature's best example with its values multiplied, in every step."""
    info, image, n = found.info, int(found.top_image[f, 0]), len(scales)
    grid = flux.token_grid(model, info["size"])
    noise = flux.draw_noise(info["seed"], np.full(n, info["first_noise"] + image),
                            (grid[0] * grid[1], model.cfg.in_channels))
    start = flux.prepare(model, [info["prompts"][image]] * n, steps=info["steps"], size=info["size"], noise=noise,
                         text_tokens=info.get("text_tokens"))
    scale, feature = jnp.asarray(scales, jnp.float32)[:, None, None], jnp.array([f])

    def edits(step):
        shared = {name: (p, feature) for name, p in subject.at(start.sigmas[step]).items()}
        return [flux.Edit(subject.layer, subject.names, scaling(subject.cfg), scale, shared)]

    return flux.decode(model, flux.sample(model, start, edits=edits), start.grid)


@lru_cache
def scaling(cfg):
    """A `flux.Edit`'s function that multiplies a feature's values; one object for an SAE, so that it compiles once."""
    def scaled(name, x, scale, shared):
        params, feature = shared[name]
        return sae.change(params, cfg, x, feature, scale, jnp.zeros(1))

    return scaled


# ---------------------------------------------------------------- the command line


def main(checkpoint="ckpt", out="dash", prompts="", prompt_field="", n=1000, steps=None, features="", model="",
         layer=None, site="", seed=0, batch=None, dtype="", quant="", transformer="", pages_only=False, overwrite=False,
         steer=None, **unknown):
    """Write a dashboard of the SAE in the folder `checkpoint` into the folder --out.

    --n: prompts. --steps: in which images are drawn. --features 0:200,512: pages of these only. --pages_only: pages
    from what an earlier run collected. --steer 20: for the 20 features that fire on the most images, their best example
    with the feature ablated, as it is, and times 2, 4 and 8; with --pages_only for a dashboard that is there.
    --model, --layer, --site: where the checkpoint does not say. --overwrite: also replace another checkpoint's
    dashboard.
    """
    session.no_unknown_flags(unknown)
    out = Path(out)
    given = {"n": n, "seed": seed, "steps": steps, "batch": batch, "steer": steer, "layer": layer}
    session.check_whole({name: value for name, value in given.items() if value is not None})
    subject = session.opened(checkpoint, model=model, layer=layer, site=site, writes=bool(steer))
    wanted = feature_range(features, subject.cfg.features)
    if steer or not pages_only:
        subject = session.placed(subject, *flux.read_config(subject.model))
    load_model = lru_cache(partial(session.load_model, subject.model, subject.run, dtype=dtype, quant=quant,
                                   transformer=transformer))
    with session.claim(out):
        check_out(out, checkpoint, pages_only, overwrite)
        building = workplace(out, "pages" if pages_only else "building")
        if pages_only:
            found = load(out / "collect")
            strips_for(checkpoint, load_model, subject, found, out, steer)
            shutil.rmtree(building, ignore_errors=True)          # of a stopped run; a stopped pass has another name
            for part in ("collect", "images", "steer"):
                if (out / part).exists() or part != "steer":
                    shutil.copytree(out / part, building / part)
        else:
            with session.stopping() as stop:                     # elsewhere a signal ends at once: all is saved
                found = collect_from(checkpoint, load_model, subject, building, prompts, prompt_field, n, steps, seed,
                                     batch, stop)
                if found is None:
                    print("stopped; the same command goes on")
                    raise SystemExit(128 + stop())
            strips_for(checkpoint, load_model, subject, found, building, steer)
        if is_of(found, checkpoint):                             # scores may be newer than what was collected
            found.info["scores"] = read_scores(Path(checkpoint) / "eval.json", saved.fingerprint(subject.params))
        pages.write(found, building, wanted)
        replace(building, out)
        print(f"dashboard: {out / 'index.html'}")


def strips_for(checkpoint, load_model, subject, found, folder, n):
    """`draw_strips` of n features, where any are asked for. Raises Mistake for another checkpoint's dashboard."""
    if not n:
        return
    if not is_of(found, checkpoint):
        raise Mistake(f"--steer: the dashboard in {folder} is of another checkpoint than {checkpoint}")
    model = load_model()
    with tqdm(total=min(n, found.features), unit="feature", desc="steering", dynamic_ncols=True) as bar:
        draw_strips(model, subject, found, folder / "steer", n, progress=bar.update)


def is_of(found, checkpoint):
    """Whether what was collected is of the checkpoint that lies in this folder now."""
    return found.info.get("checkpoint") == read_cfg(checkpoint)


def read_cfg(checkpoint):
    """cfg.json as it stands."""
    return json.loads((Path(checkpoint) / saved.CONFIG).read_text(encoding="utf-8"))


def collect_from(checkpoint, load_model, subject, folder, source, field, n, steps, seed, batch, stop):
    """What the checkpoint says of itself, and the flags → `collect`."""
    source, field, held_out = session.prompts_of(subject, source, field)
    texts, labels = captions(source, field, held_out, n)
    model = load_model()
    info = {"model": subject.model, "source": source, "checkpoint": read_cfg(checkpoint),
            "metrics": read_metrics(Path(checkpoint) / "metrics.jsonl"), "versions": {"jax": jax.__version__}}
    batch = batch or shard.batch(*((1, 16) if model.cfg.width <= 512 else (4,)))
    with tqdm(total=len(texts), unit="prompt", desc="collecting", dynamic_ncols=True) as bar:
        return collect(model, subject.params, subject.cfg, texts, folder, layer=subject.layer, site=subject.site,
                       steps=steps or (28 if model.cfg.guidance_embeds else 4), timesteps=subject.timesteps,
                       size=subject.size, text_tokens=subject.text_tokens, padding=subject.padding, seed=seed,
                       batch=batch, info=info, **labels, progress=lambda done: bar.update(done - bar.n), stop=stop)


def captions(source, field, held_out, n):
    """(n prompts that no training step saw, where the source allows it; arguments of `collect` about their scenes)."""
    if source != "scenes":
        return data.take(source, field, n, held_out=held_out), {}
    scenes, drawn = data.scenes(), data.held_out_scenes(n)
    labels = dict(zip(("attributes", "labels"), scene_attributes(scenes, drawn)))
    return [scenes.caption(scene) for scene in drawn], labels


OURS = re.compile(r"index\.html|run\.html|data\.js|dash\.(css|js)|feature(/\d+\.html)?|maps(/\d+\.js)?"
                  r"|images(/\d+\.webp)?|steer(/\d+-[\d.]+\.webp)?|collect(/(collect\.json|stats\.safetensors))?")


def check_out(out, checkpoint, pages_only, overwrite):
    """Refuse, before any work, a folder that is no dashboard, or another checkpoint's. All of it will be replaced, so
    nothing else may lie in it, hidden or deep."""
    about = out / "collect" / "collect.json"
    if pages_only and not about.is_file():
        raise Mistake(f"--pages_only: there is no dashboard in {out} yet")
    if not out.exists():
        return
    if out.is_dir() and not os.access(out, os.W_OK):
        raise Mistake(f"--out {out}: it cannot be written")
    foreign = sorted(foreign_in(out)) if out.is_dir() else [out.name]
    if foreign and not about.is_file():
        raise Mistake(f"{out} exists and is not a dashboard; choose another --out")
    if foreign:
        raise Mistake(f"{out} holds something that is no part of a dashboard: {', '.join(foreign[:5])}")
    if about.is_file() and not overwrite and not pages_only and not same_run(read_info(about), checkpoint):
        raise Mistake(f"{out} holds the dashboard of another checkpoint than {checkpoint}: choose another --out, or "
                      "--overwrite it")


def read_info(file):
    """A collect.json, whatever version wrote the statistics beside it; {} of a damaged one."""
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        return info if isinstance(info, dict) else {}
    except ValueError:
        return {}


def foreign_in(out):
    """Paths in the folder that dash.py did not make. The lock and the workplace may be inside, and what Macs leave."""
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        own = OURS.fullmatch(name) and not path.is_symlink()
        if not own and not re.fullmatch(r"\.lock|\.(building|pages)(/.*)?|(.*/)?\.DS_Store", name):
            yield name


def same_run(info, checkpoint):
    """Whether a dashboard is of a checkpoint's run, at whatever step; of a foreign SAE, of this very cfg.json."""
    def of(cfg):
        run = (cfg.get("metadata") or {}).get("run")
        shape = {name: value for name, value in cfg.items() if name != "metadata" or not run}
        return shape, {name: value for name, value in (run or {}).items() if name != "steps"}

    return of(info.get("checkpoint") or {}) == of(read_cfg(checkpoint))


def workplace(out, name):
    """Where the new dashboard is made: beside `out`, or inside it where it cannot be renamed."""
    whole = out.resolve()
    return whole.with_name(f".{whole.name}.{name}") if renamable(out) else whole / f".{name}"


def renamable(out):
    """Whether the folder can be renamed: no mount, not where the user stands, its parent writable."""
    whole = out.resolve()
    parent = next(path for path in whole.parents if path.is_dir())
    return not os.path.ismount(whole) and not Path.cwd().is_relative_to(whole) and os.access(parent, os.W_OK)


def feature_range(text, F):
    """"0:200,512" → the numbers, sorted; all F where it is empty. Raises ValueError for what is not a feature."""
    try:
        wanted = set()
        for part in str(text).strip("()").replace(" ", "").split(",") if text != "" else ["0:"]:
            low, colon, high = part.partition(":")
            low, high = int(low or 0), int(high or F) if colon else int(low) + 1
            if not 0 <= low < high <= F:
                raise ValueError
            wanted.update(range(low, high))
        return sorted(wanted)
    except ValueError:
        raise Mistake(f"--features {text}: give numbers or ranges from 0 to {F - 1}, as in 0:200,512") from None


def replace(new, out):
    """Put the finished folder `new` where `out` is or will be; an old one stays until that moment. Where it cannot be
    renamed, its parts are replaced one by one."""
    out, whole = out.resolve(), renamable(out)
    old = out.with_name(f".{out.name}.old")
    if whole:
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        return
    for path in [path for path in out.iterdir() if OURS.fullmatch(path.name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in list(new.iterdir()):
        os.replace(path, out / path.name)
    shutil.rmtree(new)


def read_metrics(path):
    """The lines of metrics.jsonl; [] without the file, and without what is torn or damaged."""
    lines = map(saved.logged, path.read_bytes().splitlines() if path.is_file() else ())
    return [line for line in lines if line and all(isinstance(value, (int, float)) for value in line.values())]


def read_scores(path, weights):
    """What score.py wrote of the SAE with these weights (their `saved.fingerprint`), or None."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["kind"] == "fae score" and found["weights"] == weights else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None                                              # none there, damaged, or another tool's


if __name__ == "__main__":
    session.command(main)
