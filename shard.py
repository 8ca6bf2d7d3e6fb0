"""Run a model on several chips or hosts: make meshes, split weights over chips, and run stacked blocks one by one.

This file works alone: copy it. It needs jax and numpy.

    shard.join()                                            # call this first, only if there are several hosts
    mesh = shard.mesh()                                     # all of jax.devices(), axes data x fsdp
    model = flux.load("schnell", put=shard.put(mesh, quant.put("nf4")), walk=shard.sliced(mesh))
    state = shard.split(mesh, sae.init(...), features)      # an SAE and its optimizer: 1/n of the features per chip

Weights are split on the input axis (FSDP, "fully sharded data parallel", arXiv 2304.11277). Each chip keeps 1/n of the
rows of every weight, of its codes and its scales: then a gathered layer is these parts one after the other, and GPUs
copy nothing to join them. Each layer is gathered while the previous layer computes.
Activations are split by batch over all chips. A block runs inside `shard_map`, so the block and its Pallas kernels see
whole weights and their own part of the batch.

`scan` and `sliced` run stacked blocks [L, ...] with the same results. `scan` is one `lax.scan`, compiled for a range of
layers. `sliced` is one program that takes the layer number and is dispatched once per layer: it can stop and capture at
any layer without another compilation.
"""
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SMALL = 2 ** 20                                                  # bytes: each chip keeps smaller arrays whole
AXES = ("data", "fsdp")


class Mistake(ValueError):
    """Report an error that the caller can fix. Its one-line message names the value and says what would be right."""


# ---------------------------------------------------------------- placement


def several() -> Mesh | None:
    """Return the `mesh` of all devices, or None if there is only one device."""
    return mesh() if len(jax.devices()) > 1 else None


def mesh(devices: Sequence[jax.Device] | None = None, *, data: int = 1) -> Mesh:
    """Return a Mesh with the axes data x fsdp over `devices` (default: all JAX devices of all hosts).

    Weights are split over fsdp and repeated over data. Raise ValueError if `data` does not divide the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not isinstance(data, int) or data < 1 or len(devices) % data:
        raise Mistake(f"data is {data!r}: it must divide the number of devices, {len(devices)}")
    return Mesh(np.array(devices).reshape(data, -1), AXES)


def put(mesh: Mesh, quantize: Callable | None = None) -> Callable:
    """Return a function (name, array) → leaf on the mesh for `flux.load`; `quantize(name, array)` runs first.

    Weights of stacked blocks are split; all other arrays, and small ones, are on every chip. The function raises
    ValueError for a weight that the mesh does not divide, before it places any part.
    """
    def leaf(name, array):
        parts = quantize(name, array) if quantize else array
        return jax.tree.map(lambda part: place(part, mesh, spec(mesh, part, name)), parts)

    return leaf


def spec(mesh: Mesh, array: Any, name: str | None = None) -> PartitionSpec:
    """Return the PartitionSpec on the mesh of an array [..., in, out] of one layer: split on the axis of inputs, or of
    outputs if only that one divides. `name`: for the error message."""
    n = mesh.shape["fsdp"]
    if array.ndim < 2 or (name and not {"block", "double", "single"} & set(name.split("."))):
        return PartitionSpec()
    for axis in (array.ndim - 2, array.ndim - 1):
        if array.shape[axis] % n == 0:
            return PartitionSpec(*[None] * axis, "fsdp")
    if array.size * array.dtype.itemsize <= SMALL:
        return PartitionSpec()
    divisors = [k for k in range(1, 65) if 0 in (array.shape[-2] % k, array.shape[-1] % k)]
    raise Mistake(f"{name or 'a weight'} of shape {list(array.shape)} cannot be split over {n} chips; one of its last "
                  f"two axes divides by {', '.join(map(str, divisors))}: choose one of them as fsdp (devices / data)")


def check(mesh: Mesh, features: int) -> None:
    if features % mesh.size:
        raise Mistake(f"{features} features cannot be split over {mesh.size} devices: take a multiple of {mesh.size}")


def batch(each: int, least: int = 1) -> int:
    """Return the default batch size of a model: `each` per device, or more until there are `least` in total. Every
    device gets the same number. (Walkers pad batches that the mesh does not divide.)"""
    devices = len(jax.devices())
    return max(each, -(-least // devices)) * devices


def arguments(mesh: Mesh | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `flux.load` arguments `options` (put, unpack), changed so that weights are placed on the mesh and
    blocks run on it; unchanged if mesh is None."""
    return options | {"put": put(mesh, options.get("put")), "walk": sliced(mesh)} if mesh else options


def place(array: Any, mesh: Mesh, spec: PartitionSpec) -> Array:
    """Place an array on the mesh. Every host passes all of it and keeps its own parts, so hosts send nothing."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def tensor(mesh: Mesh) -> Mesh:
    """Return the same chips in one row. An SAE's features are split over its axis `tensor`, for any batch size."""
    return Mesh(mesh.devices.reshape(-1), "tensor")


def split(mesh: Mesh, tree: Any, size: int) -> Any:
    """Split every array of the tree that has an axis of `size` on that axis over all chips; copy others to every chip.

    Raise ValueError if the mesh does not divide `size`.
    """
    check(mesh, size)
    return jax.tree.map(lambda array: place(array, tensor(mesh), split_spec(array.shape, size)), tree)


def mesh_of(params: Any) -> Mesh | None:
    """Return the mesh of a model's parameters; None if they are on one device."""
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def everywhere(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is whole on every chip."""
    return NamedSharding(mesh, PartitionSpec())


def split_spec(shape: tuple[int, ...], size: int) -> PartitionSpec:
    """Return the PartitionSpec that splits the first axis of `size` over the axis `tensor`."""
    return PartitionSpec(*[None] * shape.index(size), "tensor") if size in shape else PartitionSpec()


# ---------------------------------------------------------------- several hosts

HEARTBEAT = 30                                                   # seconds until a silent host counts as lost


def join(address: str | None = None, processes: int | None = None, number: int | None = None) -> None:
    """Join the processes that run the same program, each on its own host's chips. Call it before JAX sees any device.

    On a TPU pod (and under Slurm or Open MPI) JAX finds all arguments. Elsewhere give the first process's address
    "host:port", the number of processes, and this one's number from 0. Raise ValueError if they are wrong or missing.
    """
    try:
        jax.distributed.initialize(address, processes, number, heartbeat_timeout_seconds=HEARTBEAT,
                                   shutdown_timeout_seconds=HEARTBEAT)
    except (ValueError, TypeError) as error:
        raise Mistake(f"no other processes found ({error}); give the first process's address, the number of processes "
                      "and this one's number, such as localhost:1234,2,0") from None


def first() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def whole(tree: Any) -> Any:
    """Return the tree as numpy arrays on every host. If arrays are split over hosts, all hosts must call this."""
    from jax.experimental import multihost_utils

    def gather(x):
        local = not isinstance(x, jax.Array) or x.is_fully_addressable
        return np.asarray(x) if local else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gather, tree)


def of_all(array: np.ndarray) -> np.ndarray:
    """Return the arrays of all hosts, which have the same shape, stacked on a new axis 0, on every host."""
    from jax.experimental import multihost_utils
    return multihost_utils.process_allgather(array, tiled=False)


def expected(error: BaseException) -> bool:
    """Return whether the user can fix an error: an OSError, or any file's own Mistake class. Others are bugs."""
    return isinstance(error, OSError) or type(error).__name__ == "Mistake"


def together(function: Callable, *args: Any) -> Any:
    """Run function(*args) on every host. If one host raises an `expected` error, raise Mistake on all hosts."""
    try:
        result, message = function(*args), ""
    except Exception as error:
        if jax.process_count() == 1 or not expected(error):
            raise
        result, message = None, str(error) or repr(error)
    said = of_all(np.frombuffer(message.encode()[:1000].ljust(1000), np.uint8))
    for host, line in enumerate(said):
        if line := bytes(line).decode(errors="ignore").strip():
            raise Mistake(f"host {host}: {line}")
    return result


@contextlib.contextmanager
def as_one(note: str) -> Iterator[None]:
    """Make several hosts act as one program. Only the first host prints. A host that fails ends without waiting for the
    others, which then end too. note: added to an unexpected error, which may mean that a host was lost."""
    if jax.process_count() == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        if not first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if not expected(error):
                traceback.print_exc()
            said = (str(error) or repr(error)).splitlines()[0]
            # A lost host raises different exceptions, depending on what was being sent.
            print(f"error: {said}" + ("" if expected(error) else f"\n{note}"), file=sys.stderr, flush=True)
            os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)     # a normal exit waits for all hosts


# ---------------------------------------------------------------- walkers


@lru_cache
def scan(mesh: Mesh | None = None) -> Callable:
    """Return walk(block, x, stack, layers, *context) → (x, captured), which runs the range `layers` as one `lax.scan`.

    block(x, parameters of one layer, *context) → (x, captured). x: a pytree of arrays [B, ...]. stack: parameters
    [L, ...]. context: values that all layers and examples share. Captured values are stacked: [len(layers), ...].
    """
    @partial(jax.jit, static_argnums=(0, 3))
    def run(block, x, stack, layers, context):
        step = stepper(block, mesh)
        if not layers:
            return x, {}
        start = (x, fetch(stack, layers.start, mesh))
        (x, _), caught = lax.scan(lambda state, i: step(*state, stack, i, context), start,
                                  jnp.arange(layers.start, layers.stop))
        return x, caught

    return filled(mesh, lambda block, x, stack, layers, *context: wait(mesh, run(block, x, stack, layers, context)))


@lru_cache
def sliced(mesh: Mesh | None = None) -> Callable:
    """Return a walk like `scan`, but as one program, dispatched once per layer. Do not wrap it in `jax.jit`."""
    first = jax.jit(lambda stack, i: (fetch(stack, i, mesh), i))

    @partial(jax.jit, static_argnums=0)
    def run(block, x, p, stack, i, context):
        (x, p), found = stepper(block, mesh)(x, p, stack, i, context)
        return (x, p, i + 1), found                              # counting on the host would send i to every chip

    def walk(block, x, stack, layers, *context):
        if not layers:
            return x, {}
        caught, (p, i) = [], first(stack, layers.start)
        for _ in layers:
            (x, p, i), found = wait(mesh, run(block, x, p, stack, i, context))
            caught.append(found)
        return x, jax.tree.map(lambda *values: jnp.stack(values), *caught)

    walk = filled(mesh, walk)
    walk.run = run                                               # its `_cache_size` counts compilations
    return walk


def filled(mesh: Mesh | None, walk: Callable) -> Callable:
    """Return `walk` for any batch size: repeat the last example until the mesh divides the batch, then drop the copies.
    Without this, every chip would compute the whole batch."""
    def run(block, x, stack, layers, *context):
        B = jax.tree.leaves(x)[0].shape[0]
        if mesh is None or B % mesh.size == 0:
            return walk(block, x, stack, layers, *context)
        order = np.minimum(np.arange(-(-B // mesh.size) * mesh.size), B - 1)
        x, caught = walk(block, jax.tree.map(lambda a: a[order], x), stack, layers, *context)
        return jax.tree.map(lambda a: a[:B], x), jax.tree.map(lambda a: a[:, :B], caught)

    return run


def stepper(block: Callable, mesh: Mesh | None) -> Callable:
    """Return (x, p, stack, i, context) → ((x, parameters of layer i + 1), captured). It runs block i and fetches the
    next layer, which does not depend on block i: the compiler can transfer one while it computes the other."""
    def step(x, p, stack, i, context):
        following = fetch(stack, jnp.minimum(i + 1, depth(stack) - 1), mesh)
        x, caught = local(block, mesh, x)(x, p, *context)
        return (x, following), caught

    return step


def fetch(stack: Any, i: int | Array, mesh: Mesh | None) -> Any:
    """Return the parameters of layer i, whole on every chip."""
    p = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, i, keepdims=False), stack)
    if mesh is None:
        return p
    return jax.tree.map(lambda w: lax.with_sharding_constraint(w, everywhere(mesh)), p)


def local(block: Callable, mesh: Mesh | None, x: Any) -> Callable:
    """Return `block` on each chip's part of the batch. The mesh must divide the batch (see `filled`)."""
    if mesh is None:
        return block
    batch = PartitionSpec(AXES)

    def specs(*args):
        return (batch, *[PartitionSpec()] * (len(args) - 1))

    return lambda *args: jax.shard_map(block, mesh=mesh, in_specs=specs(*args), out_specs=batch, check_vma=False)(*args)


def batch_spec(mesh: Mesh, B: int) -> PartitionSpec:
    """Return the PartitionSpec of arrays [B, ...]: split if the mesh divides B, else whole on every chip."""
    return PartitionSpec(AXES) if B % mesh.size == 0 else PartitionSpec()


def wait(mesh: Mesh | None, tree: Any) -> Any:
    """Wait for the tree on a mesh of CPU devices. They share one thread pool, so programs that run at the same time can
    hold threads and wait for each other forever."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
    alone = mesh is None or mesh.devices.flat[0].platform != "cpu" or traced
    return tree if alone else jax.block_until_ready(tree)


def depth(stack: Any) -> int:
    return jax.tree.leaves(stack)[0].shape[0]
