"""Run FLUX.1's transformer, the MMDiT, and load it from files of either layout.

Copy `blocks.py`, `harvest.py` and `weights.py` with this file. `flux.py` adds the rest of the pipeline.

    cfg, params = mmdit.load_transformer("flux1-schnell.safetensors")          # or a diffusers folder
    v = mmdit.velocity(params, cfg, latents, text, pooled, timestep, grid=(16, 16))
    x = mmdit.residual(params, cfg, latents, text, pooled, timestep, grid=(16, 16), layer=10, site="img")

Letters: B batch, T text tokens, I image tokens, S = T + I, C latent channels, D width, H heads, K head width, L layers.
One number names a layer: the double blocks come first, then the single blocks. The blocks sow their output streams as
`double.img`, `double.txt`, `single.img`, `single.txt` and their MLP neurons as `double.img.neurons`,
`double.txt.neurons`, `single.neurons`, each stacked over the layers of its kind (see `harvest.py`).
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import blocks
import weights as tensor_files
from harvest import plant, reap, sow
from weights import Mistake

SITES = {"img": ("img",), "txt": ("txt",), "both": ("txt", "img")}      # the streams of each site, in their order
PREFIXES = ("model.diffusion_model.", "diffusion_model.")        # the transformer's, in files with a whole pipeline


@dataclass(frozen=True)
class Config:
    """Hold the fields of `transformer/config.json` under their own names. The defaults are FLUX.1-schnell's."""
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    patch_size: int = 1

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise Mistake(f"axes_dims_rope {self.axes_dims_rope} must add up to attention_head_dim, "
                          f"{self.attention_head_dim}")

    @property
    def width(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    @property
    def layers(self) -> int:
        return self.num_layers + self.num_single_layers


# ---------------------------------------------------------------- the model


@dataclass(frozen=True, eq=False)
class Edit:
    """Replace the values that block `layer` sows under `names` by function(name, value, each, shared).

    each: a pytree of arrays [B, ...], split like the batch. shared: arrays that are not split. JAX compiles the same
    function object only once, whatever values these arrays have."""
    layer: int
    names: tuple[str, ...]
    function: Callable
    each: Any = None
    shared: Any = None


def velocity(params: dict, cfg: Config, latents: Array, text: Array, pooled: Array, timestep: Array,
             guidance: Array | None = None, *, grid: tuple[int, int], walk: Callable | None = None,
             edits: Sequence[Edit] = ()) -> Array:
    """Return the velocity [B, I, C] that FLUX.1 predicts at packed `latents` [B, I, C]: d latents / d timestep.

    text [B, T, joint_attention_dim]: T5 states. pooled [B, pooled_projection_dim]: CLIP's vector. timestep [B] in 0…1
    (1 is pure noise). guidance [B]: the scale itself (3.5), only for models with `guidance_embeds`.
    grid: (rows, columns) of packed tokens, rows * columns = I. walk: runs the blocks (see `blocks.scan`).
    edits: change what blocks sow (see `Edit`). Raise ValueError if an argument does not fit the model.
    """
    return _run(params, cfg, (latents, text, pooled, timestep, guidance), grid, walk, edits=edits)[0]


def residual(params: dict, cfg: Config, latents: Array, text: Array, pooled: Array, timestep: Array,
             guidance: Array | None = None, *, grid: tuple[int, int], layer: int, site: str,
             walk: Callable | None = None, edits: Sequence[Edit] = ()) -> Array:
    """Return the residual stream after block `layer`: [B, I, D] for site "img", [B, T, D] for "txt", [B, T + I, D] for
    "both" (text first). The later blocks do not run. The other arguments are those of `velocity`."""
    inputs, names = (latents, text, pooled, timestep, guidance), residual_names(cfg, layer, site)
    captured = _run(params, cfg, inputs, grid, walk, layer + 1, layer, names, edits)[1]
    return jnp.concatenate(list(captured.values()), 1)


def velocity_and_values(params: dict, cfg: Config, latents: Array, text: Array, pooled: Array, timestep: Array,
                        guidance: Array | None = None, *, grid: tuple[int, int], layer: int, names: Sequence[str],
                        walk: Callable | None = None, edits: Sequence[Edit] = ()) -> tuple[Array, dict[str, Array]]:
    """Return (`velocity`, {name: value that block `layer` sows}) for `names` such as "double.img.neurons"."""
    return _run(params, cfg, (latents, text, pooled, timestep, guidance), grid, walk, None, layer, tuple(names), edits)


def residual_names(cfg: Config, layer: int, site: str) -> tuple[str, ...]:
    """Return the names of block `layer`'s residual stream at `site`. Raise ValueError if one of them is unknown."""
    if site not in SITES:
        raise Mistake(f"unknown site {site!r}: it must be one of {', '.join(SITES)}")
    if not isinstance(layer, (int, np.integer)) or not 0 <= layer < cfg.layers:
        raise Mistake(f"unknown layer {layer!r}: the model has layers 0 to {cfg.layers - 1} "
                      f"({cfg.num_layers} double, {cfg.num_single_layers} single)")
    kind = "double" if layer < cfg.num_layers else "single"
    return tuple(f"{kind}.{stream}" for stream in SITES[site])


def _run(params, cfg, inputs, grid, walk, stop=None, layer=None, names=(), edits=()):
    """Run all blocks and return (velocity, values `names` of block `layer`), or the first `stop`: (None, values)."""
    _check_inputs(cfg, *inputs, grid)
    loaded = sum(blocks.depth(params[kind]) for kind in ("double", "single"))
    if loaded < (stop or cfg.layers) or (stop is None and "out" not in params):
        raise Mistake(f"the model was loaded only up to layer {loaded - 1}; load it without `last` to run all layers")
    for edit in edits:
        residual_names(cfg, edit.layer, "both")                  # raises if the layer does not exist
    whole, stop = stop is None, stop or cfg.layers
    ends = {name: p for name, p in params.items() if name not in ("double", "single")}
    (img, txt), vec, mod, rope = _begin(ends, cfg, *inputs, grid=grid)
    T, walk, captured = txt.shape[1], walk or blocks.scan, {}

    def run(kind, x, first, last):
        n = min(stop, last) - first
        alone = {edit.layer for edit in edits} | ({layer} if names else set())
        cuts = {0, n, *(cut - first for one in alone for cut in (one, one + 1))}
        for a, b in pairwise(sorted(cut for cut in cuts if 0 <= cut <= n)):
            wanted = names if first + a == layer else ()
            here = [edit for edit in edits if edit.layer == first + a]
            block = _block(kind, cfg, T, wanted, tuple((edit.function, edit.names) for edit in here))
            each, shared = [edit.each for edit in here], [edit.shared for edit in here]
            (x, _), found = walk(block, (x, each), params[kind], range(a, b), (rope, shared))
            captured.update({name: found[name][0] for name in wanted})
        return x

    img, txt, _ = run("double", (img, txt, mod), 0, cfg.num_layers)
    if stop > cfg.num_layers:
        x, _ = run("single", (jnp.concatenate([txt, img], 1), mod), cfg.num_layers, cfg.layers)
        img = x[:, T:]
    return (_end(params["out"], img, vec) if whole else None), captured


@partial(jax.jit, static_argnames=("cfg", "grid"))
def _begin(params, cfg, latents, text, pooled, timestep, guidance, *, grid):
    """Return the blocks' inputs: the streams (img, txt), the conditioning vector [B, D], its SiLU and the RoPE tables.
    All blocks share the last two."""
    dtype = params["img_in"]["b"].dtype                          # a bias tells the dtype: biases are never quantized
    vec = _embed(params, cfg, pooled.astype(dtype), timestep, guidance)
    img, txt = _linear(params["img_in"], latents.astype(dtype)), _linear(params["txt_in"], text.astype(dtype))
    return (img, txt), vec, jax.nn.silu(vec), _rope_tables(cfg, txt.shape[1], grid)


@jax.jit
def _end(params, img, vec):
    scale, shift = jnp.split(_linear(params["mod"], jax.nn.silu(vec))[:, None], 2, axis=-1)
    return _linear(params["proj"], _modulate(img, shift, scale))


@lru_cache
def _block(kind, cfg, T, names, edits):
    """Return the block ((x, each), parameters of one layer, (rope, shared)) → ((x, each), {name: sown value}).

    Cached, so that JAX compiles it once. edits: (function, names) per `Edit`; each, shared: lists of their arrays."""
    def double(x, p, rope):
        img, txt, mod = x
        return (*_double_block(p, cfg, img, txt, mod, rope), mod)

    def single(x, p, rope):
        return _single_block(p, cfg, *x, rope, T), x[1]

    block = {"double": double, "single": single}[kind]

    def edited(x, p, context):
        (x, each), (rope, shared), planted = x, context, block
        for (function, changed), *arrays in zip(edits, each, shared):
            of = lambda name, f=function, arrays=arrays: lambda value: f(name, value, *arrays)
            planted = plant(planted, {name: of(name) for name in changed})
        return planted(x, p, rope), each

    return reap(edited, names) if names else lambda *args: (edited(*args), {})   # without names, an outer reap sees all


def _double_block(p, cfg, img, txt, mod, rope):
    """Run one MMDiT block: two streams, each with its own weights, share one attention (SD3, arXiv 2403.03206)."""
    streams = {"txt": txt, "img": img}
    mods = {s: jnp.split(_linear(p[s]["mod"], mod)[:, None], 6, axis=-1) for s in streams}
    qkv = [_qkv(p[s], cfg, _linear(p[s]["qkv"], _modulate(x, *mods[s][:2]))) for s, x in streams.items()]
    attn = _attention(*(jnp.concatenate(pair, 1) for pair in zip(*qkv)), rope)
    attn = dict(zip(streams, jnp.split(attn, [txt.shape[1]], axis=1)))
    for s, x in streams.items():
        gate, shift2, scale2, gate2 = mods[s][2:]
        x = x + gate * _linear(p[s]["o"], attn[s])
        neurons = jax.nn.gelu(_linear(p[s]["fc1"], _modulate(x, shift2, scale2)), approximate=True)
        x = x + gate2 * _linear(p[s]["fc2"], sow(neurons, name=f"double.{s}.neurons"))
        streams[s] = sow(x, name=f"double.{s}")
    return streams["img"], streams["txt"]


def _single_block(p, cfg, x, mod, rope, T):
    """Run one block on the joined stream [B, S, D], attention and MLP in parallel (ViT-22B, arXiv 2302.05442)."""
    shift, scale, gate = jnp.split(_linear(p["mod"], mod)[:, None], 3, axis=-1)
    qkv, hidden = jnp.split(_linear(p["in"], _modulate(x, shift, scale)), [3 * cfg.width], axis=-1)
    attn = _attention(*_qkv(p, cfg, qkv), rope)
    neurons = sow(jax.nn.gelu(hidden, approximate=True), name="single.neurons")
    x = x + gate * _linear(p["out"], jnp.concatenate([attn, neurons], -1))
    return jnp.concatenate([sow(x[:, :T], name="single.txt"), sow(x[:, T:], name="single.img")], 1)


def _embed(params, cfg, pooled, timestep, guidance):
    """Return the conditioning vector [B, D]: time, guidance (if the model has it) and pooled text."""
    def mlp(p, x):
        return _linear(p["fc2"], jax.nn.silu(_linear(p["fc1"], x)))

    vec = mlp(params["time"], _sinusoid(timestep).astype(pooled.dtype))
    if cfg.guidance_embeds:
        vec = vec + mlp(params["guidance"], _sinusoid(guidance).astype(pooled.dtype))
    return vec + mlp(params["pooled"], pooled)


def _sinusoid(t, width=256):
    """Return cosines, then sines, of 1000 t at frequencies 1 … 1/10000: [B] → [B, 256]; float32 keeps 1000 t exact."""
    angles = 1000 * t.astype(jnp.float32)[:, None] * jnp.exp(-np.log(1e4) * jnp.arange(width // 2) / (width // 2))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def _linear(p, x):
    """Compute x @ w + b for all tokens as one product [B S, in]: its gradient then needs no transposed copy of x."""
    y = x.reshape(-1, x.shape[-1]) @ p["w"] + p["b"]             # a quantized weight defines __rmatmul__
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _modulate(x, shift, scale):
    """Apply adaLN: layer norm without weights (statistics in float32), then scale and shift."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
    return y.astype(x.dtype) * (1 + scale) + shift


def _qkv(p, cfg, qkv):
    """Split [B, S, 3D] into q, k, v [B, S, H, K], and RMS-normalize q and k over each head (in float32)."""
    def norm(x, weight):
        y = x.astype(jnp.float32)
        return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)).astype(x.dtype) * weight

    q, k, v = (x.reshape(*x.shape[:2], cfg.num_attention_heads, -1) for x in jnp.split(qkv, 3, axis=-1))
    return norm(q, p["q_norm"]), norm(k, p["k_norm"]), v


def _attention(q, k, v, rope):
    """Attend from all S tokens to all S tokens: [B, S, H, K] → [B, S, D]. This never builds [S, S] for all heads: a TPU
    runs JAX's flash attention and a GPU runs cuDNN's if they fit; otherwise long sequences run block by block."""
    q, k, forms = _rotate(q, rope), _rotate(k, rope), {}
    tile = next((n for n in (512, 384, 256, 128) if q.shape[1] % n == 0), None)
    if tile and q.shape[-1] % 128 == 0:
        forms["tpu"] = partial(_flash, tile=tile)
    out = jax.lax.platform_dependent(q, k, v, **forms, **blocks.cudnn(q, k, v), default=_softmax_attention)
    return out.reshape(*out.shape[:2], -1)


def _softmax_attention(q, k, v, block=512):
    # jax.nn.dot_product_attention does not work here: it asks for a precision that float16 on a CPU does not have.
    def attend(q):
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
        return jnp.einsum("bhqs,bshk->bqhk", weights, v)

    if 2 * block >= q.shape[1]:
        return attend(q)
    return jax.lax.map(lambda q: attend(q[:, None])[:, 0], q.swapaxes(0, 1), batch_size=block).swapaxes(0, 1)


def _flash(q, k, v, tile):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash
    sizes = flash.BlockSizes(**{field.name: tile for field in fields(flash.BlockSizes)} | {"block_b": 1})
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return flash.flash_attention(q, k, v, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes).swapaxes(1, 2)


def _rotate(x, rope):
    """Apply RoPE to neighbouring pairs of channels, in float32: half precision is inexact for large positions."""
    cos, sin = rope
    even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return pairs.reshape(x.shape).astype(x.dtype)


def _rope_tables(cfg, text_tokens, grid):
    """Return cos and sin [S, 1, K/2] of the positions (0, row, column). All text tokens are at (0, 0, 0)."""
    rows, columns = np.indices(grid).reshape(2, -1)
    axes = [np.concatenate([np.zeros(text_tokens), p]) for p in (np.zeros_like(rows), rows, columns)]
    angles = [p[:, None] * 1e4 ** (-np.arange(0, n, 2) / n) for p, n in zip(axes, cfg.axes_dims_rope)]
    angles = np.concatenate(angles, -1)[:, None]
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def _check_inputs(cfg, latents, text, pooled, timestep, guidance, grid):
    if latents.ndim != 3 or latents.shape[1:] != (grid[0] * grid[1], cfg.in_channels):
        raise Mistake(f"latents are {list(latents.shape)}; a grid of {grid[0]}x{grid[1]} tokens needs "
                      f"[B, {grid[0] * grid[1]}, {cfg.in_channels}]")
    B = latents.shape[0]
    if text.ndim != 3 or (text.shape[0], text.shape[2]) != (B, cfg.joint_attention_dim):
        raise Mistake(f"text is {list(text.shape)}; it must be [{B}, T, {cfg.joint_attention_dim}]")
    for name, x, shape in (("pooled", pooled, (B, cfg.pooled_projection_dim)), ("timestep", timestep, (B,)),
                           ("guidance", guidance, (B,))):
        if x is not None and np.shape(x) != shape:
            raise Mistake(f"{name} is {list(np.shape(x))}; it must be {list(shape)}")
    if cfg.guidance_embeds and guidance is None:
        raise Mistake("this model has a guidance embedding and guidance is None; pass guidance [B], for example 3.5")
    if guidance is not None and not cfg.guidance_embeds:
        raise Mistake("this model has no guidance embedding (like schnell); do not pass guidance")


# ---------------------------------------------------------------- tensors and loading

# Our module → the torch modules that it joins ("{}": the layer), in diffusers' files and in Black Forest Labs' files.
DIFFUSERS = {
    "": ("", {
        "img_in": "x_embedder", "txt_in": "context_embedder", "out.mod": "norm_out.linear", "out.proj": "proj_out",
        **{f"{ours}.fc{i}": f"time_text_embed.{theirs}_embedder.linear_{i}" for i in (1, 2)
           for ours, theirs in {"time": "timestep", "guidance": "guidance", "pooled": "text"}.items()}}),
    "double.": ("transformer_blocks.{}.", {
        "img.mod": "norm1.linear", "img.qkv": "attn.to_q attn.to_k attn.to_v", "img.q_norm": "attn.norm_q.weight",
        "img.k_norm": "attn.norm_k.weight", "img.o": "attn.to_out.0", "img.fc1": "ff.net.0.proj",
        "img.fc2": "ff.net.2", "txt.mod": "norm1_context.linear",
        "txt.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt.q_norm": "attn.norm_added_q.weight",
        "txt.k_norm": "attn.norm_added_k.weight", "txt.o": "attn.to_add_out", "txt.fc1": "ff_context.net.0.proj",
        "txt.fc2": "ff_context.net.2"}),
    "single.": ("single_transformer_blocks.{}.", {
        "mod": "norm.linear", "in": "attn.to_q attn.to_k attn.to_v proj_mlp", "q_norm": "attn.norm_q.weight",
        "k_norm": "attn.norm_k.weight", "out": "proj_out"}),
}
BFL = {
    "": ("", {
        "img_in": "img_in", "txt_in": "txt_in", "out.mod": "final_layer.adaLN_modulation.1",
        "out.proj": "final_layer.linear",
        **{f"{ours}.fc{i + 1}": f"{theirs}_in.{layer}_layer" for i, layer in enumerate(("in", "out"))
           for ours, theirs in {"time": "time", "guidance": "guidance", "pooled": "vector"}.items()}}),
    "double.": ("double_blocks.{}.", {f"{s}.{ours}": f"{s}_{theirs}" for s in ("img", "txt") for ours, theirs in {
        "mod": "mod.lin", "qkv": "attn.qkv", "q_norm": "attn.norm.query_norm.scale",
        "k_norm": "attn.norm.key_norm.scale", "o": "attn.proj", "fc1": "mlp.0", "fc2": "mlp.2"}.items()}),
    "single.": ("single_blocks.{}.", {
        "mod": "modulation.lin", "in": "linear1", "q_norm": "norm.query_norm.scale", "k_norm": "norm.key_norm.scale",
        "out": "linear2"}),
}


def _names(layout):
    """Return {our module: [torch modules]} for a file layout."""
    return {ours + k: [prefix + name for name in v.split()]
            for ours, (prefix, part) in layout.items() for k, v in part.items()}


def table(cfg: Config, layout: dict = DIFFUSERS) -> dict:
    """Return every tensor's declaration (see `weights.Tensor`) under the names of one file layout."""
    D, C, K, names = cfg.width, cfg.in_channels, cfg.attention_head_dim, _names(layout)
    depth = {"double": cfg.num_layers, "single": cfg.num_single_layers}

    def lin(path, n_in, *widths, std=None):
        widths = widths if len(names[path]) > 1 else [sum(widths)]
        return tensor_files.linear(n_in, dict(zip(names[path], widths)), layers=depth.get(path.split(".")[0]), std=std)

    def norm(path):
        return tensor_files.Tensor((K,), {names[path][0]: K}, depth[path.split(".")[0]], mean=1.0)

    def mlp(path, n_in):
        return {"fc1": lin(f"{path}.fc1", n_in, D, std=0.02), "fc2": lin(f"{path}.fc2", D, D, std=0.02)}

    # Modulations and the last projection start at zero, so that each block starts as the identity (DiT, 2212.09748).
    def stream(s):
        return {"mod": lin(f"{s}.mod", D, 6 * D, std=0.0), "qkv": lin(f"{s}.qkv", D, D, D, D),
                "q_norm": norm(f"{s}.q_norm"), "k_norm": norm(f"{s}.k_norm"), "o": lin(f"{s}.o", D, D),
                "fc1": lin(f"{s}.fc1", D, 4 * D), "fc2": lin(f"{s}.fc2", 4 * D, D)}

    return {
        "img_in": lin("img_in", C, D), "txt_in": lin("txt_in", cfg.joint_attention_dim, D), "time": mlp("time", 256),
        **({"guidance": mlp("guidance", 256)} if cfg.guidance_embeds else {}),
        "pooled": mlp("pooled", cfg.pooled_projection_dim),
        "double": {"img": stream("double.img"), "txt": stream("double.txt")},
        "single": {"mod": lin("single.mod", D, 3 * D, std=0.0), "in": lin("single.in", D, D, D, D, 4 * D),
                   "q_norm": norm("single.q_norm"), "k_norm": norm("single.k_norm"),
                   "out": lin("single.out", 5 * D, D)},
        "out": {"mod": lin("out.mod", D, 2 * D, std=0.0),
                "proj": lin("out.proj", D, cfg.patch_size ** 2 * (cfg.out_channels or C), std=0.0)},
    }


def load_transformer(path: str | Path, *, put: Callable | None = None, dtype=jnp.bfloat16,
                     unpack: Callable | None = None, last: int | None = None, variant: str | None = None
                     ) -> tuple[Config, dict]:
    """Load (Config, params) from a diffusers `transformer/` folder, or from a safetensors file with the names of
    diffusers or of Black Forest Labs. Such a file may hold a whole pipeline.

    put: (name, numpy array [in, out] of one layer) → the leaf to keep, called once per weight as it streams from disk;
    the layers' leaves are then stacked. unpack: see `weights.open_weights`; `put` receives what it joins, unchanged
    (`quant.put` and `quant.unpack` work this way). last: the last layer to run; later blocks and the output layers are
    not loaded. Raise ValueError if a tensor is missing, unexpected or has the wrong shape.
    """
    cfg, tensors, weights = open_transformer(path, unpack, variant)
    if last is not None:
        tensor_files.check_tensors(tensors, weights)
        depth = {"double": min(cfg.num_layers, last + 1), "single": max(0, last + 1 - cfg.num_layers)}
        tensors = {name: jax.tree.map(lambda tensor: replace(tensor, layers=depth[name]), part) if name in depth
                   else part for name, part in tensors.items() if name != "out"}
        weights = {name: weights[name] for name in tensor_files.file_shapes(tensors)}
    return cfg, tensor_files.load_tensors(tensors, weights, put=put, dtype=dtype)


def open_transformer(path: str | Path, unpack: Callable | None = None, variant: str | None = None
                     ) -> tuple[Config, dict, dict]:
    """Return (Config, table, {name: lazy slice}) for `load_transformer`."""
    path = Path(path)
    if (path / "transformer").is_dir():
        path = path / "transformer"                              # the folder is a whole pipeline
    weights = tensor_files.open_weights(path, unpack, variant=variant, prefixes=PREFIXES)
    if "x_embedder.weight" in weights or (path.is_dir() and "img_in.weight" not in weights):
        layout, file = DIFFUSERS, (path if path.is_dir() else path.parent) / "config.json"
        cfg = read_config(file) if path.is_dir() or file.exists() else _config_of(weights, layout, path)
    else:
        weights = {k: _Swapped(v) if k.startswith(BFL[""][1]["out.mod"]) else v for k, v in weights.items()}
        layout, cfg = BFL, _config_of(weights, BFL, path)
    return cfg, table(cfg, layout), weights


def read_config(file: str | Path) -> Config:
    """Read a `Config` from a diffusers config.json. Raise ValueError if it describes another kind of model."""
    given = tensor_files.read_json(file)
    if given.get("_class_name", "FluxTransformer2DModel") != "FluxTransformer2DModel":
        raise Mistake(f"{file} describes a {given['_class_name']}; FLUX.1 needs a FluxTransformer2DModel")
    for name in ("num_layers", "num_single_layers"):
        if given.get(name) is None:
            raise Mistake(f"{file} does not say {name}; the config of a FLUX.1 transformer must have it")
    return tensor_files.read_config(Config, given)


@dataclass(frozen=True)
class _Swapped:
    """Swap the halves of a lazy slice: BFL's last modulation is (shift, scale), diffusers' is (scale, shift)."""
    piece: object

    def get_shape(self) -> list[int]:
        return self.piece.get_shape()

    def __getitem__(self, item):
        return np.roll(self.piece[:], self.get_shape()[0] // 2, axis=0)[item]


def _config_of(weights, layout, path):
    """Infer the config of a single file from names and shapes. The RoPE split follows FLUX.1's ratio 16:56:56."""
    names = {ours: theirs[0].format(0) for ours, theirs in _names(layout).items()}
    shape = lambda ours: weights[f"{names[ours]}.weight"].get_shape()
    try:
        D, C = shape("img_in")
        K, = weights[names["double.img.q_norm"]].get_shape()
        blocks = {kind: layout[kind][0].partition(".")[0] + "." for kind in ("double.", "single.")}
        double, single = (1 + max((int(n.split(".")[1]) for n in weights if n.startswith(start)), default=-1)
                          for start in blocks.values())
        return Config(
            in_channels=C, out_channels=shape("out.proj")[0], num_layers=double, num_single_layers=single,
            attention_head_dim=K, num_attention_heads=D // K, joint_attention_dim=shape("txt_in")[1],
            pooled_projection_dim=shape("pooled.fc1")[1], guidance_embeds=f"{names['guidance.fc1']}.weight" in weights,
            axes_dims_rope=(K - 4 * (7 * K // 32), 2 * (7 * K // 32), 2 * (7 * K // 32)))
    except (KeyError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise Mistake(f"{path} is not a FLUX.1 transformer: {said}") from None
