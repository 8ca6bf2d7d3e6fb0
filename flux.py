"""FLUX.1 in raw JAX: a whole pipeline, loaded, sampled, and one layer's activations.

Copy it with `mmdit.py`, `harvest.py`, `text.py`, `vae.py` and `weights.py`, which it imports; `session.py` for the
command line.

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

import mmdit
import text as text_encoders
import vae
import weights as tensor_files
from mmdit import Config, Edit, catch, residual, residual_names, scan_blocks, velocity  # noqa: F401 (API)
from weights import Mistake, download

REPOS = {"schnell": "black-forest-labs/FLUX.1-schnell", "dev": "black-forest-labs/FLUX.1-dev"}


@dataclass(frozen=True, repr=False)
class Model:
    """A whole pipeline. cfg, params: of the transformer; the others likewise; `source` is where it was loaded from."""
    cfg: Config
    params: dict
    t5: tuple                                                    # (T5Config, params)
    clip: tuple                                                  # (CLIPConfig, params)
    vae: tuple                                                   # (vae.Config, params or None)
    scheduler: dict                                              # scheduler_config.json
    source: Path
    text_tokens: int                                             # T5's length where a call does not say
    size: int                                                    # pixels a side where a call does not say
    walk: Callable | None = None                                 # how blocks are run (see `scan_blocks`)

    def __repr__(self):
        return f"<FLUX.1 model of {self.source}: {self.cfg.layers} layers of width {self.cfg.width}>"

    def tokenize(self, prompts: Sequence[str], text_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """T5 ids [B, text_tokens] and CLIP ids [B, 77] (or as many as the model has positions)."""
        length = self.text_tokens if text_tokens is None else text_tokens
        return tuple(encode(prompts) for encode in _tokenizers(self.source, length, self.t5[0], self.clip[0]))

    def words(self, prompts: Sequence[str], length: int) -> list[list[str]]:
        """For each prompt its T5 tokens as they stand in the text, at most `length`, without the padding."""
        return text_encoders.t5_words(self.source / "tokenizer_2", prompts, length)


def _tokenizers(folder, length, t5, clip):
    """T5's and CLIP's tokenizers of a pipeline's folder; t5, clip: the models' configs."""
    return (text_encoders.t5_tokenizer(folder / "tokenizer_2", length, t5.vocab_size),
            text_encoders.clip_tokenizer(folder / "tokenizer", clip.max_position_embeddings, clip.vocab_size))


def read_config(model: str | Path, transformer: str | Path | None = None, unpack: Callable | None = None
                ) -> tuple[Path, Config]:
    """(folder, transformer Config) of `model`, without its weights: enough to check flags before a long load. Raises
    ValueError where it is no FLUX.1 pipeline. transformer, unpack: as for `load`."""
    folder = resolve(model, ["model_index.json", *(f"{part}/*.json" for part in (
        "transformer", "text_encoder", "text_encoder_2", "vae", "scheduler"))])
    cfg = (mmdit.open_transformer(transformer, unpack)[0] if transformer else
           mmdit.read_config(folder / "transformer" / "config.json"))
    _check_parts(folder, cfg)
    return folder, cfg


def _check_parts(folder, cfg):
    """(T5Config, CLIPConfig, vae.Config, scheduler's fields) of a pipeline. Raises ValueError where its parts fit
    neither FLUX.1 nor each other, as those of other pipelines do not."""
    index = folder / "model_index.json"
    kind = tensor_files.read_json(index).get("_class_name") if index.exists() else None
    if kind not in (None, "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"):      # of the same weights
        raise Mistake(f"{folder} holds a {kind}; fae runs FLUX.1 from text, a FluxPipeline")
    t5, clip = text_encoders.t5_config(folder / "text_encoder_2"), text_encoders.clip_config(folder / "text_encoder")
    image = vae.config(folder / "vae")
    scheduler = read_scheduler(folder)
    for name, value, what, fitting in (
            ("in_channels", cfg.in_channels, "the VAE's latent_channels times 4", 4 * image.latent_channels),
            ("out_channels", cfg.out_channels or cfg.in_channels, "its in_channels", cfg.in_channels),
            ("patch_size", cfg.patch_size, "that of FLUX.1", 1),
            ("joint_attention_dim", cfg.joint_attention_dim, "the T5's d_model", t5.d_model),
            ("pooled_projection_dim", cfg.pooled_projection_dim, "the CLIP's hidden_size", clip.hidden_size)):
        if value != fitting:
            raise Mistake(f"the transformer's {name} is {value}, and {what} is {fitting}; in {folder} they must be the "
                          "same: it is no FLUX.1 that draws from text, or its parts are of different models")
    sigmas(scheduler, 2, 256)
    return t5, clip, image, scheduler


def read_scheduler(folder: Path) -> dict:
    """The fields of scheduler_config.json, for `sigmas`."""
    return tensor_files.read_json(folder / "scheduler" / "scheduler_config.json")


def load(model: str | Path, *, put: Callable | None = None, dtype=jnp.bfloat16, transformer: str | Path | None = None,
         unpack: Callable | None = None, walk: Callable | None = None, last: int | None = None,
         variant: str | None = None) -> Model:
    """A `Model` from "nano", "schnell", "dev", a diffusers folder or a Hugging Face repo id.

    put(name, array), unpack: see `load_transformer`; names start with transformer., t5., clip. or vae. here.
    transformer: a path to take it from instead, for example `flux1-schnell.safetensors`. last: for `residuals` at
    layers up to this one, in one step, and nothing else: what they do not need (the VAE too) is not loaded. variant:
    "fp16" for files such as `model.fp16.safetensors`. Raises ValueError, before any weight is read, where it is no
    FLUX.1 pipeline.
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
    _tokenizers(folder, tokens, t5, clip)                        # a mistake there shows before the long work
    return Model(
        cfg, mmdit.load_transformer(place, unpack=unpack, last=last, **part("transformer"))[1],
        t5=text_encoders.load_t5(folder / "text_encoder_2", unpack=unpack, **part("t5")),
        clip=text_encoders.load_clip(folder / "text_encoder", unpack=unpack, **part("clip")),
        vae=vae.load(folder / "vae", **part("vae")) if last is None else (image, None),
        scheduler=scheduler, source=folder, text_tokens=tokens, size=default_size(folder), walk=walk)


PARTS = ["model_index.json", *(f"{part}/*" for part in (
    "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler"))]


def resolve(model: str | Path, files: Sequence[str] = PARTS) -> Path:
    """The folder of `model` (see `load`); of a repo, `files` are fetched. Raises ValueError that says what is wrong."""
    if str(model) == "nano" and not Path("nano/model_index.json").exists():
        model = Path(__file__).parent / "nano"
    if Path(model).is_dir():
        return Path(model)
    repo, _, revision = str(model).partition("@")
    repo = REPOS.get(repo, repo)
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise Mistake(f"unknown model {str(model)!r}: give nano, schnell, dev, a folder or a repo id "
                      "owner/name or owner/name@revision")
    return download(repo, files, **({"revision": revision} if revision else {}))


# ---------------------------------------------------------------- sampling


def sigmas(scheduler: dict, steps: int, tokens: int) -> np.ndarray:
    """The noise levels 1 … 0 [steps + 1] of flow-match Euler sampling, float32.

    scheduler: the fields of scheduler_config.json. With `use_dynamic_shifting` (dev) they shift toward 1 with the
    number of image tokens, as SD3 (arXiv 2403.03206, section 5.3.2) derives; else (schnell) by the constant `shift`.
    """
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
                 "stochastic_sampling"):
        if scheduler.get(name):
            raise Mistake(f"the scheduler sets {name}, which FLUX.1 does not use and fae does not implement")
    s = np.linspace(1, 1 / steps, steps).astype(np.float32)
    if scheduler.get("use_dynamic_shifting"):
        low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        base, top = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        mu = base + (top - base) * (tokens - low) / (high - low)
        mu = np.exp(mu) if scheduler.get("time_shift_type", "exponential") == "exponential" else mu
        mu = np.float32(mu)                                      # the levels stay in float32, as diffusers has them
        s = mu / (mu + (1 / s - 1))
    else:
        shift = scheduler.get("shift", 1.0)
        s = shift * s / (1 + (shift - 1) * s)
    if scheduler.get("shift_terminal"):
        s = 1 - (1 - s) * (1 - scheduler["shift_terminal"]) / (1 - s[-1])
    return np.append(s, 0).astype(np.float32)


def generate(model: Model, prompts: Sequence[str], *, steps: int, size: int | tuple[int, int], seed: int = 0,
             noise=None, guidance: float | None = None, text_tokens: int | None = None,
             progress: Callable | None = None, edits: Callable | None = None) -> np.ndarray:
    """Draw one image per prompt: uint8 [B, H, W, 3].

    size: pixels, an int or (height, width). noise: packed initial latents [B, I, C]; without it they are drawn from
    `seed` and the prompt's place in the list. guidance: for models with a guidance embedding (default 3.5).
    progress: called with each step's number when it is done. edits: called with each step's number, from 0, before it
    is done, for its `Edit`s. Raises ValueError where an argument does not fit.
    """
    start = prepare(model, prompts, steps=steps, size=size, seed=seed, noise=noise, guidance=guidance,
                    text_tokens=text_tokens)
    return decode(model, sample(model, start, progress=progress, edits=edits), start.grid)


def sample(model: Model, start: "Start", *, progress: Callable | None = None, edits: Callable | None = None) -> Array:
    """The packed latents [B, I, C] in which sampling ends that begins at `start` (see `generate`)."""
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
              size: int | tuple[int, int] | None = None, noise=None, guidance: float | None = None,
              text_tokens: int | None = None) -> Array:
    """The residual stream at one layer while `model` draws `prompts`: [B, N, D], or [steps, B, N, D] where steps > 1.

    N is I, T or T + I for site "img", "txt", "both" (see `residual`). It is taken at every sampling step, the first at
    pure noise; the last step runs no block after `layer`. size: default 256 pixels, or the model's own if smaller.
    """
    residual_names(model.cfg, layer, site)                       # raises before the long work
    start = prepare(model, prompts, steps=steps, size=size or min(256, model.size), seed=seed, noise=noise,
                    guidance=guidance, text_tokens=text_tokens)
    acts = capture(model, start, layer=int(layer), site=site)
    return acts[0] if steps == 1 else acts


def capture(model: Model, start: "Start", *, layer: int, site: str) -> Array:
    """The residual stream at one layer in every sampling step from `start`: [steps, B, N, D] (see `residuals`)."""
    latents, caught, where = start.latents, [], {"grid": start.grid, "layer": layer, "walk": model.walk}
    names = residual_names(model.cfg, layer, site)
    for i in range(len(start.sigmas) - 2):
        v, found = catch(model.params, model.cfg, latents, *at(start, i), names=names, **where)
        latents = _euler(latents, v, *start.sigmas[i:i + 2])
        caught.append(jnp.concatenate(list(found.values()), 1))
    caught.append(residual(model.params, model.cfg, latents, *at(start, -2), site=site, **where))
    return jnp.stack(caught)


def token_groups(site: str, timesteps: int, text_tokens: int) -> list[tuple[str, int, slice]]:
    """[(name, timestep, slice of the site's tokens)]: the groups of tokens whose residuals differ in mean and spread,
    by timestep and stream, in the order of `capture`'s axes. A single one has no name."""
    both = [("txt", slice(0, text_tokens)), ("img", slice(text_tokens, None))]
    streams = both if site == "both" else [("", slice(None))]
    times = [f"t{t}" for t in range(timesteps)] if timesteps > 1 else [""]
    return [("-".join(filter(None, (stream, time))), t, part)
            for t, time in enumerate(times) for stream, part in streams]


@dataclass(frozen=True)
class Start:
    """What sampling starts from: latents [B, I, C] float32, (text, pooled, guidance or None), sigmas, token grid."""
    latents: jax.Array
    condition: tuple
    sigmas: np.ndarray
    grid: tuple[int, int]


def at(start: Start, i: int) -> tuple[Array, Array, Array, Array | None]:
    """What `velocity` wants to know at sampling step i besides the latents: text, pooled, timestep, guidance."""
    text, pooled, guidance = start.condition
    return text, pooled, jnp.full(len(text), start.sigmas[i]), guidance


def prepare(model: Model, prompts: str | Sequence[str], *, steps: int, size: int | tuple[int, int], seed: int = 0,
            noise=None, guidance: float | None = None, text_tokens: int | None = None) -> Start:
    """Check the arguments of `generate`, encode the prompts and draw the noise."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise Mistake("no prompt given")
    _check_number("steps", steps, 1, 10_000)
    _check_number("seed", seed, -2**31, 2**31 - 1)               # what fits JAX's default integers
    if guidance is not None:
        _check_number("guidance", guidance, kinds=(int, float, np.number))
    grid = token_grid(model, size)
    shape = (len(prompts), grid[0] * grid[1], model.cfg.in_channels)
    if noise is None:
        noise = draw_noise(seed, jnp.arange(len(prompts)), shape[1:])
    elif np.shape(noise) != shape:
        raise Mistake(f"noise is {list(np.shape(noise))}; {len(prompts)} prompt(s) at this size need {list(shape)}")
    if guidance is None and model.cfg.guidance_embeds:
        guidance = 3.5
    if guidance is not None:
        guidance = jnp.full(len(prompts), guidance, jnp.float32)
    text, pooled = encode_text(model, prompts, text_tokens)
    levels = sigmas(model.scheduler, steps, shape[1])
    return Start(jnp.asarray(noise, jnp.float32), (text, pooled, guidance), levels, grid)


@partial(jax.jit, static_argnames="shape")
def draw_noise(seed: int, numbers: Array, shape: tuple[int, ...]) -> Array:
    """Initial latents [B, *shape] of images `numbers` [B]: the same noise whatever is drawn beside them."""
    key = jax.random.key(seed)
    return jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(key, n), shape))(numbers)


def _check_number(name, value, low=-np.inf, high=np.inf, kinds=(int, np.integer)):
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a number" if float in kinds else f"a whole number from {low} to {high}"
        raise Mistake(f"{name} is {value!r}; it must be {kind}")


def token_grid(model: Model, size: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of packed tokens of an image of `size` pixels: 8 by the VAE, 2 by packing, for FLUX.1."""
    return _grid(model.vae[0], size)


def check_size(folder: Path, size: int | tuple[int, int]) -> tuple[int, int]:
    """`token_grid`, and its ValueError for a size that does not fit, from the folder of `read_config`, before a long
    load."""
    return _grid(vae.config(folder / "vae"), size)


def default_size(folder: Path) -> int:
    """Pixels a side of the model in that folder where nobody says."""
    return tensor_files.read_json(folder / "vae" / "config.json").get("sample_size", 1024)


def _grid(cfg, size):
    sides, pixels = size if isinstance(size, (tuple, list)) else (size, size), 2 * cfg.downsampling
    if len(sides) != 2 or not all(isinstance(n, (int, np.integer)) and n >= pixels and n % pixels == 0 for n in sides):
        raise Mistake(f"size is {size!r}; it must be a multiple of {pixels} pixels, or two: height,width")
    return sides[0] // pixels, sides[1] // pixels


def encode_text(model: Model, prompts: Sequence[str], text_tokens: int | None = None) -> tuple[Array, Array]:
    """T5 states [B, T, joint_attention_dim] and CLIP's pooled vector [B, pooled_projection_dim]."""
    t5_ids, clip_ids = model.tokenize(prompts, text_tokens)
    text = text_encoders.t5(model.t5[1], model.t5[0], t5_ids, walk=model.walk or scan_blocks)
    return text, _clip(model.clip[1], model.clip[0], clip_ids)


def decode(model: Model, latents: Array, grid: tuple[int, int]) -> np.ndarray:
    """Packed latents [B, I, C] → images uint8 [B, H, W, 3]."""
    images = np.asarray(_decode(model.vae[1], model.vae[0], latents, grid=tuple(grid)))
    return np.round(np.clip(images / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def pack(latents: Array) -> Array:
    """[B, h, w, c] → [B, h/2 * w/2, 4c]: each token holds a 2x2 patch, channel by channel, as FLUX.1 packs it."""
    B, h, w, c = latents.shape
    return latents.reshape(B, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(B, h * w // 4, 4 * c)


def unpack(latents: Array, grid: tuple[int, int]) -> Array:
    """The inverse of `pack`: [B, I, C] → [B, 2 rows, 2 columns, C/4]."""
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


def main(*prompts, model="auto", steps=4, seed=0, size=None, guidance=None, noise=None, dtype="bfloat16",
         text_tokens=None, transformer=None, quant="", out="out.png", **unknown):
    """Draw images: one PNG per prompt at --out (numbered where there are several)."""
    from PIL import Image
    from tqdm import tqdm

    import session
    session.no_unknown_flags(unknown)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise Mistake(f"--dtype {dtype}: it is bfloat16, float16 or float32")
    if not prompts:
        raise Mistake('no prompt given: python flux.py "a red cube" --model nano')
    noise = None if noise is None else _read_noise(noise)
    if Path(out).suffix.lower() not in Image.registered_extensions():
        raise Mistake(f"--out {out}: its name must end like an image's, for example .png")
    name = session.announce(model)
    if size is not None:
        check_size(read_config(name)[0], size)
    formats = session.quantized(quant or session.default_quant(resolve(name)))
    loaded = load(name, dtype=jnp.dtype(dtype), transformer=transformer, **formats)
    size = loaded.size if size is None else size
    with tqdm(total=steps, unit="step", delay=1e-3) as bar:      # the delay: no bar is drawn before an error
        images = generate(loaded, prompts, steps=steps, size=size, seed=seed, noise=noise,
                          guidance=guidance, text_tokens=text_tokens, progress=lambda i: bar.update())
    out = Path(out)
    for i, image in enumerate(images):
        file = out if len(images) == 1 else out.with_stem(f"{out.stem}_{i}")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        print(file)


def _read_noise(file):
    try:
        return np.load(file, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise Mistake(f"--noise {file} is not a .npy file: {error}") from None


if __name__ == "__main__":
    import flux
    import session
    session.command(flux.main)
