"""Exact top-k and the sparse encoder and decoder of a TopK SAE, forward and backward, in plain XLA.

Nothing else must be copied with this file. B batch, D model width, F features, k active features.

A TopK SAE touches k of its F features per row, so a dense backward pass wastes a factor F/k of the work and builds
several [B, F] arrays. Here the only [B, F] array is the encoder's own output. Everything else is one of three
operations that are each other's derivatives (names as in sparse linear algebra), with features as *rows*, [F, D]:

    spmm   out[b]         = sum_j values[b, j] * rows[indices[b, j]]                    [B, k], [F, D] -> [B, D]
    sddmm  out[b, j]      = x[b] . rows[indices[b, j]]                                  [B, D], [F, D] -> [B, k]
    outer  out[f]         = sum_{b, j: indices[b, j] = f} values[b, j] * x[b]           [B, k], [B, D] -> [F, D]

Each walks the k columns in a scan whose temporaries are [B, D]. Measured against gathering all of [B, k, D] at once
this is 2 to 9 times as fast on two CPU cores (k = 32; B, D, F = 4096, 128, 2048 and 1024, 3072, 16384), and against a
scatter sorted by feature 3 to 7 times. (On a CPU `outer` walks the rows of the batch instead: 1.2 to 2.4 times as fast
again.) The whole gradient takes half the time of the dense one.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax


def topk(x: Array, k: int) -> tuple[Array, Array]:
    """The k largest of the last axis, exact, in falling order: x [..., F] -> values, indices [..., k].

    Never `approx_max_k`: its recall is below one. Of equal values the one with the lower index comes first.
    """
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"k = {k} of F = {x.shape[-1]} features; it must lie in 1..F")
    return tuple(lax.platform_dependent(x, cpu=lambda x: _topk_of_blocks(x, k), default=lambda x: lax.top_k(x, k)))


def _topk_of_blocks(x: Array, k: int, size: int = 16) -> list[Array]:
    """`topk` in two stages, where that is faster: the k largest of all lie in the k blocks with the largest maxima.
    Blocks stay in order, so that of equal values the one with the lower index still comes first."""
    if x.shape[-1] % size or x.shape[-1] < 8 * size * k:
        return list(lax.top_k(x, k))
    blocks = x.reshape(*x.shape[:-1], -1, size)
    best = jnp.sort(lax.top_k(blocks.max(-1), k)[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, best[..., None], -2).reshape(*x.shape[:-1], k * size)
    values, at = lax.top_k(candidates, k)
    return [values, jnp.take_along_axis(best, at // size, -1) * size + at % size]


def _spmm(values: Array, indices: Array, rows: Array) -> Array:
    """values, indices [B, k], rows [F, D] -> [B, D], summed in float32 whatever the inputs are."""

    def add(total, column):
        value, index = column
        return total + value[:, None] * rows[index], None

    dtype = jnp.promote_types(values.dtype, rows.dtype)
    start = jnp.zeros((values.shape[0], rows.shape[1]), jnp.promote_types(dtype, jnp.float32))
    # Eight at a time, since XLA reads and writes the total once for all of them
    return lax.scan(add, start, (values.T, indices.T), unroll=8)[0].astype(dtype)


def _sddmm(x: Array, rows: Array, indices: Array) -> Array:
    """x [B, D], rows [F, D], indices [B, k] -> [B, k]."""
    return lax.map(lambda index: jnp.sum(x * rows[index], axis=-1), indices.T).T


def _outer(values: Array, indices: Array, x: Array, features: int) -> Array:
    """values, indices [B, k], x [B, D] -> [F, D], summed in float32; repeated indices add up."""

    def add(total, part):
        value, index, row = part
        return total.at[index].add(value[:, None] * row), None

    def by_row(total, values, indices, x):  # what is added stays in a CPU's cache
        return lax.scan(add, total, (values, indices, x))[0]

    def by_column(total, values, indices, x):
        return lax.scan(lambda total, part: add(total, (*part, x)), total, (values.T, indices.T))[0]

    dtype = jnp.promote_types(jnp.promote_types(values.dtype, x.dtype), jnp.float32)
    # Not a constant, which XLA would build once for several of these sums and then copy for each
    start = jnp.full((features, x.shape[1]), 0 * values[0, 0], dtype)
    return lax.platform_dependent(start, values, indices, x, cpu=by_row, default=by_column)


@jax.custom_vjp
def sparse_decode(values: Array, indices: Array, W_dec: Array) -> Array:
    """values, indices [B, k], W_dec [F, D] -> [B, D]: each row's k decoder rows, weighted and summed.

    Equals `sparse_decode_dense`, gradients included; those for `values` and `W_dec` touch active features only.
    """
    return _spmm(values, indices, W_dec)


def _sparse_decode_forward(values, indices, W_dec):
    return _spmm(values, indices, W_dec), (values, indices, W_dec)


def _sparse_decode_backward(residuals, g):
    values, indices, W_dec = residuals
    d_values = _sddmm(g, W_dec, indices).astype(values.dtype)
    return d_values, None, _outer(values, indices, g, W_dec.shape[0]).astype(W_dec.dtype)


sparse_decode.defvjp(_sparse_decode_forward, _sparse_decode_backward)


def by_rows(function, rows: Array, size: int = 128) -> Array:
    """function(rows) of an array [F, ...], where the result of a row needs that row alone. On a CPU piece by piece and
    in place: otherwise XLA may write to fresh memory, which the system has to clear first; that costs more than the
    work itself."""
    return lax.platform_dependent(rows, cpu=lambda rows: _by_rows(function, rows, size), default=function)


def _by_rows(function, rows, size):
    def piece(start, size, rows):
        new = function(lax.dynamic_slice_in_dim(rows, start, size))
        return lax.dynamic_update_slice_in_dim(rows, new, start, 0)

    size = min(size, len(rows))
    whole, left = divmod(len(rows), size)
    rows = lax.fori_loop(0, whole, lambda i, rows: piece(i * size, size, rows), rows)
    return piece(whole * size, left, rows) if left else rows


def preactivations(x: Array, W_enc: Array, b_enc: Array) -> Array:
    """x [B, D], W_enc [F, D], b_enc [F] -> [B, F], the one array of that size. Not differentiable: see `select`.

    W_enc holds features as rows, so that its gradient is row-sparse like W_dec's; the product is as fast either way.
    HIGH, because a TPU's default rounds float32 to bfloat16, which reorders the top-k. Its three passes err by 1e-5;
    HIGHEST takes six, and half a minute to compile.
    """
    x, W_enc, b_enc = lax.stop_gradient((x, W_enc, b_enc))
    product = lax.dot_general(x, W_enc, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGH)
    # In place, or every reader of the sum would get a [B, F] of its own
    return by_rows(lambda rows: rows + b_enc, product)


def select(pre: Array, k: int, x: Array, W_enc: Array, b_enc: Array) -> tuple[Array, Array]:
    """ReLU of the top k of `pre` [B, F] -> values, indices [B, k]; differentiable in x, W_enc, b_enc, not in `pre`.

    `pre` is `preactivations(x, W_enc, b_enc)`, perhaps with entries masked by -inf (which become 0 without gradient).
    The same `pre` can be selected from more than once.
    """
    values, indices = topk(lax.stop_gradient(pre), k)
    return _attach(jax.nn.relu(values), indices, x, W_enc, b_enc), indices


def sparse_encode(x: Array, W_enc: Array, b_enc: Array, k: int) -> tuple[Array, Array]:
    """x [B, D], W_enc [F, D], b_enc [F] -> values, indices [B, k]: ReLU(top-k(x W_enc^T + b_enc)).

    Equals `sparse_encode_dense`, gradients included; those for W_enc and b_enc touch active features only.
    """
    return select(preactivations(x, W_enc, b_enc), k, x, W_enc, b_enc)


@jax.custom_vjp
def _attach(values: Array, indices: Array, x: Array, W_enc: Array, b_enc: Array) -> Array:
    """`values` [B, k] as they are, with the derivative of ReLU(x[b] . W_enc[indices[b, j]] + b_enc[indices[b, j]])."""
    return values


def _attach_forward(values, indices, x, W_enc, b_enc):
    return values, (values > 0, indices, x, W_enc, b_enc)


def _attach_backward(residuals, g):
    active, indices, x, W_enc, b_enc = residuals
    g = jnp.where(active, g, 0)
    d_W = _outer(g, indices, x, W_enc.shape[0]).astype(W_enc.dtype)
    d_b = jnp.zeros_like(b_enc).at[indices.reshape(-1)].add(g.reshape(-1).astype(b_enc.dtype))
    return jnp.zeros_like(g), None, _spmm(g, indices, W_enc).astype(x.dtype), d_W, d_b


_attach.defvjp(_attach_forward, _attach_backward)


def sparse_decode_dense(values: Array, indices: Array, W_dec: Array) -> Array:
    """The plain reference of `sparse_decode`: scatter the values to [B, F], then one dense product."""
    dense = jnp.zeros((values.shape[0], W_dec.shape[0]), values.dtype)
    dense = dense.at[jnp.arange(values.shape[0])[:, None], indices].add(values)
    return jnp.matmul(dense, W_dec, precision=lax.Precision.HIGHEST)


def sparse_encode_dense(x: Array, W_enc: Array, b_enc: Array, k: int) -> tuple[Array, Array]:
    """The plain reference of `sparse_encode`: JAX's own derivative, through [B, F]."""
    values, indices = topk(jnp.matmul(x, W_enc.T, precision=lax.Precision.HIGHEST) + b_enc, k)
    return jax.nn.relu(values), indices
