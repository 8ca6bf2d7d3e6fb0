"""Check whether FLUX.1's programs fit on TPUs and GPUs: compile them at full size without one, and print Markdown.

    python bench/fit.py [v5e-1 v5e-4 v4-8 v6e-4 v5p-8 v4-32:nf4 "v4-8:nf4:capture at 18"]
    GPU_COMPILER=FOLDER python bench/fit.py h100-1 h100-4 a100-40-1 4090-1:nf4 l4-1:nf4      # see tests/gpu.py

Shapes are enough: no weights are made. The compiler reports GiB per chip: arguments that the program uses (weights),
temporaries and outputs. "total resident" adds everything else that the tools keep at most: all of FLUX.1, T5-XXL, CLIP
and the VAE, and an SAE of 16,384 features with its optimizer. "in train.py" is the total there, with one timestep: only
the blocks up to the layer (18 for programs without a layer), and no VAE. JAX takes 0.75 of a GPU's memory unless
XLA_CLIENT_MEM_FRACTION says otherwise; "0.95" means that a program fits if it does.
"""
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import gpu
import tpu

os.environ |= tpu.ENVIRONMENT
gpu.find()

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flux
import mmdit
import quant
import sae
import shard
import text
import vae
import weights

GIB = 2 ** 30
#            topology, chip, number of chips, GB of memory per chip
TOPOLOGIES = {"v5e-1": ("v5e:2x2", "v5e", 1, 16), "v5e-4": ("v5e:2x2", "v5e", 4, 16), "v4-8": ("v4:2x2x1", "v4", 4, 32),
              "v6e-4": ("v6e:2x2", "v6e", 4, 32), "v5p-8": ("v5p:2x2x1", "v5p", 4, 95),
              "v4-32": ("v4:2x2x4", "v4", 16, 32)}
T = 256
TAKEN = 0.75                                                     # JAX's share of a GPU's memory, by default


def main(*names: str) -> None:
    """Print the table for these names, each chips[:weights[:program]], or for all TPUs."""
    print(f"jax {jax.__version__}\n\n| chips | weights | program | compiled in | arguments | temporaries | outputs | "
          "total resident | in train.py | fits |\n|---|---|---|--:|--:|--:|--:|--:|--:|---|", flush=True)
    for name in names or TOPOLOGIES:
        for found in chosen(name):
            report(name.split(":")[0], *found)


def chosen(name: str) -> Iterator[tuple]:
    """Yield (weights, models, label, function, shapes of its arguments) of the programs that a name stands for."""
    name, kinds, wanted = (*name.split(":"), "", "")[:3]
    chip, devices, _ = target(name)
    mesh = shard.mesh(devices)
    for kind in [kinds] if kinds else ("nf4", "none"):
        models = resident(mesh, chip, kind)
        for label, function, *arguments in programs(mesh, models):
            if label.startswith(wanted):
                yield kind, models, label, function, arguments


def target(name: str) -> tuple[str, list, int]:
    """Return (chip, devices, bytes of memory of each) of a name such as v5e-4 or h100-4."""
    if name in TOPOLOGIES:
        topology, chip, count, memory = TOPOLOGIES[name]
        return chip, tpu.devices(topology)[:count], memory * 10 ** 9
    card, _, count = name.rpartition("-")
    return "gpu", gpu.devices(card, int(count)), gpu.CARDS[card].memory


def report(name: str, kind: str, models: dict, label: str, function: Callable, arguments: list) -> None:
    """Compile one program, and print its row."""
    start = time.time()
    if donated(function):                                        # a run has one SAE
        models = models | {"sae": arguments[0]}
    try:
        stats = gpu.compiled(function, arguments, donated(function)).memory_analysis()
    except Exception as error:
        print(f"| {name} | {kind} | {label} | {time.time() - start:.0f} s | {str(error).splitlines()[0][:200]} |",
              flush=True)
        return
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    sizes = stats.argument_size_in_bytes, stats.temp_size_in_bytes, new
    inputs = {id(leaf): leaf for leaf in jax.tree.leaves(arguments)}
    inputs = [inputs[number] for number in inputs.keys() - {id(leaf) for leaf in jax.tree.leaves(models)}]
    total, trained = (sum(sizes[1:]) + sum(map(local_bytes, jax.tree.leaves((some, inputs))))
                      for some in (models, loaded(models, label)))
    cells = [f"{size / GIB:.2f}" for size in (*sizes, total, trained)]
    if not label.startswith(("T5", "capture", "SAE")):
        cells[-1] = ""                                           # train.py does not run it
    print(f"| {name} | {kind} | {label} | {time.time() - start:.0f} s | {' | '.join(cells)} | {fits(name, total)} |",
          flush=True)


def donated(function: Callable) -> tuple[int, ...]:
    """Return the number of the argument that becomes a result: an SAE's state."""
    return (0,) if isinstance(function, partial) else ()


def loaded(models: dict, label: str) -> dict:
    """Return what train.py has of the models, for the layer in the label, else for 18."""
    number = re.search(r"capture at (\d+)", label)
    wanted, double = int(number[1]) + 1 if number else 19, flux.Config().num_layers
    some = models["flux"] | {"double": shortened(models["flux"]["double"], min(wanted, double)),
                             "single": shortened(models["flux"]["single"], max(0, wanted - double))}
    return {name: model for name, model in models.items() if name != "vae"} | {"flux": some}


def shortened(stack: dict, layers: int) -> dict:
    """Return the shapes of a stack of blocks with fewer layers."""
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct((layers, *w.shape[1:]), w.dtype, sharding=w.sharding), stack)


def fits(name: str, total: int) -> str:
    """Return yes or no, or the share of a GPU's memory that JAX must be given."""
    chip, _, memory = target(name)
    shares = (1,) if chip != "gpu" else (TAKEN, 0.95)
    fitting = [share for share in shares if total < share * memory]
    return "no" if not fitting else "yes" if fitting[0] == shares[0] else str(fitting[0])


def local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Return the bytes of an array on one chip."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def resident(mesh: Mesh, chip: str, kind: str) -> dict:
    """Return the shapes of everything that a run of train.py keeps on the chips."""
    def model(table, prefix):
        def leaf(path, tensor):
            name = f"{prefix}.{weights.path_name(path)}"
            one = jax.ShapeDtypeStruct(tensor.shape, jnp.bfloat16)
            if kind == "nf4" and len(tensor.shape) == 2 and name.startswith(quant.QUANTIZED):
                one = tpu.weight_like(quant.nf4, *tensor.shape, chip)
            depth = () if tensor.layers is None else (tensor.layers,)
            return jax.tree.map(lambda part: jax.ShapeDtypeStruct(
                (*depth, *part.shape), part.dtype, sharding=NamedSharding(
                    mesh, PartitionSpec(*[None] * len(depth), *shard.spec(mesh, part, name)))), one)
        return jax.tree_util.tree_map_with_path(leaf, table)

    cfg = sae.Config(d_in=3072, features=16384, k=32, normalization="pca")
    return {"flux": model(mmdit.table(flux.Config()), "transformer"), "t5": model(text.t5_table(text.T5Config()), "t5"),
            "clip": model(text.clip_table(text.CLIPConfig()), "clip"), "vae": vae_params(mesh),
            "sae": sae_state(mesh, cfg)}


VAE = vae.Config(latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, use_quant_conv=False,
                 use_post_quant_conv=False)


def vae_params(mesh: Mesh) -> dict:
    """Return the shapes of FLUX.1's VAE, in bfloat16 on every chip."""
    shapes = jax.eval_shape(lambda: vae.init(jax.random.key(0), VAE))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=shard.everywhere(mesh)),
                        shapes)


def sae_state(mesh: Mesh, cfg: sae.Config) -> sae.State:
    """Return the shapes of an SAE's training state, split over the chips."""
    sample = np.zeros((2, cfg.d_in), np.float32)                 # its principal axes take no time
    state = jax.eval_shape(lambda: sae.init(jax.random.key(0), cfg, sample))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(
        shard.tensor(mesh), shard.split_spec(leaf.shape, cfg.features))), state)


def programs(mesh: Mesh, models: dict) -> Iterator[tuple]:
    """Yield (label, function, *shapes of its arguments) for each program."""
    cfg, walk = flux.Config(), shard.scan(mesh)

    def inputs(B, tokens):
        where = NamedSharding(mesh, shard.batch_spec(mesh, B))
        make = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        return make(B, tokens, 64), make(B, T, 4096), make(B, 768), make(B)

    def denoise(grid, cfg=cfg):
        return lambda params, *x: flux.velocity(params, cfg, *x, grid=grid, walk=walk)

    def capture(layer):
        return lambda params, *x: flux.residual(params, cfg, *x, grid=(16, 16), layer=layer, site="img", walk=walk)

    B = max(4, mesh.size)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=NamedSharding(mesh, shard.batch_spec(mesh, B)))
    yield f"T5-XXL, {B} prompts", lambda p, ids: text.t5(p, text.T5Config(), ids, walk=walk), models["t5"], ids
    yield f"step at 256², batch {B}", denoise((16, 16)), models["flux"], *inputs(B, 256)
    yield "step at 1024², batch 1", denoise((64, 64)), models["flux"], *inputs(1, 4096)
    if mesh.size == 1:                                           # to see whether compile time grows with depth
        two = {kind: shortened(models["flux"][kind], 2) for kind in ("double", "single")}
        step = denoise((16, 16), replace(cfg, num_layers=2, num_single_layers=2))
        yield "the same step, 2 + 2 blocks", step, models["flux"] | two, *inputs(B, 256)
        latents = jax.ShapeDtypeStruct((1, 128, 128, VAE.latent_channels), jnp.float32, sharding=shard.everywhere(mesh))
        yield "VAE, an image of 1024²", lambda p, latents: vae.decode(p, VAE, latents), models["vae"], latents
    for layer in (10, 18, 37):
        yield f"capture at {layer}, batch {B}", capture(layer), models["flux"], *inputs(B, 256)
    for features in (16384, 65536):
        cfg_sae = sae.Config(d_in=3072, features=features, k=32, normalization="pca")
        state = models["sae"] if features == 16384 else sae_state(mesh, cfg_sae)
        x = jax.ShapeDtypeStruct((2048, 3072), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        yield f"SAE step, {features:,} features", partial(train_step, cfg=cfg_sae, mesh=shard.tensor(mesh)), state, x


def train_step(state: sae.State, x: jax.Array, cfg: sae.Config, mesh: Mesh) -> tuple:
    """Run `sae.step` with keywords that `partial` can set."""
    return sae.step(state, cfg, x, mesh=mesh)


if __name__ == "__main__":
    main(*sys.argv[1:])
