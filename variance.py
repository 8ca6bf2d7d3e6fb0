"""Split the variance of SAE features: how much do the position, the prompt, and the noise draw explain?

This file works alone: copy it. It needs numpy. Draw images for P prompts, each from the same S noises. Then every
feature has a table of values x[prompt, noise, position], and an analysis of variance splits it:

    sums = variance.Sums(features=F, seeds=S, positions=N)
    for values, indices in codes:                                # of one prompt: [S, N, k] each
        sums.add(values, indices)
    found = sums.finish()                                        # a `Shares`, arrays [F]
    found.prompt[7]                                              # the share of feature 7's variance due to the prompt

The model is that of random effects, with all interactions (Searle, Casella, McCulloch: Variance Components, chapter 4):
x = mean + n + p + s + np + ns + ps + nps. *Position* is the share of n: what every image has at that place. *Prompt* is
p + np. *Noise* is s + ns: what a noise draw does whatever the prompt says. *Both* is ps + nps: what needs this prompt
and this noise, such as a red object at the place where the noise puts it. The shares add up to 1.
"""
from dataclasses import dataclass
from itertools import combinations

import numpy as np

AXES = ("n", "p", "s")                                           # position, prompt, noise draw
NAMES = ("position", "prompt", "noise", "both")                  # the shares
TERMS = [frozenset(some) for size in range(4) for some in combinations(AXES, size)]


class Mistake(ValueError):
    """Report an error that the caller can fix. Its one-line message names the value and says what would be right."""


@dataclass(frozen=True)
class Shares:
    """Hold the shares of variance [F] of each feature; NaN for a feature without variance. total [F]: its variance."""
    position: np.ndarray
    prompt: np.ndarray
    noise: np.ndarray
    both: np.ndarray
    total: np.ndarray

    @property
    def table(self) -> np.ndarray:
        """Return the four shares as [F, 4], in the order of the fields."""
        return np.stack([self.position, self.prompt, self.noise, self.both], 1)

    @property
    def mean(self) -> dict[str, float]:
        """Return the means of the shares over the features that vary; an empty dict if none does."""
        alive = self.total > 0
        return {name: float(getattr(self, name)[alive].mean()) for name in NAMES} if alive.any() else {}

    @property
    def pooled(self) -> dict[str, float]:
        """Return the shares of the summed variance of all features: those of a whole space, if they are its axes."""
        alive = self.total > 0
        weight = self.total[alive] / self.total.sum() if alive.any() else 0
        return {name: float((getattr(self, name)[alive] * weight).sum()) for name in NAMES} if alive.any() else {}

    def summary(self) -> dict[str, float]:
        """Return `mean`, and how many features vary, follow the prompt, and follow the prompt or the image.

        A feature follows the prompt if the prompt explains more of it than all that the noise has a part in. It follows
        the prompt or the image if prompt and both explain more than the noise draw alone."""
        image = self.prompt + self.both > self.noise             # NaN compares as False
        return self.mean | {"varying": int((self.total > 0).sum()),
                            "follow_prompt": int(follows_prompt(self.table).sum()),
                            "follow_prompt_or_image": int(image.sum())}


def follows_prompt(table: np.ndarray) -> np.ndarray:
    """Return which features [F] follow the prompt (see `Shares.summary`), from `Shares.table` [F, 4]."""
    _, prompt, noise, both = table.T
    return prompt > noise + both


class Sums:
    """Add up a table x[prompt, noise, position] of every feature, prompt by prompt. Memory: 4 S N F bytes."""

    def __init__(self, features: int, seeds: int, positions: int) -> None:
        if min(seeds, positions) < 2:
            raise Mistake(f"{seeds} noises and {positions} positions: an analysis of variance needs at least 2 of each")
        self.shape, self.prompts = (seeds, positions, features), 0
        self.over_prompts = np.zeros(self.shape, np.float32)     # sum over prompts
        self.squares = {term: np.zeros(features) for term in TERMS if "p" in term}    # of sums over the other axes

    def add(self, values: np.ndarray, indices: np.ndarray | None = None) -> None:
        """Add one prompt. values, indices [S, N, k]: the active features of each token. Without indices the values are
        dense [S, N, F]."""
        S, N, F = self.shape
        if values.shape[:2] != (S, N) or (indices is None and values.shape[2] != F):
            raise Mistake(f"values are {list(values.shape)}; they must be [{S}, {N}, {F if indices is None else 'k'}]")
        at = np.nonzero(values)                                  # a value of 0 may have any index
        value, place = values[at].astype(np.float64), at[0] * N + at[1]
        feature = at[2] if indices is None else indices[at].astype(np.int64)
        self.over_prompts.reshape(S * N, F)[place, feature] += value
        self.squares[frozenset("nps")] += np.bincount(feature, value ** 2, F)
        for term, cell, cells in (("np", at[1], N), ("ps", at[0], S), ("p", 0, 1)):
            total = np.bincount(cell * F + feature, value, cells * F).reshape(cells, F)
            self.squares[frozenset(term)] += (total ** 2).sum(0)
        self.prompts += 1

    def finish(self) -> Shares:
        """Return the shares. Raise Mistake if there are fewer than two prompts."""
        if self.prompts < 2:
            raise Mistake(f"{self.prompts} prompts: an analysis of variance needs at least 2")
        (S, N, _), x = self.shape, self.over_prompts.astype(np.float64)
        levels = {"n": N, "p": self.prompts, "s": S}
        squares = self.squares | {frozenset("ns"): (x ** 2).sum((0, 1)), frozenset("s"): (x.sum(1) ** 2).sum(0),
                                  frozenset("n"): (x.sum(0) ** 2).sum(0), frozenset(): x.sum((0, 1)) ** 2}
        part = components(squares, levels)
        sums = {"position": part["n"], "prompt": part["p"] + part["np"], "noise": part["s"] + part["ns"],
                "both": part["ps"] + part["nps"]}
        total = sum(sums.values())
        with np.errstate(invalid="ignore", divide="ignore"):
            return Shares(**{name: np.where(total > 0, value / total, np.nan) for name, value in sums.items()},
                          total=total)


def seeds_for(features: int, positions: int, wanted: int = 8) -> int:
    """Return a number of noises, from 2 to `wanted`, for which `Sums` needs at most a gigabyte if possible."""
    return max(2, min(wanted, 2 ** 28 // (features * positions)))


def components(squares: dict[frozenset, np.ndarray], levels: dict[str, int]) -> dict[str, np.ndarray]:
    """Return the variance [F] of each effect of a full factorial table with one value per cell, none below 0.

    squares: for each set of axes, the sum over its cells of the squared total of the cell. The variances come from the
    expected mean squares (Henderson's method for balanced tables)."""
    size = lambda axes: int(np.prod([levels[axis] for axis in axes]))
    subtotal = {term: square / size(set(levels) - term) for term, square in squares.items()}
    signed = lambda parts, term: sum((-1) ** len(other ^ term) * value for other, value in parts.items())
    inside = lambda term: {other: subtotal[other] for other in TERMS if other <= term}
    mean_square = {term: signed(inside(term), term) / np.prod([levels[axis] - 1 for axis in term])
                   for term in TERMS if term}
    above = lambda term: {other: mean_square[other] for other in TERMS if other >= term}
    return {"".join(sorted(term)): np.maximum(signed(above(term), term) / size(set(levels) - term), 0)
            for term in TERMS if term}
