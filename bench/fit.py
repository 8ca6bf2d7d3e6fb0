"""Check whether FLUX.1's programs fit on TPUs: compile them at full size without a TPU, and print Markdown.

    python bench/fit.py [v5e-1 v5e-4 v4-8 v6e-4 v5p-8 v4-32:nf4 "v4-8:nf4:capture at 18"]

Shapes are enough: no weights are made. The compiler reports GiB per chip: arguments that the program uses (weights),
temporaries and outputs. "total resident" adds everything else that a run of train.py keeps: all of FLUX.1, T5-XXL, CLIP
and the VAE, and an SAE of 16,384 features with its optimizer.
"""
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tpu

os.environ |= tpu.ENVIRONMENT

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


def main(*names: str) -> None:
    """Print the table for these names, each chips[:weights[:program]], or for all chips."""
    print(f"jax {jax.__version__}\n\n| chips | weights | program | compiled in | arguments | temporaries | outputs | "
          "total resident | fits |\n|---|---|---|--:|--:|--:|--:|--:|---|", flush=True)
    for name in names or TOPOLOGIES:
        name, kinds, wanted = (*name.split(":"), "", "")[:3]
        topology, chip, chips, memory = TOPOLOGIES[name]
        mesh = shard.mesh(tpu.devices(topology)[:chips])
        for kind in [kinds] if kinds else ("nf4", "none"):
            models = resident(mesh, chip, kind)
            for label, function, *arguments in programs(mesh, models):
                if label.startswith(wanted):
                    report(name, kind, label, memory, models, function, arguments)


def report(name: str, kind: str, label: str, memory: int, models: dict, function: Callable, arguments: list) -> None:
    """Compile one program, and print its row."""
    start = time.time()
    try:
        donated = (0,) if isinstance(function, partial) else ()             # the SAE's state
        stats = jax.jit(function, donate_argnums=donated).lower(*arguments).compile().memory_analysis()
    except Exception as error:
        print(f"| {name} | {kind} | {label} | {time.time() - start:.0f} s | {str(error).splitlines()[0][:200]} |",
              flush=True)
        return
    kept = {id(leaf): local_bytes(leaf) for leaf in jax.tree.leaves((models, arguments))}
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    sizes = stats.argument_size_in_bytes, stats.temp_size_in_bytes, new
    total = sum(sizes[1:]) + sum(kept.values())                  # also what this program does not use
    print(f"| {name} | {kind} | {label} | {time.time() - start:.0f} s | "
          + " | ".join(f"{size / GIB:.2f}" for size in (*sizes, total))
          + f" | {'yes' if total < memory * 1e9 else 'no'} |", flush=True)


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


def vae_params(mesh: Mesh) -> dict:
    """Return the shapes of FLUX.1's VAE, in bfloat16 on every chip."""
    cfg = vae.Config(latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                     use_quant_conv=False, use_post_quant_conv=False)
    shapes = jax.eval_shape(lambda: vae.init(jax.random.key(0), cfg))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=shard.everywhere(mesh)),
                        shapes)


def sae_state(mesh: Mesh, cfg: sae.Config) -> sae.State:
    """Return the shapes of an SAE's training state, split over the chips."""
    sample = np.random.default_rng(0).standard_normal((64, cfg.d_in), np.float32)
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
        two = jax.tree.map(lambda w: jax.ShapeDtypeStruct((2, *w.shape[1:]), w.dtype, sharding=w.sharding),
                           {kind: models["flux"][kind] for kind in ("double", "single")})
        step = denoise((16, 16), replace(cfg, num_layers=2, num_single_layers=2))
        yield "the same step, 2 + 2 blocks", step, models["flux"] | two, *inputs(B, 256)
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
