"""NF4 (4-bit) and int8 weights that multiply like arrays: exact, with Pallas kernels for TPUs or in plain XLA.

This file works alone: copy it. It needs jax and numpy.

    q = quant.nf4(w)                       # w [..., in, out] → 4.5 bits per weight, bitsandbytes' NormalFloat4
    q = quant.int8(w)                      # one scale per column; each row of activations gets its own (see DECODED)
    y = x @ q                              # a pytree: jit, scan over stacked layers, q[i], device_put, grad to x
    w = quant.dequantize(q)

Blocks of 64 run along the input axis, so splitting the output axis never cuts a block. A byte holds the codes of two
rows that are half a span (usually 1,024 inputs) apart, not of two neighbors: both nibbles of a tile then decode to
whole tiles, and no interleaving is needed. A weight stores its chip, such as "cpu" or "v5e" (default: JAX's first
device at the time of quantization). `plan` chooses kernel or plain XLA from the chip and the sizes alone.
Sources: NF4 is from QLoRA (arXiv 2305.14314), rounded as in bitsandbytes 0.50; int8 is LLM.int8 (arXiv 2208.07339)
without its outliers.
"""
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

TABLE = np.array([                                               # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)
BOUNDS = (TABLE[:-1] + TABLE[1:]) / 2                            # a value on a bound takes the lower code
BLOCK, SPAN = 64, 1024
TINY = np.float32(1e-38)                                         # replaces the scale of a block of zeros


class Mistake(ValueError):
    """Report an error that the caller can fix. Its one-line message names the value and says what would be right."""


class Quantized:
    """Share the behavior of NF4 and Int8: both look like the array [..., in, out] that they represent."""
    ndim = property(lambda self: len(self.shape))
    __array_ufunc__ = None                                       # so numpy leaves `x @ q` to this class

    def __rmatmul__(self, x: Array | np.ndarray) -> Array:
        return matmul(jnp.asarray(x), self)

    def __getitem__(self, i: Any) -> "Quantized":
        """Return one layer or a slice of layers of stacked weights. The last two axes stay whole."""
        if self.ndim < 3:
            raise IndexError(f"a quantized weight of shape {list(self.shape)} is not stacked; it cannot be indexed")
        return jax.tree.map(lambda leaf: leaf[i], self)

    def __len__(self) -> int:
        return self.shape[0]

    def astype(self, dtype: Any) -> "Quantized":
        """Return the same codes, which now decode to `dtype`."""
        return replace(self, kind=jnp.dtype(dtype).name)

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.kind)


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"],
         meta_fields=["rows", "block", "kind", "chip"])
@dataclass(frozen=True)
class NF4(Quantized):
    """Hold 4-bit weights, TABLE[code] * scale. codes: uint8 [..., in / 2, out]; the low nibbles hold the first half of
    each span of inputs, the high nibbles the second half. scales: float32 [..., in / block, out]. rows: length of the
    input axis before padding to whole blocks. kind: the dtype that it decodes to."""
    codes: jax.Array
    scales: jax.Array
    rows: int
    block: int
    kind: str
    chip: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], self.rows, self.codes.shape[-1])

    @property
    def span(self) -> int:
        """Return how many inputs one kernel step takes: their scales fill tiles of 8 rows, or it takes all inputs."""
        return _span(2 * self.codes.shape[-2], self.block)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["kind", "chip"])
@dataclass(frozen=True)
class Int8(Quantized):
    """Hold int8 `values` [..., in, out] and float32 `scales` [..., 1, out]. kind: the dtype that it decodes to."""
    values: jax.Array
    scales: jax.Array
    kind: str
    chip: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


# ---------------------------------------------------------------- quantize


def nf4(w: Array | np.ndarray, block: int = BLOCK, *, dtype: Any = None, chip: str | None = None) -> NF4:
    """Quantize w [..., in, out] to NF4 on the host, with bitsandbytes' codes and scales for each `block` inputs.

    A last block that is not full is scaled by its own values. dtype: the type that it decodes to (default: w's type).
    Raise ValueError for NaN, for Inf and for a block that is not an even number.
    """
    w, kind = _checked(w, dtype)
    if block < 2 or block % 2:
        raise Mistake(f"block is {block}; it must be an even number of weights, such as 64")
    codes, scales = (np.asarray(part) for part in _fast_codes(jax.device_put(w, _host()), block))
    if scales.min() < 1e-30:                                     # XLA flushes the smallest floats to zero
        codes, scales = _codes(w, block, np)
    return _pack(codes, scales, w.shape[-2], block, kind, chip)


def int8(w: Array | np.ndarray, *, dtype: Any = None, chip: str | None = None) -> Int8:
    """Quantize w [..., in, out] to round(127 w / max |w|) in each output column. Raise ValueError for NaN or Inf."""
    w, kind = _checked(w, dtype)
    w = w.astype(np.float32)
    scales = np.abs(w).max(-2, keepdims=True) / np.float32(127)
    values = np.rint(w / np.maximum(scales, TINY)).clip(-127, 127).astype(np.int8)
    return Int8(jnp.asarray(values), jnp.asarray(scales), kind, chip or chip_of())


def put(name: str, *, dtype: Any = None, chip: str | None = None) -> Callable:
    """Return a function (name, array) → leaf for `flux.load`. It quantizes the block weights of transformer and T5 as
    `name` says (nf4, int8 or none); other arrays are small and stay unchanged. Raise ValueError for another name."""
    chip = chip or chip_of()
    if name not in FORMATS:
        raise Mistake(f"unknown quantization {name!r}: use one of {', '.join(FORMATS)}")
    if name == "int8" and chip == "v4":
        warnings.warn("TPU v4 multiplies no int8: weights stay int8 in memory and are decoded for use", stacklevel=2)

    def leaf(path, array):
        packed = isinstance(array, NF4)                          # from a bitsandbytes checkpoint
        wanted = path.startswith(QUANTIZED) and array.ndim == 2
        if packed and not (name == "nf4" and wanted):
            array = np.asarray(dequantize(array))
        if not wanted or name == "none":
            return array
        if name == "int8":
            return int8(array, dtype=dtype, chip=chip)
        return replace(array, chip=chip) if packed else nf4(array, dtype=dtype, chip=chip)

    return leaf


FORMATS = ("nf4", "int8", "none")
DECODED = ("v4", "gpu")                                          # chips that multiply Int8 weights in x's type
QUANTIZED = ("transformer.double.", "transformer.single.", "t5.block.")        # prefixes of names that `put` quantizes


def chip_of(device: jax.Device | None = None) -> str:
    """Return "cpu", "gpu" or the TPU generation ("v4", "v5e", "v5p", "v6e", …) of `device` (default: JAX's first)."""
    device = device or jax.devices()[0]
    if device.platform != "tpu":
        return device.platform
    kind = device.device_kind.lower().removeprefix("tpu").strip()
    return {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}.get(kind, kind)


def _checked(w, dtype):
    w = np.asarray(w)
    if w.ndim < 2:
        raise Mistake(f"the weight has shape {list(w.shape)}; quantization needs [..., in, out]")
    if not np.isfinite(w.astype(np.float32).sum()):              # a finite sum may overflow too: look again
        bad = np.argwhere(~np.isfinite(w.astype(np.float32)))
        if len(bad):
            raise Mistake(f"the weight holds {w[tuple(bad[0])]} at {bad[0].tolist()}; all numbers must be finite")
    return w, jnp.dtype(dtype or w.dtype).name


def _host():
    """Return the CPU device, because its divisions are exact; JAX may compute on another device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise RuntimeError("quantizing needs JAX's CPU backend: leave JAX_PLATFORMS unset, or add cpu to it") from None


def _block_count(rows, block):
    """Return how many whole blocks of inputs to store: as many in the low nibbles as in the high nibbles."""
    return 2 * -(-rows // (2 * block))


def _codes(w, block, np):
    """Return uint8 indices of the nearest values in TABLE [..., in, out] and float32 scales [..., n, out]. Zeros pad w
    after its last input. bitsandbytes multiplies full blocks by the reciprocal and divides the rest: the two differ in
    the last bit, so a value on a bound gets another code."""
    *stack, rows, out = w.shape
    n, full = _block_count(rows, block), rows // block
    w = np.pad(w.astype(np.float32), [*[(0, 0)] * len(stack), (0, n * block - rows), (0, 0)])
    blocks = w.reshape(*stack, n, block, out)
    scales = np.max(np.abs(blocks), -2)
    most = np.maximum(scales, TINY)[..., None, :]
    rest = np.arange(n)[:, None, None] >= full
    scaled = np.where(rest, blocks / most, blocks * (1 / most))
    codes = sum((scaled > bound).astype(np.uint8) for bound in BOUNDS)
    return codes.reshape(*stack, n * block, out), scales


_fast_codes = jax.jit(partial(_codes, np=jnp), static_argnums=1)


def _span(rows, block):
    unit = 8 * block
    return next((span for span in range(SPAN // unit * unit, 0, -unit) if rows % span == 0), rows)


def _pack(codes, scales, rows, block, kind, chip):
    """Build NF4 from codes [..., in, out] and scales [..., n, out]."""
    *stack, n, out = codes.shape
    halves = codes.reshape(*stack, -1, 2, _span(n, block) // 2, out)
    packed = (halves[..., 0, :, :] | halves[..., 1, :, :] << 4).reshape(*stack, n // 2, out)
    return NF4(jnp.asarray(packed), jnp.asarray(scales), rows, block, kind, chip or chip_of())


# ---------------------------------------------------------------- decode


def dequantize(q: Quantized) -> Array:
    """Return the array [..., in, out] that q represents, in q.dtype. Products are in float32 and rounded once."""
    if isinstance(q, Int8):
        return (q.values.astype(jnp.float32) * q.scales).astype(q.dtype)
    *stack, n, out = q.codes.shape
    half = q.span // 2
    nibbles = q.codes.reshape(*stack, -1, 1, half, out) >> np.array([0, 4], np.uint8)[:, None, None] & 15
    values = jnp.asarray(TABLE)[nibbles] if q.chip == "gpu" else _values(nibbles)
    blocks = values.reshape(*stack, -1, q.block, out) * q.scales[..., None, :]
    return blocks.reshape(*stack, 2 * n, out)[..., :q.rows, :].astype(q.dtype)


def _values(codes):
    """Return TABLE[codes] in float32 by selects: TPUs gather slowly, and CPUs do eight selects at a time. For GPUs they
    are twice the instructions of reading the table, which stays in the cache."""
    values = list(TABLE)
    for bit in range(4):
        values = [jnp.where(codes >> bit & 1 == 1, b, a) for a, b in zip(values[::2], values[1::2])]
    return values[0]


# ---------------------------------------------------------------- multiply


@jax.custom_vjp
def matmul(x: Array, q: Quantized) -> Array:
    """Return x [..., in] @ q [in, out], [..., out] in x's type, accumulated in float32. Gradients flow only to x.

    With Int8, each row of x is rounded to 8 bits too, but not on DECODED. Raise TypeError if the shapes do not fit.
    """
    if q.ndim != 2 or x.shape[-1:] != q.shape[:1]:
        raise TypeError(f"cannot multiply {list(x.shape)} by a quantized weight of shape {list(q.shape)}")
    flat = x.reshape(-1, x.shape[-1])
    tiles = plan(q, len(flat))
    if isinstance(q, Int8):
        y = int8_plain(flat, q) if tiles is None else int8_kernel(flat, q, tiles)
    else:
        y = flat @ dequantize(q.astype(x.dtype)) if tiles is None else nf4_kernel(flat, q, tiles)
    return y.reshape(*x.shape[:-1], q.shape[1])


def _matmul_forward(x, q):
    return matmul(x, q), q


def _matmul_backward(q, g):
    flat = g.reshape(-1, g.shape[-1])
    tiles = plan(q, len(flat), transposed=True)
    dx = flat @ dequantize(q.astype(g.dtype)).T if tiles is None else nf4_transposed_kernel(flat, q, tiles)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0) if leaf.dtype.kind in "iu"
                         else jnp.zeros_like(leaf), q)
    return dx.reshape(*g.shape[:-1], q.shape[0]), zeros


matmul.defvjp(_matmul_forward, _matmul_backward)


def int8_plain(x: Array, q: Int8) -> Array:
    """Multiply x by Int8 in plain XLA: exact in int32, then scaled by row and column.

    Chips of DECODED decode the weights instead and multiply in x's type. TPU v4 has no int8 product. A GPU gains
    nothing by it: XLA writes the int32 sums to memory before it scales them, keeps a transposed copy of the weights of
    all layers, and tries many int8 kernels while it compiles."""
    if q.chip in DECODED:
        return x @ dequantize(q.astype(x.dtype))
    values, scales = round_rows(x)
    product = jax.lax.dot(values, q.values, preferred_element_type=jnp.int32)
    return (product.astype(jnp.float32) * scales * q.scales).astype(x.dtype)


def round_rows(x: Array) -> tuple[Array, Array]:
    """Scale each row of x [M, in] to ±127 and round. Return int8 values [M, in] and float32 scales [M, 1]."""
    x = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), TINY * 127) / 127
    return jnp.round(x / scales).astype(jnp.int8), scales


# ---------------------------------------------------------------- TPU kernels


@dataclass(frozen=True)
class Tiles:
    """Hold the sizes of one grid step."""
    rows: int                                                    # of x
    columns: int                                                 # of the output
    depth: int                                                   # inputs; with NF4 always a span
    chunk: int = 0                                               # columns at a time (0: all), see `interleave`


@dataclass(frozen=True)
class Chip:
    """Hold the largest tiles per product, the VMEM limit and the gather axis of a TPU generation."""
    nf4: Tiles
    transposed: Tiles                                            # NF4 transposed
    int8: Tiles | None
    vmem: int                                                    # MiB that the tiles may fill
    axis: int                  # of the gather from TABLE. 0: sublanes, two halves of 8 rows; 1: lanes, if no sublanes


# Bundles of one step with 3,072 rows: ours / plain bfloat16 with the same tile (bench/bundles.py, libtpu 0.0.42). NF4:
# v4 9,814 / 8,815, v5e 23,345 / 23,166, v5p 11,975 / 11,796 (1,536 rows), v6e 12,023 / 11,568; with 256 rows v4
# 4,794 / 2,458, v5e 2,991 / 2,192, v6e 2,582 / 1,310. Transposed: v4 10,859 / 9,345, v5e 45,228 / 44,292, v5p 23,257 /
# 22,369 (1,536 rows), v6e 12,623 / 12,217; with 256 rows v4 5,118 / 2,652, v5e 5,015 / 4,144, v6e 2,591 / 1,339. Int8:
# v5e 8,128 / 13,831, v6e 9,598 / 18,710. Worse on v5e: two products of half a span each (12,606 / 11,183 with 256
# columns), decoding the whole tile first (12,557), transposed with 512 columns (26,781 / 24,003). Worse on v6e: 512
# columns (8,210 / 7,817). Worse on v4: columns in chunks (11,265 / 8,815; transposed 13,094 / 9,345).
CHIPS = {
    "v4": Chip(Tiles(1024, 512, SPAN), Tiles(1024, 512, SPAN), None, 16, 1),
    "v5e": Chip(Tiles(3072, 512, SPAN, 128), Tiles(3072, 1024, SPAN, 128), Tiles(1536, 256, 3072, 128), 100, 0),
    "v5p": Chip(Tiles(2048, 512, SPAN, 128), Tiles(2048, 1024, SPAN, 128), Tiles(1536, 256, 3072, 128), 60, 0),
    "v6e": Chip(Tiles(3072, 768, SPAN, 256), Tiles(3072, 768, SPAN, 256), Tiles(3072, 512, 3072, 256), 100, 0),
}


def plan(q: Quantized, rows: int, transposed: bool = False) -> Tiles | None:
    """Return the Tiles of the kernel for x [rows, in] @ q (or x [rows, out] @ q transposed), or None for plain XLA:
    for chips outside CHIPS, for weights that are smaller than a tile of the matrix unit or do not divide into tiles,
    and for int8 transposed, because its scales lie along the summed axis."""
    chip, coded = CHIPS.get(q.chip), isinstance(q, NF4)
    if not chip or (transposed and not coded):
        return None
    most = chip.transposed if transposed else chip.nf4 if coded else chip.int8
    if not most or q.ndim != 2 or min(q.shape) < 128:
        return None
    depth = q.span if coded else q.shape[0]
    if coded and (depth > 2 * SPAN or q.block % 8):
        return None
    if not coded and depth > most.depth:
        depth = _divisor(depth, most.depth, 128)
    unit, groups = most.chunk or 128, -(-rows // most.rows)
    columns = _divisor(-(-q.shape[1] // unit) * unit, most.columns, unit)
    chunk = most.chunk if rows > 512 else 0                      # few rows hide nothing
    return Tiles(-(-rows // (32 * groups)) * 32, columns, depth, chunk) if depth else None


def _divisor(n, most, unit):
    """Return the largest multiple of unit, at most `most`, that divides n; 0 if there is none."""
    return next((size for size in range(most // unit * unit, 0, -unit) if n % size == 0), 0)


def nf4_kernel(x: Array, q: NF4, tiles: Tiles, *, interpret: Any = False) -> Array:
    """Return x [M, in] @ NF4 [in, out], [M, out] in x's type: load codes from HBM, decode in VMEM, then multiply."""
    from jax.experimental import pallas as pl
    (M, _), (half, out), chip = x.shape, q.codes.shape, CHIPS[q.chip]
    x = jnp.pad(x, ((0, 0), (0, 2 * half - q.rows)))

    def kernel(x_ref, codes, scales, y, total):
        start_total(total)
        decode = decoder(codes, scales, q.block, chip.axis, x.dtype)

        def multiply(rows, columns, low, high):
            total[rows, columns] += jnp.dot(x_ref[rows], jnp.concatenate([low, high], 0), precision=precision(x),
                                            preferred_element_type=jnp.float32)

        interleave(spans(tiles.columns, tiles.chunk), partial(decode, slice(None)), multiply, tiles.rows)
        write_total(y, total)

    return pl.pallas_call(
        kernel, grid=(pl.cdiv(M, tiles.rows), pl.cdiv(out, tiles.columns), 2 * half // tiles.depth),
        in_specs=[pl.BlockSpec((tiles.rows, tiles.depth), lambda i, j, k: (i, k)),
                  pl.BlockSpec((tiles.depth // 2, tiles.columns), lambda i, j, k: (k, j)),
                  pl.BlockSpec((tiles.depth // q.block, tiles.columns), lambda i, j, k: (k, j))],
        **output(M, out, tiles.rows, tiles.columns, x.dtype, jnp.float32, chip, interpret),
    )(x, signed(q.codes, chip), q.scales)


def nf4_transposed_kernel(g: Array, q: NF4, tiles: Tiles, *, interpret: Any = False) -> Array:
    """Return g [M, out] @ NF4 [in, out] transposed, [M, in] in g's type."""
    from jax.experimental import pallas as pl
    (M, out), half, chip = g.shape, tiles.depth // 2, CHIPS[q.chip]
    ragged = out % tiles.columns

    def kernel(g_ref, codes, scales, y, total):
        start_total(total)
        decode = decoder(codes, scales, q.block, chip.axis, g.dtype)

        def inside(x):                                           # padding after the last column is not zero
            column = jax.lax.broadcasted_iota(jnp.int32, (1, tiles.columns), 1) + pl.program_id(2) * tiles.columns
            return jnp.where(column < out, x, 0) if ragged else x

        def multiply(rows, inputs, *parts):
            product = jax.lax.dot_general(
                inside(g_ref[rows]), inside(jnp.concatenate(parts, 0)), (((1,), (1,)), ((), ())),
                precision=precision(g), preferred_element_type=jnp.float32)
            for part, y in enumerate(jnp.split(product, 2, axis=1)):
                total[rows, slice(inputs.start + part * half, inputs.stop + part * half)] += y

        pieces = spans(half, tiles.chunk)
        interleave(pieces, lambda inputs, part: decode(inputs, slice(None), part), multiply, tiles.rows)
        write_total(y, total)

    columns = 2 * q.codes.shape[0]
    return pl.pallas_call(
        kernel, grid=(pl.cdiv(M, tiles.rows), columns // tiles.depth, pl.cdiv(out, tiles.columns)),
        in_specs=[pl.BlockSpec((tiles.rows, tiles.columns), lambda i, j, k: (i, k)),
                  pl.BlockSpec((half, tiles.columns), lambda i, j, k: (j, k)),
                  pl.BlockSpec((tiles.depth // q.block, tiles.columns), lambda i, j, k: (j, k))],
        **output(M, columns, tiles.rows, tiles.depth, g.dtype, jnp.float32, chip, interpret),
    )(g, signed(q.codes, chip), q.scales)[:, :q.rows]


def int8_kernel(x: Array, q: Int8, tiles: Tiles, *, interpret: Any = False) -> Array:
    """Return the same numbers as `int8_plain`, in tiles: sum int8 products in int32, and scale them on writing."""
    from jax.experimental import pallas as pl
    (M, _), (rows, out), chip = x.shape, q.shape, CHIPS[q.chip]
    values, scales = round_rows(x)

    def kernel(a, b, row, column, y, total):
        start_total(total)
        for columns in spans(tiles.columns, tiles.chunk):
            total[:, columns] += jnp.dot(a[...], b[:, columns], preferred_element_type=jnp.int32)
        write_total(y, total, lambda sums: sums.astype(jnp.float32) * row[...] * column[...])

    return pl.pallas_call(
        kernel, grid=(pl.cdiv(M, tiles.rows), pl.cdiv(out, tiles.columns), rows // tiles.depth),
        in_specs=[pl.BlockSpec((tiles.rows, tiles.depth), lambda i, j, k: (i, k)),
                  pl.BlockSpec((tiles.depth, tiles.columns), lambda i, j, k: (k, j)),
                  pl.BlockSpec((tiles.rows, 1), lambda i, j, k: (i, 0)),
                  pl.BlockSpec((1, tiles.columns), lambda i, j, k: (0, j))],
        **output(M, out, tiles.rows, tiles.columns, x.dtype, jnp.int32, chip, interpret),
    )(values, q.values, scales, q.scales)


def interleave(pieces: Sequence[slice], decode: Callable, multiply: Callable, rows: int) -> None:
    """Call multiply(rows, piece, low, high) for all rows and every piece of a tile; decode(piece, part) returns its low
    (part 0) or high nibbles. Each part of the next piece is decoded just before half of the rows is multiplied by this
    piece: the compiler overlaps vector and matrix work only if they are adjacent."""
    halves = [span(0, rows // 2), span(rows // 2, rows // 2)] if len(pieces) > 1 else [slice(None)]
    coming = [decode(pieces[0], part) for part in (0, 1)]
    for piece, following in zip(pieces, [*pieces[1:], None]):
        parts, coming = coming, []
        for part, half in enumerate(halves):
            if following:
                coming.append(decode(following, part))
            multiply(half, piece, *parts)


def spans(length: int, size: int) -> list[slice]:
    """Return slices of `size` that cover `length`; one slice if size is 0 or does not divide it."""
    size = size if size and length % size == 0 else length
    return [span(start, size) for start in range(0, length, size)]


def span(start: int, size: int) -> slice:
    return slice(start, start + size)


def decoder(codes: Any, scales: Any, block: int, axis: int, dtype: Any) -> Callable:
    """Return (inputs, columns, part) → that part (0: low nibbles, 1: high) of a tile as `dtype`, rounded once."""
    tables, half = gather_tables(axis), codes.shape[0]

    def decode(inputs, columns, part):
        first = part * half + (inputs.start or 0)
        return decode_rows(codes[inputs, columns], scales[:, columns], first, block, tables, part, axis).astype(dtype)

    return decode


def decode_rows(codes: Array, scales: Array, first: int, block: int, tables: list, part: int, axis: int) -> Array:
    """Decode codes [n, columns] of the rows from `first` on to float32, with exactly the products of `dequantize`."""
    codes, rows = codes.astype(jnp.int32), []                    # TPUs cannot shift narrower types
    for r in range(0, len(codes), 8):
        values = [look_up(tables, codes[r:r + 8, c:c + 128], part, axis) for c in range(0, codes.shape[1], 128)]
        scale = (first + r) // block
        rows.append(jnp.concatenate(values, 1) * scales[scale:scale + 1])
    return jnp.concatenate(rows, 0)


def look_up(tables: list[Array], codes: Array, part: int, axis: int) -> Array:
    """Return TABLE at the low (part 0) or high nibbles of bytes [8, 128], sign-extended if axis is 0 (see `signed`)."""
    gather = partial(jnp.take_along_axis, axis=axis, mode="promise_in_bounds")     # no bounds checks
    if axis:
        return gather(tables[0], codes >> 4 if part else codes & 15)
    place = (codes >> 4 if part else codes) & 7
    upper = codes < 0 if part else codes & 8 != 0
    return jnp.where(upper, gather(tables[1], place), gather(tables[0], place))


def gather_tables(axis: int) -> list[Array]:
    """Return TABLE in registers of 8 x 128, built from iotas and selects: a kernel may not capture constant arrays."""
    place = jax.lax.broadcasted_iota(jnp.int32, (8, 128), axis)
    tables = []
    for part in (TABLE,) if axis else (TABLE[:8], TABLE[8:]):
        table = jnp.zeros((8, 128), jnp.float32)
        for i, value in enumerate(part):
            table = jnp.where(place == i, value, table)
        tables.append(table)
    return tables


def signed(codes: Array, chip: Chip) -> Array:
    """Return the codes as int8 for a table in two halves: the sign is then the fourth bit of the high nibble, and
    sign-extended bytes need no instruction to test it."""
    return codes if chip.axis else jax.lax.bitcast_convert_type(codes, jnp.int8)


def output(M: int, N: int, rows: int, columns: int, dtype: Any, accumulator: Any, chip: Chip,
           interpret: Any) -> dict[str, Any]:
    """Return the arguments of `pallas_call` for the output [M, N], the running total and the compiler."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu
    parameters = tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                    vmem_limit_bytes=chip.vmem << 20)
    return {"out_specs": pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
            "out_shape": jax.ShapeDtypeStruct((M, N), dtype), "interpret": interpret,
            "scratch_shapes": [tpu.VMEM((rows, columns), accumulator)], "compiler_params": parameters}


def start_total(total: Any) -> None:
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(2) == 0)
    def _():
        total[...] = jnp.zeros_like(total)


def write_total(y: Any, total: Any, finish: Callable = lambda sums: sums) -> None:
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y[...] = finish(total[...]).astype(y.dtype)


def precision(x: Array) -> jax.lax.Precision:
    """Return full precision for float32, and the matrix unit's default (bfloat16) for other types."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


# ---------------------------------------------------------------- files


STATE = ".quant_state.bitsandbytes__nf4"
SIBLINGS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


def unpack(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Join the tensors that bitsandbytes wrote for each weight into one `Packed`, for `flux.load`; keep all others.

    weights: {name: lazy slice}. Raise ValueError for the other 4-bit type of bitsandbytes.
    """
    packed = {}
    for name in weights:
        weight, found, kind = name.partition(".quant_state.")
        if found and kind != "bitsandbytes__nf4":
            raise Mistake(f"{weight} is quantized as {kind}; only nf4 of bitsandbytes' types can be read")
        if found:
            packed[weight] = Packed(weight, {s: weights[weight + s] for s in ("", *SIBLINGS) if weight + s in weights})
    used = {weight + s for weight in packed for s in SIBLINGS}
    return {name: piece for name, piece in weights.items() if name not in used} | packed


class Packed:
    """Read, on demand, a weight [out, in] that bitsandbytes stored as NF4. A byte holds two neighboring inputs, the
    first in the high nibble. Blocks continue from one output to the next."""

    def __init__(self, name: str, parts: Mapping[str, Any]) -> None:
        self.parts, self.state = parts, json.loads(bytes(parts[STATE][:]))
        if not np.allclose(parts[".quant_map"][:], TABLE):
            raise Mistake(f"{name} has its own quantization table; only the NormalFloat4 table can be read")

    def get_shape(self) -> list[int]:
        return list(self.state["shape"])

    def __getitem__(self, item: Any) -> np.ndarray:
        return np.asarray(dequantize(self.joined([self], "float32"))).T[item]

    def joined(self, pieces: "Sequence[Packed]", dtype: Any) -> NF4:
        """Join weights on the output axis as NF4 [in, out], with the codes and scales of the file. If the file's blocks
        do not end where the inputs end, these blocks are shorter and some share a scale."""
        rows = self.get_shape()[1]
        block = int(np.gcd(rows, self.state["blocksize"]))
        n = _block_count(rows, block)
        codes = _fill(np.concatenate([piece.codes() for piece in pieces], 1), n * block)
        scales = _fill(np.concatenate([piece.scales(block) for piece in pieces], 1), n)
        return _pack(codes, scales, rows, block, jnp.dtype(dtype).name, None)

    def codes(self) -> np.ndarray:
        """Return the codes [in, out]."""
        packed = self.parts[""][:].reshape(-1)
        flat = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
        shape = self.get_shape()
        return flat[:shape[0] * shape[1]].reshape(shape).T

    def scales(self, block: int) -> np.ndarray:
        """Return float32 scales [in / block, out]: for each block, the scale of the file's block that contains it."""
        scales = self.parts[".absmax"][:].reshape(-1)
        if ".nested_absmax" in self.parts:                       # 8-bit scales: "double quantization"
            groups = np.arange(len(scales)) // self.state["nested_blocksize"]
            scales = (self.parts[".nested_quant_map"][:][scales] * self.parts[".nested_absmax"][:][groups]
                      + np.float32(self.state["nested_offset"]))
        out, rows = self.get_shape()
        return scales[np.arange(0, out * rows, block) // self.state["blocksize"]].reshape(out, -1).T


def _fill(array, n):
    """Pad array with zero rows up to n rows."""
    return np.pad(array, ((0, n - len(array)), (0, 0)))
