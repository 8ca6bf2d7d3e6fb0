"""Read and write the weights of a model: a table declares each tensor once, and files of every layout follow it.

Stands alone: copy this one file. It needs jax, numpy and safetensors.

    cfg = weights.read_config(Config, "transformer/config.json")                # a dataclass, from the JSON beside it
    params = weights.load_tensors(table, weights.open_weights("transformer"))   # streamed, one tensor at a time
    weights.save_tensors(table, params, "model.safetensors")                    # the inverse
"""
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


class Mistake(ValueError):
    """What the caller can put right; its message is one line that names the value and what would be right."""


@dataclass(frozen=True)
class Tensor:
    """One tensor, declared once.

    shape: as we keep it, without the layer axis. parts: {name in the file: width on our last axis}, joined in this
    order; "{}" in a name stands for the layer number. layers: how many are stacked on axis 0 (None: not stacked).
    transposed: the file holds torch's [out, in]. mean, std: of the initialization (std 0: a constant).
    """
    shape: tuple[int, ...]
    parts: dict[str, int]
    layers: int | None = None
    transposed: bool = False
    mean: float = 0.0
    std: float = 0.0

    def file_shape(self, width):
        shape = (*self.shape[:-1], width)
        return shape[::-1] if self.transposed else shape

    @property
    def numbers(self):
        """The layers' numbers; a tensor that is not stacked counts as one."""
        return range(1 if self.layers is None else self.layers)


def linear(n_in, parts, *, layers=None, bias=True, std=None):
    """Tensors of `x @ w + b`; `parts` maps each torch module's name to its number of outputs, joined as one weight."""
    n_out = sum(parts.values())
    std = n_in ** -0.5 if std is None else std
    table = {"w": Tensor((n_in, n_out), {f"{k}.weight": n for k, n in parts.items()}, layers, True, std=std)}
    if bias:
        table["b"] = Tensor((n_out,), {f"{k}.bias": n for k, n in parts.items()}, layers)
    return table


def open_weights(path, unpack=None):
    """{tensor name: lazy slice} of a safetensors file, or of a folder with one file or a sharded set and its index.

    Nothing is read yet: a slice has `get_shape()`, and reads what `[...]` asks for. unpack: from this dict to another,
    in which one piece may stand for several tensors of the file. Raises OSError or ValueError.
    """
    path, weights = Path(path), {}
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    for file in [path] if path.is_file() else _weight_files(path):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is named by the index beside it but is missing")
        try:
            reader = safe_open(file, "np")
        except Exception as error:
            raise Mistake(f"{file} is not a readable safetensors file: {error}") from None
        with reader:
            weights |= {name: Slice(file, name, reader.get_slice(name).get_shape())
                        for name in reader.keys()}               # noqa: SIM118 (it is no dict)
    return unpack(weights) if unpack else weights


@dataclass(frozen=True)
class Slice:
    """A tensor of a safetensors file, which is mapped into memory only while it is read: what stays mapped counts as
    used, and a model may be larger than the memory."""
    file: Path
    name: str
    shape: list[int]

    def get_shape(self):
        return self.shape

    def __getitem__(self, item):
        with safe_open(self.file, "np") as reader:
            return reader.get_slice(self.name)[item]


def _weight_files(folder):
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        return sorted({folder / name for name in read_json(index[0])["weight_map"].values()})
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).exists():
            return [folder / name]
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor diffusion_pytorch_model.safetensors nor "
                            "a *.safetensors.index.json")


def load_tensors(table, weights, *, put=None, dtype=jnp.bfloat16, ignore=()):
    """Read `weights` (as `open_weights` gives them) into the shape of `table`, one tensor at a time.

    put: (name, array [in, out] of one layer) → the leaf to keep; the leaves of a stack are then joined on axis 0.
    Before anything is read, a missing, unexpected (unless in `ignore`) or misshapen tensor raises ValueError.
    """
    check_tensors(table, weights, ignore)
    put = put or (lambda name, array: jax.tree.map(jnp.asarray, array))
    arrays = _ahead(lambda job: _read(job[0], weights, job[1], dtype),
                    [(tensor, i) for tensor in jax.tree.leaves(table) for i in tensor.numbers])

    def leaf(path, tensor):
        name = path_name(path)
        if tensor.layers is None:
            return put(name, next(arrays))
        layers = [put(name, next(arrays)) for _ in tensor.numbers]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *layers) if layers else jnp.zeros((0, *tensor.shape), dtype)

    return jax.tree_util.tree_map_with_path(leaf, table)


def _ahead(function, jobs):
    """function(job) of each job, in order; while the caller works on one, a thread has begun with the next."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for job in jobs:
            ready, coming = coming, pool.submit(function, job)
            if ready:
                yield ready.result()
                del ready                                        # or it would be in memory beside the next two
        if coming:
            yield coming.result()


def file_shapes(table):
    """{name in the file: shape there} of all that `table` declares."""
    return {part.format(i): tensor.file_shape(width) for tensor in jax.tree.leaves(table)
            for i in tensor.numbers for part, width in tensor.parts.items()}


def check_tensors(table, weights, ignore=()):
    """Raise ValueError, with names and shapes, unless `weights` holds exactly the tensors that `table` declares."""
    expected = file_shapes(table)
    shapes = {name: tuple(piece.get_shape()) for name, piece in weights.items() if name not in ignore}
    for problem, names in (("missing", expected.keys() - shapes), ("unexpected", shapes.keys() - expected)):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise Mistake(f"{problem} tensor{'s' * (len(names) > 1)} in the weights: {listed}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise Mistake(f"misshapen tensor in the weights: {name} is {list(shapes[name])}, "
                             f"should be {list(shape)}")


def _read(tensor, weights, layer, dtype):
    """One layer of one tensor as [in, out], its parts joined: each value is moved once, while it is transposed."""
    pieces = [weights[part.format(layer)] for part in tensor.parts]
    if all(hasattr(piece, "joined") for piece in pieces):        # quantized in the file, and so they stay
        return pieces[0].joined(pieces, dtype)
    array, start = np.empty(tensor.shape, jnp.dtype(dtype)), 0
    for piece, width in zip(pieces, tensor.parts.values()):
        array[..., start:start + width] = piece[:].T if tensor.transposed else piece[:]
        start += width
    return array


def init_tensors(table, key, dtype=jnp.float32):
    """Random parameters as `table` declares them (normal, mean and std per tensor)."""
    leaves, structure = jax.tree.flatten(table)
    keys = jax.random.split(key, max(len(leaves), 1))

    def leaf(tensor, key):
        shape = tensor.shape if tensor.layers is None else (tensor.layers, *tensor.shape)
        noise = tensor.std * jax.random.normal(key, shape) if tensor.std else 0.0
        return jnp.broadcast_to(tensor.mean + noise, shape).astype(dtype)

    return structure.unflatten([leaf(tensor, k) for tensor, k in zip(leaves, keys)])


def save_tensors(table, params, file, dtype=jnp.bfloat16):
    """Write `params` under the names that `table` gives, in the file's layout; the inverse of `load_tensors`."""
    arrays = {}
    for tensor, value in zip(jax.tree.leaves(table), jax.tree.structure(table).flatten_up_to(params)):
        value = np.asarray(value).astype(jnp.dtype(dtype))
        for i in tensor.numbers:
            layer, start = value if tensor.layers is None else value[i], 0
            for part, width in tensor.parts.items():
                piece = layer[..., start:start + width]
                arrays[part.format(i)] = np.ascontiguousarray(piece.T if tensor.transposed else piece)
                start += width
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, file, metadata={"format": "pt"})


def path_name(path):
    return ".".join(str(getattr(entry, "key", entry)) for entry in path)


def read_json(file):
    """The JSON object in `file`; a missing or broken file raises an error that names it."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except ValueError as error:
        raise Mistake(f"{file} is not valid JSON: {error}") from None


def read_config(cls, file, **fixed):
    """A config dataclass from the JSON `file`: fields that the file lacks keep the default; others are ignored."""
    given = read_json(file) if not isinstance(file, dict) else file
    names = {f.name for f in fields(cls)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in names and v is not None}
    return cls(**values | fixed)
