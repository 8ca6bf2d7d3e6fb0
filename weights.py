"""Read and write model weights: a table declares each tensor once, for files of every layout.

This file works alone: copy it. It needs jax, numpy and safetensors.

    cfg = weights.read_config(Config, "transformer/config.json")                # a dataclass from the model's JSON file
    params = weights.load_tensors(table, weights.open_weights("transformer"))   # streams one tensor at a time
    weights.save_tensors(table, params, "model.safetensors")                    # the inverse
"""
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import safe_open
from safetensors.numpy import save_file


class Mistake(ValueError):
    """Report an error that the caller can fix. Its one-line message names the value and says what would be right."""


@dataclass(frozen=True)
class Tensor:
    """Declare one tensor."""
    shape: tuple[int, ...]                                       # in memory, without the layer axis
    parts: dict[str, int]          # {name in the file: width on the last axis}, joined in order; "{}": the layer number
    layers: int | None = None                                    # number of layers stacked on axis 0; None: not stacked
    transposed: bool = False       # the file has torch's [out, in], or [out, in, h, w] for [h, w, in, out] in memory
    mean: float = 0.0                                            # of the initialization
    std: float = 0.0                                             # of the initialization; 0: a constant

    def file_shape(self, width: int) -> tuple[int, ...]:
        """Return the shape in the file of a part of this width."""
        shape = (*self.shape[:-1], width)
        return (width, shape[-2], *shape[:-2]) if self.transposed else shape

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Return the array with its axes in the file's order."""
        return array.transpose(-1, -2, *range(array.ndim - 2)) if self.transposed else array

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """Return the file's array with its axes in our order."""
        return array.transpose(*range(2, array.ndim), 1, 0) if self.transposed else array

    @property
    def numbers(self) -> range:
        """Return the layer numbers; a tensor that is not stacked counts as one layer."""
        return range(1 if self.layers is None else self.layers)


def linear(n_in: int, parts: Mapping[str, int], *, layers: int | None = None, bias: bool = True,
           std: float | None = None) -> dict[str, Tensor]:
    """Declare the tensors of `x @ w + b`. `parts` maps torch module names to their outputs, joined in one weight."""
    n_out = sum(parts.values())
    std = n_in ** -0.5 if std is None else std
    table = {"w": Tensor((n_in, n_out), {f"{k}.weight": n for k, n in parts.items()}, layers, True, std=std)}
    if bias:
        table["b"] = Tensor((n_out,), {f"{k}.bias": n for k, n in parts.items()}, layers)
    return table


def open_weights(path: str | Path, unpack: Callable | None = None, *, variant: str | None = None,
                 prefixes: Sequence[str] = ()) -> dict[str, Any]:
    """Return {tensor name: lazy slice} of a safetensors file, of an index file, or of a folder that holds one of them.

    Nothing is read yet: a slice has `get_shape()`, and `[...]` reads its data. A weight with a scale beside it (float8)
    is multiplied by that scale. unpack: maps this dict to another, in which one entry may join several tensors of the
    file. variant: "fp16" for `model.fp16.safetensors`; None for the plain file, or for the only variant in the folder.
    prefixes: the first one that the file uses is removed from the names, and tensors without it are left out.
    Raise OSError or ValueError.
    """
    path, weights = Path(path), {}
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    whole = _weight_file(path, variant) if path.is_dir() else path
    for file in _shards(whole) if whole.suffix == ".json" else [whole]:
        weights |= _slices(file)
    for prefix in prefixes:
        if any(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): piece for name, piece in weights.items() if name.startswith(prefix)}
            break
    weights = _scaled(weights, path)
    return unpack(weights) if unpack else weights


# Types by their safetensors names. The numpy reader of safetensors does not support float8
KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
         "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
         "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"}


@dataclass(frozen=True)
class Slice:
    """Read a tensor of a safetensors file. The file is open only during reads: a model may be larger than memory."""
    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str                                                    # the type, by its safetensors name
    start: int                                                   # offset of the first byte

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, item: Any) -> np.ndarray:
        if self.kind not in KINDS:
            raise Mistake(f"{self.name} in {self.file} has type {self.kind}; known types are {', '.join(KINDS)}")
        dtype = jnp.dtype(KINDS[self.kind])
        raw = np.fromfile(self.file, np.uint8, math.prod(self.shape) * dtype.itemsize, offset=self.start)
        return raw.view(dtype).reshape(self.shape)[item]


@dataclass(frozen=True)
class Scaled:
    """Multiply a lazy slice by its scale in float32. The scale is one number, or one for each output (axis 0)."""
    piece: Slice
    scale: Slice

    def get_shape(self) -> list[int]:
        return self.piece.get_shape()

    def __getitem__(self, item: Any) -> np.ndarray:
        scale = self.scale[...].astype(np.float32).reshape(-1, *[1] * (len(self.get_shape()) - 1))
        return (self.piece[...].astype(np.float32) * scale)[item]


def _scaled(weights, path):
    """Return the weights with their scales applied, without the scales and other tensors of a quantized file."""
    for name in weights:
        if name.endswith(".SCB"):
            raise Mistake(f"{path} holds int8 weights of bitsandbytes ({name}), which cannot be read: load the "
                          "unquantized weights with --quant int8, or use NF4 weights of bitsandbytes")
    scaled = {}
    for name, scale in weights.items():
        module, _, kind = name.rpartition(".")
        weight = f"{module}.weight"
        if kind in ("scale_weight", "weight_scale") and weight in weights:
            outputs, size = weights[weight].get_shape()[:1], math.prod(scale.get_shape())
            if size not in (1, *outputs):
                raise Mistake(f"{name} in {path} has shape {scale.get_shape()}; only one scale, or one for each "
                              "output, can be applied")
            scaled[weight] = Scaled(weights[weight], scale)
    beside = ("scale_weight", "weight_scale", "scale_input", "input_scale", "scaled_fp8", "comfy_quant")
    return {name: piece for name, piece in (weights | scaled).items() if name.rpartition(".")[2] not in beside}


def _slices(file):
    """Return {name: Slice} of one safetensors file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is named by the index beside it, but it is missing")
    try:
        with safe_open(file, "np"):                              # checks the whole header
            pass
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except Exception as error:
        raise Mistake(f"{file} is not a readable safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return {name: Slice(file, name, tuple(about["shape"]), about["dtype"], 8 + length + about["data_offsets"][0])
            for name, about in header.items()}


def _weight_file(folder, variant):
    """Return the folder's index or single file of a variant: model.safetensors, model.fp16.safetensors,
    model.safetensors.index.json, model.safetensors.index.fp16.json, or the same with diffusion_pytorch_model."""
    found = {}
    for stem in ("diffusion_pytorch_model", "model"):
        for file in sorted(folder.glob(f"{stem}.*"), key=lambda file: (file.suffix, file.name)):       # .json first
            words = file.name.split(".")[1:]
            kind = [word for word in words if word not in ("safetensors", "index", "json")]
            if words[-1] in ("safetensors", "json") and "safetensors" in words and "-of-" not in file.name:
                found.setdefault(".".join(kind), file)
    wanted = variant or ("" if "" in found or len(found) != 1 else next(iter(found)))
    if wanted not in found:
        variants = ", ".join(filter(None, sorted(found)))
        if not variants:
            raise FileNotFoundError(f"{folder} holds neither model.safetensors nor diffusion_pytorch_model.safetensors "
                                    "nor a *.safetensors.index.json")
        raise Mistake(f"{folder} holds the variants {variants}" + (f", not {variant}" if variant else
                      " and no plain weights: name one (variant=), or keep only one in the folder"))
    return found[wanted]


def _shards(index):
    """Return the files that an index file names; they are in its folder."""
    try:
        return sorted({index.with_name(name) for name in read_json(index)["weight_map"].values()})
    except Mistake:
        raise
    except (KeyError, TypeError, AttributeError, ValueError):
        raise Mistake(f"{index} is not an index of safetensors files") from None


def load_tensors(table: Any, weights: Mapping[str, Any], *, put: Callable | None = None, dtype: Any = jnp.bfloat16,
                 ignore: Collection[str] = ()) -> Any:
    """Read `weights` (from `open_weights`) into the structure of `table`, one tensor at a time.

    put: (name, array [in, out] of one layer) → the leaf to keep; the leaves of a stack are then stacked on axis 0.
    NumPy arrays are stacked before they go to the device, which needs no compiled program for each shape.
    Raise ValueError, before reading any data, for a missing, unexpected (unless in `ignore`) or misshapen tensor.
    """
    check_tensors(table, weights, ignore)
    put = put or (lambda name, array: array)
    arrays = _ahead(lambda job: _read(job[0], weights, job[1], dtype),
                    [(tensor, i) for tensor in jax.tree.leaves(table) for i in tensor.numbers])

    def leaf(path, tensor):
        name = path_name(path)
        if tensor.layers is None:
            return jax.tree.map(_placed, put(name, next(arrays)))
        layers = [put(name, next(arrays)) for _ in tensor.numbers]
        return jax.tree.map(_stacked, *layers) if layers else jnp.zeros((0, *tensor.shape), dtype)

    return jax.tree_util.tree_map_with_path(leaf, table)


def _stacked(*leaves):
    return jax.device_put(np.stack(leaves)) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)


def _placed(leaf):
    return jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf       # `put` may have placed it elsewhere


def _ahead(function, jobs):
    """Yield function(job) of each job, in order. While the caller uses one result, a thread computes the next."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for job in jobs:
            ready, coming = coming, pool.submit(function, job)
            if ready:
                yield ready.result()
                del ready                                        # else memory holds it beside the next two
        if coming:
            yield coming.result()


def file_shapes(table: Any) -> dict[str, tuple[int, ...]]:
    """Return {name in the file: shape in the file} of all tensors that `table` declares."""
    return {part.format(i): tensor.file_shape(width) for tensor in jax.tree.leaves(table)
            for i in tensor.numbers for part, width in tensor.parts.items()}


def check_tensors(table: Any, weights: Mapping[str, Any], ignore: Collection[str] = ()) -> None:
    """Raise ValueError, with names and shapes, unless `weights` holds exactly the tensors that `table` declares."""
    expected = file_shapes(table)
    shapes = {name: tuple(piece.get_shape()) for name, piece in weights.items() if name not in ignore}
    for problem, names in (("missing", expected.keys() - shapes), ("unexpected", shapes.keys() - expected)):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise Mistake(f"{problem} tensor{'s' * (len(names) > 1)} in the weights: {listed}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise Mistake(f"misshapen tensor in the weights: {name} is {list(shapes[name])}, should be {list(shape)}")
        if getattr(weights[name], "kind", "F")[0] in "IU":
            raise Mistake(f"{name} in the weights holds whole numbers ({weights[name].kind}), a quantization that "
                          "cannot be read; use float weights")


def _read(tensor, weights, layer, dtype):
    """Read one layer of one tensor as [in, out] and join its parts. Each value moves only once, when transposed."""
    pieces = [weights[part.format(layer)] for part in tensor.parts]
    if all(hasattr(piece, "joined") for piece in pieces):        # quantized in the file: keep it quantized
        return pieces[0].joined(pieces, dtype)
    array, start = np.empty(tensor.shape, jnp.dtype(dtype)), 0
    for piece, width in zip(pieces, tensor.parts.values()):
        array[..., start:start + width] = tensor.from_file(piece[:])
        start += width
    return array


def init_tensors(table: Any, key: Array, dtype: Any = jnp.float32) -> Any:
    """Return random parameters as `table` declares them (normal, with a mean and std per tensor)."""
    leaves, structure = jax.tree.flatten(table)
    keys = jax.random.split(key, max(len(leaves), 1))

    def leaf(tensor, key):
        shape = tensor.shape if tensor.layers is None else (tensor.layers, *tensor.shape)
        noise = tensor.std * jax.random.normal(key, shape) if tensor.std else 0.0
        return jnp.broadcast_to(tensor.mean + noise, shape).astype(dtype)

    return structure.unflatten([leaf(tensor, k) for tensor, k in zip(leaves, keys)])


def save_tensors(table: Any, params: Any, file: str | Path, dtype: Any = jnp.bfloat16) -> None:
    """Write `params` with the names of `table`, in the file's layout; the inverse of `load_tensors`."""
    arrays = {}
    for tensor, value in zip(jax.tree.leaves(table), jax.tree.structure(table).flatten_up_to(params)):
        value = np.asarray(value).astype(jnp.dtype(dtype))
        for i in tensor.numbers:
            layer, start = value if tensor.layers is None else value[i], 0
            for part, width in tensor.parts.items():
                piece = layer[..., start:start + width]
                arrays[part.format(i)] = np.ascontiguousarray(tensor.to_file(piece))
                start += width
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, file, metadata={"format": "pt"})


def download(repo: str, files: Sequence[str], **options: Any) -> Path:
    """Download the files of a hub repo that match the patterns `files`. Return the local folder. options: revision."""
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(repo, allow_patterns=files, **options))
    except errors.GatedRepoError:
        raise Mistake(f"{repo} is gated: accept its license on the hub, then log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise Mistake(f"no repo {repo} on the hub (or it is private and you are not logged in)") from None
    except Exception as error:                                   # the hub client's HTTP library has its own errors
        raise Mistake(f"cannot fetch {repo}: {(str(error) or repr(error)).splitlines()[0]}") from None


def path_name(path: Sequence[Any]) -> str:
    """Return a pytree key path as "a.b.c"."""
    return ".".join(str(getattr(entry, "key", entry)) for entry in path)


def read_json(file: str | Path) -> Any:
    """Return the JSON object in `file`. Raise an error that names the file if it is missing or broken."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except ValueError as error:
        raise Mistake(f"{file} is not valid JSON: {error}") from None


def read_config(cls: type, file: str | Path | dict, **fixed: Any) -> Any:
    """Return the dataclass `cls` from the JSON `file`, or from a dict. Missing fields keep their defaults; unknown ones
    are ignored. fixed: fields that replace those of the file."""
    given = read_json(file) if not isinstance(file, dict) else file
    names = {f.name for f in fields(cls)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in names and v is not None}
    return cls(**values | fixed)
