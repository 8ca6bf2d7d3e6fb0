"""Compute the three sparse products of `kernels.py` and its exact top-k on NVIDIA GPUs in Pallas.

Copy it with `kernels.py`, which imports it if JAX runs on a GPU; it needs nothing else.

    how = kernels_gpu.plan(device, values, rows)                       # Kernels, or "dense", or "scan"
    out = kernels_gpu.spmm(values, indices, rows, how)                 # [B, D]
    entries = kernels_gpu.sorted_entries(indices, F)                   # XLA merges equal ones: once for both gradients
    d_rows, dots, sums = kernels_gpu.outer(entries, values, g, rows, F, how)    # [F, D], [B, k], [F]
    values, indices = kernels_gpu.topk(x, k)                           # exact, ties by lower index

`spmm` runs one program for each token, `outer` one for each feature, on `columns` columns at a time. All programs of
one range of columns run before those of the next, so that the rows they gather stay in the L2 cache: without it each
active entry would read 4 D bytes of memory. Each program reads `together` rows at once. Nothing is added atomically:
a feature's entries are added in the order of their tokens, so results have the same bits in every run. A feature that
is active in many tokens is split into pieces of PIECE entries, which run side by side; a second kernel adds them up.

B batch, D model width, F features, k active features, n = B k entries.
"""
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

PIECE = 256                      # entries of one feature that one program adds up
CACHE = 40 * 2**20               # bytes of gathered rows that stay in the L2 cache; an H100 has 50 MiB


class Kernels(NamedTuple):
    """How the kernels split their work: `columns` at a time, `together` gathered rows at once, by `warps` warps.
    interpret: run in Pallas' interpreter."""

    columns: int
    together: int = 8
    warps: int = 4
    interpret: bool = False

    def decode(self, values: Array, indices: Array, rows: Array) -> tuple[Array, None]:
        """Do what `kernels.Plain.decode` does. The gradients need nothing that this has computed."""
        return spmm(values, indices, rows, self), None

    def decode_gradients(self, values, indices, rows, entries, g) -> tuple[Array, Array]:
        """Do what `kernels.Plain.decode_gradients` does."""
        d_rows, dots, _ = outer(sorted_entries(indices, len(rows)), values, g, rows, len(rows), self)
        return dots, d_rows

    def encode_gradients(self, g, indices, x, rows) -> tuple[Array, Array, Array]:
        """Do what `kernels.Plain.encode_gradients` does."""
        d_rows, _, d_bias = outer(sorted_entries(indices, len(rows)), g, x, None, len(rows), self)
        return spmm(g, indices, rows, self), d_rows, d_bias


def plan(device: jax.Device, values: Array, rows: Array, devices: int = 1) -> Kernels | str:
    """Return the method for products of values [B, k] and rows [F, D] (the share of one of `devices` devices):
    `Kernels` or "dense", whichever takes less `seconds`; "scan" on a GPU for which Triton does not compile, or for
    numbers that are not float32.

    Dense products round to TF32, as the encoder's product does (`kernels.preactivations`)."""
    (B, k), (F, D) = values.shape, rows.shape
    if not supported(device) or not values.dtype == rows.dtype == jnp.float32:
        return "scan"
    how = cut(B, F, D)
    return how if seconds(B, F, D, k / devices, True) < seconds(B, F, D, k, False) else "dense"


def supported(device: jax.Device) -> bool:
    """Return whether XLA compiles Triton kernels for this GPU: NVIDIA's Ampere or newer (compute capability 8)."""
    found = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    return bool(found) and int(found[1]) >= 8


def cut(B: int, F: int, D: int) -> Kernels:
    """Return Kernels with as many columns as let the gathered rows stay in the L2 cache, between 128 and 512."""
    fit = 2 ** ((CACHE // (4 * max(B, F))).bit_length() - 1)
    return Kernels(min(512, max(128, fit), max(16, pl.next_power_of_2(D))))


def seconds(B: int, F: int, D: int, k: float, sparse: bool) -> float:
    """Estimate how long the decoder takes on an H100, forward and backward. Other GPUs have similar ratios.

    The kernels gather 2 B k rows from the L2 cache at about 4 TB/s and pass three times over [F, D] at 3 TB/s. Dense
    products take three times 2 B F D operations at 400 TFLOP/s (TF32) and five passes over [B, F]."""
    if sparse:
        return 2 * 4 * B * k * D / 4e12 + 3 * 4 * F * D / 3e12
    return 3 * 2 * B * F * D / 4e14 + 5 * 4 * B * F / 3e12


class Entries(NamedTuple):
    """Active entries in the order of their features, and the pieces into which they are cut. Piece f < F is the first
    one of feature f; the others follow."""

    places: Array  # [n] int32, b * k + j; entries without a row on this device come last
    feature: Array  # [F + extra] int32, of each piece; F for pieces that are not used
    first: Array  # [F + extra] int32, the piece's first entry
    last: Array  # [F + extra] int32, one past its last entry


def sorted_entries(indices: Array, features: int) -> Entries:
    """Sort indices [B, k] into Entries. An index outside 0..features - 1 belongs to another device."""
    flat = indices.reshape(-1).astype(jnp.int32)
    key = jnp.where((flat >= 0) & (flat < features), flat, features)
    places = lax.sort((key, lax.iota(jnp.int32, flat.size)), num_keys=1)[1]
    counts = jnp.zeros(features + 1, jnp.int32).at[key].add(1)[:features]  # whole numbers: any order gives these bits
    ends = jnp.cumsum(counts)
    # Further pieces of a feature, and the numbers of them up to and with each feature
    upto = jnp.cumsum(jnp.maximum(-(-counts // PIECE) - 1, 0))
    extra = lax.iota(jnp.int32, flat.size // PIECE)
    of = jnp.sum(upto[None, :] <= extra[:, None], axis=1, dtype=jnp.int32)
    there = jnp.minimum(of, features - 1)
    number = extra - jnp.where(there > 0, upto[there - 1], 0) + 1
    start = jnp.concatenate([ends - counts, (ends - counts)[there] + number * PIECE])
    feature = jnp.concatenate([lax.iota(jnp.int32, features), of])
    last = jnp.where(feature < features, jnp.minimum(start + PIECE, jnp.concatenate([ends, ends[there]])), start)
    return Entries(places, feature, start, last)


def spmm(values: Array, indices: Array, rows: Array, how: Kernels) -> Array:
    """values, indices [B, k], rows [F, D] -> [B, D]. An entry whose index is F or more must have the value 0."""
    (B, k), (F, D) = values.shape, rows.shape

    def kernel(value, index, row, out):
        b, start, inside = _range(how, D)

        def add(i, total):
            at = i * how.together + jnp.arange(how.together)
            weight = triton.load(value.at[b, pl.ds(i * how.together, how.together)], mask=at < k, other=0.0)
            which = triton.load(index.at[b, pl.ds(i * how.together, how.together)], mask=at < k, other=0)
            found = _gathered(row, jnp.minimum(which, F - 1), start, (at < k)[:, None] & inside[None, :])
            return total + weight[:, None] * found

        total = lax.fori_loop(0, pl.cdiv(k, how.together), add, jnp.zeros((how.together, how.columns), jnp.float32))
        triton.store(out.at[b, pl.ds(start, how.columns)], total.sum(0), mask=inside)

    shape = jax.ShapeDtypeStruct((B, D), jnp.float32)
    return _call(kernel, "spmm", (B, pl.cdiv(D, how.columns)), shape, how)(values, indices.astype(jnp.int32), rows)


def outer(entries: Entries, values: Array, x: Array, rows: Array | None, features: int,
          how: Kernels) -> tuple[Array, Array | None, Array]:
    """Entries of values [B, k], x [B, D] -> outer [F, D], sddmm with rows [F, D] or None, the sums of values [F].

    `sddmm` costs little here, because it needs the rows of x that this reads anyway. It is not defined for entries of
    other devices."""
    (B, k), D, pieces, blocks = values.shape, x.shape[1], len(entries.feature), pl.cdiv(x.shape[1], how.columns)
    make, extra = jax.ShapeDtypeStruct, max(1, pieces - features)
    shapes = [make((features, D), jnp.float32), make((extra, D), jnp.float32), make((pieces,), jnp.float32)]
    if rows is not None:
        shapes.append(make((blocks, B * k), jnp.float32))
    inputs = [entries.feature, entries.first, entries.last, entries.places, values.reshape(-1), x, rows]
    out, more, sums, *dots = _call(partial(_outer_kernel, how, features, k, rows is not None), "outer",
                                   (pieces, blocks), shapes, how)(*inputs[:6 + (rows is not None)])
    if pieces > features:
        out, sums = _joined(entries, out, more, sums, features, how)
    return out, dots[0].sum(0).reshape(B, k) if dots else None, sums[:features]


def _outer_kernel(how, features, k, dotted, feature, first, last, places, values, x, *refs):
    """Add up one piece of one feature, for one range of columns."""
    rows, out, more, sums, dots = refs if dotted else (None, *refs, None)
    i, start, inside = _range(how, x.shape[1])
    columns, f, first_columns = pl.ds(start, how.columns), feature[i], pl.program_id(1) == 0
    if dotted:
        block = jnp.full(how.together, pl.program_id(1))
        row = triton.load(rows.at[jnp.minimum(f, features - 1), columns], mask=inside, other=0.0)

    def add(j, carry):
        total, sum_ = carry
        entry = first[i] + j * how.together
        here = entry + jnp.arange(how.together) < last[i]
        place = triton.load(places.at[pl.ds(entry, how.together)], mask=here, other=len(places))
        value = triton.load(values.at[place], mask=here, other=0.0)
        found = _gathered(x, lax.div(place, k), start, here[:, None] & inside[None, :])
        if dotted:
            triton.store(dots.at[block, place], jnp.sum(found * row[None, :], 1), mask=here)
        return total + value[:, None] * found, sum_ + value

    zero = jnp.zeros((how.together, how.columns), jnp.float32), jnp.zeros(how.together, jnp.float32)
    total, sum_ = lax.fori_loop(0, pl.cdiv(last[i] - first[i], how.together), add, zero)

    @pl.when(i < features)
    def _():
        triton.store(out.at[i, columns], total.sum(0), mask=inside)

    @pl.when((i >= features) & (f < features))
    def _():
        triton.store(more.at[i - features, columns], total.sum(0), mask=inside)

    @pl.when(first_columns)
    def _():
        sums[i] = sum_.sum()


def _joined(entries, out, more, sums, features, how):
    """Add the further pieces [extra, D] to the rows of their features in `out` [F, D], and the same for the sums
    [F + extra]. One program handles all pieces of a feature; it begins at the first of them."""
    D, extra = out.shape[1], len(more)

    def kernel(feature, more, old, old_sums, out, sums):
        i, start, inside = _range(how, D)
        columns, f, first_columns = pl.ds(start, how.columns), feature[features + i], pl.program_id(1) == 0
        before = feature[features + jnp.maximum(i - 1, 0)]

        @pl.when((f < features) & ((i == 0) | (before != f)))
        def _():
            def same(carry):
                j = carry[0]
                return (j < extra) & (feature[features + jnp.minimum(j, extra - 1)] == f)

            def add(carry):
                j, total, sum_ = carry
                piece = triton.load(more.at[j, columns], mask=inside, other=0.0)
                return j + 1, total + piece, sum_ + old_sums[features + j]

            row = triton.load(old.at[f, columns], mask=inside, other=0.0)
            _, total, sum_ = lax.while_loop(same, add, (i, row, old_sums[f]))
            triton.store(out.at[f, columns], total, mask=inside)

            @pl.when(first_columns)
            def _():
                sums[f] = sum_

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (out, sums)]
    call = _call(kernel, "outer_pieces", (extra, pl.cdiv(D, how.columns)), shapes, how, {2: 0, 3: 1})
    return call(entries.feature, more, out, sums)


def topk(x: Array, k: int, interpret: bool = False) -> tuple[Array, Array]:
    """Return the k largest of the last axis of x [..., F] in descending order, exact, ties by lower index, as
    `lax.top_k` does.

    One program reads one row. It keeps the largest of each of W groups of features: the k-th largest of these is a
    lower bound of the k-th largest of all, and few values reach it. They are written out in order, and `lax.top_k`
    orders them. Where more reach it than there is room for, the program finds the k-th largest value bit by bit."""
    F, group, room = x.shape[-1], max(256, 4 * pl.next_power_of_2(k)), max(64, 2 * pl.next_power_of_2(k))
    if x.dtype != jnp.float32 or 2 * group > F:
        return tuple(lax.top_k(x, k))
    flat = x.reshape(-1, F)
    shapes = [jax.ShapeDtypeStruct((len(flat), room), dtype) for dtype in (jnp.float32, jnp.int32)]
    how = Kernels(group, interpret=interpret)
    values, indices = _call(partial(_topk_kernel, k, group), "topk", (len(flat),), shapes, how)(flat)
    values, at = lax.top_k(values, k)
    indices = jnp.take_along_axis(indices, at, -1)
    return tuple(a.reshape(*x.shape[:-1], k) for a in (values, indices))


def _topk_kernel(k, group, x, values, indices):
    """Write all candidates of one row, in order; then -inf."""
    b, (F, room) = pl.program_id(0), (x.shape[1], values.shape[1])

    def tiles(function, carry):
        """Return carry = function(places, numbers, their ordered keys, carry), for all parts of the row in order."""
        def one(i, carry):
            at = i * group + jnp.arange(group)
            number = triton.load(x.at[b, pl.ds(i * group, group)], mask=at < F, other=-jnp.inf)
            return function(at, number, _key(number), carry)

        return lax.fori_loop(0, pl.cdiv(F, group), one, carry)

    def count(chosen):
        """Return how many places satisfy chosen(places, keys)."""
        add = lambda at, _, key, total: total + jnp.where((at < F) & chosen(at, key), 1, 0)
        return jnp.sum(tiles(add, jnp.zeros(group, jnp.int32)))

    best = tiles(lambda at, _, key, best: jnp.maximum(best, key), jnp.full(group, -2**31, jnp.int32))
    low = _greatest(32, lambda low: jnp.sum(jnp.where(best >= low, 1, 0)) >= k, -2**31)
    fits = (count(lambda at, key: key >= low) <= room).astype(jnp.int32)
    # If not: the k-th largest key, and the last place at which such a key is among the k largest
    exact = _greatest(32, lambda low: count(lambda at, key: key >= low) >= k, -2**31, skip=fits)
    low = jnp.where(fits > 0, low, exact)
    end = _greatest(F.bit_length(), lambda end: count(
        lambda at, key: (key > low) | ((key == low) & (at < end))) < k, F * fits, skip=fits)

    def write(at, number, key, total):
        chosen = (at < F) & ((key > low) | ((key == low) & (at <= end)))
        place = jnp.where(chosen, total + jnp.cumsum(jnp.where(chosen, 1, 0)) - 1, room)
        row = jnp.full(group, b)
        triton.store(values.at[row, place], number, mask=chosen)
        triton.store(indices.at[row, place], at, mask=chosen)
        return total + jnp.sum(jnp.where(chosen, 1, 0))

    total = tiles(write, jnp.int32(0))
    rest = jnp.arange(room) >= total
    triton.store(values.at[b], jnp.full(room, -jnp.inf, jnp.float32), mask=rest)
    triton.store(indices.at[b], jnp.zeros(room, jnp.int32), mask=rest)


def _key(number):
    """Return int32 numbers in the order of these float32 numbers."""
    bits = lax.bitcast_convert_type(number, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7fffffff)


def _greatest(bits, holds, least, skip=0):
    """Return the greatest of the 2**bits whole numbers from `least` for which `holds`, which is true up to one of them
    and false beyond it, bit by bit. skip: 1 to return `least` at once, without a branch: Triton's are fragile."""
    def bit(i, low):
        higher = low + (jnp.int32(1) << (bits - 1 - i))  # the first of 32 bits wraps around to 0
        return jnp.where(holds(higher), higher, low)

    return lax.fori_loop(0, bits * (1 - skip), bit, jnp.asarray(least, jnp.int32))


def _range(how, D):
    """Return (the program's number, the first of its columns, which of them lie within D)."""
    start = pl.program_id(1) * how.columns
    return pl.program_id(0), start, start + jnp.arange(how.columns) < D


def _gathered(ref, rows, start, mask):
    """Return some rows of ref [n, D], mask.shape[1] columns of each from `start` on; 0 where the mask is false."""
    which = jnp.broadcast_to(rows[:, None], mask.shape)
    return triton.load(ref.at[which, jnp.broadcast_to((start + jnp.arange(mask.shape[1]))[None], mask.shape)],
                       mask=mask, other=0.0)


def _call(kernel, name, grid, shapes, how, aliases=None):
    """Return the pallas_call. Its first axis runs fastest on a GPU."""
    return pl.pallas_call(kernel, grid=grid, out_shape=shapes, name=name, interpret=how.interpret,
                          input_output_aliases=aliases or {},
                          compiler_params=triton.CompilerParams(num_warps=how.warps, num_stages=3))
