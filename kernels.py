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


# ---- the three operations on TPUs, in Pallas ------------------------------------------------------------------------
#
# All k x B active entries are sorted by feature. A grid then walks them in chunks of ENTRIES and the rows in blocks of
# ROWS: rows stream through VMEM once, whatever they hold, and what belongs to tokens (x, or the output) stays there.
# An entry costs a handful of scalar and vector instructions; nothing is gathered from HBM, where 12 KB at a time would
# take longer than reading every row once. In VMEM a row lies in one piece, [D / 128, 128], at an odd distance from the
# next one: then a tile of 8 rows is rearranged by stores with a stride that never hit one memory bank twice.

ENTRIES, ROWS, GROUP, TOGETHER = 1024, 256, 8, 2


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


def _visits(features: Array, F: int, before: int = 0, after: int = 0) -> list[Array]:
    """Entries' features [n] -> block, chunk, first, last of each visit: the entries first..last of a chunk that lie in
    a block of rows. Blocks and chunks rise one at a time, and every one of them is visited. With so many steps before
    and after as are asked for, which have no entries."""
    chunks, blocks = len(features) // ENTRIES, -(-F // ROWS)
    edges = jnp.minimum(jnp.arange(blocks + 1) * ROWS, F)
    starts = jnp.sum(features[None, :] < edges[:, None], axis=1, dtype=jnp.int32)
    starts, total = starts[:-1], starts[-1]
    place = jnp.arange(blocks) + jnp.minimum(chunks, starts // ENTRIES + 1)  # in the merged list of starts of either
    visit = jnp.arange(1, chunks + blocks)
    block = jnp.sum(place[None, :] <= visit[:, None], axis=1, dtype=jnp.int32) - 1
    chunk = (visit - block - 1).astype(jnp.int32)
    first = jnp.minimum(jnp.maximum(starts[block], chunk * ENTRIES), total)
    ranges = first - chunk * ENTRIES, jnp.append(first[1:], total) - chunk * ENTRIES
    return [jnp.pad(a, (before, after), mode="edge") for a in (block, chunk)] + [
        jnp.pad(a, (before, after)) for a in ranges]


class Layout(NamedTuple):
    """How a width D is cut so that all tokens fit into VMEM: `slices` parts of `tall` * 128, `pitch` rows of 128 apart."""

    slices: int
    tall: int
    pitch: int


def _layout(chip: Chip, B: int, D: int) -> Layout | None:
    """The widest slices that fit; None where not even one column of 128 does, or D is no multiple of 128."""
    for slices in range(1, D // 128 + 1):
        tall = D // 128 // slices
        size = (_blocks(B) + 2) * ROWS * (tall | 1) + 6 * ROWS * tall + ENTRIES * (_fold(tall) | 1)
        if D % (128 * slices) == 0 and 512 * size <= chip.vmem << 20:
            return Layout(slices, tall, tall | 1)
    return None


def _fold(tall: int) -> int:
    """The rows of 128 in which the products of two rows are summed: a whole register where they fill registers."""
    return tall if tall % 8 else 8


def _blocks(n: int) -> int:
    return -(-n // ROWS)


def spmm_kernel(entries: Entries, rows: Array, shape: tuple[int, int], layout: Layout, chip: Chip, interpret=False):
    """Entries of values [B, k] = shape, rows [F, D] -> [B, D]: `_spmm`. All of the output stays in VMEM until the end,
    and each entry adds its row to its token's."""
    from jax.experimental import pallas as pl

    (B, k), (_, tall, pitch), F = shape, layout, rows.shape[0]
    visits = _visits(entries.features, F, after=_blocks(B))
    ends = len(visits[0]) - _blocks(B)

    def kernel(block, chunk, first, last, f, t, v, w, out, tokens, spread):
        i = pl.program_id(1)
        pl.when(i == 0)(lambda: _zero(tokens))
        pl.when((i == 0) | (block[i] != block[jnp.maximum(i - 1, 0)]))(lambda: _spread(w, spread, layout))

        def some(start, count, carry):
            for e in range(0, count, TOGETHER):
                add([start + e + u for u in range(min(count, TOGETHER))])
            return carry

        def add(these):  # reads all before it writes any, which costs less than a read after each write
            places, sums = [t[0, 0, e] for e in these], []
            for e, place in zip(these, places):
                old = tokens[pl.ds(place, tall)]
                for other, new in zip(places, sums):  # the same token's
                    old = jnp.where(place == other, new, old)
                sums.append(old + v[0, 0, e] * spread[pl.ds(f[0, 0, e], tall)])
            for place, new in zip(places, sums):
                tokens[pl.ds(place, tall)] = new

        _walk(first[i], last[i], some, 0)
        pl.when(i >= ends)(lambda: _gather(tokens, out, layout, i - ends))

    output = (jax.ShapeDtypeStruct((B, rows.shape[1]), jnp.float32),
              pl.BlockSpec((ROWS, tall * 128), lambda s, i, *_: (jnp.maximum(i - ends, 0), s)))
    scratch = [_blocks(B) * ROWS * pitch, ROWS * pitch]
    return _call(kernel, visits, entries, k, layout, [(rows, _rows_spec(layout))], [output], scratch, chip, interpret)[0]


def outer_kernel(entries: Entries, x: Array, rows: Array | None, F: int, k: int, layout: Layout, chip: Chip,
                 interpret=False):
    """Entries of values [B, k], x [B, D] -> [F, D]: `_outer`. With rows [F, D] also, of the same read, [B, k]: `_sddmm`.
    All of x is put into VMEM first."""
    from jax.experimental import pallas as pl

    (B, D), (slices, tall, pitch), fold = x.shape, layout, _fold(layout.tall)
    visits, starts = _visits(entries.features, F, before=_blocks(B)), _blocks(B)

    def kernel(block, chunk, first, last, f, t, v, x, *refs):
        (w, d_values, out, tokens, total, spread, dots) = refs if rows is not None else (
            None, None, *refs, None, None)
        i, end = pl.program_id(1), pl.num_programs(1) - 1
        before, after = jnp.maximum(i - 1, 0), jnp.minimum(i + 1, end)
        pl.when(i < starts)(lambda: _spread(x, tokens, layout, i))

        @pl.when((i == 0) | (block[i] != block[before]))
        def _():
            _zero(total)
            if rows is not None:
                _spread(w, spread, layout)

        def one(e, carry):
            sums, previous = carry
            feature, row = f[0, 0, e], tokens[pl.ds(t[0, 0, e], tall)]
            if rows is not None:
                product = row * spread[pl.ds(feature, tall)]
                dots[pl.ds(e * (fold | 1), fold)] = sum(product[r:r + fold] for r in range(0, tall, fold))
            sums = jnp.where(feature == previous, sums, 0.0) + v[0, 0, e] * row
            total[pl.ds(feature, tall)] = sums  # the last one of a feature stays
            return sums, feature

        def some(start, count, carry):
            for u in range(count):
                carry = one(start + u, carry)
            return carry

        feature = f[0, 0, jnp.minimum(first[i], ENTRIES - 1)]  # goes on where the chunk before stopped
        _walk(first[i], last[i], some, (total[pl.ds(feature, tall)], feature))
        pl.when((i == end) | (block[i] != block[after]))(lambda: _gather(total, out, layout))
        if rows is not None:
            pl.when((i == end) | (chunk[i] != chunk[after]))(lambda: _sum_dots(dots, d_values, fold))

    inputs = [(x, pl.BlockSpec((ROWS, tall * 128), lambda s, i, *_: (jnp.minimum(i, starts - 1), s)))]
    outputs = [(jax.ShapeDtypeStruct((F, D), jnp.float32), _rows_spec(layout))]
    scratch = [starts * ROWS * pitch, ROWS * pitch]
    if rows is None:
        return _call(kernel, visits, entries, k, layout, inputs, outputs, scratch, chip, interpret)[0]
    lines = ENTRIES // 128
    dots = (jax.ShapeDtypeStruct((slices, len(entries.values) // ENTRIES, lines, 128), jnp.float32),
            pl.BlockSpec((1, 1, lines, 128), lambda s, i, block, chunk, *_: (s, chunk[i], 0, 0)))
    dots, out = _call(kernel, visits, entries, k, layout, [*inputs, (rows, _rows_spec(layout))], [dots, *outputs],
                      [*scratch, ROWS * pitch, ENTRIES * (fold | 1)], chip, interpret)
    dots = jnp.where(entries.features < F, dots.sum(0).reshape(-1), 0)[:B * k]
    return out, lax.sort((entries.places[:B * k], dots), num_keys=1, is_stable=False)[1].reshape(B, k)


def _call(kernel, visits, entries, k, layout, inputs, outputs, scratch, chip, interpret):
    """`kernel` on a grid of slices of D x visits. Where each entry's row begins in its block, where its token does, and
    its value go to the scalar core, a chunk at a time. inputs: (array, spec); outputs: (shape, spec); scratch: how many
    rows of 128."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu
    pitch = layout.pitch
    lists = [a.reshape(-1, 1, ENTRIES) for a in (
        entries.features % ROWS * pitch, entries.places // k * pitch, entries.values)]
    chunk_spec = pl.BlockSpec((1, 1, ENTRIES), lambda s, i, block, chunk, *_: (chunk[i], 0, 0), memory_space=tpu.SMEM)
    grid = tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(visits), grid=(layout.slices, len(visits[0])),
        in_specs=[chunk_spec] * len(lists) + [spec for _, spec in inputs], out_specs=[spec for _, spec in outputs],
        scratch_shapes=[tpu.VMEM((n, 128), jnp.float32) for n in scratch])
    parameters = tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=chip.vmem << 20)
    return pl.pallas_call(kernel, grid_spec=grid, out_shape=[shape for shape, _ in outputs], interpret=interpret,
                          compiler_params=parameters)(*visits, *lists, *(array for array, _ in inputs))


def _rows_spec(layout):
    from jax.experimental import pallas as pl
    return pl.BlockSpec((ROWS, layout.tall * 128), lambda s, i, block, *_: (block[i], s))


def _walk(first, last, some, carry):
    """carry = some(start, count, carry) for entries first..last: by GROUPs where they are aligned, else one by one."""
    head = jnp.minimum((first + GROUP - 1) & -GROUP, last)
    tail = jnp.maximum(last & -GROUP, head)
    one, group = (lambda i, carry: some(i, 1, carry)), (lambda i, carry: some(i * GROUP, GROUP, carry))
    carry = lax.fori_loop(first, head, one, carry)
    carry = lax.fori_loop(lax.div(head, GROUP), lax.div(tail, GROUP), group, carry)
    return lax.fori_loop(tail, last, one, carry)


def _zero(ref):
    """Rows [n, 128], n a multiple of 128."""
    from jax.experimental import pallas as pl

    def some(i, carry):
        ref[pl.ds(pl.multiple_of(i * 128, 128), 128)] = jnp.zeros((128, 128), ref.dtype)
        return carry

    lax.fori_loop(0, ref.shape[0] // 128, some, 0)


def _spread(rows, spread, layout, block=0):
    """A tile [ROWS, tall * 128] -> the block'th [ROWS * pitch, 128] of spread, each row in one piece."""
    def move(part, place, columns):
        spread[place] = rows[part, columns]

    _tiles(move, layout, block)


def _gather(spread, rows, layout, block=0):
    """The inverse of `_spread`."""
    def move(part, place, columns):
        rows[part, columns] = spread[place]

    _tiles(move, layout, block)


def _tiles(move, layout, block):
    from jax.experimental import pallas as pl

    def some(i, carry):
        start = (block * ROWS + i * 8) * layout.pitch
        for column in range(layout.tall):
            move(pl.ds(pl.multiple_of(i * 8, 8), 8), pl.ds(start + column, 8, stride=layout.pitch),
                 slice(column * 128, column * 128 + 128))
        return carry

    lax.fori_loop(0, ROWS // 8, some, 0)


def _sum_dots(dots, out, fold):
    """[ENTRIES * (fold | 1), 128] -> [1, 1, ENTRIES / 128, 128]: each entry's sum; over lanes it is the matrix unit's."""
    from jax.experimental import pallas as pl

    def some(i, carry):
        pitch = fold | 1
        sums = sum(dots[pl.ds(i * 128 * pitch + row, 128, stride=pitch)] for row in range(fold))
        line = lax.dot_general(jnp.ones((8, 128), jnp.float32), sums, (((1,), (1,)), ((), ())),
                               precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        out[0, 0, pl.ds(i, 1)] = line[:1]
        return carry

    lax.fori_loop(0, ENTRIES // 128, some, 0)
