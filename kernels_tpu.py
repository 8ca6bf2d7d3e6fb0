"""Compute the three sparse products of `kernels.py` on TPUs in Pallas, and choose them when they beat dense products.

Copy it with `kernels.py`, which imports it if JAX runs on a TPU; it needs nothing else.

    how = kernels_tpu.plan(device, values, rows)                       # Kernels, or "dense" if that is faster
    entries = kernels_tpu.sorted_entries(values, indices, F)           # once for forward and backward
    out = kernels_tpu.spmm(entries, rows, values.shape, how)           # [B, D]
    d_rows, dots = kernels_tpu.outer(entries, g, rows, F, k, how)      # [F, D], [n]

All k x B active entries are sorted by feature. A grid then visits the entries in chunks of ENTRIES and the rows in
blocks of ROWS. All rows stream through VMEM once; the tokens' data (x, or the output) stay in VMEM. An entry costs a
few scalar and vector instructions. Nothing is gathered from HBM: fetching 12 KB at a time would take longer than
reading every row once. In VMEM each row is contiguous, [D / 128, 128], at an odd distance from the next row: strided
stores then rearrange a tile of 8 rows without hitting a memory bank twice.

B batch, D model width, F features, k active features, n entries.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ENTRIES, ROWS, GROUP, TOGETHER = 1024, 256, 8, 2


@dataclass(frozen=True)
class Chip:
    """A chip's limits: MiB of VMEM that a kernel may fill, bfloat16 multiply-adds per cycle of the matrix unit, and HBM
    bytes per cycle. The rates are the peak FLOP/s and GB/s of Google's data sheets, divided by the clock."""
    vmem: int
    macs: int
    bandwidth: float


CHIPS = {"v4": Chip(15, 8 * 128 ** 2, 1228 / 1.05), "v5e": Chip(100, 4 * 128 ** 2, 819 / 1.5),
         "v5p": Chip(56, 8 * 128 ** 2, 2765 / 1.75), "v6e": Chip(100, 4 * 256 ** 2, 1640 / 1.75)}


class Kernels(NamedTuple):
    """How the kernels split the width D so that all tokens fit into VMEM: into `slices` parts of `tall` * 128 columns,
    with rows `pitch` * 128 apart. vmem: MiB to use. interpret: run in Pallas' interpreter."""

    slices: int
    tall: int
    pitch: int
    vmem: int
    interpret: bool = False

    def decode(self, values: Array, indices: Array, rows: Array) -> tuple[Array, "Entries"]:
        """Do what `kernels.Plain.decode` does. The gradients need the sorted entries too."""
        entries = sorted_entries(values, indices, len(rows))
        return spmm(entries, rows, values.shape, self), entries

    def decode_gradients(self, values, indices, rows, entries, g) -> tuple[Array, Array]:
        """Do what `kernels.Plain.decode_gradients` does."""
        d_rows, dots = outer(entries, g, rows, len(rows), values.shape[1], self)
        return in_place(entries, dots, values.shape), d_rows

    def encode_gradients(self, g, indices, x, rows) -> tuple[Array, Array, Array]:
        """Do what `kernels.Plain.encode_gradients` does."""
        entries = sorted_entries(g, indices, len(rows))
        d_bias = jnp.zeros(len(rows), g.dtype).at[indices.reshape(-1)].add(g.reshape(-1))
        return spmm(entries, rows, g.shape, self), outer(entries, x, None, len(rows), g.shape[1], self), d_bias


def plan(device: jax.Device, values: Array, rows: Array, devices: int = 1) -> Kernels | str:
    """Return the method for products of values [B, k] and rows [F, D] (the share of one of `devices` devices):
    `Kernels` or "dense", whichever takes fewer `cycles`; "scan" on an unknown TPU."""
    chip, (B, k), (F, D) = CHIPS.get(chip_of(device)), values.shape, rows.shape
    if chip is None:
        return "scan"
    how = cut(chip, B, D) if values.dtype == rows.dtype == jnp.float32 else None
    return how if how and cycles(chip, B, F, D, k / devices, how) < cycles(chip, B, F, D, k, None) else "dense"


def cycles(chip: Chip, B: int, F: int, D: int, k: float, how: Kernels | None) -> float:
    """Estimate the cycles of the decoder, forward and backward; how: None for dense products.

    The dense decoder needs three products of three passes each (`Precision.HIGH`). The kernels' costs were measured on
    v5e by bench/bundles.py. Each entry and slice costs 2 x (3.5 bundles + 1.2 per register of 8 x 128 that its row
    fills), each row 5 per register, and each entry 2 for two sorts. If reading the rows twice from HBM and writing
    their gradient takes longer, that time counts."""
    if how is None:
        return 9 * B * F * D / chip.macs
    registers = -(-how.tall // 8)
    counted = how.slices * (B * k * (7 + 2.4 * registers) + 5 * registers * F) + 2 * B * k
    return max(counted, 3 * 4 * F * D / chip.bandwidth)


def cut(chip: Chip, B: int, D: int) -> Kernels | None:
    """Return the widest slices that fit into VMEM, or None if not even 128 columns fit or 128 does not divide D."""
    for slices in range(1, D // 128 + 1):
        tall = D // 128 // slices
        size = (_blocks(B) + 2) * ROWS * (tall | 1) + 6 * ROWS * tall + ENTRIES * (_fold(tall) | 1)
        if D % (128 * slices) == 0 and 512 * size <= chip.vmem << 20:
            return Kernels(slices, tall, tall | 1, chip.vmem)
    return None


def chip_of(device: jax.Device) -> str:
    """Return the generation of a TPU: "v4", "v5e", …"""
    kind = device.device_kind.lower().removeprefix("tpu").strip()
    return {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}.get(kind, kind)


class Entries(NamedTuple):
    """Active entries sorted by feature and padded to whole chunks. Entries without a row on this device come last."""

    features: Array  # [n] int32, F if the row is not here
    places: Array  # [n] int32, b * k + j
    values: Array  # [n]


def sorted_entries(values: Array, indices: Array, features: int) -> Entries:
    """Sort values, indices [B, k] into Entries. An index outside 0..features - 1 belongs to another device."""
    n = values.size
    key = jnp.where((indices >= 0) & (indices < features), indices, features).reshape(-1).astype(jnp.int32)
    ordered = lax.sort((key, lax.iota(jnp.int32, n), values.reshape(-1)), num_keys=1, is_stable=False)
    return Entries(*(jnp.pad(a, (0, -n % ENTRIES), constant_values=fill) for a, fill in zip(ordered, (features, 0, 0))))


def in_place(entries: Entries, dots: Array, shape: tuple[int, int]) -> Array:
    """Reorder one value per entry, [n] -> [B, k]."""
    n = shape[0] * shape[1]
    return lax.sort((entries.places[:n], dots[:n]), num_keys=1, is_stable=False)[1].reshape(shape)


def _visits(features: Array, F: int, before: int = 0, after: int = 0) -> list[Array]:
    """Entries' features [n] -> block, chunk, first, last of each visit, which handles the entries first..last of a
    chunk whose rows lie in a block. Block and chunk rise one at a time, and each is visited. `before` and `after` add
    steps without entries."""
    chunks, blocks = len(features) // ENTRIES, _blocks(F)
    edges = jnp.minimum(jnp.arange(blocks + 1) * ROWS, F)
    starts = jnp.sum(features[None, :] < edges[:, None], axis=1, dtype=jnp.int32)
    starts, total = starts[:-1], starts[-1]
    place = jnp.arange(blocks) + jnp.minimum(chunks, starts // ENTRIES + 1)  # in the merged starts of blocks and chunks
    visit = jnp.arange(1, chunks + blocks)
    block = jnp.sum(place[None, :] <= visit[:, None], axis=1, dtype=jnp.int32) - 1
    chunk = (visit - block - 1).astype(jnp.int32)
    first = jnp.minimum(jnp.maximum(starts[block], chunk * ENTRIES), total)
    ranges = first - chunk * ENTRIES, jnp.append(first[1:], total) - chunk * ENTRIES
    return [jnp.pad(a, (before, after), mode="edge") for a in (block, chunk)] + [
        jnp.pad(a, (before, after)) for a in ranges]


def _fold(tall: int) -> int:
    """Return how many rows of 128 hold the product sums of two rows: a whole register if rows fill registers."""
    return tall if tall % 8 else 8


def _blocks(n: int) -> int:
    return -(-n // ROWS)


def spmm(entries: Entries, rows: Array, shape: tuple[int, int], how: Kernels) -> Array:
    """Entries of values [B, k] = shape, rows [F, D] -> [B, D]. Each entry adds its row to the output of its token. The
    whole output stays in VMEM until the end."""
    (B, k), F, tall, pitch = shape, len(rows), how.tall, how.pitch
    visits = _visits(entries.features, F, after=_blocks(B))
    ends = len(visits[0]) - _blocks(B)

    def kernel(block, chunk, first, last, f, t, v, w, out, tokens, spread):
        i = pl.program_id(1)
        pl.when(i == 0)(lambda: _zero(tokens))
        pl.when((i == 0) | (block[i] != block[jnp.maximum(i - 1, 0)]))(lambda: _spread(w, spread, how))

        def some(start, count, carry):
            for e in range(0, count, TOGETHER):
                add([start + e + u for u in range(min(count, TOGETHER))])
            return carry

        def add(these):  # all reads before all writes: faster than reading after each write
            places, sums = [t[0, 0, e] for e in these], []
            for e, place in zip(these, places):
                old = tokens[pl.ds(place, tall)]
                for other, new in zip(places, sums):  # an entry of the same token
                    old = jnp.where(place == other, new, old)
                sums.append(old + v[0, 0, e] * spread[pl.ds(f[0, 0, e], tall)])
            for place, new in zip(places, sums):
                tokens[pl.ds(place, tall)] = new

        _walk(first[i], last[i], some, 0)
        pl.when(i >= ends)(lambda: _gather(tokens, out, how, i - ends))

    output = (jax.ShapeDtypeStruct((B, rows.shape[1]), jnp.float32),
              pl.BlockSpec((ROWS, tall * 128), lambda s, i, *_: (jnp.maximum(i - ends, 0), s)))
    scratch = [_blocks(B) * ROWS * pitch, ROWS * pitch]
    return _call(kernel, visits, entries, k, how, [(rows, _rows_spec(how))], [output], scratch)[0]


def outer(entries: Entries, x: Array, rows: Array | None, F: int, k: int,
          how: Kernels) -> Array | tuple[Array, Array]:
    """Entries of values [B, k], x [B, D] -> [F, D]. With rows [F, D] also return sddmm [n], in the order of entries: it
    uses the same reads of x. All of x is copied into VMEM first."""
    D, tall, pitch, fold, starts = x.shape[1], how.tall, how.pitch, _fold(how.tall), _blocks(len(x))
    visits = _visits(entries.features, F, before=starts)

    def kernel(*refs):
        _outer_visit(how, starts, *refs)

    inputs = [(x, pl.BlockSpec((ROWS, tall * 128), lambda s, i, *_: (jnp.minimum(i, starts - 1), s)))]
    outputs = [(jax.ShapeDtypeStruct((F, D), jnp.float32), _rows_spec(how))]
    scratch = [starts * ROWS * pitch, ROWS * pitch]
    if rows is None:
        return _call(kernel, visits, entries, k, how, inputs, outputs, scratch)[0]
    lines = ENTRIES // 128
    dots = (jax.ShapeDtypeStruct((how.slices, len(entries.values) // ENTRIES, lines, 128), jnp.float32),
            pl.BlockSpec((1, 1, lines, 128), lambda s, i, block, chunk, *_: (s, chunk[i], 0, 0)))
    dots, out = _call(kernel, visits, entries, k, how, [*inputs, (rows, _rows_spec(how))], [dots, *outputs],
                      [*scratch, ROWS * pitch, ENTRIES * (fold | 1)])
    return out, jnp.where(entries.features < F, dots.sum(0).reshape(-1), 0)


def _outer_visit(how, starts, block, chunk, first, last, f, t, v, x, *refs):
    """Run one grid step of `outer`. The first `starts` steps copy x. Without rows, w, d_values, spread and dots are
    None."""
    w, d_values, out, tokens, total, spread, dots = refs if len(refs) == 7 else (None, None, *refs, None, None)
    i, end = pl.program_id(1), pl.num_programs(1) - 1
    before, after = jnp.maximum(i - 1, 0), jnp.minimum(i + 1, end)
    pl.when(i < starts)(lambda: _spread(x, tokens, how, i))

    @pl.when((i == 0) | (block[i] != block[before]))
    def _():
        _zero(total)
        if w is not None:
            _spread(w, spread, how)

    feature = f[0, 0, jnp.minimum(first[i], ENTRIES - 1)]  # continue the sum of the chunk before
    add = _outer_entries(how, f, t, v, tokens, total, spread, dots)
    _walk(first[i], last[i], add, (total[pl.ds(feature, how.tall)], feature))
    pl.when((i == end) | (block[i] != block[after]))(lambda: _gather(total, out, how))
    if w is not None:
        pl.when((i == end) | (chunk[i] != chunk[after]))(lambda: _sum_dots(dots, d_values, _fold(how.tall)))


def _outer_entries(how, f, t, v, tokens, total, spread, dots):
    """Return the function for `_walk` that adds entries to their features' rows of total and, with dots, stores the
    products of token and row. It carries the sum of the current feature."""
    tall, fold = how.tall, _fold(how.tall)

    def one(e, carry):
        sums, previous = carry
        feature, row = f[0, 0, e], tokens[pl.ds(t[0, 0, e], tall)]
        if dots is not None:
            product = row * spread[pl.ds(feature, tall)]
            dots[pl.ds(e * (fold | 1), fold)] = sum(product[r:r + fold] for r in range(0, tall, fold))
        sums = jnp.where(feature == previous, sums, 0.0) + v[0, 0, e] * row
        total[pl.ds(feature, tall)] = sums  # the last write of a feature stays
        return sums, feature

    def some(start, count, carry):
        for u in range(count):
            carry = one(start + u, carry)
        return carry

    return some


def _call(kernel, visits, entries, k, how, inputs, outputs, scratch):
    """Run `kernel` on a grid of slices of D x visits. The scalar core gets, one chunk at a time, each entry's row
    offset in its block, its token's offset and its value. inputs: (array, spec); outputs: (shape, spec); scratch:
    numbers of rows of 128."""
    pitch = how.pitch
    lists = [a.reshape(-1, 1, ENTRIES) for a in (
        entries.features % ROWS * pitch, entries.places // k * pitch, entries.values)]
    chunk_spec = pl.BlockSpec((1, 1, ENTRIES), lambda s, i, block, chunk, *_: (chunk[i], 0, 0), memory_space=pltpu.SMEM)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(visits), grid=(how.slices, len(visits[0])),
        in_specs=[chunk_spec] * len(lists) + [spec for _, spec in inputs], out_specs=[spec for _, spec in outputs],
        scratch_shapes=[pltpu.VMEM((n, 128), jnp.float32) for n in scratch])
    parameters = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=how.vmem << 20)
    return pl.pallas_call(kernel, grid_spec=grid, out_shape=[shape for shape, _ in outputs], interpret=how.interpret,
                          compiler_params=parameters)(*visits, *lists, *(array for array, _ in inputs))


def _rows_spec(how):
    return pl.BlockSpec((ROWS, how.tall * 128), lambda s, i, block, *_: (block[i], s))


def _walk(first, last, some, carry):
    """Apply carry = some(start, count, carry) to entries first..last: aligned GROUPs at once, the others one by one."""
    head = jnp.minimum((first + GROUP - 1) & -GROUP, last)
    tail = jnp.maximum(last & -GROUP, head)
    one, group = (lambda i, carry: some(i, 1, carry)), (lambda i, carry: some(i * GROUP, GROUP, carry))
    carry = lax.fori_loop(first, head, one, carry)
    carry = lax.fori_loop(lax.div(head, GROUP), lax.div(tail, GROUP), group, carry)
    return lax.fori_loop(tail, last, one, carry)


def _zero(ref):
    """Set ref [n, 128] to zero; n must be a multiple of 128."""
    def some(i, carry):
        ref[pl.ds(pl.multiple_of(i * 128, 128), 128)] = jnp.zeros((128, 128), ref.dtype)
        return carry

    lax.fori_loop(0, ref.shape[0] // 128, some, 0)


def _spread(rows, spread, how, block=0):
    """Copy a tile [ROWS, tall * 128] to block number `block` of spread, [ROWS * pitch, 128], with contiguous rows."""
    def move(part, place, columns):
        spread[place] = rows[part, columns]

    _tiles(move, how, block)


def _gather(spread, rows, how, block=0):
    """Do the inverse of `_spread`."""
    def move(part, place, columns):
        rows[part, columns] = spread[place]

    _tiles(move, how, block)


def _tiles(move, how, block):
    """Call move(rows of the tile, rows of the block, columns) for each part of 8 x 128."""
    def some(i, carry):
        start = (block * ROWS + i * 8) * how.pitch
        for column in range(how.tall):
            move(pl.ds(pl.multiple_of(i * 8, 8), 8), pl.ds(start + column, 8, stride=how.pitch),
                 slice(column * 128, column * 128 + 128))
        return carry

    lax.fori_loop(0, ROWS // 8, some, 0)


def _sum_dots(dots, out, fold):
    """Sum each entry: [ENTRIES * (fold | 1), 128] -> [1, 1, ENTRIES / 128, 128]. The matrix unit adds up the lanes."""
    def some(i, carry):
        pitch = fold | 1
        sums = sum(dots[pl.ds(i * 128 * pitch + row, 128, stride=pitch)] for row in range(fold))
        line = lax.dot_general(jnp.ones((8, 128), jnp.float32), sums, (((1,), (1,)), ((), ())),
                               precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        out[0, 0, pl.ds(i, 1)] = line[:1]
        return carry

    lax.fori_loop(0, ENTRIES // 128, some, 0)
