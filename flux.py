"""Run FLUX.1 in raw JAX: load a whole pipeline, draw images, and capture one layer's activations.

Copy `mmdit.py`, `blocks.py`, `harvest.py`, `text.py`, `vae.py` and `weights.py` with this file, and `session.py` for
the command line.

    model = flux.load("nano")                                             # or "schnell", "dev", a folder, a repo id
    images = flux.generate(model, ["a red cube"], steps=8, size=128)      # uint8 [1, 128, 128, 3]
    acts = flux.residuals(model, ["a red cube"], layer=10, site="img")    # [1, 64, D]

    python flux.py "a red cube left of a blue sphere" "another prompt" --model nano --steps 8 --seed 0 --out out.png

Letters: B batch, T text tokens, I image tokens, C latent channels, D width, L layers (see `mmdit.py`).
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import blocks
import mmdit
import text as text_encoders
import vae
import weights as tensor_files
from mmdit import SITES, Config, Edit, residual, residual_names, velocity, velocity_and_values  # noqa: F401
from weights import Mistake, download

REPOS = {"schnell": "black-forest-labs/FLUX.1-schnell", "dev": "black-forest-labs/FLUX.1-dev"}
BUNDLED = ("nano", "nano-dev", "nano-base")                      # folders beside this file


@dataclass(frozen=True, repr=False)
class Model:
    """Hold a whole pipeline. cfg and params are the transformer's; source is the folder that it was loaded from."""
    cfg: Config
    params: dict
    t5: tuple                                                    # (T5Config, params)
    clip: tuple                                                  # (CLIPConfig, params)
    vae: tuple                                                   # (vae.Config, params or None)
    scheduler: dict                                              # scheduler_config.json
    source: Path
    text_tokens: int                                             # default number of T5 tokens
    size: int                                                    # default image size in pixels per side
    walk: Callable | None = None                                 # runs the blocks (see `blocks.scan`)

    def __repr__(self):
        return f"<FLUX.1 model from {self.source}: {self.cfg.layers} layers of width {self.cfg.width}>"

    def tokenize(self, prompts: Sequence[str], text_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return T5 ids [B, text_tokens] and CLIP ids [B, CLIP's number of positions] (77 for FLUX.1)."""
        length = self.text_tokens if text_tokens is None else text_tokens
        return tuple(encode(prompts) for encode in _tokenizers(self.source, length, self.t5[0], self.clip[0]))

    def words(self, prompts: Sequence[str], length: int) -> list[list[str]]:
        """Return each prompt's T5 tokens as pieces of its text: at most `length`, without the padding tokens."""
        return text_encoders.t5_words(self.source / "tokenizer_2", prompts, length)


def _tokenizers(folder, length, t5, clip):
    """Open T5's and CLIP's tokenizers in a pipeline's folder. t5, clip: the models' configs."""
    return (text_encoders.t5_tokenizer(folder / "tokenizer_2", length, t5.vocab_size),
            text_encoders.clip_tokenizer(folder / "tokenizer", clip.max_position_embeddings, clip.vocab_size))


def read_config(model: str | Path, transformer: str | Path | None = None, unpack: Callable | None = None
                ) -> tuple[Path, Config]:
    """Read (folder, transformer Config) of `model` without its weights, to check flags before a long load. Raise
    ValueError if it is not a FLUX.1 pipeline. transformer, unpack: as in `load`."""
    folder = resolve(model, ["model_index.json", *(f"{part}/*.json" for part in (
        "transformer", "text_encoder", "text_encoder_2", "vae", "scheduler"))])
    cfg = (mmdit.open_transformer(transformer, unpack)[0] if transformer else
           mmdit.read_config(folder / "transformer" / "config.json"))
    _check_parts(folder, cfg)
    return folder, cfg


def _check_parts(folder, cfg):
    """Read (T5Config, CLIPConfig, vae.Config, scheduler fields) of a pipeline. Raise ValueError if the parts do not fit
    FLUX.1 or each other, as in the folders of other pipelines."""
    index = folder / "model_index.json"
    kind = tensor_files.read_json(index).get("_class_name") if index.exists() else None
    if kind not in (None, "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"):      # the same weights
        raise Mistake(f"{folder} holds a {kind}; fae needs a FluxPipeline (FLUX.1, text to image)")
    t5, clip = text_encoders.t5_config(folder / "text_encoder_2"), text_encoders.clip_config(folder / "text_encoder")
    image = vae.config(folder / "vae")
    scheduler = read_scheduler(folder)
    for name, value, what, fitting in (
            ("in_channels", cfg.in_channels, "the VAE's latent_channels times 4", 4 * image.latent_channels),
            ("out_channels", cfg.out_channels or cfg.in_channels, "its in_channels", cfg.in_channels),
            ("patch_size", cfg.patch_size, "FLUX.1's patch_size", 1),
            ("joint_attention_dim", cfg.joint_attention_dim, "the T5's d_model", t5.d_model),
            ("pooled_projection_dim", cfg.pooled_projection_dim, "the CLIP's hidden_size", clip.hidden_size)):
        if value != fitting:
            raise Mistake(f"the transformer's {name} is {value}, and {what} is {fitting}; in {folder} they must be "
                          "equal: it is not a text-to-image FLUX.1, or its parts belong to different models")
    sigmas(scheduler, 2, 256)
    return t5, clip, image, scheduler


def draws_scenes(folder: Path) -> bool:
    """Return whether the model in a folder is of the nano family, whose world is known."""
    family = folder.name in BUNDLED and (folder.parent / "nano" / "scenes.py").is_file()
    return family or (folder / "scenes.py").is_file()


def read_scheduler(folder: Path) -> dict:
    """Read the fields of scheduler_config.json, which `sigmas` needs."""
    return tensor_files.read_json(folder / "scheduler" / "scheduler_config.json")


def load(model: str | Path, *, put: Callable | None = None, dtype=jnp.bfloat16, transformer: str | Path | None = None,
         unpack: Callable | None = None, walk: Callable | None = None, last: int | None = None,
         variant: str | None = None) -> Model:
    """Load a `Model` from "nano", "schnell", "dev", a diffusers folder or a Hugging Face repo id.

    put(name, array), unpack: see `load_transformer`; here the names start with transformer., t5., clip. or vae.
    transformer: load the transformer from this path, for example `flux1-schnell.safetensors`. last: load only what
    `residuals` needs in one step at layers up to this one (so not the VAE). variant: "fp16" for files such as
    `model.fp16.safetensors`. Raise ValueError, before reading any weight, if `model` is not a FLUX.1 pipeline.
    """
    folder = resolve(model, [part for part in PARTS if not transformer or not part.startswith("transformer/")])
    place = transformer or folder / "transformer"

    def part(prefix):
        return {"put": None if put is None else lambda name, array: put(f"{prefix}.{name}", array), "dtype": dtype,
                "variant": variant}

    cfg = mmdit.open_transformer(place, unpack, variant)[0]
    t5, clip, image, scheduler = _check_parts(folder, cfg)
    tokens = text_encoders.tokenizer_config(folder / "tokenizer_2").get("model_max_length", 512)
    tokens = min(tokens, 512 if cfg.guidance_embeds else 256)
    _tokenizers(folder, tokens, t5, clip)                        # raises before the long work
    params = mmdit.load_transformer(place, unpack=unpack, last=last, **part("transformer"))[1]
    t5, encoder = text_encoders.load_t5(folder / "text_encoder_2", unpack=unpack, **part("t5"))
    if walk is None and jax.devices()[0].platform == "gpu":
        params, encoder = blocks.stacks_apart(params), blocks.stacks_apart(encoder)
    return Model(
        cfg, params, t5=(t5, encoder),
        clip=text_encoders.load_clip(folder / "text_encoder", unpack=unpack, **part("clip")),
        vae=vae.load(folder / "vae", **part("vae")) if last is None else (image, None),
        scheduler=scheduler, source=folder, text_tokens=tokens, size=default_size(folder), walk=walk)


PARTS = ["model_index.json", *(f"{part}/*" for part in (
    "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler"))]


def resolve(model: str | Path, files: Sequence[str] = PARTS) -> Path:
    """Return the folder of `model` (see `load`); download `files` of a repo. Raise ValueError if it does not exist."""
    if str(model) in BUNDLED and not (Path(model) / "model_index.json").exists():
        model = Path(__file__).parent / model
    if Path(model).is_dir():
        return Path(model)
    repo, _, revision = str(model).partition("@")
    repo = REPOS.get(repo, repo)
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise Mistake(f"unknown model {str(model)!r}: give nano, schnell, dev, an existing folder or a repo id "
                      "(owner/name or owner/name@revision)")
    return download(repo, files, **({"revision": revision} if revision else {}))


# ---------------------------------------------------------------- sampling


def sigmas(scheduler: dict, steps: int, tokens: int) -> np.ndarray:
    """Return the noise levels 1 … 0 [steps + 1] of flow-match Euler sampling, float32.

    scheduler: the fields of scheduler_config.json. With `use_dynamic_shifting` (dev), more image tokens shift the
    levels closer to 1 (SD3, arXiv 2403.03206, section 5.3.2). Otherwise (schnell) `shift` is a constant.
    """
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
                 "stochastic_sampling"):
        if scheduler.get(name):
            raise Mistake(f"the scheduler sets {name}; FLUX.1 does not use it and fae does not support it")
    s = np.linspace(1, 1 / steps, steps).astype(np.float32)
    if scheduler.get("use_dynamic_shifting"):
        low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        base, top = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        mu = base + (top - base) * (tokens - low) / (high - low)
        mu = np.exp(mu) if scheduler.get("time_shift_type", "exponential") == "exponential" else mu
        mu = np.float32(mu)                                      # keeps the levels in float32, as in diffusers
        s = mu / (mu + (1 / s - 1))
    else:
        shift = scheduler.get("shift", 1.0)
        s = shift * s / (1 + (shift - 1) * s)
    if scheduler.get("shift_terminal"):
        s = 1 - (1 - s) * (1 - scheduler["shift_terminal"]) / (1 - s[-1])
    return np.append(s, 0).astype(np.float32)


def generate(model: Model, prompts: Sequence[str], *, steps: int, size: int | tuple[int, int], seed: int = 0,
             noise: Array | np.ndarray | None = None, guidance: float | None = None, text_tokens: int | None = None,
             progress: Callable | None = None, edits: Callable | None = None) -> np.ndarray:
    """Draw one image per prompt: uint8 [B, H, W, 3].

    size: pixels, an int or (height, width). noise: packed initial latents [B, I, C]; the default is drawn from `seed`
    and the prompt's index. guidance: for models with a guidance embedding (default 3.5). progress: called after each
    step with the number of steps done. edits: called before each step with its number, from 0; returns the step's
    `Edit`s. Raise ValueError if an argument does not fit.
    """
    start = prepare(model, prompts, steps=steps, size=size, seed=seed, noise=noise, guidance=guidance,
                    text_tokens=text_tokens)
    return decode(model, sample(model, start, progress=progress, edits=edits), start.grid)


def sample(model: Model, start: "Start", *, progress: Callable | None = None, edits: Callable | None = None) -> Array:
    """Sample from `start` and return the final packed latents [B, I, C] (see `generate`)."""
    latents = start.latents
    for i in range(len(start.sigmas) - 1):
        v = velocity(model.params, model.cfg, latents, *at(start, i), grid=start.grid, walk=model.walk,
                     edits=edits(i) if edits else ())
        latents = _euler(latents, v, *start.sigmas[i:i + 2])
        if progress:
            jax.block_until_ready(latents)
            progress(i + 1)
    return latents


def residuals(model: Model, prompts: Sequence[str], *, layer: int, site: str, seed: int = 0, steps: int = 1,
              size: int | tuple[int, int] | None = None, noise: Array | np.ndarray | None = None,
              guidance: float | None = None, text_tokens: int | None = None) -> Array:
    """Return one layer's residual stream while `model` draws `prompts`: [B, N, D], or [steps, B, N, D] if steps > 1.

    N is I, T or T + I for site "img", "txt", "both" (see `residual`). Every sampling step is captured; the first starts
    from pure noise, and the last runs no block after `layer`. size: default 256 pixels, or the model's size if smaller.
    """
    residual_names(model.cfg, layer, site)                       # raises before the long work
    start = prepare(model, prompts, steps=steps, size=size or min(256, model.size), seed=seed, noise=noise,
                    guidance=guidance, text_tokens=text_tokens)
    acts = capture(model, start, layer=int(layer), site=site)
    return acts[0] if steps == 1 else acts


def capture(model: Model, start: "Start", *, layer: int, site: str) -> Array:
    """Capture the residual stream at one layer in every sampling step from `start`: [steps, B, N, D]."""
    latents, captured, where = start.latents, [], {"grid": start.grid, "layer": layer, "walk": model.walk}
    names = residual_names(model.cfg, layer, site)
    for i in range(len(start.sigmas) - 2):
        v, values = velocity_and_values(model.params, model.cfg, latents, *at(start, i), names=names, **where)
        latents = _euler(latents, v, *start.sigmas[i:i + 2])
        captured.append(jnp.concatenate(list(values.values()), 1))
    captured.append(residual(model.params, model.cfg, latents, *at(start, -2), site=site, **where))
    return jnp.stack(captured)


def inputs(model: Model, start: "Start") -> Array:
    """Return the latents that each sampling step from `start` reads: [steps, B, I, C]."""
    latents, seen = start.latents, [start.latents]
    for i in range(len(start.sigmas) - 2):
        v = velocity(model.params, model.cfg, latents, *at(start, i), grid=start.grid, walk=model.walk)
        latents = _euler(latents, v, *start.sigmas[i:i + 2])
        seen.append(latents)
    return jnp.stack(seen)


def token_groups(site: str, timesteps: int, text_tokens: int) -> list[tuple[str, int, slice]]:
    """Return [(name, timestep, slice of the site's tokens)] for each timestep and stream, in the order of `capture`'s
    axes. The residuals of these groups differ in mean and spread. A single group has the name ""."""
    both = [("txt", slice(0, text_tokens)), ("img", slice(text_tokens, None))]
    streams = both if len(SITES[site]) > 1 else [("", slice(None))]
    times = [f"t{t}" for t in range(timesteps)] if timesteps > 1 else [""]
    return [("-".join(filter(None, (stream, time))), t, part)
            for t, time in enumerate(times) for stream, part in streams]


@dataclass(frozen=True)
class Start:
    """Hold the inputs of sampling. condition is (text, pooled, guidance or None), grid (rows, columns) of tokens."""
    latents: Array                                               # [B, I, C] float32: the initial noise
    condition: tuple
    sigmas: np.ndarray                                           # noise levels [steps + 1]
    grid: tuple[int, int]


def at(start: Start, i: int) -> tuple[Array, Array, Array, Array | None]:
    """Return the inputs of `velocity` at sampling step i, except the latents: text, pooled, timestep, guidance."""
    text, pooled, guidance = start.condition
    return text, pooled, jnp.full(len(text), start.sigmas[i]), guidance


def prepare(model: Model, prompts: str | Sequence[str], *, steps: int, size: int | tuple[int, int], seed: int = 0,
            noise: Array | np.ndarray | None = None, guidance: float | None = None, text_tokens: int | None = None,
            numbers: Sequence[int] | None = None) -> Start:
    """Check the arguments of `generate`, encode the prompts and draw the noise. numbers: those of the images, for
    `draw_noise` (default: 0, 1, …)."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise Mistake("no prompt given; give at least one")
    _check_number("steps", steps, 1, 10_000)
    _check_number("seed", seed, -2**31, 2**31 - 1)               # the range of JAX's default integers
    if guidance is not None:
        _check_number("guidance", guidance, kinds=(int, float, np.number))
    grid = token_grid(model, size)
    shape = (len(prompts), grid[0] * grid[1], model.cfg.in_channels)
    if noise is None:
        noise = draw_noise(seed, jnp.arange(len(prompts)) if numbers is None else jnp.asarray(numbers), shape[1:])
    elif np.shape(noise) != shape:
        raise Mistake(f"noise is {list(np.shape(noise))}; {len(prompts)} prompt(s) at this size need {list(shape)}")
    levels = sigmas(model.scheduler, steps, shape[1])
    return Start(jnp.asarray(noise, jnp.float32), condition(model, prompts, text_tokens, guidance), levels, grid)


def condition(model: Model, prompts: Sequence[str], text_tokens: int | None = None, guidance: float | None = None
              ) -> tuple[Array, Array, Array | None]:
    """Return text, pooled (see `encode_text`) and guidance [B]: 3.5 by default, None if the model takes none."""
    if guidance is not None or model.cfg.guidance_embeds:
        guidance = jnp.full(len(prompts), 3.5 if guidance is None else guidance, jnp.float32)
    return *encode_text(model, prompts, text_tokens), guidance


@partial(jax.jit, static_argnames="shape")
def draw_noise(seed: int, numbers: Array, shape: tuple[int, ...]) -> Array:
    """Draw initial latents [B, *shape] for images `numbers` [B]. An image's noise does not depend on the others."""
    key = jax.random.key(seed)
    return jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(key, n), shape))(numbers)


def _check_number(name, value, low=-np.inf, high=np.inf, kinds=(int, np.integer)):
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a number" if float in kinds else f"a whole number from {low} to {high}"
        raise Mistake(f"{name} is {value!r}; it must be {kind}")


def token_grid(model: Model, size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of packed tokens for an image of `size` pixels. In FLUX.1 a token covers 16x16 pixels."""
    return _grid(model.vae[0], size)


def check_size(folder: Path, size: int | tuple[int, int]) -> tuple[int, int]:
    """Do the same as `token_grid` from the folder of `read_config`, to reject a wrong size before a long load."""
    return _grid(vae.config(folder / "vae"), size)


def default_size(folder: Path) -> int:
    """Return the default image size, in pixels per side, of the model in that folder."""
    return tensor_files.read_json(folder / "vae" / "config.json").get("sample_size", 1024)


def _grid(cfg, size):
    sides, pixels = size if isinstance(size, (tuple, list)) else (size, size), 2 * cfg.downsampling
    if len(sides) != 2 or not all(isinstance(n, (int, np.integer)) and n >= pixels and n % pixels == 0 for n in sides):
        raise Mistake(f"size is {size!r}; it must be a multiple of {pixels} pixels, or two of them: height,width")
    return sides[0] // pixels, sides[1] // pixels


def encode_text(model: Model, prompts: Sequence[str], text_tokens: int | None = None) -> tuple[Array, Array]:
    """Return T5 states [B, T, joint_attention_dim] and CLIP's pooled vector [B, pooled_projection_dim]."""
    t5_ids, clip_ids = model.tokenize(prompts, text_tokens)
    text = text_encoders.t5(model.t5[1], model.t5[0], t5_ids, walk=model.walk)
    return text, _clip(model.clip[1], model.clip[0], clip_ids)


def decode(model: Model, latents: Array, grid: tuple[int, int]) -> np.ndarray:
    """Decode packed latents [B, I, C] to images uint8 [B, H, W, 3]."""
    images = np.asarray(_decode(model.vae[1], model.vae[0], latents, grid=tuple(grid)))
    return np.round(np.clip(images / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def pack(latents: Array) -> Array:
    """Pack [B, h, w, c] to [B, h/2 * w/2, 4c]: each token holds a 2x2 patch, channel by channel, as in FLUX.1."""
    B, h, w, c = latents.shape
    return latents.reshape(B, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(B, h * w // 4, 4 * c)


def unpack(latents: Array, grid: tuple[int, int]) -> Array:
    """Invert `pack`: [B, I, C] → [B, 2 rows, 2 columns, C/4]."""
    B, (h, w), c = latents.shape[0], grid, latents.shape[-1] // 4
    return latents.reshape(B, h, w, c, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(B, 2 * h, 2 * w, c)


_clip = jax.jit(text_encoders.clip, static_argnums=1)


@partial(jax.jit, static_argnames=("cfg", "grid"))
def _decode(params, cfg, latents, *, grid):
    dtype = jax.tree.leaves(params)[0].dtype
    return vae.decode(params, cfg, unpack(latents, grid).astype(dtype)).astype(jnp.float32)


@jax.jit
def _euler(latents, v, sigma, following):
    return latents + (following - sigma) * v.astype(jnp.float32)


# ---------------------------------------------------------------- the command line


def main(*prompts: str, model: str = "auto", steps: int = 4, seed: int = 0, size: int | tuple[int, int] | None = None,
         guidance: float | None = None, noise: str | None = None, dtype: str = "bfloat16",
         text_tokens: int | None = None, transformer: str | None = None, quant: str = "", out: str = "out.png",
         **unknown) -> None:
    """Draw one image per prompt and save it as --out (numbered if there are several prompts)."""
    from PIL import Image
    from tqdm import tqdm

    import session
    session.no_unknown_flags(unknown)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise Mistake(f"--dtype {dtype}: it must be bfloat16, float16 or float32")
    if not prompts:
        raise Mistake('no prompt given: python flux.py "a red cube" --model nano')
    noise = None if noise is None else _read_noise(noise)
    if Path(out).suffix.lower() not in Image.registered_extensions():
        raise Mistake(f"--out {out}: the name must end like that of an image file, for example .png")
    name = session.announce(model)
    if size is not None:
        check_size(read_config(name)[0], size)
    formats = session.quantized(quant or session.default_quant(resolve(name)))
    loaded = load(name, dtype=jnp.dtype(dtype), transformer=transformer, **formats)
    size = loaded.size if size is None else size
    with tqdm(total=steps, unit="step", delay=1e-3) as bar:      # with a delay, no bar shows before an error
        images = generate(loaded, prompts, steps=steps, size=size, seed=seed, noise=noise,
                          guidance=guidance, text_tokens=text_tokens, progress=lambda i: bar.update())
    target = Path(out)
    for i, image in enumerate(images):
        file = target if len(images) == 1 else target.with_stem(f"{target.stem}_{i}")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        print(file)


def _read_noise(file):
    try:
        return np.load(file, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise Mistake(f"--noise {file} is not a readable .npy file: {error}") from None


if __name__ == "__main__":
    import flux
    import session
    session.command(flux.main)
