"""Collect statistics, examples and neighbors of every feature of an SAE, image by image.

This file works alone: copy it. It needs numpy and safetensors. `dash.py` fills it, and `pages.py` shows it.

    counts = stats.Counts(features, stats.Layout(timesteps=1, text_tokens=0, grid=(8, 8)))
    counts.add(0, values, indices, seed=0)                       # image 0: [S, k], the active features of each token
    found = counts.finish(W_dec, labels, maxima, info)           # a `Collected`
    stats.save(folder, found)
    found.density[7], found.top_image[7], found.top_map[7]       # feature 7

Letters: F features, N images, I image tokens, T text tokens, S positions of an example (timesteps × its site's tokens,
text before image), K top examples, Q examples of a quantile, B bins of the histogram.
"""
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class Mistake(ValueError):
    """Report an error that the caller can fix. Its one-line message names the value and says what would be right."""


EDGES = np.concatenate([[0], 10 ** np.arange(-4, 4.01, 0.1)]).astype(np.float32)   # lower edges of histogram bins
KEPT, RESERVOIR, QUANTILES, SHOWN = 16, 32, 4, 4       # top examples, random examples, their groups, examples per group
BATCHED = 2 ** 22                                                # entries that wait before they are merged
DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError)        # errors that a damaged file may raise
MAPS, PARTS = ("top_map", "quantile_map"), ("span", "position", "value")


@dataclass(frozen=True)
class Layout:
    """Describe the order of an example's positions: by timestep; in each, text tokens, then image tokens in rows."""
    timesteps: int
    text_tokens: int                                             # 0 if the site has none
    grid: tuple[int, int]                                        # rows, columns of image tokens; or (0, 0)

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def positions(self) -> int:
        return self.timesteps * (self.text_tokens + self.image_tokens)

    def image_part(self, maps: np.ndarray) -> np.ndarray:
        """Return the image tokens [..., timesteps, I] of maps [..., S]."""
        return self.by_step(maps)[..., self.text_tokens:]

    def text_part(self, maps: np.ndarray) -> np.ndarray:
        """Return the text tokens [..., timesteps, T] of maps [..., S]."""
        return self.by_step(maps)[..., :self.text_tokens]

    def by_step(self, maps: np.ndarray) -> np.ndarray:
        """Reshape maps [..., S] to [..., timesteps, tokens]."""
        return maps.reshape(*maps.shape[:-1], self.timesteps, self.text_tokens + self.image_tokens)


@dataclass(frozen=True, eq=False)
class Maps:
    """Store only the values above zero of maps [..., S], to save memory. Indexing like an array returns dense maps:
    `maps[7]`, `maps[7, 0]`, `maps[:, 0]`."""
    span: np.ndarray                                             # [..., 2]: start and end of each map in those below
    position: np.ndarray                                         # [M] uint32
    value: np.ndarray                                            # [M] float32
    length: int                                                  # S

    def __getitem__(self, index: Any) -> np.ndarray:
        span = self.span[index]
        dense = np.zeros((*span.shape[:-1], self.length), np.float32)
        for at in np.ndindex(span.shape[:-1]):
            here = slice(*span[at])
            dense[at][self.position[here]] = self.value[here]
        return dense

    def kept(self) -> "Maps":
        """Return the same maps without entries that belong to no map."""
        count = (self.span[..., 1] - self.span[..., 0]).reshape(-1)
        ends = np.cumsum(count)
        rows = np.repeat(self.span[..., 0].reshape(-1) - (ends - count), count) + np.arange(count.sum())
        span = np.stack([ends - count, ends], 1).reshape(self.span.shape)
        return Maps(span, self.position[rows], self.value[rows], self.length)


@dataclass(frozen=True)
class Collected:
    """Hold the statistics of F features over all tokens of N images, as in `stats.safetensors` and `collect.json`.

    An example is one image with the activations of one feature at all S positions. Its value is their maximum. Top
    examples come from K different images. The other examples come from a uniform sample of 32 images on which the
    feature fires: without the top ones, the sample is split by value into quarters, and each quantile is drawn at
    random from one quarter. Unused places have image -1 and value 0.
    """
    fired: np.ndarray                                            # [F] int64: positions where it is above zero
    images: np.ndarray                                           # [F] int64: images where it fires
    total: np.ndarray                                            # [F] float64: sum of its values
    maximum: np.ndarray                                          # [F] float32
    histogram: np.ndarray                                        # [F, B] int64: positions per bin; EDGES[b]: its start
    mean_map: np.ndarray                                         # [F, I] float32: mean value at each image token
    area: np.ndarray                                             # [F]: mean share of active tokens, where it fires
    concentration: np.ndarray                                    # [F]: 1 - (Σv)² / (I Σv²), mean; near 1 is one token
    spread: np.ndarray                                           # [F]: rms distance from its center, in image sides
    top_value: np.ndarray                                        # [F, K] float32, descending
    top_image: np.ndarray                                        # [F, K] int32: index into `info["prompts"]`
    top_map: Maps                                                # [F, K, S]
    quantile_value: np.ndarray                                   # [F, 4, Q] float32; group 0 holds the largest
    quantile_image: np.ndarray                                   # [F, 4, Q] int32
    quantile_map: Maps                                           # [F, 4, Q, S]
    together: np.ndarray                                         # [F, 10] int32: features that fire with it, or -1
    together_jaccard: np.ndarray                                 # [F, 10]: positions of both / positions of either
    nearest: np.ndarray                                          # [F, 10] int32: most similar decoder rows, or -1
    nearest_cosine: np.ndarray                                   # [F, 10] float32
    auroc: np.ndarray                                            # [F, A] float32: per image, for info["attributes"]
    variance: np.ndarray                                         # [F, 4] float32: shares, see `variance.Shares`; or NaN
    info: dict                                                   # prompts, model, layer, site, grid, tokens, ...

    @property
    def features(self) -> int:
        return len(self.fired)

    @property
    def layout(self) -> Layout:
        return Layout(**self.info["layout"])

    @property
    def density(self) -> np.ndarray:
        """Return [F]: the share of positions where the feature is above zero."""
        return self.fired / max(self.info["tokens"], 1)

    @property
    def mean(self) -> np.ndarray:
        """Return [F]: the mean value where the feature is above zero."""
        return self.total / np.maximum(self.fired, 1)

    def best_attribute(self, feature: int) -> tuple[str, float] | None:
        """Return the scene attribute that the feature predicts best, with its AUROC; None if no scene is known."""
        row = self.auroc[feature] if self.auroc.shape[1] else np.array([np.nan])
        if np.isnan(row).all():
            return None
        best = int(np.nanargmax(np.abs(row - 0.5)))
        return self.info["attributes"][best], float(row[best])


def load(folder: str | Path) -> Collected:
    """Load the statistics that `save` wrote to `folder`. Raise ValueError if they are missing or damaged."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "collect.json").read_text(encoding="utf-8"))
        with safe_open(folder / "stats.safetensors", "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}       # noqa: SIM118 (not a dict)
        maps = {name: Maps(*(arrays.pop(f"{name}.{part}") for part in PARTS), Layout(**info["layout"]).positions)
                for name in MAPS}
        return Collected(**arrays, **maps, info=info)
    except (*DAMAGED, AttributeError) as error:
        raise Mistake(f"{folder} holds no statistics that this version can read: {error}; collect them again") from None


def save(folder: Path, found: Collected) -> None:
    """Write `stats.safetensors` and `collect.json` to `folder`."""

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in (*MAPS, "info")}
    arrays |= {f"{name}.{part}": getattr(getattr(found, name), part) for name in MAPS for part in PARTS}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "stats.safetensors")
    (folder / "collect.json").write_text(json.dumps(found.info))


class Counts:
    """Count features image by image. The state is a dict of arrays, so that a stopped run can save and restore it. The
    maps of kept examples are in `position` and `value`, mixed with maps of examples that were replaced."""

    def __init__(self, F: int, layout: Layout) -> None:
        self.layout = layout
        self.a = {
            "fired": np.zeros(F, np.int64), "images": np.zeros(F, np.int64), "total": np.zeros(F),
            "maximum": np.zeros(F, np.float32), "histogram": np.zeros((F, len(EDGES)), np.int64),
            "map_sum": np.zeros((F, layout.image_tokens)), "shape_sum": np.zeros((F, 4)),
            # a F + b for features a < b that fire at the same position, ascending; and the number of such positions
            "pair": np.zeros(0, np.min_scalar_type(F * F - 1)), "pair_count": np.zeros(0, np.int32)}
        self.a |= {"position": np.zeros(0, np.uint32), "value": np.zeros(0, np.float32),
                   "tokens": np.zeros(1, np.int64)}
        for kind, room in (("top", KEPT), ("some", RESERVOIR)):
            self.a |= {f"{kind}_key": np.full((F, room), -np.inf), f"{kind}_value": np.zeros((F, room), np.float32),
                       f"{kind}_image": np.full((F, room), -1, np.int32),
                       f"{kind}_span": np.zeros((F, room, 2), np.int64)}
        self.new, self.end = [], 0                               # (position, value) not yet in `a`; total entries
        self.new_pairs, self.waiting = [], 0                     # pairs not yet in `a`; their number

    def add(self, number: int, values: np.ndarray, indices: np.ndarray, seed: int,
            real: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Count image `number` with values [S, k] and indices [S, k]. real: bool [S], the positions to count (default:
        all). Return the features that fire and their maxima."""
        on = values > 0 if real is None else (values > 0) & real[:, None]
        positions, slots = np.nonzero(on)
        value, feature = values[positions, slots], indices[positions, slots]
        order = np.argsort(feature, kind="stable")               # makes the entries of a feature adjacent
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

    def settled(self) -> dict[str, np.ndarray]:
        """Return the state as arrays only, without the maps of replaced examples."""
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
        """Count pairs of features that fire at the same positions, each pair once."""
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
        """Add area, concentration and spread of features that fire on image tokens. row: index into `alive`."""
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
        for at in ((y + 0.5) / layout.grid[0], (x + 0.5) / layout.grid[1]):
            variance += total(v * at ** 2)[seen] / whole[seen] - (total(v * at)[seen] / whole[seen]) ** 2
        concentration = 1 - whole[seen] ** 2 / (I * squares[seen])
        self.a["shape_sum"][alive[seen]] += np.stack(
            [area[seen] / I, concentration, np.sqrt(variance.clip(0)), np.ones(len(variance))], 1)

    def _keep(self, kind, alive, keys, values, span, number):
        """Replace the example with the smallest key where the new key is larger. Return whether any was replaced."""
        a = self.a
        smallest = a[f"{kind}_key"][alive].argmin(1)
        better = np.flatnonzero(keys > a[f"{kind}_key"][alive, smallest])
        at = alive[better], smallest[better]
        a[f"{kind}_key"][at], a[f"{kind}_value"][at] = keys[better], values[better]
        a[f"{kind}_image"][at], a[f"{kind}_span"][at] = number, span[better]
        return len(better) > 0

    def finish(self, W_dec: Any, labels: np.ndarray, maxima: np.ndarray, variance: np.ndarray, info: dict[str, Any]
               ) -> Collected:
        """Return the counts as `Collected`. labels [N, A] and maxima [N, F] are for the AUROCs; A may be 0."""
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
            auroc(maxima, labels), variance, info | {"tokens": int(a["tokens"][0])})

    def _quantiles(self, top):
        """Return values, images and spans of the random examples, [F, 4, Q], with the largest quarter first."""
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


def auroc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return areas under the ROC curve [F, A]: how likely an image with the label scores above one without it. Ties
    count half. scores [N, F], labels [N, A] bool. The method is the rank sum (Mann and Whitney 1947). NaN if all or no
    images have the label."""
    N, F = scores.shape if scores.size else (len(labels), scores.shape[1])
    out = np.full((F, labels.shape[1]), np.nan, np.float32)
    yes = labels.sum(0, dtype=np.float64)
    both = (yes > 0) & (yes < N)
    for f in range(F if both.any() else 0):
        _, place, count = np.unique(scores[:, f], return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[place]
        out[f, both] = (rank @ labels[:, both] - yes[both] * (yes[both] + 1) / 2) / (yes[both] * (N - yes[both]))
    return out


def _take(array, order):
    return np.take_along_axis(array, order.reshape(*order.shape, *[1] * (array.ndim - 2)), 1)


def _best(score, n=10):
    """Return indices and values of the n largest in each row, descending; -1 if the value is not above zero."""
    n = min(n, score.shape[1])
    part = np.argpartition(-score, n - 1, 1)[:, :n]
    value = np.take_along_axis(score, part, 1)
    order = np.argsort(-value, 1, kind="stable")
    part, value = np.take_along_axis(part, order, 1), np.take_along_axis(value, order, 1)
    return np.where(value > 0, part, -1).astype(np.int32), value.astype(np.float32)


def _together(pair, count, fired, n=10):
    """Return the n features that fire most with each feature, and their Jaccard index (positions of both / positions of
    either). pair, count: as in `Counts`."""
    F = len(fired)
    index, value = np.full((F, min(n, F)), -1, np.int32), np.zeros((F, min(n, F)), np.float32)
    second = (pair % F).astype(np.uint32)
    starts = [*np.searchsorted(pair, (np.arange(F) * F).astype(pair.dtype)), len(pair)]
    rows = max(1, F * BATCHED // (len(pair) + 1))                # features at a time, to sort few entries at once
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
    """Return the n features with the most similar decoder rows, and the cosines, without an [F, F] array."""
    W = np.asarray(W_dec, np.float32)
    norm, blocks, rows = np.maximum(np.linalg.norm(W, axis=1), 1e-30), [], max(1, 2 ** 23 // len(W))
    for i in range(0, len(W), rows):
        block = W[i:i + rows] @ W.T / norm / norm[i:i + rows, None]
        block[np.arange(len(block)), np.arange(i, i + len(block))] = -np.inf        # skip the feature itself
        blocks.append(_best(block, n))
    index, value = (np.concatenate(part) for part in zip(*blocks))
    return index, value
