"""Normalize raw residuals for the training of an SAE, and fold the normalization into the trained weights.

Raw FLUX residuals are dominated by a few huge directions. SAEs train on *standardized* residuals instead:

    u = (x - mean) / std                                 with normalization "std"
    u = (x - mean) / std @ basis                         with "pca": then rotated to the principal axes
    u = x / std, one std for all dimensions              with "scale"

Some directions can be *removed* before training, such as those into which the model writes its input noise. u is then
zero along them, so the SAE neither reads nor writes them. Splicing the SAE into the model leaves this part of x alone.

Stands alone: copy this one file. `sae.py` uses it; `state` and `cfg` below are its `State` and `Config`.

B batch, N sample tokens, C columns of the residuals, D model width, F features, G groups of tokens.
"""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

NORMALIZATIONS = ("std", "pca", "scale")


class Mistake(ValueError):
    """An error that the caller can correct. Its message is one line: the wrong value, and what would be right."""


def fit(sample: np.ndarray, groups: np.ndarray, names: Sequence[str], kind: str, without: np.ndarray | None = None
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return mean [G, C], std [G, C], basis [C, C] or None, and the removed directions [C, R] or None; float32.

    sample [N, C]: raw residuals. groups [N]: the group of each token, a number. names: of the groups. without:
    directions [G, R, C] of each group's raw residuals to remove. basis: for "pca" the principal axes as columns, and if
    directions are removed R columns of zeros; for "std" with removed directions the projection onto the others. The
    removed directions are orthonormal in standardized space. Raises Mistake if a value is not finite or a group has
    fewer than two tokens.

    The axes are those of all groups together. They change no distance, so they do not change FVU either. But Adam
    scales each coordinate separately and gains from them: in two layers of a nano with 64 latent channels FVU fell by
    1 % at k = 16 and by 1 to 5 % at k = 32, and fewer features died.
    """
    parts = [sample[groups == g] for g in range(len(names))]
    if few := [name for name, part in zip(names, parts) if len(part) < 2]:
        raise Mistake(f"sample holds fewer than two tokens of the group {few[0]}")
    means, covariances = zip(*(_moments(part, full=kind == "pca") for part in parts))
    if kind == "scale":                                          # as SAELens' expected_average_only_in: mean |x|² is D
        std = np.sqrt([np.full_like(m, (m * m + c).mean()) for m, c in zip(means, covariances)])
        return np.zeros_like(std, np.float32), np.where(std > 0, std, 1).astype(np.float32), None, None
    std = np.array([_spread(m, np.diag(c) if kind == "pca" else c) for m, c in zip(means, covariances)])
    removed, kept = _split_space(None if without is None else without / std[:, None], sample.shape[1])
    if kind == "std":
        basis = None if removed is None else np.eye(len(removed)) - removed @ removed.T
    else:
        pooled = sum(c / np.outer(s, s) * len(part) for c, s, part in zip(covariances, std, parts))
        # Without variation any axes will do. `checkpoint.load_state` asks for that; eigh takes seconds at D = 3072
        axes = kept @ np.linalg.eigh(kept.T @ pooled @ kept)[1] if pooled.any() else kept
        basis = np.pad(axes, ((0, 0), (len(axes) - axes.shape[1], 0)))
    return (np.float32(means), np.float32(std), *(None if a is None else np.float32(a) for a in (basis, removed)))


def directions(cfg: Any, without: np.ndarray | None) -> np.ndarray | None:
    """Return the directions to remove with an axis for groups, for `fit`. Raises Mistake if they do not fit cfg."""
    shape = (len(cfg.groups), cfg.removed, cfg.d_in) if cfg.groups else (cfg.removed, cfg.d_in)
    if (np.shape(without) if without is not None else None) != (shape if cfg.removed else None):
        raise Mistake(f"without has shape {None if without is None else list(np.shape(without))}; cfg.removed = "
                      f"{cfg.removed} needs {list(shape) if cfg.removed else None}")
    return None if without is None else np.asarray(without).reshape(-1, cfg.removed, cfg.d_in)


def _split_space(directions: np.ndarray | None, width: int) -> tuple[np.ndarray | None, np.ndarray]:
    """Return orthonormal columns: the R dimensions that the groups' directions [G, R, C] span most, and the others."""
    if directions is None:
        return None, np.eye(width)
    count = directions.shape[1]
    rows = np.linalg.svd(np.asarray(directions, np.float64).reshape(-1, width))[2]
    return rows[:count].T, rows[count:].T


def _moments(sample, full):
    """Return the mean [C] and the variances [C] (or, if `full`, covariances [C, C]), summed in float64 in chunks."""
    chunks = [sample[i : i + 4096] for i in range(0, len(sample), 4096)]
    mean = sum(c.sum(0, dtype=np.float64) for c in chunks) / len(sample)
    centered = (c.astype(np.float64) - mean for c in chunks)
    var = sum(c.T @ c if full else (c**2).sum(0) for c in centered) / len(sample)
    if not np.isfinite(mean).all() or not np.isfinite(var).all():
        bad = ~np.isfinite(np.diag(var) if full else var)
        raise Mistake(f"sample is not finite in {int(bad.sum())} of {len(mean)} dimensions")
    return mean, var


def _spread(mean, var):
    """Return the std of each dimension. A constant dimension gets the rms of all."""
    std, rms = np.sqrt(np.maximum(var, 0)), np.sqrt(max(var.mean(), 0))
    constant = (std <= 1e-6 * np.abs(mean)) | (std <= 1e-8 * rms)
    return np.where(constant, rms or 1.0, std)


def standardize(x: Array, mean: Array, std: Array, basis: Array | None, group: Array | None) -> Array:
    """Return u [B, C] of raw residuals x [B, C]. group [B]: the group of each token; then mean and std are [G, C]."""
    mean, std = (mean, std) if group is None else (mean[group], std[group])
    u = (jnp.asarray(x, jnp.float32) - mean) / std
    return u if basis is None else jnp.matmul(u, basis, precision=lax.Precision.HIGH)  # as in `kernels.preactivations`


def fold(state: Any, cfg: Any, group: int = 0) -> dict[str, Array]:
    """Return the trained SAE on the raw residuals of a group: W_enc [d_in, F], b_enc [F], W_dec [F, d_out], b_dec
    [d_out] and, with thresholds, threshold [F]; with removed directions also `Config.removed_shapes`. In float64."""
    p = {name: np.asarray(value) for name, value in state.params.items()}
    (mean, mean_y), (std, std_y) = (cfg.split(np.asarray(a, np.float64)) for a in _of_group(state, cfg, group))
    rotate, back = _rotations(state)
    center = rotate(mean / std) + (p["b_dec"] if cfg.d_out is None else 0)
    folded = {  # one at a time: the float64 copies of the large ones take much memory
        "W_enc": lambda: (back(p["enc"]) / std).T,
        "b_enc": lambda: p["b_enc"] - p["enc"] @ center,
        "W_dec": lambda: back(p["dec"]) * std_y,
        "b_dec": lambda: back(p["b_dec"]) * std_y + mean_y,
    }
    if cfg.removed:
        removed = np.asarray(state.removed, np.float64)
        folded |= {"read": lambda: removed / std[:, None], "write": lambda: removed.T * std,
                   "offset": lambda: -(mean / std) @ removed}
    if cfg.activation != "topk":
        log = p.get("log_threshold")
        folded["threshold"] = lambda: np.full(cfg.features, state.threshold) if log is None else np.exp(log)
    return {name: jnp.asarray(value(), jnp.float32) for name, value in folded.items()}


def unfold(params: dict[str, Array], cfg: Any, state: Any) -> Any:
    """Return `state` with the parameters of an SAE on raw residuals (of the first group), to train it further.

    `fold` gives back `params`, except that decoder rows have unit length in the state's space. Raises Mistake if an
    array has another shape than cfg says, or is not finite.
    """
    needed = {name: shape for name, shape in cfg.shapes.items() if name != "threshold"}
    check_arrays("the SAE to begin from", {name: np.asarray(params[name]) for name in needed}, needed)
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    mean, std = (np.asarray(a, np.float64) for a in _of_group(state, cfg, 0))
    rotate, _ = _rotations(state)
    enc, dec = rotate(p["W_enc"].T * std), rotate(p["W_dec"] / std)
    length = np.maximum(np.linalg.norm(dec, axis=1), 1e-30)
    b_dec, enc = rotate((p["b_dec"] - mean) / std), enc * length[:, None]
    new = {"enc": enc, "b_enc": (p["b_enc"] + mean @ p["W_enc"]) * length + enc @ b_dec, "dec": dec / length[:, None]}
    threshold, new["b_dec"] = state.threshold, b_dec
    if "threshold" in p:
        level = np.maximum(p["threshold"] * length, 1e-6)
        threshold = None if threshold is None else jnp.float32(np.median(level))
        new["log_threshold"] = np.log(level)
    taken = {name: jnp.asarray(new.get(name, old), jnp.float32) for name, old in state.params.items()}
    return state._replace(params=taken, threshold=threshold)


def _of_group(state, cfg, group):
    return (state.mean[group], state.std[group]) if cfg.groups else (state.mean, state.std)


def _rotations(state) -> tuple[Callable, Callable]:
    """Return functions that rotate rows [..., D] to the principal axes, and back, in float64."""
    if state.basis is None:
        return (lambda rows: rows), (lambda rows: rows)
    basis = np.asarray(state.basis, np.float64)
    return (lambda rows: rows @ basis), (lambda rows: rows @ basis.T)


def check_arrays(source: Any, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise Mistake, naming the first offender, unless arrays have exactly these names and shapes, all finite."""
    if arrays.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
        raise Mistake(f"{source}: missing tensors {missing}, unknown tensors {unknown}")
    for name, array in arrays.items():
        if array.shape != tuple(shapes[name]):
            raise Mistake(f"{source}: {name} has shape {list(array.shape)}; its config says {list(shapes[name])}")
        if not np.isfinite(array).all():
            raise Mistake(f"{source}: {name} holds {int((~np.isfinite(array)).sum())} values that are not finite")


@jax.jit
def geometric_median(u: Array, iterations: int = 20) -> Array:
    """Return the point [D] with the least summed distance to u [N, D], by Weiszfeld's iteration."""
    def nearer(_, center):
        weight = 1 / jnp.maximum(jnp.linalg.norm(u - center, axis=1), 1e-6)
        return jnp.matmul(weight, u, precision=lax.Precision.HIGHEST) / weight.sum()

    return lax.fori_loop(0, iterations, nearer, u.mean(0))
