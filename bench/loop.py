"""Measure how harvesting and SAE steps overlap in a run, as Markdown tables: python bench/loop.py

    python bench/loop.py [nano] [flux]                     # measured on this machine, and estimated for TPUs

nano is measured: chunks alternate between the loop of train.py and a loop that waits for every pass and step, whose
times are listed separately. FLUX.1 is estimated: the operations of the products (from the jaxprs of its real shapes) at
the chip's peak, or the bytes at its bandwidth if these take longer; the times are lower bounds. Assumptions: layer 18
at 256 x 256 pixels, 256 text tokens, 4 prompts per pass, each encoded anew; NF4 weights read once per pass. An SAE step
has 2,048 tokens and k = 32; its encoder's product takes three bfloat16 passes on a TPU; parameters and moments are read
and written once, gradients written and read once, and a decoder row is gathered or added to four times per token and
active feature. The row of this CPU assumes the rate of one large float32 product. "host" is measured here, line by
line: on a TPU the overlap hides it. Its model has FLUX.1's layers and vocabularies (nano's plus random pieces) but tiny
widths, so that only sending its programs takes time. The link to the chip is assumed to carry 10 GB/s each way.
"""
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import synthetic

import activations
import data
import flux
import mmdit
import sae
import text
import train
import vae
import weights

#        bfloat16 FLOP/s, bytes/s of HBM: https://cloud.google.com/tpu/docs/v5e, v6e, v4 and v5p
CHIPS = {"v5e": (197e12, 819e9), "v6e": (918e12, 1640e9), "v4": (275e12, 1228e9), "v5p": (459e12, 2765e9)}
LINK = 10e9                                                      # bytes/s between host and chip, each way
LAYER, B, T, I, D, TOKENS, K = 18, 4, 256, 256, 3072, 2048, 32
PASSES = TOKENS // (B * I)                                       # passes that give the tokens of a step


def main(*names: str) -> None:
    """Print the tables of nano and FLUX.1, or of one of them."""
    print(f"{os.cpu_count()} CPUs, jax {jax.__version__}\n")
    for name in names or ("nano", "flux"):
        {"nano": nano, "flux": full_size}[name]()


# ---------------------------------------------------------------- nano, measured


def nano(rounds: int = 5) -> None:
    """Print the medians of `rounds` chunks."""
    folder, cfg = flux.read_config("nano")
    run = train.defaults("nano", folder, cfg, {"steps": 10 ** 6, "without": "nothing"})
    model = flux.load("nano", dtype=jnp.float32, last=run.layer)
    run = replace(run, size=min(256, model.size), text_tokens=model.text_tokens)
    make = lambda: activations.Activations(run, model, data.stream("scenes"))
    overlapped, apart = Loop(run, make()), Loop(run, make())
    rows = []
    for _ in range(rounds + 1):
        rows.append((*apart.waiting(), overlapped.chunk()))
    harvest, steps, both = (statistics.median(column) for column in zip(*rows[1:]))
    h = overlapped.harvest
    print(f"nano, layer {run.layer}, {run.features:,} features: a chunk of {h.tokens:,} tokens, {h.forwards} passes, "
          f"{h.batches} steps of {run.batch:,} tokens\n\n"
          "| harvest | steps | one after the other | overlapped | hidden |\n|--:|--:|--:|--:|--:|\n"
          f"| {harvest:.2f} s | {steps:.2f} s | {harvest + steps:.2f} s | {both:.2f} s | "
          f"{1 - both / (harvest + steps):.1%} |\n")


class Loop:
    """A training loop without files; every call trains on one chunk."""

    def __init__(self, run: train.Run, harvest: activations.Activations):
        self.harvest, self.number = harvest, 0
        harvest.ready(0)
        self.cfg = train.config(run, harvest.model.cfg, harvest.groups)
        self.state = sae.init(jax.random.key(0), self.cfg, harvest.rows[0, :65536].astype(np.float32))
        self.step = jax.jit(sae.step, static_argnums=1, donate_argnums=0)

    def chunk(self) -> float:
        """Return the seconds of a chunk with overlap."""
        start = time.perf_counter()
        for n in range(self.number, self.number + self.harvest.batches):
            self.harvest.ready(n)
            self.state, _ = self.step(self.state, self.cfg, self.harvest.batch(n))
        jax.block_until_ready(self.state)
        self.number = n + 1
        return time.perf_counter() - start

    def waiting(self) -> np.ndarray:
        """Return the seconds of (the passes, the steps) of a chunk, without overlap."""
        h, send, seconds = self.harvest, self.harvest.send, np.zeros(2)
        h.send = lambda *args: jax.block_until_ready(send(*args))
        for n in range(self.number, self.number + h.batches):
            start = time.perf_counter()
            h.ready(n)
            x, between = h.batch(n), time.perf_counter()
            self.state, _ = jax.block_until_ready(self.step(self.state, self.cfg, x))
            seconds += between - start, time.perf_counter() - between
        self.number, h.send = n + 1, send
        return seconds


# ---------------------------------------------------------------- FLUX.1, estimated


def full_size() -> None:
    """Print the table of FLUX.1."""
    passes, sizes = harvest_floor()
    with tempfile.TemporaryDirectory() as folder:
        opening, lines = host_work(Path(folder))
    here, rate, host = f"{os.cpu_count()} CPUs here", product_rate(), sum(lines.values())
    print(f"FLUX.1: {TOKENS:,} tokens are {PASSES} passes of {B} prompts, each {passes[0] / 1e12:.1f} TFLOP of T5-XXL "
          f"and {passes[1] / 1e12:.1f} of blocks\n\n"
          "| chip | harvest | share of T5-XXL | step, 16,384 | 65,536 | link | host |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, (peak, bandwidth) in (CHIPS | {here: (rate, np.inf)}).items():
        t5, blocks = (PASSES * max(count / peak, size / bandwidth) for count, size in zip(passes, sizes))
        rounds = 1 if name == here else 3                        # passes of the encoder's product
        steps = [max(rounds * count / peak, size / bandwidth) for count, size in map(step_floor, (16384, 65536))]
        beside = ["", ""] if name == here else [seconds(2 * TOKENS * D / LINK), seconds(host)]
        print(f"| {name} | {seconds(t5 + blocks)} | {t5 / (t5 + blocks):.0%} | {' | '.join(map(seconds, steps))} | "
              f"{' | '.join(beside)} |")
    print("\nhost, per step: " + ", ".join(f"{what} {seconds(t)}" for what, t in lines.items()) +
          f"; once: opening the tokenizers {seconds(opening)}")


def seconds(t: float) -> str:
    """Return a duration as text."""
    return f"{t:.1f} s" if t >= 1 else f"{1e3 * t:.1f} ms"


def host_work(folder: Path, rounds: int = 20) -> tuple[float, dict[str, float]]:
    """Return (seconds to open the tokenizers, {what: seconds}). The latter are this host's times to prepare and send
    the passes of one step, and to move their rows into a chunk and out of it."""
    synthetic.tokenizers(folder)
    model, begun = skeleton(folder), time.perf_counter()
    captions = list(itertools.islice(data.stream("scenes"), B))
    model.tokenize(captions, T)
    opening = time.perf_counter() - begun
    rows, places = np.zeros((2 ** 16, D), jnp.bfloat16), np.random.default_rng(0).permutation(2 ** 16)[:TOKENS]
    new, ids = np.zeros((TOKENS, D), jnp.bfloat16), model.tokenize(captions, 4)
    encode = lambda: (text.t5(model.t5[1], model.t5[0], ids[0]),
                      flux._clip(model.clip[1], model.clip[0], ids[1]))
    noise = lambda: flux.draw_noise(0, np.arange(B), (4, 64))
    start = flux.Start(noise(), (*encode(), None), flux.sigmas(model.scheduler, 1, 4), (2, 2))
    work = {"tokenizing": (PASSES, lambda: model.tokenize(captions, T)), "text encoders": (PASSES, encode),
            "noise": (PASSES, noise),
            "blocks": (PASSES, lambda: flux.capture(model, start, layer=LAYER, site="img")),
            "rows into a chunk": (1, lambda: rows.__setitem__(places, new)), "and out": (1, lambda: rows[places])}
    times = {what: [] for what in work}
    for what, (n, function) in [*work.items()] * (rounds + 1):
        begun = time.perf_counter()
        sent = [function() for _ in range(n)]
        times[what].append(time.perf_counter() - begun)
        jax.block_until_ready(sent)
    return opening, {what: statistics.median(t[1:]) for what, t in times.items()}


def skeleton(folder: Path) -> flux.Model:
    """Return a model with FLUX.1's layers and vocabularies and tiny widths, and with the tokenizers of the folder."""
    cfg = flux.Config(attention_head_dim=16, num_attention_heads=1, axes_dims_rope=(4, 6, 6), joint_attention_dim=16,
                      pooled_projection_dim=16)
    t5 = text.T5Config(d_model=16, d_kv=8, d_ff=16, num_heads=2)
    clip = text.CLIPConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    tables = mmdit.table(cfg), text.t5_table(t5), text.clip_table(clip)
    params = [weights.init_tensors(table, jax.random.key(0), jnp.bfloat16) for table in tables]
    return flux.Model(cfg, params[0], (t5, params[1]), (clip, params[2]), (vae.Config(latent_channels=16), None), {},
                      folder, T, 256)


def harvest_floor() -> tuple[tuple, tuple]:
    """Return ((FLOPs of T5-XXL, of the blocks), (bytes of their NF4 weights)) of a forward pass."""
    cfg, t5 = flux.Config(), text.T5Config()
    one = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    params, encoder = (jax.tree.map(lambda t: one(*(() if t.layers is None else (t.layers,)), *t.shape), table)
                       for table in (mmdit.table(cfg), text.t5_table(t5)))
    inputs = one(B, I, 64), one(B, T, 4096), one(B, 768), one(B)
    capture = partial(flux.residual, cfg=cfg, grid=(16, 16), layer=LAYER, site="img")
    counts = (flops(lambda p, ids: text.t5(p, t5, ids), encoder, jax.ShapeDtypeStruct((B, T), jnp.int32)),
              flops(lambda p, *x: capture(p, latents=x[0], text=x[1], pooled=x[2], timestep=x[3]), params, *inputs))
    stacked = sum(leaf.size for leaf in jax.tree.leaves(params["double"])) * (LAYER + 1) // cfg.num_layers
    return counts, (0.5625 * sum(leaf.size for leaf in jax.tree.leaves(encoder)), 0.5625 * stacked)


def step_floor(features: int) -> tuple[int, int]:
    """Return (FLOPs of the encoder's product and of the rotation to the principal axes, bytes moved) of a step."""
    matrix, gathered = 4 * features * D, 4 * TOKENS * K * D * 4
    return 2 * TOKENS * (features + D) * D, 2 * (3 * 2 + 2) * matrix + gathered


def flops(function: Callable, *shapes) -> int:
    """Return the FLOPs of the products in a function: 2 x multiplications, times the iterations of its loops."""
    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                total += 2 * eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[i] for i in contracted]))
            inner = [count(getattr(sub, "jaxpr", sub)) for value in eqn.params.values()
                     for sub in (value if isinstance(value, (tuple, list)) else [value])
                     if hasattr(getattr(sub, "jaxpr", sub), "eqns")]
            branches = eqn.primitive.name in ("cond", "platform_index")
            total += (max(inner, default=0) if branches else sum(inner)) * eqn.params.get("length", 1)
        return total

    return count(jax.make_jaxpr(function)(*shapes).jaxpr)


def product_rate(n: int = 4096, rounds: int = 3) -> float:
    """Return the FLOP/s of a float32 product on this machine."""
    a, product = jnp.ones((n, n)), jax.jit(jnp.matmul)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
