"""Apply an SAE to raw residuals: encode and decode them, replace them, change single features, measure the error.

Copy it with `kernels.py` and `normalize.py`. params, cfg: of `checkpoint.load`, or of `sae.fold` and a `sae.Config`.

    values, indices = apply.encode(params, cfg, x)                    # also sae.encode
    x_hat = apply.decode(params, cfg, values, indices)                # also sae.decode
    x_hat = apply.splice(params, cfg, x)                              # both, in x's shape and dtype
    x_new = apply.change(params, cfg, x, features, scale, add)        # some features scaled or added to
    found = apply.evaluate(params, cfg, batches)                      # FVU, L0, dead features, ...

B batch, C columns of the residuals, D model width, F features, n changed features.
"""
import warnings
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import kernels
from normalize import Mistake

if TYPE_CHECKING:
    from sae import Config

Params = dict[str, Array]


def encode(params: Params, cfg: "Config", x: Array, width: int | None = None) -> tuple[Array, Array]:
    """Return values (falling) and indices, [..., width], of raw residuals x [..., d_in]: ReLU(x W_enc + b_enc) of the
    features in the top k or above their threshold.

    If fewer features fire, the rest have value 0 and a meaningless index. width: k or, with thresholds, the most that
    fire on any of these tokens (rounded up to a multiple of 16). Under `jit` an SAE with thresholds needs `width`, and
    keeps the largest values.
    """
    flat = jnp.asarray(x, jnp.float32).reshape(-1, cfg.d_in)
    pre, most = _candidates(params, flat)
    if width is None and cfg.activation == "topk":
        width = cfg.k
    if width is None:
        if isinstance(most, jax.core.Tracer):
            raise Mistake("with thresholds, encode needs `width` under jit: the most features that a token may have")
        width = min(cfg.features, 16 * max(1, -(-int(most) // 16)))
    values, indices = _select(params, flat, pre, width)
    return values.reshape(*x.shape[:-1], width), indices.reshape(*x.shape[:-1], width)


@partial(jax.jit, static_argnums=3)
def _select(params, x, pre, width):
    return kernels.select(pre, width, x, params["W_enc"].T, params["b_enc"])


@jax.jit
def _candidates(params: Params, x: Array) -> tuple[Array, Array]:
    """Return pre-activations [B, F], -inf below a threshold, and the most features above it on any token.

    The product has full precision: raw residuals are far from zero, and rounding to TF32 or bfloat16 would choose other
    features on each kind of chip.
    """
    pre = kernels.preactivations(*_around_center(params, x), precision=lax.Precision.HIGHEST)
    if "threshold" not in params:
        return pre, jnp.zeros((), int)
    above = pre > jnp.maximum(params["threshold"], 0)
    return jnp.where(above, pre, -jnp.inf), above.sum(1).max()


def _around_center(params: Params, x: Array) -> tuple[Array, Array, Array]:
    """Return x, encoder rows [F, d_in] and biases of the same encoder, moved to b_dec, which is close to the residuals'
    mean: (x - b_dec) W + (b_enc + b_dec W).

    Without this the values would be small differences of large products, and each chip would round them differently.
    """
    center, W_enc, b_enc = params["b_dec"], params["W_enc"], params["b_enc"]
    if center.shape != x.shape[-1:]:
        return x, W_enc.T, b_enc
    pieces = (-(-len(center) // 32), 32)
    center_in, rows = (jnp.pad(a, [(0, -len(center) % 32)] + [(0, 0)] * (a.ndim - 1)) for a in (center, W_enc))
    parts = jnp.einsum("pd,pdf->pf", center_in.reshape(pieces), rows.reshape(*pieces, -1),
                       precision=lax.Precision.HIGHEST)

    def add(sums, part):  # Knuth's sum, which keeps what rounding loses
        total, lost = sums
        new = total + part
        back = new - total
        return (new, lost + ((total - (new - back)) + (part - back))), None

    (total, lost), _ = lax.scan(add, (b_enc, jnp.zeros_like(b_enc)), parts)
    return x - center, W_enc.T, total + lost


def decode(params: Params, cfg: "Config", values: Array, indices: Array) -> Array:
    """Return raw residuals [..., d_out] from values and indices [..., n]: those of `encode`, or any other selection."""
    n = values.shape[-1]
    flat = kernels.sparse_decode(values.reshape(-1, n), indices.reshape(-1, n), params["W_dec"])
    return (flat + params["b_dec"]).reshape(*values.shape[:-1], params["b_dec"].shape[0])


def removed(params: Params, x: Array) -> Array:
    """Return the part [..., d_in] of raw residuals x that lies along removed directions, relative to the mean (see
    `normalize.py`). Zeros if none are removed. `decode` does not contain this part."""
    if "read" not in params:
        return jnp.zeros_like(x)
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return product(product(jnp.asarray(x, jnp.float32), params["read"]) + params["offset"], params["write"])


def splice(params: Params, cfg: "Config", x: Array) -> Array:
    """Return the reconstruction [..., d_out] of raw residuals x [..., d_in], in x's dtype, with the `removed` part of
    x. Works under `jit` too."""
    if cfg.activation == "topk":
        return (decode(params, cfg, *encode(params, cfg, x)) + removed(params, x)).astype(x.dtype)
    flat = jnp.asarray(x, jnp.float32).reshape(-1, cfg.d_in)
    size = min(len(flat), 512)  # tokens at a time: no [B, F] of all
    parts = jnp.pad(flat, ((0, -len(flat) % size), (0, 0))).reshape(-1, size, cfg.d_in)
    out = lax.map(partial(_reconstruct_all, params), parts).reshape(-1, params["b_dec"].shape[0])[:len(flat)]
    out = out if cfg.d_out is not None else out + removed(params, flat)
    return out.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _reconstruct_all(params, x):
    """Reconstruct x [B, d_in] from all features above their thresholds, however many there are."""
    values = jax.nn.relu(_candidates(params, x)[0])
    return jnp.matmul(values, params["W_dec"], precision=lax.Precision.HIGHEST) + params["b_dec"]


def change(params: Params, cfg: "Config", x: Array, features: Array, scale: Array, add: Array) -> Array:
    """Return raw residuals x [..., d_in] with each value v of `features` [n] changed to scale * v + add.

    scale, add: [..., n], broadcast against x's tokens. Only decoder rows times the change of the values are added to x:
    the part of x that the SAE does not reconstruct stays. With scale = 1 and add = 0, x keeps all its bits.
    """
    flat = jnp.asarray(x, jnp.float32).reshape(-1, cfg.d_in)
    v = _values_of(params, cfg, flat, features).reshape(*x.shape[:-1], len(features))
    by = jnp.matmul((scale - 1) * v + add, params["W_dec"][features], precision=lax.Precision.HIGHEST)
    return jnp.where(jnp.any(by != 0, -1, keepdims=True), x + by.astype(x.dtype), x)


def _values_of(params, cfg, x, features):
    """Return the values [B, n] that `encode` gives to `features` [n] at x [B, d_in].

    A feature is in the top k if fewer than k features come before it. Counting these costs far less than a top-k.
    """
    pre, _ = _candidates(params, x)
    own = lax.stop_gradient(pre[:, features])
    x, rows, bias = _around_center(params, x)
    v = jax.nn.relu(jnp.matmul(x, rows[features].T, precision=lax.Precision.HIGHEST) + bias[features])
    if cfg.activation != "topk":
        return jnp.where(own > 0, v, 0)                          # below its threshold, `own` is -inf
    return jnp.where(_ranks(pre, own, features) < cfg.k, v, 0)


def _ranks(pre, own, features, lanes=128):
    """Count how many of pre [B, F] come before own [B, n] of `features` [n] in each row. Ties keep the lower index
    first.

    The sums run over pieces of `lanes` columns, in vectors: a CPU sums along a row one by one, 100 times as slowly.
    """
    pre = jnp.pad(pre, ((0, 0), (0, -pre.shape[1] % lanes)), constant_values=-jnp.inf)

    def add(i, counts):
        piece = lax.dynamic_slice_in_dim(pre, i * lanes, lanes, 1)[:, None]
        left = i * lanes + jnp.arange(lanes) < features[:, None]
        return counts + ((piece > own[:, :, None]) | ((piece == own[:, :, None]) & left))

    counts = jnp.zeros((*own.shape, lanes), jnp.int32)
    return lax.fori_loop(0, pre.shape[1] // lanes, add, counts).sum(-1)


class Evaluation(NamedTuple):
    """How well an SAE reconstructs raw residuals x, summed over all tokens in float64. For a transcoder x is the
    residual that it has to write. The `removed` part of x does not count."""

    tokens: int
    fvu: float  # raw space: squared error / squared deviation from the mean; huge dimensions decide
    fvu_standardized: float  # the same after scaling each dimension to unit variance: the space of training
    l0: float  # features with value > 0 per token
    cosine: float  # mean over tokens of cos(x, x_hat), raw space, mean not removed
    dead: float  # fraction of features that never fired on these tokens
    variance_explained: float  # as in the FLUX SAE paper: mean over dimensions of the squared correlation; NOT 1 - fvu
    density: np.ndarray  # [F], fraction of tokens on which each feature fires


def evaluate(params: Params, cfg: "Config", batches: Array | Iterable[Array]) -> Evaluation:
    """Return statistics of raw residuals, one array [..., C] or a stream of them. Raises Mistake if there are none.
    Memory does not grow with the stream."""
    total = {}
    for batch in [batches] if hasattr(batches, "shape") else batches:
        total = added(total, params, cfg, batch)
    return evaluation(total)


def added(total: dict[str, Any], params: Params, cfg: "Config", batch: Array) -> dict[str, Any]:
    """Return the sums that `evaluation` needs: `total` (at first {}) and those of a batch [..., C]."""
    rows = np.asarray(batch, np.float32).reshape(-1, cfg.columns)
    for i in range(0, len(rows), 4096):                          # so that [4096, F] bounds the memory
        x, y = cfg.split(rows[i : i + 4096])
        # Sums of squares around a point near the mean: around zero, float32 would lose the variance in the mean.
        shift = total.get("shift", y.mean(0, dtype=np.float64).astype(np.float32))
        sums = _sums(params, cfg, y - removed(params, y), *encode(params, cfg, x), shift)
        total = {name: total.get(name, 0) + np.asarray(value, np.float64) for name, value in sums.items()}
        total["shift"] = shift
    return total


@jax.jit(static_argnums=1)
def _sums(params, cfg, x, values, indices, shift):
    x_hat = decode(params, cfg, values, indices)
    a, b = x - shift, x_hat - shift
    per_dimension = {"x": a, "xx": a * a, "y": b, "yy": b * b, "xy": a * b, "error": (x - x_hat) ** 2}
    sums = {name: jnp.sum(value, axis=0) for name, value in per_dimension.items()}
    fired = jnp.zeros(cfg.features, jnp.int32).at[indices].add(values > 0)
    return sums | {"tokens": jnp.asarray(len(x)), "fired": fired, "cosine": jnp.sum(cosine(x, x_hat))}


def evaluation(total: dict[str, Any]) -> Evaluation:
    """Return the statistics of all that was `added`. Raises Mistake if that is nothing. Warns about an FVU above 2."""
    if not total:
        raise Mistake("no residuals to evaluate on")
    n = float(total["tokens"])
    var_x, var_y = total["xx"] - total["x"] ** 2 / n, total["yy"] - total["y"] ** 2 / n
    covariance, alive = total["xy"] - total["x"] * total["y"] / n, var_x > 0
    both = alive & (var_y > 0)
    correlation = np.where(both, covariance / np.sqrt(np.where(both, var_x * var_y, 1)), 0)
    fvu = float(np.mean(total["error"][alive] / var_x[alive])) if alive.any() else 0.0
    if fvu > 2:
        warnings.warn(f"FVU {fvu:.1f}: the reconstruction is far worse than the mean. Are these residuals of the "
                      "model, layer and site that the SAE was trained on?", stacklevel=3)
    return Evaluation(
        tokens=int(n),
        fvu=float(total["error"].sum() / max(var_x.sum(), 1e-300)),
        fvu_standardized=fvu,
        l0=float(total["fired"].sum() / n),
        cosine=float(total["cosine"] / n),
        dead=float(np.mean(total["fired"] == 0)),
        variance_explained=float(np.mean(correlation**2)),
        density=total["fired"] / n,
    )


def cosine(a: Array, b: Array) -> Array:
    """Return the cosine [B] of each row of a [B, D] and b [B, D]; 0 if one of them is zero."""
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    return jnp.sum(a * b, axis=1) / jnp.maximum(norms, 1e-30)
