"""The three sparse products of `kernels.py` on TPUs, in Pallas, and when they beat dense ones there.

Copy it with `kernels.py`, which imports it where JAX runs on a TPU; it needs nothing else.

    how = kernels_tpu.plan(device, values, rows)                       # Kernels, or "dense" where that is faster
    entries = kernels_tpu.sorted_entries(values, indices, F)           # once for forward and backward
    out = kernels_tpu.spmm(entries, rows, values.shape, how)           # [B, D]
    d_rows, dots = kernels_tpu.outer(entries, g, rows, F, k, how)      # [F, D], [n]

All k x B active entries are sorted by feature. A grid then walks them in chunks of ENTRIES and the rows in blocks of
ROWS: rows stream through VMEM once, whatever they hold, and what belongs to tokens (x, or the output) stays there.
An entry costs a handful of scalar and vector instructions; nothing is gathered from HBM, where 12 KB at a time would
take longer than reading every row once. In VMEM a row lies in one piece, [D / 128, 128], at an odd distance from the
next one: then a tile of 8 rows is rearranged by stores with a stride that never hit one memory bank twice.

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
    """MiB of VMEM that a kernel may fill, multiply-adds of the matrix unit in a cycle (bfloat16), and bytes from HBM in
    a cycle: peak FLOP/s and GB/s of Google's data sheets, over the clock."""
    vmem: int
    macs: int
    bandwidth: float


CHIPS = {"v4": Chip(15, 8 * 128 ** 2, 1228 / 1.05), "v5e": Chip(100, 4 * 128 ** 2, 819 / 1.5),
         "v5p": Chip(56, 8 * 128 ** 2, 2765 / 1.75), "v6e": Chip(100, 4 * 256 ** 2, 1640 / 1.75)}


class Kernels(NamedTuple):
    """How the kernels cut a width D so that all tokens fit into VMEM: `slices` parts of `tall` * 128, whose rows lie
    `pitch` * 128 apart. vmem: MiB of it. interpret: in Pallas' interpreter."""

    slices: int
    tall: int
    pitch: int
    vmem: int
    interpret: bool = False


def plan(device, values: Array, rows: Array, devices: int = 1) -> "Kernels | str":
    """How products of values [B, k] and rows [F, D] (of one of so many devices) are done: by `Kernels` or "dense",
    whichever takes fewer cycles as `cycles` counts them; "scan" on a TPU that is not known here."""
    chip, (B, k), (F, D) = CHIPS.get(chip_of(device)), values.shape, rows.shape
    if chip is None:
        return "scan"
    how = cut(chip, B, D) if values.dtype == rows.dtype == jnp.float32 else None
    return how if how and cycles(chip, B, F, D, k / devices, how) < cycles(chip, B, F, D, k, None) else "dense"


def cycles(chip: Chip, B: int, F: int, D: int, k: float, how: Kernels | None) -> float:
    """About how long the decoder takes forward and backward, in cycles of a chip.

    Dense, it is three products of three passes each (`Precision.HIGH`). The kernels' counts are those that
    bench/bundles.py finds on v5e: for every entry and slice 2 x 3.5 bundles and 1.2 for each register of 8 x 128
    that its row fills, for every row 5 a register, and for every entry 2 to sort it twice; or the time in which HBM
    reads the rows twice and writes their gradient, if that is longer."""
    if how is None:
        return 9 * B * F * D / chip.macs
    registers = -(-how.tall // 8)
    counted = how.slices * (B * k * (7 + 2.4 * registers) + 5 * registers * F) + 2 * B * k
    return max(counted, 3 * 4 * F * D / chip.bandwidth)


def cut(chip: Chip, B: int, D: int) -> Kernels | None:
    """The widest slices that fit; None where not even 128 columns do, or D is no multiple of 128."""
    for slices in range(1, D // 128 + 1):
        tall = D // 128 // slices
        size = (_blocks(B) + 2) * ROWS * (tall | 1) + 6 * ROWS * tall + ENTRIES * (_fold(tall) | 1)
        if D % (128 * slices) == 0 and 512 * size <= chip.vmem << 20:
            return Kernels(slices, tall, tall | 1, chip.vmem)
    return None


def chip_of(device) -> str:
    """The generation of a TPU: "v4", "v5e", …"""
    kind = device.device_kind.lower().removeprefix("tpu").strip()
    return {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}.get(kind, kind)


class Entries(NamedTuple):
    """Active entries sorted by feature, filled up to whole chunks; those that no row here belongs to come last."""

    features: Array  # [n] int32, F where there is none
    places: Array  # [n] int32, b * k + j
    values: Array  # [n]


def sorted_entries(values: Array, indices: Array, features: int) -> Entries:
    """values, indices [B, k] -> Entries; an index outside 0..features - 1 (another device's) counts as none."""
    n = values.size
    key = jnp.where((indices >= 0) & (indices < features), indices, features).reshape(-1).astype(jnp.int32)
    ordered = lax.sort((key, lax.iota(jnp.int32, n), values.reshape(-1)), num_keys=1, is_stable=False)
    return Entries(*(jnp.pad(a, (0, -n % ENTRIES), constant_values=fill) for a, fill in zip(ordered, (features, 0, 0))))


def in_place(entries: Entries, dots: Array, shape: tuple[int, int]) -> Array:
    """What belongs to entries, [n] -> [B, k]."""
    n = shape[0] * shape[1]
    return lax.sort((entries.places[:n], dots[:n]), num_keys=1, is_stable=False)[1].reshape(shape)


def _visits(features: Array, F: int, before: int = 0, after: int = 0) -> list[Array]:
    """Entries' features [n] -> block, chunk, first, last of each visit: the entries first..last of a chunk that lie in
    a block of rows. Blocks and chunks rise one at a time, and every one of them is visited. With so many steps before
    and after as are asked for, which have no entries."""
    chunks, blocks = len(features) // ENTRIES, _blocks(F)
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


def _fold(tall: int) -> int:
    """The rows of 128 in which the products of two rows are summed: a whole register where they fill registers."""
    return tall if tall % 8 else 8


def _blocks(n: int) -> int:
    return -(-n // ROWS)


def spmm(entries: Entries, rows: Array, shape: tuple[int, int], how: Kernels) -> Array:
    """Entries of values [B, k] = shape, rows [F, D] -> [B, D]. All of the output stays in VMEM until the end, and each
    entry adds its row to its token's."""
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
        pl.when(i >= ends)(lambda: _gather(tokens, out, how, i - ends))

    output = (jax.ShapeDtypeStruct((B, rows.shape[1]), jnp.float32),
              pl.BlockSpec((ROWS, tall * 128), lambda s, i, *_: (jnp.maximum(i - ends, 0), s)))
    scratch = [_blocks(B) * ROWS * pitch, ROWS * pitch]
    return _call(kernel, visits, entries, k, how, [(rows, _rows_spec(how))], [output], scratch)[0]


def outer(entries: Entries, x: Array, rows: Array | None, F: int, k: int, how: Kernels):
    """Entries of values [B, k], x [B, D] -> [F, D]. With rows [F, D] also sddmm, of the same read, in the order of the
    entries, [n]. All of x is put into VMEM first."""
    (B, D), tall, pitch, fold = x.shape, how.tall, how.pitch, _fold(how.tall)
    visits, starts = _visits(entries.features, F, before=_blocks(B)), _blocks(B)

    def kernel(block, chunk, first, last, f, t, v, x, *refs):
        (w, d_values, out, tokens, total, spread, dots) = refs if rows is not None else (
            None, None, *refs, None, None)
        i, end = pl.program_id(1), pl.num_programs(1) - 1
        before, after = jnp.maximum(i - 1, 0), jnp.minimum(i + 1, end)
        pl.when(i < starts)(lambda: _spread(x, tokens, how, i))

        @pl.when((i == 0) | (block[i] != block[before]))
        def _():
            _zero(total)
            if rows is not None:
                _spread(w, spread, how)

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
        pl.when((i == end) | (block[i] != block[after]))(lambda: _gather(total, out, how))
        if rows is not None:
            pl.when((i == end) | (chunk[i] != chunk[after]))(lambda: _sum_dots(dots, d_values, fold))

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


def _call(kernel, visits, entries, k, how, inputs, outputs, scratch):
    """`kernel` on a grid of slices of D x visits. Where each entry's row begins in its block, where its token does, and
    its value go to the scalar core, a chunk at a time. inputs: (array, spec); outputs: (shape, spec); scratch: how many
    rows of 128."""
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
    """carry = some(start, count, carry) for entries first..last: by GROUPs where they are aligned, else one by one."""
    head = jnp.minimum((first + GROUP - 1) & -GROUP, last)
    tail = jnp.maximum(last & -GROUP, head)
    one, group = (lambda i, carry: some(i, 1, carry)), (lambda i, carry: some(i * GROUP, GROUP, carry))
    carry = lax.fori_loop(first, head, one, carry)
    carry = lax.fori_loop(lax.div(head, GROUP), lax.div(tail, GROUP), group, carry)
    return lax.fori_loop(tail, last, one, carry)


def _zero(ref):
    """Rows [n, 128], n a multiple of 128."""
    def some(i, carry):
        ref[pl.ds(pl.multiple_of(i * 128, 128), 128)] = jnp.zeros((128, 128), ref.dtype)
        return carry

    lax.fori_loop(0, ref.shape[0] // 128, some, 0)


def _spread(rows, spread, how, block=0):
    """A tile [ROWS, tall * 128] -> the block'th [ROWS * pitch, 128] of spread, each row in one piece."""
    def move(part, place, columns):
        spread[place] = rows[part, columns]

    _tiles(move, how, block)


def _gather(spread, rows, how, block=0):
    """The inverse of `_spread`."""
    def move(part, place, columns):
        rows[part, columns] = spread[place]

    _tiles(move, how, block)


def _tiles(move, how, block):
    def some(i, carry):
        start = (block * ROWS + i * 8) * how.pitch
        for column in range(how.tall):
            move(pl.ds(pl.multiple_of(i * 8, 8), 8), pl.ds(start + column, 8, stride=how.pitch),
                 slice(column * 128, column * 128 + 128))
        return carry

    lax.fori_loop(0, ROWS // 8, some, 0)


def _sum_dots(dots, out, fold):
    """[ENTRIES * (fold | 1), 128] -> [1, 1, ENTRIES / 128, 128]: each entry's sum; the matrix unit adds up lanes."""
    def some(i, carry):
        pitch = fold | 1
        sums = sum(dots[pl.ds(i * 128 * pitch + row, 128, stride=pitch)] for row in range(fold))
        line = lax.dot_general(jnp.ones((8, 128), jnp.float32), sums, (((1,), (1,)), ((), ())),
                               precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        out[0, 0, pl.ds(i, 1)] = line[:1]
        return carry

    lax.fori_loop(0, ENTRIES // 128, some, 0)
