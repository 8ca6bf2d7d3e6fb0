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
scatter sorted by feature 3 to 7 times. The whole gradient takes half the time of the dense one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


def topk(x: Array, k: int) -> tuple[Array, Array]:
    """The k largest of the last axis, exact, in falling order: x [..., F] -> values, indices [..., k].

    Never `approx_max_k`: its recall is below one. Of equal values the one with the lower index comes first.
    """
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"k = {k} of F = {x.shape[-1]} features; it must lie in 1..F")
    return lax.top_k(x, k)


def _spmm(values: Array, indices: Array, rows: Array) -> Array:
    """values, indices [B, k], rows [F, D] -> [B, D], summed in float32 whatever the inputs are."""

    def add(total, column):
        value, index = column
        return total + value[:, None] * rows[index], None

    dtype = jnp.promote_types(values.dtype, rows.dtype)
    start = jnp.zeros((values.shape[0], rows.shape[1]), jnp.promote_types(dtype, jnp.float32))
    return lax.scan(add, start, (values.T, indices.T))[0].astype(dtype)


def _sddmm(x: Array, rows: Array, indices: Array) -> Array:
    """x [B, D], rows [F, D], indices [B, k] -> [B, k]."""
    return lax.map(lambda index: jnp.sum(x * rows[index], axis=-1), indices.T).T


def _outer(values: Array, indices: Array, x: Array, features: int) -> Array:
    """values, indices [B, k], x [B, D] -> [F, D], summed in float32; repeated indices add up."""

    def add(total, column):
        value, index = column
        return total.at[index].add(value[:, None] * x), None

    dtype = jnp.promote_types(values.dtype, x.dtype)
    start = jnp.zeros((features, x.shape[1]), jnp.promote_types(dtype, jnp.float32))
    return lax.scan(add, start, (values.T, indices.T))[0]


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


def by_rows(function, tree, inputs, size: int = 128):
    """function(tree, inputs) → the new tree, for pytrees of [F, ...] arrays and of scalars, where the result of a row
    needs that row alone (and scalars). On a CPU piece by piece: all that is done to a row then happens in the cache;
    memory is read and written once, not once for every operation."""
    return lax.platform_dependent(tree, inputs, cpu=lambda t, x: _by_rows(function, t, x, size), default=function)


def _by_rows(function, tree, inputs, size):
    rows = max(leaf.shape[0] for leaf in jax.tree.leaves(inputs) if leaf.ndim)
    if rows <= size:
        return function(tree, inputs)

    def piece(start, size, tree):
        cut = lambda a: lax.dynamic_slice_in_dim(a, start, size) if a.ndim else a
        paste = lambda a, new: lax.dynamic_update_slice_in_dim(a, new, start, 0) if a.ndim else a
        # A branch that is always taken, so that XLA does not fuse reading and writing, for which it would copy arrays.
        old = jax.tree.map(cut, (tree, inputs))
        return jax.tree.map(paste, tree, lax.cond(start >= 0, function, lambda tree, inputs: tree, *old))

    left = rows % size
    done = lax.fori_loop(0, rows // size, lambda i, tree: piece(i * size, size, tree), tree)
    scalars = function(jax.tree.map(lambda a: a[:1] if a.ndim else a, tree),
                       jax.tree.map(lambda a: a[:1] if a.ndim else a, inputs))
    done = piece(rows - left, left, done) if left else done
    return jax.tree.map(lambda a, b: a if a.ndim else b, done, scalars)


def preactivations(x: Array, W_enc: Array, b_enc: Array) -> Array:
    """x [B, D], W_enc [F, D], b_enc [F] -> [B, F], the one array of that size. Not differentiable: see `select`.

    W_enc holds features as rows, so that its gradient is row-sparse like W_dec's; the product is as fast either way.
    HIGH, because a TPU's default rounds float32 to bfloat16, which reorders the top-k. Its three passes err by 1e-5;
    HIGHEST takes six, and half a minute to compile.
    """
    x, W_enc, b_enc = lax.stop_gradient((x, W_enc, b_enc))
    return lax.dot_general(x, W_enc, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGH) + b_enc


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


# ---- the three operations on TPUs, in Pallas ------------------------------------------------------------------------
#
# All k x B active entries are sorted by feature. A grid then walks them in chunks of ENTRIES and the rows in blocks of
# ROWS: rows stream through VMEM once, whatever they hold, and what belongs to tokens (x, or the output) stays there.
# An entry costs a handful of scalar and vector instructions; nothing is gathered from HBM, where 12 KB at a time would
# take longer than reading every row once. In VMEM a row lies in one piece, [D / 128, 128], at an odd distance from the
# next one: then a tile of 8 rows is rearranged by stores with a stride that never hit one memory bank twice.

ENTRIES, ROWS, GROUP = 1024, 256, 8


@dataclass(frozen=True)
class Chip:
    """What `plan` must know: MiB of VMEM that a kernel may fill (0: too little), multiply-adds of the matrix unit in
    a cycle (bfloat16), bytes from HBM in a cycle. Sources: Google's data sheets, peak FLOP/s and GB/s over the clock."""
    vmem: int
    macs: int
    bandwidth: float


CHIPS = {"v4": Chip(0, 8 * 128 ** 2, 1228 / 1.05), "v5e": Chip(100, 4 * 128 ** 2, 819 / 1.5),
         "v5p": Chip(56, 8 * 128 ** 2, 2765 / 1.75), "v6e": Chip(100, 4 * 256 ** 2, 1640 / 1.75)}


class Entries(NamedTuple):
    """Active entries sorted by feature, filled up to whole chunks; those that no row here belongs to come last."""

    features: Array  # [n] int32, F where there is none
    places: Array  # [n] int32, b * k + j
    values: Array  # [n]


def _entries(values: Array, indices: Array, features: int) -> Entries:
    """values, indices [B, k] -> Entries; an index outside 0..features - 1 (another device's) counts as none."""
    n = values.size
    key = jnp.where((indices >= 0) & (indices < features), indices, features).reshape(-1).astype(jnp.int32)
    ordered = lax.sort((key, lax.iota(jnp.int32, n), values.reshape(-1)), num_keys=1, is_stable=False)
    return Entries(*(jnp.pad(a, (0, -n % ENTRIES), constant_values=fill) for a, fill in zip(ordered, (features, 0, 0))))


def _visits(features: Array, F: int) -> tuple[Array, ...]:
    """Entries' features [n] -> block, chunk, first, last of each visit: the entries first..last of a chunk that lie in
    a block of rows. Blocks and chunks rise one at a time, and every one of them is visited."""
    chunks, blocks = len(features) // ENTRIES, -(-F // ROWS)
    edges = jnp.minimum(jnp.arange(blocks + 1) * ROWS, F)
    starts = jnp.sum(features[None, :] < edges[:, None], axis=1, dtype=jnp.int32)
    starts, total = starts[:-1], starts[-1]
    place = jnp.arange(blocks) + jnp.minimum(chunks, starts // ENTRIES + 1)  # in the merged list of starts of either
    visit = jnp.arange(1, chunks + blocks)
    block = jnp.sum(place[None, :] <= visit[:, None], axis=1, dtype=jnp.int32) - 1
    chunk = (visit - block - 1).astype(jnp.int32)
    first = jnp.minimum(jnp.maximum(starts[block], chunk * ENTRIES), total)
    last = jnp.append(first[1:], total)
    return block, chunk, first - chunk * ENTRIES, last - chunk * ENTRIES


class Layout(NamedTuple):
    """How a width D is cut so that all tokens fit into VMEM: `slices` parts of `tall` * 128, `pitch` rows of 128 apart."""

    slices: int
    tall: int
    pitch: int


def _layout(chip: Chip, B: int, D: int) -> Layout | None:
    """The widest slices that fit; None where not even one column of 128 does, or D is no multiple of 128."""
    for slices in range(1, D // 128 + 1):
        tall = D // 128 // slices
        size = B * (tall | 1) + ROWS * (4 * tall + 2 * (tall | 1)) + ENTRIES * (_fold(tall) | 1)
        if D % (128 * slices) == 0 and 512 * size <= chip.vmem << 20:
            return Layout(slices, tall, tall | 1)
    return None


def _fold(tall: int) -> int:
    """The rows of 128 in which the products of two rows are summed: a whole register where they fill registers."""
    return tall if tall % 8 else 8


def spmm_kernel(entries: Entries, rows: Array, shape: tuple[int, int], layout: Layout, chip: Chip, interpret=False):
    """Entries of values [B, k] = shape, rows [F, D] -> [B, D]: `_spmm`, each block of rows added to all of the output."""
    from jax.experimental import pallas as pl

    (B, k), (slices, tall, pitch) = shape, layout

    def kernel(block, chunk, first, last, f, t, v, clash, w, out, spread):
        i = pl.program_id(1)
        pl.when(i == 0)(lambda: _zero(out.at[0]))
        pl.when((i == 0) | (block[i] != block[jnp.maximum(i - 1, 0)]))(lambda: _spread(w, spread, layout))

        def add(start, count):  # reads all before it writes any
            places = [pl.ds(t[0, 0, start + u], tall) for u in range(count)]
            sums = [out[0, place] + v[0, 0, start + u] * spread[pl.ds(f[0, 0, start + u], tall)]
                    for u, place in enumerate(places)]
            for place, total in zip(places, sums):
                out[0, place] = total

        def one(e, carry):
            add(e, 1)
            return carry

        def group(g, carry):
            free = clash[0, 0, g] == 0
            pl.when(free)(lambda: add(g * GROUP, GROUP))
            pl.when(~free)(lambda: [add(g * GROUP + u, 1) for u in range(GROUP)] and None)
            return carry

        _walk(first[i], last[i], one, group, 0)

    tokens = (entries.places // k).reshape(-1, GROUP)
    clash = jnp.tril(tokens[:, :, None] == tokens[:, None, :], -1).any((1, 2)).astype(jnp.int32)
    lists = _lists(entries, k, pitch)
    size = _tokens_size(B, pitch)
    output = jax.ShapeDtypeStruct((slices, size, 128), jnp.float32), _tokens_spec(size)
    out, = _call(kernel, entries, rows.shape[0], layout, [*lists, clash.reshape(-1, 1, ENTRIES // GROUP)], [], [rows],
                 [output], [ROWS * pitch], chip, interpret)
    out = out[:, :B * pitch].reshape(slices, B, pitch, 128)[:, :, :tall]
    return out.transpose(1, 0, 2, 3).reshape(B, -1)


def outer_kernel(entries: Entries, x: Array, rows: Array | None, F: int, k: int, layout: Layout, chip: Chip,
                 interpret=False):
    """Entries of values [B, k], x [B, D] -> [F, D]: `_outer`; with rows [F, D] also `_sddmm`, [B, k], of the same read."""
    from jax.experimental import pallas as pl

    slices, tall, pitch = layout
    fold, dots_too = _fold(tall), rows is not None

    def kernel(block, chunk, first, last, f, t, v, x, *refs):
        (w, dot, out, total, spread, dots) = refs if dots_too else (None, None, *refs, None, None)
        i, visits = pl.program_id(1), pl.num_programs(1)
        lo, hi, before, after = first[i], last[i], jnp.maximum(i - 1, 0), jnp.minimum(i + 1, visits - 1)

        @pl.when((i == 0) | (block[i] != block[before]))
        def _():
            _zero(total)
            if dots_too:
                _spread(w, spread, layout)

        def one(e, carry):
            sums, previous = carry
            feature, row = f[0, 0, e], x[0, pl.ds(t[0, 0, e], tall)]
            if dots_too:
                product = row * spread[pl.ds(feature, tall)]
                dots[pl.ds(e * (fold | 1), fold)] = sum(product[r:r + fold] for r in range(0, tall, fold))
            sums = jnp.where(feature == previous, sums, 0.0) + v[0, 0, e] * row
            total[pl.ds(feature, tall)] = sums  # the last one of a feature stays
            return sums, feature

        def group(g, carry):
            for u in range(GROUP):
                carry = one(g * GROUP + u, carry)
            return carry

        feature = f[0, 0, jnp.minimum(lo, ENTRIES - 1)]  # goes on where the chunk before stopped
        _walk(lo, hi, one, group, (total[pl.ds(feature, tall)], feature))
        pl.when((i == visits - 1) | (block[i] != block[after]))(lambda: _gather(total, out, layout))
        if dots_too:
            pl.when((i == visits - 1) | (chunk[i] != chunk[after]))(lambda: _sum_dots(dots, dot, fold))

    B, D = x.shape
    chunks, size = len(entries.places) // ENTRIES, _tokens_size(B, pitch)
    x = x.reshape(B, slices, tall, 128).transpose(1, 0, 2, 3)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, pitch - tall), (0, 0))).reshape(slices, B * pitch, 128)
    x = jnp.pad(x, ((0, 0), (0, size - B * pitch), (0, 0)))
    d_rows = jax.ShapeDtypeStruct((F, D), jnp.float32), _rows_spec(layout)
    d_values = (jax.ShapeDtypeStruct((slices, chunks, ENTRIES // 128, 128), jnp.float32),
                pl.BlockSpec((1, 1, ENTRIES // 128, 128), lambda s, i, block, chunk, *_: (s, chunk[i], 0, 0)))
    outputs = [d_values, d_rows] if dots_too else [d_rows]
    scratch = [ROWS * pitch] * (2 if dots_too else 1) + [ENTRIES * (fold | 1)] * dots_too
    results = _call(kernel, entries, F, layout, _lists(entries, k, pitch), [x], [rows] if dots_too else [], outputs,
                    scratch, chip, interpret)
    if not dots_too:
        return results[0]
    n = B * k
    dots = jnp.where(entries.features < F, results[0].sum(0).reshape(-1), 0)[:n]
    return results[1], lax.sort((entries.places[:n], dots), num_keys=1, is_stable=False)[1].reshape(B, k)


def _call(kernel, entries, F, layout, lists, tokens, rows, outputs, scratch, chip, interpret):
    """`kernel` on a grid of slices of D x visits. lists: [chunks, 1, ...] for the scalar core; tokens: [slices, ...], a
    slice at a time; rows [F, D]; outputs: (shape, spec); scratch: how many rows of 128."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu
    visits = _visits(entries.features, F)
    specs = [pl.BlockSpec((1, *a.shape[1:]), lambda s, i, block, chunk, *_: (chunk[i], 0, 0), memory_space=tpu.SMEM)
             for a in lists]
    specs += [_tokens_spec(a.shape[1]) for a in tokens] + [_rows_spec(layout) for _ in rows]
    grid = tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(visits), grid=(layout.slices, len(visits[0])), in_specs=specs,
        out_specs=[spec for _, spec in outputs], scratch_shapes=[tpu.VMEM((n, 128), jnp.float32) for n in scratch])
    parameters = tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=chip.vmem << 20)
    return pl.pallas_call(kernel, grid_spec=grid, out_shape=[shape for shape, _ in outputs], interpret=interpret,
                          compiler_params=parameters)(*visits, *lists, *tokens, *rows)


def _tokens_spec(size):
    from jax.experimental import pallas as pl
    return pl.BlockSpec((1, size, 128), lambda s, i, *_: (s, 0, 0), pipeline_mode=pl.Buffered(1))


def _rows_spec(layout):
    from jax.experimental import pallas as pl
    return pl.BlockSpec((ROWS, layout.tall * 128), lambda s, i, block, *_: (block[i], s))


def _tokens_size(B, pitch):
    return -(-B * pitch // 128) * 128


def _lists(entries, k, pitch):
    """Where each entry's row begins in its block, where its token does, and its value: [chunks, 1, ENTRIES] each."""
    lists = entries.features % ROWS * pitch, entries.places // k * pitch, entries.values
    return [a.reshape(-1, 1, ENTRIES) for a in lists]


def _walk(first, last, one, group, carry):
    """Entries first..last: whole groups by `group`, those before and after by `one`."""
    head = jnp.minimum((first + GROUP - 1) & -GROUP, last)
    tail = jnp.maximum(last & -GROUP, head)
    carry = lax.fori_loop(first, head, one, carry)
    carry = lax.fori_loop(lax.div(head, GROUP), lax.div(tail, GROUP), group, carry)
    return lax.fori_loop(tail, last, one, carry)


def _zero(ref):
    """Rows [n, 128], n a multiple of 128."""
    from jax.experimental import pallas as pl

    def some(i, _):
        ref[pl.ds(pl.multiple_of(i * 128, 128), 128)] = jnp.zeros((128, 128), ref.dtype)
        return _

    lax.fori_loop(0, ref.shape[0] // 128, some, 0)


def _spread(rows, spread, layout):
    """A block of rows [ROWS, tall * 128] -> [ROWS * pitch, 128], each in one piece."""
    def move(part, place, columns):
        spread[place] = rows[part, columns]

    _tiles(move, layout)


def _gather(spread, rows, layout):
    """The inverse of `_spread`."""
    def move(part, place, columns):
        rows[part, columns] = spread[place]

    _tiles(move, layout)


def _tiles(move, layout):
    from jax.experimental import pallas as pl

    def some(i, _):
        for column in range(layout.tall):
            move(pl.ds(pl.multiple_of(i * 8, 8), 8), pl.ds(i * 8 * layout.pitch + column, 8, stride=layout.pitch),
                 slice(column * 128, column * 128 + 128))
        return _

    lax.fori_loop(0, ROWS // 8, some, 0)


def _sum_dots(dots, out, fold):
    """[ENTRIES * (fold | 1), 128] -> [1, 1, ENTRIES / 128, 128]: each entry's sum; over lanes it is the matrix unit's."""
    from jax.experimental import pallas as pl

    def some(i, _):
        pitch = fold | 1
        sums = sum(dots[pl.ds(i * 128 * pitch + row, 128, stride=pitch)] for row in range(fold))
        line = lax.dot_general(jnp.ones((8, 128), jnp.float32), sums, (((1,), (1,)), ((), ())),
                               precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        out[0, 0, pl.ds(i, 1)] = line[:1]
        return _

    lax.fori_loop(0, ENTRIES // 128, some, 0)
