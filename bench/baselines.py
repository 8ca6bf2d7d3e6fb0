"""Compute the baselines that an SAE must beat: other ways to describe a vector with k numbers, as plain functions.

Each takes tokens [N, D], usually standardized, and returns their reconstructions [N, D]:

    pca(fit, x, k)                            the k largest principal components of other tokens
    pursue(x, atoms, k)                       k atoms of a dictionary, chosen by gradient pursuit
    random_dictionary(key, atoms, D)          make a dictionary from random directions
    itda(batches, atoms, k)                   make a dictionary from tokens that earlier atoms cannot reconstruct
    largest(fit_codes, fit, codes, k)         the k largest other numbers of each token (MLP neurons), decoded linearly

D width, A atoms.
"""
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def pca(fit: np.ndarray, x: np.ndarray, k: int) -> np.ndarray:
    """Reconstruct x [N, D] from its coordinates along the k largest principal components of `fit` [M, D]."""
    mean = fit.mean(0, dtype=np.float64)
    _, axes = np.linalg.eigh(np.cov(np.asarray(fit, np.float64), rowvar=False))
    top = axes[:, ::-1][:, :k]
    return ((x - mean) @ top @ top.T + mean).astype(np.float32)


def random_dictionary(key: Array, atoms: int, width: int) -> Array:
    """Return `atoms` random unit directions [A, D]."""
    return unit(jax.random.normal(key, (atoms, width)))


def unit(rows: Array | np.ndarray) -> Array:
    """Return rows scaled to length 1."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)


# ---------------------------------------------------------------- decomposition at inference time


def pursue(x: np.ndarray, atoms: Array, k: int, size: int = 4096) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run gradient pursuit, `size` tokens at a time: x [N, D], unit atoms [A, D] → (reconstructions [N, D], weights
    [N, k], chosen atoms [N, k]). Weights may be negative."""
    pieces = [_pursue(jnp.asarray(x[i:i + size]), atoms, k) for i in range(0, len(x), size)]
    return tuple(np.concatenate(parts) for parts in zip(*pieces))


@partial(jax.jit, static_argnums=2)
def _pursue(x, atoms, k):
    """Run gradient pursuit (Blumensath & Davies 2008, IEEE Trans. Signal Process. 56(6)): k times, add the atom that
    fits the residual best, and move all weights along the gradient by the step that minimizes the residual."""
    def gathered(total, column):
        weight, index = column
        return total + weight[:, None] * atoms[index], None

    def move(i, carry):
        left, weights, chosen, used = carry
        fits = left @ atoms.T                                    # [B, A]
        best = jnp.argmax(jnp.abs(fits), 1)
        fresh = ~((chosen == best[:, None]) & used).any(1)       # the best atom may be in use already
        chosen, used = chosen.at[:, i].set(best), used.at[:, i].set(fresh)
        gradient = jnp.where(used, jnp.take_along_axis(fits, chosen, 1), 0)
        change, _ = lax.scan(gathered, jnp.zeros_like(x), (gradient.T, chosen.T))
        length = jnp.sum(left * change, 1) / jnp.maximum(jnp.sum(change * change, 1), 1e-30)
        return left - length[:, None] * change, weights + length[:, None] * gradient, chosen, used

    shape = (len(x), k)
    start = x, jnp.zeros(shape), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
    left, weights, chosen, _ = lax.fori_loop(0, k, move, start)
    return x - left, weights, chosen


def itda(batches: Iterable[np.ndarray], size: int, k: int) -> Array:
    """Make a dictionary of unit tokens [size, D] after Leask et al. 2025 (arXiv 2505.17769): the first D tokens, then
    from each batch [B, D] the tokens whose relative squared error with the dictionary so far is largest.

    The paper adds tokens above a threshold that is tuned for the wanted size; here each batch's threshold fills the
    dictionary evenly. Raise ValueError if a batch has fewer tokens than it must contribute.
    """
    batches = list(batches)
    width = batches[0].shape[1]
    ends = np.linspace(min(width, size), size, len(batches) + 1).astype(int)
    least = min(len(x) for x in batches)
    if max(ends[0], *np.diff(ends)) > least:
        raise ValueError(f"{len(batches)} batches of {least} tokens are too few for a dictionary of {size}")
    # Start at the final size, with rows of zeros, so that all batches use one compiled program
    atoms = np.zeros((size, width), np.float32)
    atoms[:ends[0]] = unit(batches[0][:ends[0]])
    for x, start, end in zip(batches, ends, ends[1:]):
        found, _, _ = pursue(x, jnp.asarray(atoms), k)
        lost = np.sum((x - found) ** 2, 1) / np.maximum(np.sum(x * x, 1), 1e-30)
        atoms[start:end] = unit(x[np.argsort(-lost)[:end - start]])
    return jnp.asarray(atoms)


# ---------------------------------------------------------------- other numbers of the same token


def largest(fit_codes: np.ndarray, fit: np.ndarray, codes: np.ndarray, k: int, ridge: float = 1e-3) -> np.ndarray:
    """Reconstruct tokens from their k largest |codes|: codes [M, N] of `fit` [M, D], codes [B, N] → [B, D].

    Scale the codes to unit rms, keep the k largest of each token, and fit an affine map from them to the tokens by
    ridge regression. No linear decoder can do better, except for the ridge, a fraction of the codes' mean square.
    """
    rms = np.sqrt(np.mean(np.square(fit_codes, dtype=np.float32), 0)) + 1e-12
    masked = _masked(fit_codes / rms, k)
    a, b = masked.mean(0), fit.mean(0)
    gram = (masked - a).T @ (masked - a)
    penalty = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = np.linalg.solve(gram + penalty, (masked - a).T @ (fit - b))
    return (_masked(codes / rms, k) - a) @ weights + b


def _masked(codes, k):
    """Return codes with all but the k largest magnitudes of each row set to zero."""
    kept = np.zeros_like(codes, np.float32)
    which = np.argpartition(-np.abs(codes), k - 1, axis=1)[:, :k]
    np.put_along_axis(kept, which, np.take_along_axis(codes, which, 1), 1)
    return kept
