"""Compute exact top-k and the sparse encoder and decoder of a TopK SAE, forward and backward, in plain XLA.

Copy this file alone; for a TPU also copy `kernels_tpu.py`, for a GPU `kernels_gpu.py`, which do the same in Pallas.

B batch, D model width, F features, k active features.

A TopK SAE uses k of its F features per row, so a dense backward pass wastes a factor F/k of the work and builds several
[B, F] arrays. Here the only [B, F] array is the encoder's output (on a CPU, 512 rows of it). Everything else is one of
three operations that are each other's derivatives (named as in sparse linear algebra), with features as *rows*, [F, D]:

    spmm   out[b]         = sum_j values[b, j] * rows[indices[b, j]]                    [B, k], [F, D] -> [B, D]
    sddmm  out[b, j]      = x[b] . rows[indices[b, j]]                                  [B, D], [F, D] -> [B, k]
    outer  out[f]         = sum_{b, j: indices[b, j] = f} values[b, j] * x[b]           [B, k], [B, D] -> [F, D]

Each scans over the k columns with temporaries [B, D]. On two CPU cores (k = 32; B, D, F = 4096, 128, 2048 and 1024,
3072, 16384) this is 2 to 9 times as fast as gathering [B, k, D] at once, and 3 to 7 times as fast as a scatter sorted
by feature. On a CPU, `outer` scans over the batch rows instead (1.2 to 2.4 times as fast) or, for large F x D, over the
entries sorted by feature (a whole step gains 7 %), and `sddmm` scans over the rows (up to 1.8 times as fast). The whole
gradient takes half the time of the dense one. On TPUs and GPUs, `plan` chooses between Pallas kernels and dense
products. For this it needs the mesh: one device, or the devices over which F is split.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec


def topk(x: Array, k: int, mesh: Mesh | None = None) -> tuple[Array, Array]:
    """Return the k largest of the last axis, exact, in descending order: x [..., F] -> values, indices [..., k].

    Ties keep the lower index first. This never uses `approx_max_k`, whose recall is below one.
    mesh: the devices over which F is split, as for `sparse_decode`. Each finds its own k and sends only those.
    """
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"k = {k} of F = {x.shape[-1]} features; k must lie in 1..F")
    axis = _axis(mesh)
    if axis is None:
        return tuple(_topk(x, k, mesh))

    def here(x):
        values, indices = _topk(x, min(k, x.shape[-1]), mesh)
        indices = indices + lax.axis_index(axis) * x.shape[-1]
        values, indices = (lax.all_gather(a, axis, axis=x.ndim - 1, tiled=True) for a in (values, indices))
        values, place = lax.top_k(values, k)
        return values, jnp.take_along_axis(indices, place, -1)

    split = PartitionSpec(*[None] * (x.ndim - 1), axis)
    return jax.shard_map(here, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False)(x)


def _topk(x, k, mesh):
    """Compute `topk` on one device. Without a mesh use `lax.top_k` on a TPU: its compiler can split only that one."""
    if kernel := _gpu_kernel(mesh):
        return kernel.topk(x, k)
    of_blocks = lambda size: lambda x: _topk_of_blocks(x, k, size)
    whole = lambda x: list(lax.top_k(x, k))
    return lax.platform_dependent(x, cpu=of_blocks(16), tpu=of_blocks(128) if mesh else whole, default=of_blocks(32))


def _gpu_kernel(mesh):
    """Return the module `kernels_gpu` if the mesh is of GPUs for which it compiles, else None."""
    if mesh is None or mesh.devices.flat[0].platform != "gpu":
        return None
    import kernels_gpu
    return kernels_gpu if kernels_gpu.supported(mesh.devices.flat[0]) else None


def _topk_of_blocks(x: Array, k: int, size: int) -> list[Array]:
    """Compute `topk` in two stages if that is faster: the k largest values lie in the k blocks with the largest maxima.
    Blocks stay in order, so that ties keep the lower index first."""
    if x.shape[-1] % size or x.shape[-1] < max(128, 2 * size) * k:
        return list(lax.top_k(x, k))
    blocks = x.reshape(*x.shape[:-1], -1, size)
    best = jnp.sort(lax.top_k(blocks.max(-1), k)[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, best[..., None], -2).reshape(*x.shape[:-1], k * size)
    values, at = lax.top_k(candidates, k)
    return [values, jnp.take_along_axis(best, at // size, -1) * size + at % size]


def _spmm(values: Array, indices: Array, rows: Array) -> Array:
    """values, indices [B, k], rows [F, D] -> [B, D]. The sum is at least float32 for every input type."""

    def add(total, column):
        value, index = column
        return total + value[:, None] * rows[index], None

    dtype = jnp.promote_types(values.dtype, rows.dtype)
    start = jnp.zeros((values.shape[0], rows.shape[1]), jnp.promote_types(dtype, jnp.float32))
    # Eight columns at a time: XLA then reads and writes the total once for all eight
    return lax.scan(add, start, (values.T, indices.T), unroll=8)[0].astype(dtype)


def _sddmm(x: Array, rows: Array, indices: Array) -> Array:
    """x [B, D], rows [F, D], indices [B, k] -> [B, k]."""
    by_row = lambda x, rows, indices: lax.map(lambda part: rows[part[1]] @ part[0], (x, indices), batch_size=8)
    by_column = lambda x, rows, indices: lax.map(lambda index: jnp.sum(x * rows[index], axis=-1), indices.T).T
    return lax.platform_dependent(x, rows, indices, cpu=by_row, default=by_column)


def _outer(values: Array, indices: Array, x: Array, features: int) -> Array:
    """values, indices [B, k], x [B, D] -> [F, D], summed in float32. Repeated indices add up."""

    def add(total, part):
        value, index, row = part
        return total.at[index].add(value[:, None] * row), None

    def by_row(total, values, indices, x):  # the added row stays in a CPU's cache
        return lax.scan(add, total, (values, indices, x))[0]

    def by_feature(total, values, indices, x):  # the row of the total stays in the cache, and x if it fits
        feature, place = _by_feature(indices, features)
        value, row = values.reshape(-1)[place], place // indices.shape[1]

        def add_entry(i, total):
            new = lax.dynamic_slice_in_dim(total, feature[i], 1) + value[i] * lax.dynamic_slice_in_dim(x, row[i], 1)
            return lax.dynamic_update_slice_in_dim(total, new, feature[i], 0)

        return lax.fori_loop(0, len(place), add_entry, total, unroll=2)

    def by_column(total, values, indices, x):
        return lax.scan(lambda total, part: add(total, (*part, x)), total, (values.T, indices.T))[0]

    def by_product(total, values, indices, x):  # a GPU scatter adds in random order: different bits each time
        return total + _outer_dense(values, indices, x, features).astype(total.dtype)

    dtype = jnp.promote_types(jnp.promote_types(values.dtype, x.dtype), jnp.float32)
    # A constant is no use: XLA would build it once for several sums and copy it for each
    start = jnp.full((features, x.shape[1]), 0 * values[0, 0], dtype)
    # by_row: if all rows fit the cache, or if rows are so short that a loop over entries costs more than the additions
    on_cpu = by_feature if start.size >= 2**22 and x.shape[1] >= 512 else by_row
    return lax.platform_dependent(start, values, indices, x, cpu=on_cpu, tpu=by_column, default=by_product)


def _by_feature(indices: Array, features: int) -> tuple[Array, Array]:
    """[B, k] -> sorted features, and the place of each in the flattened `indices`, both [B k]. XLA's sort of two arrays
    takes five times as long on a CPU, so both are packed into one number if 32 bits suffice."""
    flat, places = indices.reshape(-1), lax.iota(jnp.int32, indices.size)
    bits = (indices.size - 1).bit_length()
    if (features - 1).bit_length() + bits > 32:
        return tuple(lax.sort((flat, places), num_keys=1))
    key = lax.sort((flat.astype(jnp.uint32) << bits) | places.astype(jnp.uint32))
    return (key >> bits).astype(jnp.int32), (key & (2**bits - 1)).astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def sparse_decode(values: Array, indices: Array, W_dec: Array, mesh: Mesh | None = None) -> Array:
    """Sum the k weighted decoder rows of each token: values, indices [B, k], W_dec [F, D] -> [B, D].

    Equals the dense product, gradients included. The gradients of `values` and `W_dec` touch active features only.
    mesh: the devices over which F is split, on one axis (or the only device); `plan` then chooses the method. None:
    plain XLA.
    """
    return _decode(values, indices, W_dec, mesh)[0]


def _sparse_decode_forward(values, indices, W_dec, mesh):
    out, entries = _decode(values, indices, W_dec, mesh)
    return out, (values, indices, W_dec, entries)


def _sparse_decode_backward(mesh, residuals, g):
    values, indices, W_dec, entries = residuals
    d_values, d_W = _decode_gradients(values, indices, W_dec, entries, g, mesh)
    return d_values.astype(values.dtype), None, d_W.astype(W_dec.dtype)


sparse_decode.defvjp(_sparse_decode_forward, _sparse_decode_backward)


def by_rows(function: Callable[[Array], Array], rows: Array, size: int = 128) -> Array:
    """Return function(rows) for rows [F, ...], where each result row depends on its own row only.

    On a CPU this works in place, `size` rows at a time. Otherwise XLA may write to new memory, which the system must
    clear first; that costs more than the work itself.
    """
    return lax.platform_dependent(rows, cpu=lambda rows: _by_rows(function, rows, size), default=function)


def _by_rows(function, rows, size):
    def piece(start, size, rows):
        new = function(lax.dynamic_slice_in_dim(rows, start, size))
        return lax.dynamic_update_slice_in_dim(rows, new, start, 0)

    size = min(size, len(rows))
    whole, left = divmod(len(rows), size)
    rows = lax.fori_loop(0, whole, lambda i, rows: piece(i * size, size, rows), rows)
    return piece(whole * size, left, rows) if left else rows


def preactivations(x: Array, W_enc: Array, b_enc: Array, precision: lax.Precision = lax.Precision.HIGH) -> Array:
    """Return x W_enc^T + b_enc: x [B, D], W_enc [F, D], b_enc [F] -> [B, F], the only array of that size.

    It has no gradient: use `select` on it, or `sparse_encode` for both steps. W_enc has features as rows, so that its
    gradient is row-sparse like that of W_dec; the product is equally fast. precision: a TPU's default rounds float32 to
    bfloat16, which reorders the top-k. HIGH has errors of 1e-5 on TPUs (three passes) and 5e-4 on GPUs (TF32), which is
    enough for training on standardized residuals. HIGHEST is float32 everywhere.
    """
    x, W_enc, b_enc = lax.stop_gradient((x, W_enc, b_enc))
    product = lax.dot_general(x, W_enc, (((1,), (1,)), ((), ())), precision=precision)
    # In place; otherwise every use of the sum would get its own [B, F]
    return by_rows(lambda rows: rows + b_enc, product)


def select(pre: Array, k: int, x: Array, W_enc: Array, b_enc: Array) -> tuple[Array, Array]:
    """Return the ReLU of the top k of `pre` [B, F]: values, indices [B, k], with gradients for x, W_enc and b_enc.

    `pre` is `preactivations(x, W_enc, b_enc)`. Entries may be masked with -inf: they become 0 and have no gradient.
    Several calls may select from the same `pre`.
    """
    values, indices = topk(lax.stop_gradient(pre), k)
    return _attach(jax.nn.relu(values), indices, x, W_enc, b_enc, None), indices


def sparse_encode(x: Array, W_enc: Array, b_enc: Array, k: int, mesh: Mesh | None = None) -> tuple[Array, Array]:
    """Return ReLU(top-k(x W_enc^T + b_enc)): x [B, D], W_enc [F, D], b_enc [F] -> values, indices [B, k].

    Equals the dense product, gradients included. The gradients of W_enc and b_enc touch active features only. A feature
    with bias -inf has value 0 and no gradient. mesh: as for `sparse_decode`.
    """
    values, indices = _largest(*lax.stop_gradient((x, W_enc, b_enc)), k, mesh)
    return _attach(jax.nn.relu(values), indices, x, W_enc, b_enc, mesh), indices


def _largest(x, W_enc, b_enc, k, mesh, size=512):
    """Return the top k of `preactivations`. On a CPU take `size` rows at a time: this needs less new memory (5 % less
    time at B, D, F = 2048, 768, 16384), and with fewer rows the product gets slower."""
    def whole(x, W_enc, b_enc):
        return topk(preactivations(x, W_enc, b_enc), k, mesh)

    def in_pieces(x, W_enc, b_enc):
        parts = lax.map(lambda x: whole(x, W_enc, b_enc), x.reshape(-1, size, x.shape[1]))
        return tuple(part.reshape(len(x), k) for part in parts)

    on_cpu = whole if len(x) % size or _axis(mesh) else in_pieces
    return lax.platform_dependent(x, W_enc, b_enc, cpu=on_cpu, default=whole)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attach(values, indices, x: Array, W_enc: Array, b_enc: Array, mesh: Mesh | None) -> Array:
    """Return `values` [B, k], with the derivative of ReLU(x[b] . W_enc[indices[b, j]] + b_enc[indices[b, j]])."""
    return values


def _attach_forward(values, indices, x, W_enc, b_enc, mesh):
    return values, (values > 0, indices, x, W_enc, b_enc)


def _attach_backward(mesh, residuals, g):
    active, indices, x, W_enc, b_enc = residuals
    d_x, d_W, d_b = _encode_gradients(jnp.where(active, g, 0), indices, x, W_enc, mesh)
    return jnp.zeros_like(g), None, d_x.astype(x.dtype), d_W.astype(W_enc.dtype), d_b.astype(b_enc.dtype)


_attach.defvjp(_attach_forward, _attach_backward)


@jax.custom_vjp
def gather(vector: Array, indices: Array) -> Array:
    """Return vector[indices]: vector [F], indices [B, k] -> [B, k]. Its gradient has the same bits in every run, which
    the gradient of plain indexing does not have on GPUs."""
    return vector[indices]


gather.defvjp(lambda vector, indices: (vector[indices], (indices, vector)),
              lambda residuals, g: (_total(g, residuals[0], len(residuals[1])).astype(residuals[1].dtype), None))


def _total(values: Array, indices: Array, features: int) -> Array:
    """values, indices [B, k] -> [F]: the sum of each feature's values, always in the same order."""
    def by_entry(values, indices):
        return jnp.zeros(features, values.dtype).at[indices.reshape(-1)].add(values.reshape(-1))

    return lax.platform_dependent(values, indices, cpu=by_entry, tpu=by_entry,
                                  default=lambda values, indices: _scattered(values, indices, features).sum(0))


# ---- choose the method of the three operations ----------------------------------------------------------------------


def plan(mesh: Mesh | None, values: Array, rows: Array) -> Any:
    """Return the method for products of values [B, k] and one device's rows [F, D]: "scan", or, on a TPU or GPU with a
    mesh, "dense" or the `Kernels` of `kernels_tpu` or `kernels_gpu` (see their `plan`)."""
    platform = mesh.devices.flat[0].platform if mesh else None
    if platform == "tpu":
        import kernels_tpu as module
    elif platform == "gpu":
        import kernels_gpu as module
    else:
        return "scan"
    return module.plan(mesh.devices.flat[0], values, rows, mesh.size)


class Plain(NamedTuple):
    """The three operations in plain XLA, and what is made of them. `Kernels` have the same three methods."""

    spmm: Callable
    sddmm: Callable
    outer: Callable

    def decode(self, values: Array, indices: Array, rows: Array) -> tuple[Array, Any]:
        """Return the output [B, D] and what `decode_gradients` wants to have of it."""
        return self.spmm(values, indices, rows), None

    def decode_gradients(self, values, indices, rows, entries, g) -> tuple[Array, Array]:
        """Return the gradients of values [B, k] and rows [F, D]."""
        return self.sddmm(g, rows, indices), self.outer(values, indices, g, len(rows))

    def encode_gradients(self, g, indices, x, rows) -> tuple[Array, Array, Array]:
        """g, indices [B, k], x [B, D], rows [F, D] -> the gradients of x, rows and the bias [F]."""
        F = len(rows)
        return self.spmm(g, indices, rows), self.outer(g, indices, x, F), _total(g, indices, F)


def _decode(values, indices, rows, mesh):
    """Return the output [B, D] and, if kernels compute it, the sorted entries, which the gradients need too."""
    def here(values, indices, rows):
        how, values, indices, _ = _prepared(mesh, values, indices, rows)
        out, entries = how.decode(values, indices, rows)
        return _summed(mesh, out), entries

    return _on_each(mesh, here, (WHOLE, WHOLE, SPLIT), (WHOLE, SPLIT))(values, indices, rows)


def _decode_gradients(values, indices, rows, entries, g, mesh):
    """Return the gradients of values [B, k] and rows [F, D]."""
    def here(values, indices, rows, entries, g):
        how, values, indices, mine = _prepared(mesh, values, indices, rows)
        d_values, d_rows = how.decode_gradients(values, indices, rows, entries, g)
        return _summed(mesh, d_values if mine is None else jnp.where(mine, d_values, 0)), d_rows

    specs = (WHOLE, WHOLE, SPLIT, SPLIT, WHOLE), (WHOLE, SPLIT)
    return _on_each(mesh, here, *specs)(values, indices, rows, entries, g)


def _encode_gradients(g, indices, x, rows, mesh):
    """g, indices [B, k], x [B, D], rows [F, D] -> the gradients of x, rows and the bias [F]."""
    def here(g, indices, x, rows):
        how, g, indices, _ = _prepared(mesh, g, indices, rows)
        d_x, d_rows, d_bias = how.encode_gradients(g, indices, x, rows)
        return _summed(mesh, d_x), d_rows, d_bias

    specs = (WHOLE, WHOLE, WHOLE, SPLIT), (WHOLE, SPLIT, SPLIT)
    return _on_each(mesh, here, *specs)(g, indices, x, rows)


WHOLE, SPLIT = False, True                                       # is an array split over the mesh, on its axis 0?


def _axis(mesh):
    """Return the mesh axis over which features are split, or None if one device has all features."""
    if mesh is None or mesh.size == 1:
        return None
    (axis,) = mesh.axis_names
    return axis


def _on_each(mesh, function, inputs, outputs):
    """Return `function`, mapped over each device's own rows. The compiler alone could not split a kernel, and would add
    a sum over all devices after each of the k gathers."""
    axis = _axis(mesh)
    if axis is None:
        return function
    specs = [tuple(PartitionSpec(axis) if split else PartitionSpec() for split in ways) for ways in (inputs, outputs)]
    return jax.shard_map(function, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def _summed(mesh, array):
    return array if _axis(mesh) is None else lax.psum(array, _axis(mesh))


def _prepared(mesh, values, indices, rows):
    """Return (method, values, indices into this device's rows, mask of its own entries or None for all). Entries of
    other devices get the value 0, and the index F for kernels, else 0."""
    how, axis = plan(mesh, values, rows), _axis(mesh)
    how = PLAIN.get(how, how)
    if axis is None:
        return how, values, indices, None
    index = indices - lax.axis_index(axis) * len(rows)
    mine = (index >= 0) & (index < len(rows))
    nowhere = 0 if isinstance(how, Plain) else len(rows)
    return how, jnp.where(mine, values, 0), jnp.where(mine, index, nowhere), mine


def _scattered(values, indices, F):
    """values, indices [B, k] -> dense [B, F]."""
    return jnp.zeros((len(values), F), values.dtype).at[jnp.arange(len(values))[:, None], indices].add(values)


def _spmm_dense(values, indices, rows):
    return jnp.matmul(_scattered(values, indices, len(rows)), rows, precision=lax.Precision.HIGH)


def _sddmm_dense(x, rows, indices):
    return jnp.take_along_axis(jnp.matmul(x, rows.T, precision=lax.Precision.HIGH), indices, axis=1)


def _outer_dense(values, indices, x, F):
    return jnp.matmul(_scattered(values, indices, F).T, x, precision=lax.Precision.HIGH)


PLAIN = {"scan": Plain(_spmm, _sddmm, _outer), "dense": Plain(_spmm_dense, _sddmm_dense, _outer_dense)}
