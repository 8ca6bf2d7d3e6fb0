"""Run FLUX.1's image autoencoder (diffusers' `AutoencoderKL`): load, encode, decode, init, save.

Copy `weights.py` with this file.

    cfg, params = vae.load("FLUX.1-schnell/vae")
    latents = vae.encode(params, cfg, images)            # [B, H, W, 3] in -1…1 → [B, H/8, W/8, 16], about unit variance
    images = vae.decode(params, cfg, latents)            # the inverse, not clipped

Images and activations are [B, H, W, C] (torch: [B, C, H, W]), convolutions [height, width, in, out], linear layers
[in, out]. The model computes in the dtype of its parameters and returns float32. `table` declares every tensor once.
Source: arXiv 2112.10752 (latent diffusion), as `diffusers` runs it.
"""
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array, lax

import weights as tensor_files
from weights import Mistake, Tensor, linear, open_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
EPSILON = 1e-6                                                   # for every group norm; fixed in diffusers too
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# Attention layer names before diffusers 0.15. Such files may store these linear layers as 1x1 convolutions.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """Hold the fields of `config.json` under diffusers' names, with its defaults. This file ignores sample_size."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    act_fn: str = "silu"
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int = 32

    @property
    def downsampling(self) -> int:
        """Return the pixels per latent on each side: 8 for FLUX.1, which has four levels and halves three times."""
        return 2 ** (len(self.block_out_channels) - 1)


def config(source: dict | Path | str) -> Config:
    """Read a `Config` from a folder with config.json, from that file, or from its contents as a dict."""
    if not isinstance(source, dict):
        path = Path(source)
        source = tensor_files.read_json(path / "config.json" if path.is_dir() else path)
    if source.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise Mistake(f"_class_name is {source['_class_name']!r}; only 'AutoencoderKL' is supported")
    cfg = tensor_files.read_config(Config, source)
    _check_config(cfg, source)
    return cfg


def _check_config(cfg, source):
    """Raise ValueError for settings that this file does not support, and name the value."""
    levels = len(cfg.block_out_channels)
    for key, supported in BLOCKS.items():
        kinds = source.get(key, [supported] * levels)
        for kind in kinds:
            if kind != supported:
                raise Mistake(f"{key} has {kind!r}; only {supported!r} is supported")
        if len(kinds) != levels:
            raise Mistake(f"{key} has {len(kinds)} entries for {levels} block_out_channels; it must have {levels}")
    if cfg.act_fn not in ("silu", "swish"):
        raise Mistake(f"act_fn is {cfg.act_fn!r}; only 'silu' is supported")
    for key in ("latents_mean", "latents_std"):
        if source.get(key) is not None:
            raise Mistake(f"{key} is {source[key]}; only scaling_factor and shift_factor are supported")
    for channels in cfg.block_out_channels:
        if channels % cfg.norm_num_groups:
            raise Mistake(f"block_out_channels has {channels}; each must be a multiple of norm_num_groups, "
                          f"{cfg.norm_num_groups}")


# ---------------------------------------------------------------- the table of tensors: load, initialize, save


def table(cfg: Config) -> dict:
    """Return every tensor's declaration, in the same nested dict as the parameters."""
    channels, wide = cfg.block_out_channels, cfg.block_out_channels[-1]
    encoder = {
        "conv_in": _conv("encoder.conv_in", cfg.in_channels, channels[0]),
        "down": _levels("encoder.down_blocks", channels, channels[0], cfg.layers_per_block, "downsample"),
        "mid": _middle("encoder.mid_block", wide, cfg.mid_block_add_attention),
        "norm_out": _norm("encoder.conv_norm_out", wide),
        "conv_out": _conv("encoder.conv_out", wide, 2 * cfg.latent_channels)}
    decoder = {
        "conv_in": _conv("decoder.conv_in", cfg.latent_channels, wide),
        "mid": _middle("decoder.mid_block", wide, cfg.mid_block_add_attention),
        "up": _levels("decoder.up_blocks", channels[::-1], wide, cfg.layers_per_block + 1, "upsample"),
        "norm_out": _norm("decoder.conv_norm_out", channels[0]),
        "conv_out": _conv("decoder.conv_out", channels[0], cfg.out_channels)}
    if cfg.use_quant_conv:
        encoder["quant_conv"] = _conv("quant_conv", 2 * cfg.latent_channels, 2 * cfg.latent_channels, size=1)
    if cfg.use_post_quant_conv:
        decoder["post_quant_conv"] = _conv("post_quant_conv", cfg.latent_channels, cfg.latent_channels, size=1)
    return {"encoder": encoder, "decoder": decoder}


def _conv(name, n_in, n_out, size=3):
    std = (size * size * n_in) ** -0.5
    return {"w": Tensor((size, size, n_in, n_out), {f"{name}.weight": n_out}, transposed=True, std=std),
            "b": Tensor((n_out,), {f"{name}.bias": n_out})}


def _norm(name, channels):
    return {"w": Tensor((channels,), {f"{name}.weight": channels}, mean=1.0),
            "b": Tensor((channels,), {f"{name}.bias": channels})}


def _resnet(name, n_in, n_out):
    block = {"norm1": _norm(f"{name}.norm1", n_in), "conv1": _conv(f"{name}.conv1", n_in, n_out),
             "norm2": _norm(f"{name}.norm2", n_out), "conv2": _conv(f"{name}.conv2", n_out, n_out)}
    return block if n_in == n_out else block | {"shortcut": _conv(f"{name}.conv_shortcut", n_in, n_out, size=1)}


def _levels(name, channels, n_in, depth, resample):
    """Declare `depth` resnet blocks per entry of `channels`, with a resampling convolution between two levels."""
    levels = {}
    for i, n_out in enumerate(channels):
        levels[str(i)] = {"resnets": {str(j): _resnet(f"{name}.{i}.resnets.{j}", n_out if j else n_in, n_out)
                                      for j in range(depth)}}
        if i < len(channels) - 1:
            levels[str(i)][resample] = _conv(f"{name}.{i}.{resample}rs.0.conv", n_out, n_out)
        n_in = n_out
    return levels


def _middle(name, channels, attention):
    block = {"resnets": {str(j): _resnet(f"{name}.resnets.{j}", channels, channels) for j in range(2)}}
    if attention:
        at = f"{name}.attentions.0"
        block["attention"] = {"norm": _norm(f"{at}.group_norm", channels)} | {
            key: linear(channels, {f"{at}.{theirs}": channels})
            for key, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))}
    return block


def load(folder: Path | str, *, put: Callable | None = None, dtype=jnp.bfloat16, variant: str | None = None
         ) -> tuple[Config, dict]:
    """Load (Config, params) from a diffusers `vae/` folder: config.json and safetensors, one file or sharded.

    put: (name, array in our layout) → the leaf to keep, called for each tensor as it streams from disk. The name is the
    path in the parameters, such as "encoder.conv_in.w". variant: see `weights.open_weights`. Raise ValueError if a
    tensor is missing, unexpected or has the wrong shape.
    """
    cfg = config(folder)
    weights = _today(open_weights(folder, variant=variant))
    return cfg, tensor_files.load_tensors(table(cfg), weights, put=put, dtype=dtype)


def _today(weights):
    """Rename old weights to diffusers' names of today, and make linear layers of the old 1x1 convolutions."""
    today = {}
    for name, piece in weights.items():
        module, _, last = name.rpartition(".")
        head, _, old = module.rpartition(".")
        if ".attentions." in name and old in OLD_NAMES:
            name, shape = f"{head}.{OLD_NAMES[old]}.{last}", piece.get_shape()
            piece = replace(piece, shape=tuple(shape[:2])) if shape[2:] == [1, 1] else piece
        today[name] = piece
    return today


def init(key: Array, cfg: Config, dtype=jnp.float32) -> dict:
    """Return random parameters as `table` declares them: normal with variance 1 / inputs, norms one, biases zero."""
    return tensor_files.init_tensors(table(cfg), key, dtype)


def save(folder: Path | str, params: dict, cfg: Config, dtype=jnp.bfloat16) -> None:
    """Write a folder that `load` and `diffusers.AutoencoderKL.from_pretrained` read. Write each file atomically."""
    folder = Path(folder)
    tensor_files.save_tensors(table(cfg), params, folder / f".{WEIGHTS}", dtype)
    os.replace(folder / f".{WEIGHTS}", folder / WEIGHTS)
    blocks = {key: [kind] * len(cfg.block_out_channels) for key, kind in BLOCKS.items()}
    text = json.dumps({"_class_name": "AutoencoderKL"} | asdict(cfg) | blocks, indent=2)
    (folder / ".config.json").write_text(text + "\n")
    os.replace(folder / ".config.json", folder / "config.json")


# ---------------------------------------------------------------- encode and decode


def encode(params: dict, cfg: Config, images: Array, key: Array | None = None) -> Array:
    """Encode images [B, H, W, 3] in -1…1 to latents [B, h, w, C], shifted and scaled. Return the posterior's mode, or a
    sample if there is a `key`. H and W must be multiples of `cfg.downsampling`."""
    mean, log_variance = moments(params, cfg, images)
    if key is not None:
        mean += jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    return (mean - (cfg.shift_factor or 0.0)) * cfg.scaling_factor


def moments(params: dict, cfg: Config, images: Array) -> tuple[Array, Array]:
    """Return the posterior's mean and log variance for images [B, H, W, 3], each float32 [B, h, w, C], not shifted."""
    if images.ndim != 4 or images.shape[-1] != cfg.in_channels or any(n % cfg.downsampling for n in images.shape[1:3]):
        raise Mistake(f"images are {list(images.shape)}, should be [B, H, W, {cfg.in_channels}], with H and W "
                      f"multiples of {cfg.downsampling}")
    p, groups = params["encoder"], cfg.norm_num_groups
    x = conv(p["conv_in"], images.astype(p["conv_in"]["w"].dtype))
    for level in _in_order(p["down"]):
        for block in _in_order(level["resnets"]):
            x = resnet(block, x, groups)
        if "downsample" in level:
            x = conv(level["downsample"], x, stride=2, padding=((0, 1), (0, 1)))
    x = middle(p["mid"], x, groups)
    x = conv(p["conv_out"], jax.nn.silu(group_norm(p["norm_out"], x, groups)))
    x = conv(p["quant_conv"], x) if cfg.use_quant_conv else x
    # Use float32 from here on: shift and scale also increase rounding errors.
    mean, log_variance = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)                               # diffusers' bounds


def decode(params: dict, cfg: Config, latents: Array) -> Array:
    """Decode latents [B, h, w, C] from `encode` to images [B, H, W, 3], float32, about -1…1 but not clipped."""
    if latents.ndim != 4 or latents.shape[-1] != cfg.latent_channels:
        raise Mistake(f"latents are {list(latents.shape)}, should be [B, h, w, {cfg.latent_channels}]")
    p, groups = params["decoder"], cfg.norm_num_groups
    x = latents.astype(jnp.float32) / cfg.scaling_factor + (cfg.shift_factor or 0.0)
    x = x.astype(p["conv_in"]["w"].dtype)                                          # not earlier, see `moments`
    x = conv(p["post_quant_conv"], x) if cfg.use_post_quant_conv else x
    x = middle(p["mid"], conv(p["conv_in"], x), groups)
    for level in _in_order(p["up"]):
        for block in _in_order(level["resnets"]):
            x = resnet(block, x, groups)
        if "upsample" in level:
            x = conv(level["upsample"], jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
    x = conv(p["conv_out"], jax.nn.silu(group_norm(p["norm_out"], x, groups)))
    return x.astype(jnp.float32)


def _in_order(blocks):
    """Return the values of {"0": …, "1": …} in numeric order. A pytree's own order puts "10" before "2"."""
    return [blocks[str(i)] for i in range(len(blocks))]


def conv(p: dict, x: Array, stride: int = 1, padding: str | tuple = "SAME") -> Array:
    """Apply a 3x3 or 1x1 convolution to x [B, H, W, C]. For odd kernels, SAME pads evenly, as torch does."""
    x = lax.conv_general_dilated(x, p["w"], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x + p["b"]


def group_norm(p: dict, x: Array, groups: int) -> Array:
    """Normalize x [B, H, W, C] over space and the C / groups channels of each group, in float32: a group has up to a
    million values, and bfloat16 cannot even count that far."""
    B, H, W, C = x.shape
    y = x.astype(jnp.float32).reshape(B, H * W, groups, C // groups)
    y = y - y.mean((1, 3), keepdims=True)
    y = y * lax.rsqrt((y * y).mean((1, 3), keepdims=True) + EPSILON)
    return (y.reshape(x.shape) * p["w"].astype(jnp.float32) + p["b"].astype(jnp.float32)).astype(x.dtype)


def resnet(p: dict, x: Array, groups: int) -> Array:
    """Apply two convolutions and add the input; a 1x1 convolution adapts the input if the channels change."""
    y = conv(p["conv1"], jax.nn.silu(group_norm(p["norm1"], x, groups)))
    y = conv(p["conv2"], jax.nn.silu(group_norm(p["norm2"], y, groups)))
    return y + (conv(p["shortcut"], x) if "shortcut" in p else x)


def middle(p: dict, x: Array, groups: int) -> Array:
    """Apply a resnet block, attention (if the model has it) and a resnet block, at the lowest resolution."""
    first, second = _in_order(p["resnets"])
    x = resnet(first, x, groups)
    return resnet(second, attention(p["attention"], x, groups) if "attention" in p else x, groups)


def attention(p: dict, x: Array, groups: int) -> Array:
    """Add one-head attention over all positions to x [B, H, W, C]."""
    B, H, W, C = x.shape
    y = group_norm(p["norm"], x, groups).reshape(B, H * W, C)
    q, k, v = (y @ p[name]["w"] + p[name]["b"] for name in "qkv")
    # Use float32: bfloat16 would round each of up to 16,384 softmax weights to 8 bits before their sum.
    weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * C ** -0.5)
    y = weights.astype(x.dtype) @ v
    return x + (y @ p["out"]["w"] + p["out"]["b"]).reshape(x.shape)
