"""Find which part of a residual stream is a linear copy of the model's input latents, and in which subspace it lies.

    python score.py --input --model nano                   # a table over all layers; see `report`

Copy it with `flux.py` and `data.py`. From Python:

    moments = inputs.Moments(D, C)
    moments.add(x, z)                                      # [n, D] residuals, [n, C] the latents of the same tokens
    directions = moments.directions()                      # [C, D]: where each latent channel is written
    found = inputs.described(moments)                      # share of variance, dimension, angles

A velocity contains the noise, so a model must carry it from its first block to its last. The regression of residuals on
latents, token by token, shows where. Letters: n tokens, C latent channels, D model width.
"""
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data as sources
import flux
from weights import Mistake

DOMINANT = 3                                                     # directions of the raw residual to report
LEGEND = """Image tokens at pure noise. The subspace holds 99 % of the variance that is linear in a token's input noise.
  linear        share of the variance that is a linear function of the noise
  dim           dimension of the subspace
  in it         share of all variance in the subspace
  overlap       mean squared cosine of its angles to as many principal axes (in brackets: of random directions)
  dominating    the three largest directions of raw residuals: share of the variance, angle to the subspace

                 standardized residual                     raw residual
layer   linear        dim    in it         overlap   linear        dim   dominating"""
WHOLE = 0.99                                                     # a subspace holds this share of what is linear


class Moments:
    """Add up means and covariances of residuals x and latents z, in float64. full: also x's own covariance."""

    def __init__(self, width: int, channels: int, full: bool = False) -> None:
        self.n, self.x, self.z = 0, np.zeros(width), np.zeros(channels)
        self.zz, self.zx = np.zeros((channels, channels)), np.zeros((channels, width))
        self.xx = np.zeros((width, width)) if full else None

    def add(self, x: np.ndarray, z: np.ndarray) -> None:
        """Add tokens: x [n, D] and z [n, C]. Raise Mistake if a value is not finite."""
        x, z = np.asarray(x, np.float64), np.asarray(z, np.float64)
        if not (np.isfinite(x).all() and np.isfinite(z).all()):
            raise Mistake("residuals or latents hold NaN or Inf")
        if not self.n:                                           # sums around a point near the mean lose no digits
            self.around = x.mean(0)
        x = x - self.around
        self.n, self.x, self.z = self.n + len(x), self.x + x.sum(0), self.z + z.sum(0)
        self.zz, self.zx = self.zz + z.T @ z, self.zx + z.T @ x
        if self.xx is not None:
            self.xx += x.T @ x

    def covariances(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return the covariances of z [C, C], of z and x [C, D], and of x [D, D] (None unless `full`). Raise Mistake if
        there are no more tokens than latent channels."""
        if self.n <= len(self.z) + 1:
            raise Mistake(f"{self.n} tokens: a regression on {len(self.z)} latent channels needs more")
        centered = lambda sums, a, b: (sums - np.outer(a, b) / self.n) / (self.n - 1)
        xx = None if self.xx is None else centered(self.xx, self.x, self.x)
        return centered(self.zz, self.z, self.z), centered(self.zx, self.z, self.x), xx

    def directions(self) -> np.ndarray:
        """Return the regression of x on z, scaled: rows [C, D] whose squares add up to the variance that is linear in
        z. Each row is a direction of raw residuals."""
        zz, zx, _ = self.covariances()
        values, axes = np.linalg.eigh(zz)
        keep = values > 1e-9 * values.max()                      # a constant latent channel explains nothing
        scale = np.where(keep, 1 / np.sqrt(np.where(keep, values, 1)), 0)
        return (scale[:, None] * axes.T) @ zx


def described(moments: Moments) -> dict[str, dict]:
    """Return what `report` shows of one layer: {"standardized": ..., "raw": ...}, each as `_space` returns it."""
    rows, (*_, xx) = moments.directions(), moments.covariances()
    std = np.sqrt(np.maximum(np.diag(xx), 1e-30))
    return {"standardized": _space(rows / std, xx / np.outer(std, std), moments.n), "raw": _space(rows, xx, moments.n)}


def _space(rows, xx, n):
    """Return, as a dict for JSON: the share of variance that is linear in z, the dimension of the subspace that holds
    99 % of it, all variance in that subspace, its principal angles (degrees) to as many principal axes, with the
    overlap (mean squared cosine) and what chance gives, and the dominating directions with their angle to it."""
    _, length, axes = np.linalg.svd(rows, full_matrices=False)
    total, power = np.trace(xx), length ** 2
    linear = 1 - (1 - power.sum() / total) * (n - 1) / (n - len(rows) - 1)      # adjusted: C numbers were fitted
    size = int(np.searchsorted(np.cumsum(power), WHOLE * power.sum()) + 1)
    space, (values, principal) = axes[:size], np.linalg.eigh(xx)
    values, principal = values[::-1], principal[:, ::-1]
    cosines = np.linalg.svd(space @ principal[:, :size], compute_uv=False).clip(0, 1)
    inside = np.linalg.norm(space @ principal[:, :DOMINANT], axis=0).clip(0, 1)
    degrees = lambda cosine: np.degrees(np.arccos(cosine)).round(2).tolist()
    return {"linear": float(max(linear, 0)), "dimension": size,
            "variance": float(np.trace(space @ xx @ space.T) / total), "angles": degrees(cosines),
            "overlap": float((cosines ** 2).mean()), "chance": size / len(xx),
            "dominant": [{"share": float(v / total), "angle": a} for v, a in zip(values, degrees(inside))]}


# ---------------------------------------------------------------- for any model


def report(model: flux.Model, prompts: Sequence[str], layers: Sequence[int], *, tokens: int, seed: int = 0,
           batch: int = 16, size: int | tuple[int, int] | None = None, text_tokens: int | None = None
           ) -> Iterator[tuple[int, dict]]:
    """Yield (layer, `described`) for image tokens at pure noise, from at least `tokens` tokens per layer."""
    grid = flux.token_grid(model, size or min(256, model.size))
    levels = flux.sigmas(model.scheduler, 1, grid[0] * grid[1])
    images = -(-tokens // (grid[0] * grid[1]))
    for layer in layers:
        moments = Moments(model.cfg.width, model.cfg.in_channels, full=True)
        for first in range(0, images, batch):
            texts = [prompts[i % len(prompts)] for i in range(first, first + batch)]
            start = sources.beginning(model, texts, np.arange(first, first + batch), levels, grid, seed, text_tokens)
            x = np.asarray(flux.capture(model, start, layer=layer, site="img")[0], np.float32)
            moments.add(x.reshape(-1, x.shape[-1]), np.asarray(start.latents).reshape(-1, model.cfg.in_channels))
        yield layer, described(moments)


def show(model: flux.Model, prompts: Sequence[str], layers: Sequence[int], file: Path | None, **options) -> None:
    """Print the `report` as a table, and write it to `file` as JSON."""
    print(LEGEND)
    found = {}
    for layer, one in tqdm(report(model, prompts, layers, **options), total=len(layers), unit="layer",
                           dynamic_ncols=True):
        found[layer] = one
        std, raw = one["standardized"], one["raw"]
        strong = ", ".join(f"{d['share']:.0%} {d['angle']:.0f}°" for d in raw["dominant"])
        tqdm.write(f"{layer:>5}{std['linear']:>9.1%}{std['dimension']:>11}{std['variance']:>9.1%}"
                   f"{std['overlap']:>9.2f} ({std['chance']:.2f}){raw['linear']:>9.1%}{raw['dimension']:>11}   "
                   f"{strong}")
    if file:
        file.write_text(json.dumps({"kind": "fae input", "layers": found}, indent=1) + "\n", encoding="utf-8")
        print(f"table: {file}")
