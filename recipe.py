"""Define the flags of train.py, their defaults for a model, and the checks against each other and a checkpoint.

Copy it with `train.py` and what that imports.
"""
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors

import checkpoint
import data
import flux
import sae
import session
import shard
import weights
from session import Mistake


def flag(help: str, default: Any = None, *, auto: str = "") -> Any:
    """Return a field of `Run` that is also a command-line flag. auto: the rule by which `defaults` sets its value."""
    return field(default=default, metadata={"help": help, "auto": auto})


@dataclass(frozen=True)
class Run:
    """The flags that decide what a run computes. The checkpoint stores them, and a resumed run must match them."""
    model: str = flag("nano, schnell, dev, a folder or a repo id; auto: schnell if JAX sees an accelerator, else nano",
                      "auto")
    layer: int = flag("number of the block whose output the SAE reads", auto="the last double block; nano: 10")
    site: str = flag("tokens to train on: img, txt or both", "img")
    features: int = flag("number of SAE features", auto="16 times the width, at most 16384; nano: 128")
    k: int = flag("active features per token", auto="width / 8, at most 32; nano: 24; txt: 32")
    steps: int = flag("training steps", auto="10000; 1000 for small models")
    batch: int = flag("tokens per step", 2048)
    prompts: str = flag("prompt file, hf:owner/dataset[/file] or scenes",
                        auto="scenes for nano, else the captions of the FLUX SAE paper")
    prompt_field: str | None = flag("field or column of the prompts", auto="prompt, caption or text")
    prompt_batch: int = flag("prompts per forward pass", auto="4 per chip; 32 for small models")
    seeds_per_prompt: int = flag("noise samples per prompt", auto="1; 4 for small models")
    timesteps: int = flag("number of noise levels to capture, starting at pure noise", 1)
    buffer: int = flag("minimum number of tokens to shuffle together", auto="65536; 131072 for small models")
    size: int | tuple | None = flag("pixels: one side, or height,width", auto="256, or the model's own if smaller")
    text_tokens: int = flag("T5 tokens per prompt", auto="the model's own")
    lr: float | None = flag("learning rate", auto="computed from features and k")
    seed: int = flag("seed of the noise, the training order and the SAE", 0)
    dtype: str = flag("dtype of the model: float32, bfloat16 or float16", auto="float32 on a CPU, else bfloat16")
    quant: str = flag("format of the model's weights: nf4, int8 or none", auto="none for nano and on a CPU, else nf4")
    activation: str = flag("topk, batchtopk or jumprelu", auto="topk; batchtopk for nano and transcoders")
    matryoshka: tuple | None = flag("sizes of nested feature prefixes, for example 512,2048")
    transcoder: int | None = flag("train a transcoder that predicts the output of this layer from that of --layer")
    normalization: str = flag("pca (standardize, then rotate to the principal axes), std (no rotation) or scale (one "
                              "factor)", auto="pca; std for txt and transcoders")
    without: str = flag("what to remove from the residuals before training: input (what is linear in the latents that "
                        "the model reads) or nothing", "nothing", auto="nothing; nano: input")
    init: str | None = flag("SAE to start from: a folder of fae, SAELens or sparsify, or owner/repo/folder")
    transformer: str | None = flag("file or folder to load the transformer from")
    revision: str | None = flag("revision of a model on the hub")
    padding: bool | None = flag("also train on text padding", False)
    held_out: bool | None = flag("hold out one prompt in twenty for the final table", auto="True if there are enough")
    prompts_sha256: str | None = flag("expected SHA-256 of the prompt file; the checkpoint stores it")

    def __post_init__(self):
        for name in ("matryoshka", "size"):
            if isinstance(getattr(self, name), list):            # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))


# Defaults for nano's image tokens ("nano:" in the help), chosen by what can be read; figures are in docs/results.md.
# Few features suffice for its small world. Late layers know what is drawn. BatchTopK spends more features on solids.
READABLE = {"layer": 10, "features": 128, "k": 24, "activation": "batchtopk"}

# Older checkpoints do not store these flags; their runs used these values.
OLD = {"padding": True, "held_out": False, "quant": "none", "activation": "topk", "normalization": "std",
       "without": "nothing"}


def saved(out: Path) -> Run:
    """Return the Run of the checkpoint in `out`, with OLD for flags that it lacks. Raise Mistake if it has none."""
    try:
        return Run(**OLD | checkpoint.load_metadata(out)["run"])
    except (KeyError, TypeError):
        raise Mistake(f"--resume: {out} was not written by this train.py") from None


def defaults(name: str, folder: Path, cfg: flux.Config, given: dict) -> Run:
    """Return a Run with the given flags, and the model's defaults for the others. Raise ValueError for bad values."""
    small = cfg.width <= 512
    transcoder = given.get("transcoder") is not None
    activation = "batchtopk" if transcoder else "topk"           # SAELens has no TopK transcoder
    given = inherited(given, cfg.width) if "init" in given else given
    nano = flux.draws_scenes(folder)
    source, field = ("scenes", None) if nano else (data.DATASET, data.DATASET_FIELD)
    source = given.get("prompts", source)
    run = Run(**{
        "model": name, "layer": max(cfg.num_layers - 1, 0), "features": min(16 * cfg.width, 16384),
        "steps": 1000 if small else 10_000, "prompts": source,
        "prompt_field": None if "prompts" in given else field,
        "prompt_batch": shard.batch(1, 32) if small else shard.batch(4),
        "seeds_per_prompt": 4 if small else 1, "buffer": 2 ** 17 if small else 2 ** 16, "size": 0, "text_tokens": 0,
        "dtype": session.default_dtype(), "quant": session.default_quant(folder), "activation": activation,
        "held_out": source == "scenes", "revision": session.revision_of(folder)}
        | recipe(given.get("site"), cfg.width, transcoder)
        | (READABLE if nano and not transcoder and given.get("site", "img") == "img" else {}) | given)
    if "without" not in given and nano and can_leave_the_input_out(run):
        run = replace(run, without="input")
    run = replace(run, matryoshka=prefixes(run.matryoshka, run.features))
    flux.residual_names(cfg, run.layer, run.site)
    if run.transcoder is not None:
        flux.residual_names(cfg, run.transcoder, run.site)
    check_numbers(run)
    config(run, cfg, ())                                         # raises for flags that do not fit together
    return replace(run, lr=rate(run.features, run.k, cfg.width, run.site, small)) if run.lr is None else run


def recipe(site: str | None, width: int, transcoder: bool = False) -> dict:
    """Return the default k and normalization, as flags. Figures are for an earlier nano, with 64 latent channels.

    k is at most width / 8: of 2,048 features with k = 32, a quarter of the width, about 200 (pairs of opposite
    directions) did all the work. Text tokens alone are few and similar: at k = 16, 40 % of layer 0's features died, and
    with rotation to the principal axes 8 %. Transcoders are not rotated: their input and output have different axes.
    """
    text = site == "txt"
    return {"k": 32 if text else max(1, min(32, width // 8)), "normalization": "std" if transcoder or text else "pca"}


def rate(features: int, k: int, width: int, site: str, small: bool) -> float:
    """Return the default learning rate: the SAE's own, times a factor for short runs on a small model.

    The factor is 9 (at k = 16, layers 0 and 5 of an earlier nano had a higher FVU at 14) and rises to 36 where k is a
    quarter of the width. It falls again for larger k: at k = 64 and a factor of 28, half of layer 0's features died, at
    equal FVU. Text tokens are similar to each other: 34 % of layer 0's features died at a factor of 9, and 4 % at 2.
    """
    quarters = 4 * k / width
    times = 2 if site == "txt" else min(max(36 * quarters ** 2, 9), 36 / quarters ** 3)
    return (times if small else 1) * sae.default_lr(features)


def config(run: Run, cfg: flux.Config, groups: tuple[str, ...]) -> sae.Config:
    """Return the SAE's Config for a run on activations of a model and these groups of tokens."""
    return sae.Config(d_in=cfg.width, features=run.features, k=run.k, activation=run.activation,
                      matryoshka=run.matryoshka, d_out=None if run.transcoder is None else cfg.width,
                      normalization=run.normalization, removed=cfg.in_channels * (run.without == "input"),
                      groups=groups, lr=run.lr, **schedule(run.steps))


def schedule(steps: int) -> dict:
    """Return the learning rate schedule for `sae.Config`: a warmup, then a decay to zero. On an earlier nano's layer 5,
    200 steps of warmup left 9 % of the features dead, and 300 steps left 3 %."""
    warmup = min(300, steps * 3 // 10)
    return {"warmup": warmup, "decay": (warmup, steps + 1)}


def prefixes(matryoshka: tuple | None, features: int) -> tuple | None:
    """Return the prefix sizes with all features as the last one, added if it is missing."""
    if not matryoshka or not isinstance(matryoshka[-1], int) or matryoshka[-1] >= features:
        return matryoshka
    return (*matryoshka, features)


def inherited(given: dict, width: int) -> dict:
    """Return the flags plus those that the SAE of --init decides. Raise ValueError if they contradict it."""
    _, cfg = checkpoint.load(begun_from(given["init"]))
    if cfg.d_in != width or cfg.d_out is not None or given.get("transcoder") is not None:
        raise Mistake(f"--init {given['init']}: need an SAE of width {width}, not a transcoder; it has d_in "
                      f"{cfg.d_in}, d_out {cfg.d_out}")
    if given.get("features", cfg.features) != cfg.features:
        raise Mistake(f"--features {given['features']}: the SAE of --init has {cfg.features}")
    return {"k": cfg.k, "activation": cfg.activation, "matryoshka": cfg.matryoshka} | given | {"features": cfg.features}


def begun_from(init: str) -> Path:
    """Return the folder of the SAE of --init. Download it from the hub if it is not local."""
    if Path(init).is_dir():
        return Path(init)
    owner, _, rest = str(init).partition("/")
    name, _, folder = rest.partition("/")
    if not owner or not name or owner[0] in ".~":
        raise Mistake(f"--init {init}: no such folder, and not a repo: give a folder, owner/repo or owner/repo/folder")
    files = [f"{folder}/{file}".lstrip("/") for file in checkpoint.READ]
    return weights.download(f"{owner}/{name}", files) / folder


def check_numbers(run: Run) -> None:
    """Raise Mistake if a flag's value is invalid on its own, or if k is larger than features."""
    session.check_whole({field.name: getattr(run, field.name) for field in fields(Run) if field.type is int})
    if run.lr is not None and not (isinstance(run.lr, (int, float)) and 0 < run.lr < float("inf")):
        raise Mistake(f"--lr {run.lr}: it must be a number above 0")
    session.check_dtype(run.dtype)
    session.quantized(run.quant)                                 # raises for an unknown format
    if run.without not in ("input", "nothing"):
        raise Mistake(f"--without {run.without}: it must be input or nothing")
    if run.without == "input" and not can_leave_the_input_out(run):
        raise Mistake("--without input works for an SAE of --site img (text tokens read no latents) with "
                      f"--normalization pca or std; not for --site {run.site}, --transcoder {run.transcoder}, "
                      f"--normalization {run.normalization}")
    if run.transformer and not Path(run.transformer).exists():
        raise Mistake(f"--transformer {run.transformer}: there is no such file or folder")
    if run.k > run.features:
        raise Mistake(f"--k {run.k} is more than --features {run.features}")


def can_leave_the_input_out(run: Run) -> bool:
    """Return whether --without input works: text tokens read no latents, and one factor keeps no mean to subtract."""
    return run.site == "img" and run.transcoder is None and run.normalization != "scale"


def identified(run: Run, given: dict) -> Run:
    """Return the Run with its prompts' permanent name and hash, and with `held_out` decided. Raise Mistake if the
    given flags do not fit the prompts."""
    held_out = given.get("held_out", True) and data.divisible(run.prompts, run.prompt_field)
    if given.get("held_out") and not held_out:
        raise Mistake(f"--held_out: {run.prompts} has fewer than 100 different prompts, or none to hold out")
    found = data.fingerprint(run.prompts)
    if run.prompts_sha256 not in (None, found):
        raise Mistake(f"--prompts_sha256 {run.prompts_sha256}: the SHA-256 of {run.prompts} is {found}")
    return replace(run, prompts=data.located(run.prompts), prompts_sha256=found, held_out=held_out)


def absolute(path: str) -> str:
    """Return the absolute path, or `path` itself if nothing is there (it may be on the hub)."""
    return os.path.abspath(path) if Path(path).exists() else path


def resumed(out: Path, model: str, given: dict) -> Run:
    """Return the Run of the checkpoint in `out` with the given --steps. Raise Mistake if another flag differs."""
    run = saved(out)
    given = given if model == "auto" else {"model": session.located(model)} | given
    given |= {"matryoshka": prefixes(given["matryoshka"], run.features)} if "matryoshka" in given else {}
    if "prompts" in given and data.same(given["prompts"], run.prompts):
        given["prompts"] = run.prompts
    known = {"steps"} | ({"prompts"} if run.prompts_sha256 else set())           # the hash finds a moved file
    same = {"model": session.located, "init": absolute, "transformer": absolute}         # old runs stored them as typed
    for name, value in given.items():
        old = getattr(run, name)
        if name not in known and value != (same[name](old) if old and name in same else old):
            raise Mistake(f"--resume: {out} was trained with --{name} {old}, not {value}")
    run = replace(run, **{name: value for name, value in given.items() if name in known})
    check_numbers(run)
    if (done := step_of(out)) > run.steps:
        raise Mistake(f"--resume: {out} has {done:,} steps, more than --steps {run.steps:,}")
    if run.prompts_sha256 not in (None, data.fingerprint(run.prompts)):
        raise Mistake(f"--resume: {run.prompts} is not the file that {out} was trained on: its contents differ")
    print(f"model: {run.model} (as in {out})")
    return run


def step_of(out: Path) -> int:
    """Return the step of the training state in the folder `out`. Read only that number from the file."""
    try:
        with safetensors.safe_open(out / checkpoint.STATE, "np") as file:
            return int(file.get_tensor("step"))
    except Exception as error:                                   # safetensors has its own exceptions
        raise Mistake(f"{out / checkpoint.STATE} is damaged: {error}") from None
