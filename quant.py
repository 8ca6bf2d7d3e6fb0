"""4-bit NF4 and int8 weights that multiply like arrays, exact, with Pallas kernels for TPUs and a plain XLA form.

Stands alone: copy this one file. It needs jax and numpy.

    q = quant.nf4(w)                       # w [..., in, out] → 4.5 bits a weight, bitsandbytes' NormalFloat4
    q = quant.int8(w)                      # one scale per output column; activations get one per row as they come
    y = x @ q                              # a pytree: jit, scan over stacked layers, q[i], device_put, grad to x
    w = quant.dequantize(q)

Blocks of 64 run along the input axis, so that a split of the output axis never cuts one. A byte holds the codes of two
rows that lie half a span of (mostly) 1,024 inputs apart, not of two neighbours: both nibbles of a tile then decode to
whole tiles, and nothing is ever interleaved. A weight knows its chip, "cpu" or for example "v5e" (default: of JAX's
first device, when it is quantized); `plan` says from it and from the sizes alone which product is a kernel. Sources:
NF4: QLoRA (arXiv 2305.14314), rounding as bitsandbytes 0.50 does it; int8: LLM.int8 (arXiv
2208.07339) without its outliers.
"""
import json
import warnings
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

TABLE = np.array([                                               # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)
BOUNDS = (TABLE[:-1] + TABLE[1:]) / 2                            # a value on a bound takes the lower code
BLOCK, SPAN = 64, 1024
TINY = np.float32(1e-38)                                         # stands in for the scale of a block of zeros


class Mistake(ValueError):
    """What the caller can put right; its message is one line that names the value and what would be right."""


class Quantized:
    """What NF4 and Int8 share: they look like the array [..., in, out] that they stand for."""
    ndim = property(lambda self: len(self.shape))
    __array_ufunc__ = None                                       # so that numpy leaves `x @ q` to us

    def __rmatmul__(self, x):
        return matmul(jnp.asarray(x), self)

    def __getitem__(self, i):
        """Of stacked weights one layer, or a slice of layers. The last two axes stay whole."""
        if self.ndim < 3:
            raise IndexError(f"a quantized weight of shape {list(self.shape)} is not stacked; it cannot be indexed")
        return jax.tree.map(lambda leaf: leaf[i], self)

    def __len__(self):
        return self.shape[0]

    def astype(self, dtype):
        """The same codes; what they decode to has another type."""
        return replace(self, kind=jnp.dtype(dtype).name)

    @property
    def dtype(self):
        return jnp.dtype(self.kind)


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"],
         meta_fields=["rows", "block", "kind", "chip"])
@dataclass(frozen=True)
class NF4(Quantized):
    """Values TABLE[code] * scale. rows: the length of the input axis, which is filled up to whole blocks. codes
    [..., in / 2, out] uint8: of each span of inputs the first half is in the low nibbles, the second in the high ones.
    scales: float32 [..., in / block, out]. kind: the dtype it decodes to."""
    codes: jax.Array
    scales: jax.Array
    rows: int
    block: int
    kind: str
    chip: str

    @property
    def shape(self):
        return (*self.codes.shape[:-2], self.rows, self.codes.shape[-1])

    @property
    def span(self):
        """How many inputs a step of the kernels takes: with scales that fill tiles of 8 rows, or all there are."""
        return _span(2 * self.codes.shape[-2], self.block)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["kind", "chip"])
@dataclass(frozen=True)
class Int8(Quantized):
    """values [..., in, out] int8 times scales [..., 1, out] float32. kind: the dtype it decodes to."""
    values: jax.Array
    scales: jax.Array
    kind: str
    chip: str

    @property
    def shape(self):
        return self.values.shape


# ---------------------------------------------------------------- quantize


def nf4(w, block=BLOCK, *, dtype=None, chip=None):
    """w [..., in, out] → NF4, on the host: with bitsandbytes' codes and scales for each block of `block` inputs.

    A last block that is not full is scaled by its own values. dtype: what it decodes to (default: w's). Raises
    ValueError for NaN or Inf and for a block that is not an even number.
    """
    w, kind = _checked(w, dtype)
    if block < 2 or block % 2:
        raise Mistake(f"block is {block}; it must be an even number of weights, such as 64")
    codes, scales = (np.asarray(part) for part in _fast_codes(jax.device_put(w, _host()), block))
    if scales.min() < 1e-30:                                     # XLA takes the smallest floats for zeros
        codes, scales = _codes(w, block, np)
    return _pack(codes, scales, w.shape[-2], block, kind, chip)


def int8(w, *, dtype=None, chip=None):
    """w [..., in, out] → Int8: round(127 w / max |w|) of each output column. Raises ValueError for NaN or Inf."""
    w, kind = _checked(w, dtype)
    w = w.astype(np.float32)
    scales = np.abs(w).max(-2, keepdims=True) / np.float32(127)
    values = np.rint(w / np.maximum(scales, TINY)).clip(-127, 127).astype(np.int8)
    return Int8(jnp.asarray(values), jnp.asarray(scales), kind, chip or chip_of())


def put(name, *, dtype=None, chip=None):
    """For `flux.load`: (name, array) → leaf, quantizing the weights of the blocks of transformer and T5 as `name` says
    (nf4, int8 or none). What else there is, is small, and stays as it is. Raises ValueError for another name."""
    chip = chip or chip_of()
    if name not in FORMATS:
        raise Mistake(f"unknown quantization {name!r}: it is one of {', '.join(FORMATS)}")
    if name == "int8" and chip == "v4":
        warnings.warn("a TPU v4 multiplies no int8: weights stay 8 bits in memory and are decoded to be used",
                      stacklevel=2)

    def leaf(path, array):
        packed = isinstance(array, NF4)                          # from a checkpoint of bitsandbytes
        wanted = path.startswith(QUANTIZED) and array.ndim == 2
        if packed and not (name == "nf4" and wanted):
            array = np.asarray(dequantize(array))
        if not wanted or name == "none":
            return jax.tree.map(jnp.asarray, array)
        if name == "int8":
            return int8(array, dtype=dtype, chip=chip)
        return replace(array, chip=chip) if packed else nf4(array, dtype=dtype, chip=chip)

    return leaf


FORMATS = ("nf4", "int8", "none")
QUANTIZED = ("transformer.double.", "transformer.single.", "t5.block.")        # the names of what `put` quantizes


def chip_of(device=None):
    """"cpu", "gpu", or a TPU's generation ("v4", "v5e", "v5p", "v6e", …) of a device, by default JAX's first one."""
    device = device or jax.devices()[0]
    if device.platform != "tpu":
        return device.platform
    kind = device.device_kind.lower().removeprefix("tpu").strip()
    return {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}.get(kind, kind)


def _checked(w, dtype):
    w = np.asarray(w)
    if w.ndim < 2:
        raise Mistake(f"a weight of shape {list(w.shape)}; quantization needs [..., in, out]")
    if not np.isfinite(w.astype(np.float32).sum()):              # a sum of finite numbers may overflow: then look again
        bad = np.argwhere(~np.isfinite(w.astype(np.float32)))
        if len(bad):
            raise Mistake(f"the weight holds {w[tuple(bad[0])]} at {bad[0].tolist()}; only finite numbers can be "
                             "quantized")
    return w, jnp.dtype(dtype or w.dtype).name


def _host():
    """The CPU, whose divisions are exact, also where JAX computes elsewhere."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise RuntimeError("quantizing needs JAX's CPU backend: leave JAX_PLATFORMS unset, or add cpu to it") from None


def _block_count(rows, block):
    """How many blocks of inputs are kept: whole ones, as many in the low nibbles as in the high ones."""
    return 2 * -(-rows // (2 * block))


def _codes(w, block, np):
    """(uint8 index into TABLE of the nearest value [..., in, out], float32 scales [..., n, out]) of w, zeros behind its
    last input. bitsandbytes multiplies full blocks by the reciprocal and divides the rest; the two differ in the last
    bit, and so, on a bound, in the code."""
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
    """NF4 from codes [..., in, out] and scales [..., n, out]."""
    *stack, n, out = codes.shape
    halves = codes.reshape(*stack, -1, 2, _span(n, block) // 2, out)
    packed = (halves[..., 0, :, :] | halves[..., 1, :, :] << 4).reshape(*stack, n // 2, out)
    return NF4(jnp.asarray(packed), jnp.asarray(scales), rows, block, kind, chip or chip_of())


# ---------------------------------------------------------------- decode


def dequantize(q):
    """The array [..., in, out] that q stands for, in q.dtype; exact: products in float32, rounded once."""
    if isinstance(q, Int8):
        return (q.values.astype(jnp.float32) * q.scales).astype(q.dtype)
    *stack, n, out = q.codes.shape
    half = q.span // 2
    nibbles = q.codes.reshape(*stack, -1, 1, half, out) >> np.array([0, 4], np.uint8)[:, None, None] & 15
    blocks = _values(nibbles).reshape(*stack, -1, q.block, out) * q.scales[..., None, :]
    return blocks.reshape(*stack, 2 * n, out)[..., :q.rows, :].astype(q.dtype)


def _values(codes):
    """TABLE[codes] in float32, by selects: TPUs are slow to gather, and CPUs do these eight at a time."""
    values = list(TABLE)
    for bit in range(4):
        values = [jnp.where(codes >> bit & 1 == 1, b, a) for a, b in zip(values[::2], values[1::2])]
    return values[0]


# ---------------------------------------------------------------- multiply


@jax.custom_vjp
def matmul(x, q):
    """x [..., in] @ q [in, out] → [..., out] in x's type, accumulated in float32. Gradients flow to x alone.

    With Int8, each row of x is rounded to 8 bits too. Raises TypeError where the shapes do not fit.
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


def int8_plain(x, q):
    """The product with Int8 in plain XLA: exact in int32, then scaled by row and column."""
    if q.chip == "v4":                                           # has no int8 product
        return x @ dequantize(q.astype(x.dtype))
    values, scales = round_rows(x)
    product = jax.lax.dot(values, q.values, preferred_element_type=jnp.int32)
    return (product.astype(jnp.float32) * scales * q.scales).astype(x.dtype)


def round_rows(x):
    """x [M, in] → (int8 values [M, in], float32 scales [M, 1]): each row scaled to ±127 and rounded."""
    x = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), TINY * 127) / 127
    return jnp.round(x / scales).astype(jnp.int8), scales


# ---------------------------------------------------------------- TPU kernels


@dataclass(frozen=True)
class Tiles:
    """Sizes of one grid step: rows of x, columns of the output, inputs (with NF4 always a span), and how many columns
    are worked on at a time (0: all; see `interleave`)."""
    rows: int
    columns: int
    depth: int
    chunk: int = 0


@dataclass(frozen=True)
class Chip:
    """The largest tiles of products with NF4, with NF4 transposed, and with int8; MiB of VMEM that they may fill; and
    along which axis TABLE is gathered (0: sublanes, in two halves of 8 rows; 1: lanes, where the chip has no other)."""
    nf4: Tiles
    transposed: Tiles
    int8: "Tiles | None"
    vmem: int
    axis: int


# Bundles of one step with 3,072 rows, ours / plain bfloat16's with the same tile (bench/bundles.py, libtpu 0.0.42):
# NF4 v4 9,814 / 8,815, v5e 23,345 / 23,166, v5p 11,975 / 11,796 (1,536 rows), v6e 12,023 / 11,568; with 256 rows v4
# 4,794 / 2,458, v5e 2,991 / 2,192, v6e 2,582 / 1,310. Transposed v4 10,859 / 9,345, v5e 45,228 / 44,292, v5p 23,257 /
# 22,369 (1,536 rows), v6e 12,623 / 12,217; with 256 rows v4 5,118 / 2,652, v5e 5,015 / 4,144, v6e 2,591 / 1,339. Int8
# v5e 8,128 / 13,831, v6e 9,598 / 18,710. What was worse on v5e: two products of half a span each (12,606 / 11,183 with
# 256 columns), the whole tile decoded first (12,557), transposed 512 columns (26,781 / 24,003); on v6e 512 columns
# (8,210 / 7,817); on v4 columns in chunks (11,265 / 8,815; transposed 13,094 / 9,345).
CHIPS = {
    "v4": Chip(Tiles(1024, 512, SPAN), Tiles(1024, 512, SPAN), None, 16, 1),
    "v5e": Chip(Tiles(3072, 512, SPAN, 128), Tiles(3072, 1024, SPAN, 128), Tiles(1536, 256, 3072, 128), 100, 0),
    "v5p": Chip(Tiles(2048, 512, SPAN, 128), Tiles(2048, 1024, SPAN, 128), Tiles(1536, 256, 3072, 128), 60, 0),
    "v6e": Chip(Tiles(3072, 768, SPAN, 256), Tiles(3072, 768, SPAN, 256), Tiles(3072, 512, 3072, 256), 100, 0),
}


def plan(q, rows, transposed=False):
    """The Tiles with which a product of x [rows, in] and q (or, [rows, out], and q transposed) is a kernel, or None
    where it is plain XLA's: on other chips than those of CHIPS, for weights smaller than a tile of the matrix unit,
    for those that do not divide, and for int8 transposed, whose scales lie along what is summed."""
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
    """The largest multiple of unit, up to most, that divides n; 0 if there is none."""
    return next((size for size in range(most // unit * unit, 0, -unit) if n % size == 0), 0)


def nf4_kernel(x, q, tiles, *, interpret=False):
    """x [M, in] @ NF4 [in, out] → [M, out] in x's type: codes come from HBM, are decoded in VMEM and multiplied."""
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


def nf4_transposed_kernel(g, q, tiles, *, interpret=False):
    """g [M, out] @ NF4 [in, out] transposed → [M, in] in g's type."""
    from jax.experimental import pallas as pl
    (M, out), half, chip = g.shape, tiles.depth // 2, CHIPS[q.chip]
    ragged = out % tiles.columns

    def kernel(g_ref, codes, scales, y, total):
        start_total(total)
        decode = decoder(codes, scales, q.block, chip.axis, g.dtype)

        def inside(x):                                           # what lies behind the last column is not zero
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


def int8_kernel(x, q, tiles, *, interpret=False):
    """The same numbers as `int8_plain`, in tiles: int8 products, summed in int32, scaled when they are written."""
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


def interleave(pieces, decode, multiply, rows):
    """multiply(rows, piece, low, high) of all rows with every piece of a tile, which decode(piece, part) gives in two
    parts (0: low nibbles, 1: high). Each part of the next piece is decoded before the product of one half of the rows
    with this one: the compiler hides vector work behind the matrix unit's only where the two stand side by side."""
    halves = [span(0, rows // 2), span(rows // 2, rows // 2)] if len(pieces) > 1 else [slice(None)]
    coming = [decode(pieces[0], part) for part in (0, 1)]
    for piece, following in zip(pieces, [*pieces[1:], None]):
        parts, coming = coming, []
        for part, half in enumerate(halves):
            if following:
                coming.append(decode(following, part))
            multiply(half, piece, *parts)


def spans(length, size):
    """Slices of `size`, or of all where it is 0 or does not divide."""
    size = size if size and length % size == 0 else length
    return [span(start, size) for start in range(0, length, size)]


def span(start, size):
    return slice(start, start + size)


def decoder(codes, scales, block, axis, dtype):
    """(inputs, columns, part) → of a tile's codes that part (0: low nibbles, 1: high) as `dtype`, rounded once."""
    tables, half = gather_tables(axis), codes.shape[0]

    def decode(inputs, columns, part):
        first = part * half + (inputs.start or 0)
        return decode_rows(codes[inputs, columns], scales[:, columns], first, block, tables, part, axis).astype(dtype)

    return decode


def decode_rows(codes, scales, first, block, tables, part, axis):
    """Codes [n, columns] of rows first … → float32 values, exact: the very products that `dequantize` makes."""
    codes, rows = codes.astype(jnp.int32), []                    # narrower types cannot be shifted
    for r in range(0, len(codes), 8):
        values = [look_up(tables, codes[r:r + 8, c:c + 128], part, axis) for c in range(0, codes.shape[1], 128)]
        scale = (first + r) // block
        rows.append(jnp.concatenate(values, 1) * scales[scale:scale + 1])
    return jnp.concatenate(rows, 0)


def look_up(tables, codes, part, axis):
    """TABLE at the low (part 0) or high nibbles of bytes [8, 128]; for axis 0 they are sign-extended (see `signed`)."""
    gather = partial(jnp.take_along_axis, axis=axis, mode="promise_in_bounds")     # no tests for bounds
    if axis:
        return gather(tables[0], codes >> 4 if part else codes & 15)
    place = (codes >> 4 if part else codes) & 7
    upper = codes < 0 if part else codes & 8 != 0
    return jnp.where(upper, gather(tables[1], place), gather(tables[0], place))


def gather_tables(axis):
    """TABLE in registers of 8 x 128. A kernel may not hold constant arrays: they are made of iotas and selects."""
    place = jax.lax.broadcasted_iota(jnp.int32, (8, 128), axis)
    tables = []
    for part in (TABLE,) if axis else (TABLE[:8], TABLE[8:]):
        table = jnp.zeros((8, 128), jnp.float32)
        for i, value in enumerate(part):
            table = jnp.where(place == i, value, table)
        tables.append(table)
    return tables


def signed(codes, chip):
    """For a table in two halves the same bytes as int8: sign-extended, a test of the fourth bit of the high nibble
    costs no instruction."""
    return codes if chip.axis else jax.lax.bitcast_convert_type(codes, jnp.int8)


def output(M, N, rows, columns, dtype, accumulator, chip, interpret):
    """What every kernel says about its output [M, N], its running total, and the compiler."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu
    parameters = tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                    vmem_limit_bytes=chip.vmem << 20)
    return {"out_specs": pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
            "out_shape": jax.ShapeDtypeStruct((M, N), dtype), "interpret": interpret,
            "scratch_shapes": [tpu.VMEM((rows, columns), accumulator)], "compiler_params": parameters}


def start_total(total):
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(2) == 0)
    def _():
        total[...] = jnp.zeros_like(total)


def write_total(y, total, finish=lambda sums: sums):
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y[...] = finish(total[...]).astype(y.dtype)


def precision(x):
    """Products of float32 as float32 has them; the matrix unit's own (bfloat16) else."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


# ---------------------------------------------------------------- files


STATE = ".quant_state.bitsandbytes__nf4"
SIBLINGS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


def unpack(weights):
    """For `flux.load`: of the tensors that bitsandbytes wrote for one weight, one `Packed`; all others as they are.

    weights: {name: lazy slice}. Raises ValueError for its other 4-bit type.
    """
    packed = {}
    for name in weights:
        weight, found, kind = name.partition(".quant_state.")
        if found and kind != "bitsandbytes__nf4":
            raise Mistake(f"{weight} is quantized as {kind}; of bitsandbytes' types only nf4 can be read")
        if found:
            packed[weight] = Packed(weight, {s: weights[weight + s] for s in ("", *SIBLINGS) if weight + s in weights})
    used = {weight + s for weight in packed for s in SIBLINGS}
    return {name: piece for name, piece in weights.items() if name not in used} | packed


class Packed:
    """A weight [out, in] as bitsandbytes stores NF4, read when it is asked for: two neighbouring inputs a byte, the
    first in the high nibble, in blocks that run on from one output to the next."""

    def __init__(self, name, parts):
        self.parts, self.state = parts, json.loads(bytes(parts[STATE][:]))
        if not np.allclose(parts[".quant_map"][:], TABLE):
            raise Mistake(f"{name} has a table of its own; only NormalFloat4's can be read")

    def get_shape(self):
        return list(self.state["shape"])

    def __getitem__(self, item):
        return np.asarray(dequantize(self.joined([self], "float32"))).T[item]

    def joined(self, pieces, dtype):
        """NF4 [in, out] of weights side by side on the output axis: with the codes and scales of the file. Where its
        blocks do not end with the inputs, ours are shorter, and some share a scale."""
        rows = self.get_shape()[1]
        block = int(np.gcd(rows, self.state["blocksize"]))
        n = _block_count(rows, block)
        codes = _fill(np.concatenate([piece.codes() for piece in pieces], 1), n * block)
        scales = _fill(np.concatenate([piece.scales(block) for piece in pieces], 1), n)
        return _pack(codes, scales, rows, block, jnp.dtype(dtype).name, None)

    def codes(self):
        """[in, out]"""
        packed = self.parts[""][:].reshape(-1)
        flat = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
        shape = self.get_shape()
        return flat[:shape[0] * shape[1]].reshape(shape).T

    def scales(self, block):
        """float32 [in / block, out]: of the file's block in which each of ours lies."""
        scales = self.parts[".absmax"][:].reshape(-1)
        if ".nested_absmax" in self.parts:                       # in 8 bits: "double quantization"
            groups = np.arange(len(scales)) // self.state["nested_blocksize"]
            scales = (self.parts[".nested_quant_map"][:][scales] * self.parts[".nested_absmax"][:][groups]
                      + np.float32(self.state["nested_offset"]))
        out, rows = self.get_shape()
        return scales[np.arange(0, out * rows, block) // self.state["blocksize"]].reshape(out, -1).T


def _fill(array, n):
    """Zeros behind the rows of array, up to n."""
    return np.pad(array, ((0, n - len(array)), (0, 0)))
