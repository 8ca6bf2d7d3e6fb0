"""Measure everything on one GPU beside other libraries, and check there what only a GPU can show.

    python bench/gpu.py                                          # all stages, at most six minutes
    python bench/gpu.py --only sae,capture --minutes 3           # some stages
    python bench/gpu.py --small                                  # tiny shapes: two minutes on a CPU

Each result is printed at once; the tables come last (see `stages.py`: with $OUT they are also saved). Weights are
random and made on the device. Times are medians after a warm-up. "%" is the share of the rate of a large bfloat16
product on this card, by the operations of all products. A cell says so if a library is not installed or if the card has
too little memory. Peers: pip install diffusers transformers accelerate eai-sparsify
"""
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
os.environ |= {"HF_HUB_OFFLINE": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}          # `exact` uses two processes

import gpu_peers
import jax
import jax.numpy as jnp
import main_job
import numpy as np
import stages
from jax import lax
from stages import Job, cell, tell

import blocks
import flux
import kernels
import mmdit
import quant
import sae
import session
import shard
import text
import weights

LIBRARIES = ("jax", "jaxlib", "torch", "triton", "diffusers", "transformers", "eai-sparsify")
PHASES = ("none dead", "1 % dead", "first steps")                # first steps: no feature has fired yet


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Hold the shapes (the defaults are FLUX.1's) and the names of their rows, which are the same for all libraries."""
    matrix: int = 8192                                           # of the product that measures the card's rate
    width: int = 3072
    saes: tuple = ((2048, 16384, 32), (8192, 16384, 32), (4096, 65536, 64))                # tokens, features, k
    flux: mmdit.Config = mmdit.Config()                          # noqa: RUF009
    t5: text.T5Config = text.T5Config()                          # noqa: RUF009
    batches: tuple = (32, 4)
    side: int = 16                                               # image tokens per side of a capture
    large: int = 64                                              # and of the large image
    text_tokens: int = 256
    run: tuple = ()                                              # flags of the main job
    rounds: int = 20                                             # of each time

    def sae(self, tokens: int, features: int, k: int) -> str:
        """Return the row of an SAE."""
        return f"F {features:,}, k {k}, {tokens:,} tokens"

    def captured(self, batch: int) -> str:
        """Return the row of a capture at the last double block."""
        return f"capture at {self.flux.num_layers - 1}, {16 * self.side}², batch {batch}"

    @property
    def whole(self) -> str:
        """Return the row of all blocks on the large image."""
        return f"all {self.flux.layers} blocks, {16 * self.large}², batch 1"


SMALL = Sizes(matrix=256, width=96, saes=((64, 512, 8), (96, 640, 8)), batches=(2, 1), side=4, large=6, text_tokens=8,
              flux=mmdit.Config(num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
                                joint_attention_dim=64, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6)),
              t5=text.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4),
              run=(("steps", 10), ("buffer", 8192), ("batch", 512)), rounds=3)

# ---------------------------------------------------------------- the command line


def main(only: str = "", small: bool = False, minutes: float = 6, stage: str = "", **unknown) -> None:
    """Run the stages and print their tables.

    Args:
        only: names of stages, separated by commas; all are listed in STAGES
        small: use tiny shapes
        minutes: time for all stages; what does not fit is left out
        stage: run this stage here, after a line on stdin (the script calls itself so)
    """
    session.no_unknown_flags(unknown)
    chosen = (stage or only).split(",") if stage or only else [name for name in STAGES if name != "hashes"]
    if bad := [name for name in chosen if name not in STAGES]:
        raise session.Mistake(f"unknown stage {bad[0]!r}: the stages are {', '.join(STAGES)}")
    if not isinstance(minutes, (int, float)) or not 0 < minutes < float("inf"):
        raise session.Mistake(f"--minutes {minutes}: it must be a number above 0")
    if stage:
        return stages.perform(STAGES, stage, SMALL if small else Sizes())
    if small:                                                    # a CPU compiles faster so
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    stages.run(__file__, STAGES, chosen, minutes, ["--small"] * small)


def measure(jobs: list[Job], sizes: Sizes) -> None:
    """Tell the time of each job."""
    stages.measure(jobs, jax.block_until_ready, sizes.rounds)


# ---------------------------------------------------------------- the card


def card(sizes: Sizes) -> None:
    """Tell the machine, the versions, and the rates of large products and of the memory."""
    fact = partial(tell, "machine", column="")
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with cell("machine", "GPU", ""):
        fact("GPU", text=subprocess.run(asked, capture_output=True, text=True, check=True).stdout
             if shutil.which(asked[0]) else "no nvidia-smi")
    device = jax.devices()[0]
    fact("JAX's device", text=f"{device.device_kind} ({device.platform})")
    fact("host", text=f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}")
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            fact(name, text=metadata.version(name))
    n = sizes.matrix
    for name, dtype, precision in (("bfloat16", jnp.bfloat16, None), ("float32, HIGH", jnp.float32, "high"),
                                   ("float32, HIGHEST", jnp.float32, "highest")):
        a = noise((n, n), dtype, 0, 0, 1)
        product = jax.jit(partial(jnp.matmul, precision=precision))
        rate = 2 * n ** 3 / stages.median(lambda: product(a, a), jax.block_until_ready, sizes.rounds)
        fact(f"{n}³, {name}", text=f"{rate / 1e12:.4g} TFLOP/s", **({"peak": rate} if dtype == jnp.bfloat16 else {}))
    a = jnp.ones((8 * n, n))
    add = jax.jit(lambda a: a + 1)
    rate = 2 * a.nbytes / stages.median(lambda: add(a), jax.block_until_ready, sizes.rounds)
    fact("memory, read and written", text=f"{rate / 1e12:.3g} TB/s")


# ---------------------------------------------------------------- SAE: ours


def begun(sizes: Sizes, tokens: int, features: int, k: int, **options: Any
          ) -> tuple[sae.Config, sae.State, jax.Array, dict[str, jax.Array]]:
    """Return (cfg, state, residuals x [tokens, D], {phase: tokens since each feature fired}). One feature of a hundred
    can never fire."""
    cfg = sae.Config(d_in=sizes.width, features=features, k=k, warmup=1, **options)
    x = mixed(tokens, sizes.width)
    state = sae.init(jax.random.key(0), cfg, np.asarray(x[:1024]))
    dead = jnp.arange(features) % 100 == 0
    state = state._replace(params=state.params | {"b_enc": jnp.where(dead, -1e3, state.params["b_enc"])})
    none = jnp.zeros(features, jnp.int32)
    since = none, jnp.where(dead, cfg.dead_after, none), none + sae.NEVER
    return cfg, state, x, dict(zip(PHASES, since))


@partial(jax.jit, static_argnums=(0, 1))
def mixed(tokens: int, width: int) -> jax.Array:
    """Return residuals [tokens, width] with 64 large directions."""
    a, b, c = jax.random.split(jax.random.key(1), 3)
    large = jax.random.normal(a, (tokens, 64)) @ jax.random.normal(b, (64, width)) / 8
    return large + jax.random.normal(c, (tokens, width)) / 2


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def stepped(state: sae.State, cfg: sae.Config, x: jax.Array, since: jax.Array) -> tuple[sae.State, dict]:
    """Run `sae.step` with a given `since_fired`, so that a repeated step stays in its phase."""
    return sae.step(state._replace(since_fired=since), cfg, x, mesh=mesh())


def mesh() -> jax.sharding.Mesh:
    """Return what allows a GPU's kernels: the mesh that train.py passes on one device."""
    return shard.tensor(shard.mesh(jax.devices()[:1]))


def sae_ours(sizes: Sizes) -> None:
    """Time our training step in each phase."""
    def compiled(size):
        cfg, state, x, phases = begun(sizes, *size)
        return stepped.lower(state, cfg, x, phases[PHASES[0]]).compile(), [state], x, phases

    def call(program, kept, x, since):
        kept[0], metrics = program(kept[0], x, since)            # the state is donated, as in train.py
        return metrics

    jobs, share = [], lambda metrics: f"{float(metrics['dead']):.0%} dead"
    with ThreadPoolExecutor(len(sizes.saes)) as pool:
        made = [pool.submit(compiled, size) for size in sizes.saes]
    for size, future in zip(sizes.saes, made):
        with cell(f"SAE step, D {sizes.width}", sizes.sae(*size), "ours"):
            program, kept, x, phases = future.result()
            jobs += [Job(f"SAE step, D {sizes.width}", f"{sizes.sae(*size)}, {phase}", "ours",
                         partial(call, program, kept, x, since), judge=share) for phase, since in phases.items()]
    stages.measure(jobs, jax.block_until_ready, sizes.rounds, together=1)


def parts(sizes: Sizes) -> None:
    """Time the parts of a training step, each as a program of its own, also for the SAE of the main job."""
    nano = dataclasses.replace(sizes, width=128), (2048, 128, 24), {"activation": "batchtopk"}
    for shapes, size, options in (nano, *((sizes, size, {}) for size in sizes.saes[1:])):
        cfg, state, x, phases = begun(shapes, *size, **options)
        params, grads = state.params, jax.tree.map(jnp.ones_like, state.params)
        pre = kernels.preactivations(x, params["enc"], params["b_enc"])
        values, indices = lax.top_k(pre, cfg.width)
        auxk = lambda phase: lambda grads, params, x: sae._with_aux(
            grads, params, cfg, x, phases[phase] >= cfg.dead_after, x, mesh())
        fired = lambda kind: lambda values, indices: jnp.zeros(cfg.features, kind).at[indices].max(
            (values > 0).astype(kind))
        calls = {
            "encoder's product": (kernels.preactivations, x, params["enc"], params["b_enc"]),
            "top-k": (partial(kernels.topk, k=cfg.width, mesh=mesh()), pre),
            "which features fired, bool": (fired(bool), values, indices),
            "which features fired, int32": (fired(jnp.int32), values, indices),
            "lowest value of BatchTopK": (lambda values: sae._lowest(values, cfg.k), values),
            "forward": (lambda params, x: sae._reconstruct(params, cfg, x, mesh()), params, x),
            "forward and gradients": (lambda params, x: sae._gradients(params, cfg, x, mesh()), params, x),
            "AuxK, 1 % dead, with a copy": (auxk(PHASES[1]), grads, params, x),
            "AuxK, first steps, with a copy": (auxk(PHASES[2]), grads, params, x),
            "update": (lambda state, grads: sae._updated(state, cfg, grads, phases[PHASES[1]]), state, grads),
            "the whole step, not donated": (lambda state, x: sae.step(state, cfg, x, mesh=mesh()), state, x)}
        column = f"D {shapes.width}, {sizes.sae(*size)}" + ", BatchTopK" * bool(options)
        measure([Job("parts of a step", name, column, partial(jax.jit(function), *args))
                 for name, (function, *args) in calls.items()], sizes)


# ---------------------------------------------------------------- SAE: kernels


def methods(tokens: int, width: int, features: int, k: int) -> dict[str, dict[str, Callable]]:
    """Return {operation: {method: function}}: topk(pre), spmm(values, indices, rows), sddmm(x, rows, indices),
    outer(values, indices, x) and both(values, indices, x, rows), which returns the last two. Add new ones here."""
    scan, dense = (kernels.PLAIN[name] for name in ("scan", "dense"))
    product = lambda algorithm: lambda values, indices, x: lax.dot_general(
        kernels._scattered(values, indices, features), x, (((0,), (0,)), ((), ())), precision=algorithm)
    found = {"topk": {"chosen": partial(kernels.topk, k=k, mesh=mesh()), "lax.top_k": partial(lax.top_k, k=k),
                      **{f"blocks of {n}": partial(kernels._topk_of_blocks, k=k, size=n) for n in (16, 32, 64, 128)},
                      "approx_max_k": partial(lax.approx_max_k, k=k, recall_target=0.99)},
             "spmm": {"scan": scan.spmm, "dense": dense.spmm}, "sddmm": {"scan": scan.sddmm, "dense": dense.sddmm},
             "outer": {"scan": lambda *args: scan.outer(*args, features), "HIGHEST": product(lax.Precision.HIGHEST)},
             "both": {}}
    if jax.devices()[0].platform == "gpu":
        found["outer"]["three TF32"] = product(lax.DotAlgorithmPreset.TF32_TF32_F32_X3)
        found["outer"]["three bfloat16"] = product(lax.DotAlgorithmPreset.BF16_BF16_F32_X3)
    with suppress(ImportError):
        add_kernels(found, gpu_splits(tokens, width, features), features, k)
    return found


def gpu_splits(tokens: int, width: int, features: int) -> dict:
    """Return {name: `kernels_gpu.Kernels`}: the chosen split, and some that could be faster on this card."""
    import kernels_gpu
    cut = kernels_gpu.cut(tokens, features, width)._replace(interpret=jax.devices()[0].platform == "cpu")
    others = () if cut.interpret else ((128, 8, 4), (256, 8, 4), (512, 8, 4), (1024, 8, 4), (256, 4, 4), (256, 16, 4),
                                       (256, 8, 2), (256, 8, 8))
    return {"chosen": cut} | {f"{columns}, {together}, {warps}": cut._replace(
        columns=columns, together=together, warps=warps) for columns, together, warps in others}


def add_kernels(found: dict, splits: dict, features: int, k: int) -> None:
    """Add the methods of `kernels_gpu`. The names are: columns, rows together, warps."""
    import kernels_gpu
    sort = lambda indices: kernels_gpu.sorted_entries(indices, features)
    found["topk"]["kernels_gpu"] = partial(kernels_gpu.topk, k=k, interpret=splits["chosen"].interpret)
    found["outer"]["kernels_gpu"] = lambda values, indices, x: kernels_gpu.outer(
        sort(indices), values, x, None, features, splits["chosen"])[0]
    found["both"]["only the sort"] = lambda values, indices, x, rows: sort(indices)
    for name, how in splits.items():
        found["spmm"][f"kernels_gpu: {name}"] = partial(kernels_gpu.spmm, how=how)
        found["both"][f"kernels_gpu: {name}"] = lambda values, indices, x, rows, how=how: kernels_gpu.outer(
            sort(indices), values, x, rows, features, how)[:2]


def products(sizes: Sizes) -> None:
    """Time each method of the sparse operations, and compare its result with float32 products."""
    for tokens, features, k in sizes.saes:
        keys = jax.random.split(jax.random.key(2), 4)
        pre, x, rows = (jax.random.normal(key, shape) for key, shape in zip(
            keys, ((tokens, features), (tokens, sizes.width), (features, sizes.width))))
        largest, indices = lax.top_k(pre, k)
        values = jax.random.normal(keys[3], indices.shape)
        product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
        wide = jax.jit(partial(kernels._scattered, F=features))(values, indices)
        inputs = {"topk": (pre,), "spmm": (values, indices, rows), "sddmm": (x, rows, indices),
                  "outer": (values, indices, x), "both": (values, indices, x, rows)}
        right = {"topk": [largest, indices], "spmm": [product(wide, rows)], "outer": [product(wide.T, x)],
                 "sddmm": [jnp.take_along_axis(product(x, rows.T), indices, 1)]}
        right["both"] = right["outer"] + right["sddmm"]
        del wide
        measure([Job(operation, sizes.sae(tokens, features, k), name, partial(jax.jit(function), *inputs[operation]),
                     judge=None if name == "only the sort" else partial(wrong, right[operation]))
                 for operation, ways in methods(tokens, sizes.width, features, k).items()
                 for name, function in ways.items()], dataclasses.replace(sizes, rounds=min(7, sizes.rounds)))


def wrong(right: list[jax.Array], out: Any) -> str:
    """Return how far results are from the right ones."""
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    if len(out) > 1 and out[1].dtype == jnp.int32:
        share = float(jnp.mean((out[0] != right[0]).any(1) | (out[1] != right[1]).any(1)))
        return f"{share:.1%} of rows wrong" if share else "exact"
    return f"error {max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(out, right)):.0e}"


# ---------------------------------------------------------------- SAE: exactness


def exact(sizes: Sizes) -> None:
    """Tell how often `sae.encode` of raw residuals chooses the same features as float64, and whether training gives the
    same bits twice in one process and in another one."""
    for ratio in (5, 50, 300):
        agreement(sizes, ratio)
    found = [[trained(sizes, activation) for activation in sae.ACTIVATIONS] for _ in range(2)]
    other = subprocess.run([sys.executable, __file__, "--stage", "hashes", *["--small"] * (sizes == SMALL)],
                           input="go\n", capture_output=True, text=True).stdout.splitlines()
    other = [json.loads(line.removeprefix(stages.MARK))["text"] for line in other if line.startswith(stages.MARK)]
    for i, activation in enumerate(sae.ACTIVATIONS):
        tell("same bits after five steps", activation, "in one process", found[0][i] == found[1][i])
        tell("same bits after five steps", activation, "in another", other[i:i + 1] == [found[0][i]])


def hashes(sizes: Sizes) -> None:
    """Tell the hash of each kind of SAE, for `exact`."""
    for activation in sae.ACTIVATIONS:
        tell("hashes", activation, "", trained(sizes, activation))


def trained(sizes: Sizes, activation: str) -> str:
    """Return a hash of the state after five steps, in the phase with 1 % dead."""
    cfg, state, x, phases = begun(sizes, *sizes.saes[0], activation=activation)
    for i in range(5):
        state, _ = stepped(state, cfg, jnp.roll(x, i, 1), phases[PHASES[1]])
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def agreement(sizes: Sizes, ratio: float) -> None:
    """Tell which share of the chosen features float64 also chooses, for `encode` and for one HIGH precision product.
    ratio: the mean of the residuals, in standard deviations."""
    tokens, features, k = sizes.saes[0]
    rng = np.random.default_rng(ratio)
    scale = np.exp(rng.standard_normal(sizes.width)).astype(np.float32)
    x = np.asarray(mixed(2 * tokens, sizes.width)) + np.float32(ratio) * rng.choice(np.float32([-1, 1]), sizes.width)
    x, cfg = scale * x, sae.Config(d_in=sizes.width, features=features, k=k)
    params = sae.fold(sae.init(jax.random.key(0), cfg, x[:tokens]), cfg)
    x = x[tokens:]
    high = kernels.topk(kernels.preactivations(x, params["W_enc"].T, params["b_enc"]), k)[1]
    W, b = (np.asarray(params[name], np.float64) for name in ("W_enc", "b_enc"))
    right = np.concatenate([np.argpartition(-(x[i:i + 512].astype(np.float64) @ W + b), k - 1, 1)[:, :k]
                            for i in range(0, tokens, 512)])
    for name, found in (("encode", sae.encode(params, cfg, x)[1]), ("one product in HIGH", high)):
        share = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(np.asarray(found), right)])
        tell("features that float64 chooses too", f"mean = {ratio} std", name, f"{share:.4%}")


# ---------------------------------------------------------------- FLUX.1 and T5: ours


@partial(jax.jit, static_argnums=(0, 1))
def noise(shape: tuple[int, ...], dtype: Any, seed: int, mean: float, std: float) -> jax.Array:
    """Return random numbers, uniform, or all values of an integer dtype. It hashes each number's place (Mueller's
    constants): JAX's generators would need temporaries of several times the size and compile longer."""
    place = seed * jnp.uint32(0x9e3779b9)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    for _ in range(2):
        place = (place ^ place >> 16) * jnp.uint32(0x45d9f3b)
    place = place ^ place >> 16
    if jnp.issubdtype(dtype, jnp.integer):
        return place.astype(jnp.uint8).astype(dtype)
    unit = place.astype(jnp.float32) * 2 ** -31 - 1
    return (mean + 3 ** 0.5 * std * unit).astype(dtype)


def random_params(table: dict, prefix: str, kind: str = "none") -> dict:
    """Return random bfloat16 parameters of a table of `weights.Tensor`, quantized as `quant.put(kind)` does it."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(table)

    def leaf(seed, item):
        path, tensor = item
        depth, name = () if tensor.layers is None else (tensor.layers,), f"{prefix}.{weights.path_name(path)}"
        if kind != "none" and len(tensor.shape) == 2 and name.startswith(quant.QUANTIZED):
            narrow = getattr(quant, kind)(np.zeros((tensor.shape[0], 1), np.float32), dtype="bfloat16")
            return jax.tree.map(lambda part: noise((*depth, *part.shape[:-1], tensor.shape[1]), part.dtype, seed, 0.01,
                                                   0.001), narrow)
        return noise((*depth, *tensor.shape), jnp.bfloat16, seed, tensor.mean, tensor.std or 0.02)

    with ThreadPoolExecutor(8) as pool:
        params = structure.unflatten(list(pool.map(leaf, range(len(leaves)), leaves)))
    return blocks.stacks_apart(params) if jax.devices()[0].platform == "gpu" else params     # as flux.load does it


def block_flops(cfg: mmdit.Config, batch: int, text_tokens: int, image_tokens: int, double: int, single: int) -> float:
    """Return the operations of the products in so many double and single blocks."""
    D, S = cfg.width, text_tokens + image_tokens
    each = 24 * D * D * S + 4 * S * S * D
    return batch * (double * (each + 24 * D * D) + single * (each + 6 * D * D))         # the last: modulations


def capture_job(sizes: Sizes, params: dict, batch: int, column: str) -> Job:
    """Return the job to capture the last double block's output."""
    cfg, last = sizes.flux, sizes.flux.num_layers - 1
    x = inputs(sizes, batch, sizes.side)
    call = lambda: flux.residual(params, cfg, *x, grid=(sizes.side,) * 2, layer=last, site="img")
    flops = block_flops(cfg, batch, sizes.text_tokens, sizes.side ** 2, last + 1, 0)
    return Job("FLUX.1 and T5", sizes.captured(batch), column, call, flops)


def inputs(sizes: Sizes, batch: int, side: int) -> tuple[jax.Array, ...]:
    """Return latents, text, pooled and timestep."""
    cfg, key = sizes.flux, jax.random.key(3)
    shapes = ((side ** 2, cfg.in_channels), (sizes.text_tokens, cfg.joint_attention_dim), (cfg.pooled_projection_dim,))
    return *(jax.random.normal(key, (batch, *shape), jnp.bfloat16) for shape in shapes), jnp.ones(batch)


def capture(sizes: Sizes, kinds: tuple = ("none", "nf4")) -> None:
    """Time our capture with each kind of weights."""
    jobs = []
    for kind in kinds:
        column = {"none": "ours", "nf4": "ours, NF4", "int8": "ours, int8"}[kind]
        with cell("FLUX.1 and T5", sizes.captured(sizes.batches[0]), column):
            params = random_params(mmdit.table(dataclasses.replace(sizes.flux, num_single_layers=1)), "transformer",
                                   kind)
            jobs += [capture_job(sizes, params, batch, column) for batch in sizes.batches]
    measure(jobs, sizes)


def large(sizes: Sizes) -> None:
    """Time all our blocks on a large image."""
    cfg, x, row = sizes.flux, inputs(sizes, 1, sizes.large), sizes.whole
    flops = block_flops(cfg, 1, sizes.text_tokens, sizes.large ** 2, cfg.num_layers, cfg.num_single_layers)
    for kind, column in (("none", "ours"), ("nf4", "ours, NF4")):
        with cell("FLUX.1 and T5", row, column):
            params = random_params(mmdit.table(cfg), "transformer", kind)
            run = partial(flux.velocity, params, cfg, *x, grid=(sizes.large,) * 2)
            measure([Job("FLUX.1 and T5", row, column, run, flops)], sizes)
        params = run = None                                      # two models need not fit at once


def t5(sizes: Sizes) -> None:
    """Time our T5 encoder."""
    cfg, params = sizes.t5, random_params(text.t5_table(sizes.t5), "t5")
    jobs = []
    for batch in sizes.batches:
        ids = jax.random.randint(jax.random.key(4), (batch, sizes.text_tokens), 0, cfg.vocab_size)
        jobs.append(Job("FLUX.1 and T5", f"T5-XXL, batch {batch}", "ours",
                        partial(text.t5, params, cfg, ids), t5_flops(cfg, batch, sizes.text_tokens)))
    measure(jobs, sizes)


def t5_flops(cfg: text.T5Config, batch: int, tokens: int) -> float:
    """Return the operations of the products in T5's blocks."""
    inner = cfg.num_heads * cfg.d_kv
    each = 2 * cfg.d_model * (4 * inner + 3 * cfg.d_ff) + 4 * tokens * inner
    return cfg.num_layers * batch * tokens * each


# {name: (function, seconds at most, modules to import early)}, the most important ones first
STAGES = {
    "card": (card, 60, ()), "sae": (sae_ours, 90, ()), "kernels": (products, 100, ()), "parts": (parts, 60, ()),
    "capture": (capture, 90, ()), "1024": (large, 60, ()), "t5": (t5, 60, ()), "job": (main_job.job, 120, ()),
    "sae-peers": (gpu_peers.saes, 60, ("torch", "sparsify")),
    "t5-peers": (gpu_peers.t5, 60, ("torch", "transformers.models.t5.modeling_t5")),
    "flux-peers": (gpu_peers.flux, 150, ("torch", "diffusers.models.transformers.transformer_flux")),
    "exact": (exact, 90, ()), "int8": (partial(capture, kinds=("int8",)), 120, ()), "hashes": (hashes, 90, ())}

if __name__ == "__main__":
    session.command(main)
