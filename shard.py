"""A model on several chips or hosts: meshes, weights that live in parts, and stacked blocks run one by one.

Stands alone: copy this one file. It needs jax and numpy.

    shard.join()                                            # only where there are several hosts: first of all
    mesh = shard.mesh()                                     # all of jax.devices(), axes data x fsdp
    model = flux.load("schnell", put=shard.put(mesh, quant.put("nf4")), walk=shard.sliced(mesh))
    state = shard.split(mesh, sae.init(...), features)      # an SAE and its optimizer: 1/n of the features a chip

Weights are split on their last, the output axis (FSDP, "fully sharded data parallel", arXiv 2304.11277): each chip
keeps 1/n of every weight, of its codes and its scales, and a layer is gathered while the one before it computes.
Activations are split by batch over all chips. A block runs inside `shard_map`, so that it, and the Pallas kernels in
it, see whole weights and their own part of the batch.

`scan` and `sliced` walk stacked blocks [L, ...] with the same results. `scan` is one `lax.scan`, compiled for a range
of layers; `sliced` is one program that takes the layer's number, dispatched once per layer: it stops at any layer, and
catches at any layer, without another compilation.
"""
import contextlib
import os
import sys
import traceback
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SMALL = 2 ** 20                                                  # bytes: what is smaller is on every chip, whole
AXES = ("data", "fsdp")


class Mistake(ValueError):
    """What the caller can put right; its message is one line that names the value and what would be right."""


# ---------------------------------------------------------------- placement


def several():
    """`mesh` of all devices, or None where there is one."""
    return mesh() if len(jax.devices()) > 1 else None


def mesh(devices=None, *, data=1):
    """Mesh with the axes data x fsdp over `devices` (default: all that JAX has, of all hosts).

    Weights are split over fsdp and repeated over data. Raises ValueError where `data` does not divide the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not isinstance(data, int) or data < 1 or len(devices) % data:
        raise Mistake(f"data is {data!r}: it must divide the number of devices, {len(devices)}")
    return Mesh(np.array(devices).reshape(data, -1), AXES)


def put(mesh, quantize=None):
    """For `flux.load`: (name, array) → leaf on the mesh, quantized first by `quantize(name, array)`.

    Weights of stacked blocks are split; everything else, and what is small, is on every chip. Raises ValueError for a
    weight whose outputs the mesh does not divide, before anything of it is placed.
    """
    def leaf(name, array):
        parts = quantize(name, array) if quantize else array
        return jax.tree.map(lambda part: place(part, mesh, spec(mesh, part, name)), parts)

    return leaf


def spec(mesh, array, name=None):
    """How an array [..., out] of one layer lies on the mesh: a PartitionSpec. `name`: for the error."""
    n = mesh.shape["fsdp"]
    if array.ndim < 2 or (name and not {"block", "double", "single"} & set(name.split("."))):
        return PartitionSpec()
    if array.shape[-1] % n == 0:
        return PartitionSpec(*[None] * (array.ndim - 1), "fsdp")
    if array.size * array.dtype.itemsize <= SMALL:
        return PartitionSpec()
    divisors = [k for k in range(1, 65) if array.shape[-1] % k == 0]
    raise Mistake(f"{name or 'a weight'} of shape {list(array.shape)} cannot be split over {n} chips; its last axis "
                     f"divides by {', '.join(map(str, divisors))}: choose fsdp (devices / data) among them")


def check(mesh, features):
    if features % mesh.size:
        raise Mistake(f"{features} features cannot be split over {mesh.size} devices: take a multiple of "
                         f"{mesh.size}")


def batch(each, least=1):
    """How many examples go through a model together where nobody says: `each` a device, or `least` in all where that is
    more, and every device has as many. (What a mesh does not divide, the walkers fill up.)"""
    devices = len(jax.devices())
    return max(each, -(-least // devices)) * devices


def arguments(mesh, options):
    """The arguments `options` of `flux.load` (put, unpack) with which weights go to the mesh and blocks run on it; with
    mesh None as they are."""
    return options | {"put": put(mesh, options.get("put")), "walk": sliced(mesh)} if mesh else options


def place(array, mesh, spec):
    """The array on the mesh. Every host passes all of it and keeps its own parts: nothing is sent between hosts."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def tensor(mesh):
    """The same chips in one row, the axis `tensor`: over it an SAE's features are split, whatever its batch."""
    return Mesh(mesh.devices.reshape(-1), "tensor")


def split(mesh, tree, size):
    """The tree with every array that has an axis of `size` split on it over all chips, and the others on every chip.

    Raises ValueError where the mesh does not divide `size`.
    """
    check(mesh, size)
    return jax.tree.map(lambda array: place(array, tensor(mesh), split_spec(array.shape, size)), tree)


def mesh_of(params):
    """The mesh over which a model's parameters lie; None on one device."""
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def everywhere(mesh):
    return NamedSharding(mesh, PartitionSpec())


def split_spec(shape, size):
    return PartitionSpec(*[None] * shape.index(size), "tensor") if size in shape else PartitionSpec()


# ---------------------------------------------------------------- several hosts

HEARTBEAT = 30                                                   # seconds after which a silent host counts as lost


def join(address=None, processes=None, number=None):
    """Make this process one of several that run the same program, each on its own host's chips: before JAX sees any.

    On a TPU pod (and under Slurm or Open MPI) all arguments are found; elsewhere: address "host:port" of the first
    process, how many there are, and this one's number from 0. Raises ValueError where they are wrong or not found.
    """
    try:
        jax.distributed.initialize(address, processes, number, heartbeat_timeout_seconds=HEARTBEAT,
                                   shutdown_timeout_seconds=HEARTBEAT)
    except (ValueError, TypeError) as error:
        raise Mistake(f"no other processes found ({error}); where the system does not name them, give the first "
                         "one's address, how many there are, and the number of this one: localhost:1234,2,0") from None


def first():
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def whole(tree):
    """The tree as numpy arrays on every host, also what is split over hosts: then all of them have to ask."""
    from jax.experimental import multihost_utils

    def gather(x):
        local = not isinstance(x, jax.Array) or x.is_fully_addressable
        return np.asarray(x) if local else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gather, tree)


def of_all(array):
    """The arrays that the hosts give, of one shape, stacked on a new axis 0, on every host."""
    from jax.experimental import multihost_utils
    return multihost_utils.process_allgather(array, tiled=False)


def expected(error):
    """Whether an error is for the user, in one line: the system's, or a Mistake, of which each file that stands alone
    has its own. Any other is a bug."""
    return isinstance(error, OSError) or type(error).__name__ == "Mistake"


def together(function, *args):
    """function(*args) on every host. Where one of them raises an error that is `expected`, Mistake on all."""
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
def as_one(note):
    """Several hosts act as one program: only the first one prints, and when one fails, it ends without waiting for the
    others, who then end as well. note: what to add, in case that one was lost."""
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
            # How a lost host shows depends on what was being sent: no type of exception tells it.
            print(f"error: {said}" + ("" if expected(error) else f"\n{note}"), file=sys.stderr, flush=True)
            os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)     # an ordinary exit waits for all


# ---------------------------------------------------------------- walkers


@lru_cache
def scan(mesh=None):
    """walk(block, x, stack, layers, *context) → (x, caught): the blocks as one `lax.scan` over `layers`, a range.

    block(x, parameters of one layer, *context) → (x, caught). x: a pytree of arrays [B, ...]. stack: parameters
    [L, ...]; context: what all layers and examples share. Values caught are stacked, [len(layers), ...].
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
def sliced(mesh=None):
    """As `scan`, but one program for all layers, dispatched once for each. Not to be wrapped in `jax.jit`."""
    first = jax.jit(lambda stack, i: (fetch(stack, i, mesh), i))

    @partial(jax.jit, static_argnums=0)
    def run(block, x, p, stack, i, context):
        (x, p), found = stepper(block, mesh)(x, p, stack, i, context)
        return (x, p, i + 1), found                              # counted here: the host would send it to every chip

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


def filled(mesh, walk):
    """`walk` for any batch: the last example is repeated until the mesh divides them, and taken off again. Else every
    chip would do the work of all."""
    def run(block, x, stack, layers, *context):
        B = jax.tree.leaves(x)[0].shape[0]
        if mesh is None or B % mesh.size == 0:
            return walk(block, x, stack, layers, *context)
        order = np.minimum(np.arange(-(-B // mesh.size) * mesh.size), B - 1)
        x, caught = walk(block, jax.tree.map(lambda a: a[order], x), stack, layers, *context)
        return jax.tree.map(lambda a: a[:B], x), jax.tree.map(lambda a: a[:, :B], caught)

    return run


def stepper(block, mesh):
    """(x, p, stack, i, context) → ((x, parameters of layer i + 1), caught): block i, and the fetching of the next one,
    which needs nothing from it, so that the compiler can send the one while it computes the other."""
    def step(x, p, stack, i, context):
        following = fetch(stack, jnp.minimum(i + 1, depth(stack) - 1), mesh)
        x, caught = local(block, mesh, x)(x, p, *context)
        return (x, following), caught

    return step


def fetch(stack, i, mesh):
    """The parameters of layer i, whole on every chip."""
    p = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, i, keepdims=False), stack)
    if mesh is None:
        return p
    return jax.tree.map(lambda w: lax.with_sharding_constraint(w, everywhere(mesh)), p)


def local(block, mesh, x):
    """`block` on each chip's part of the batch, which the mesh has to divide (see `filled`)."""
    if mesh is None:
        return block
    batch = PartitionSpec(AXES)

    def specs(*args):
        return (batch, *[PartitionSpec()] * (len(args) - 1))

    return lambda *args: jax.shard_map(block, mesh=mesh, in_specs=specs(*args), out_specs=batch, check_vma=False)(*args)


def batch_spec(mesh, B):
    """How arrays [B, ...] lie on the mesh: split where it divides B, else whole on every chip."""
    return PartitionSpec(AXES) if B % mesh.size == 0 else PartitionSpec()


def wait(mesh, tree):
    """Several devices on a CPU share one pool of threads: of programs that run at the same time, each may hold threads
    that wait for the others' forever."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
    alone = mesh is None or mesh.devices.flat[0].platform != "cpu" or traced
    return tree if alone else jax.block_until_ready(tree)


def depth(stack):
    return jax.tree.leaves(stack)[0].shape[0]
