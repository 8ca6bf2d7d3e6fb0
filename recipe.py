"""What a training run is: its flags, their defaults for a model, and whether they fit each other and a checkpoint.

Copy it with `train.py`, whose flags these are, and what that imports.
"""
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import safetensors

import checkpoint
import data
import flux
import sae
import session
import shard
import weights
from session import Mistake


def flag(help, default=None):
    """A field of `Run` and a flag of the command line. Without a default it suits the model: see `defaults`."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Run:
    """All that decides what a run computes, as flags; kept in the checkpoint, and compared when it is resumed."""
    model: str = flag("nano, schnell, dev, a folder or a repo id; auto: schnell if JAX sees an accelerator, else nano",
                      "auto")
    layer: int = flag("number of the block whose output is read; default: the last double block")
    site: str = flag("which tokens: img, txt or both", "img")
    features: int = flag("of the SAE; default: 16 times the width, at most 16384")
    k: int = flag("active features of a token; default: an eighth of the width, at most 32; 32 for txt")
    steps: int = flag("of training; default: 10000, 1000 for small models")
    batch: int = flag("tokens a step", 2048)
    prompts: str = flag("a file, hf:owner/dataset[/file] or scenes; default: scenes for nano, else the captions of the "
                        "FLUX SAE paper")
    prompt_field: str | None = flag("the prompts' field or column; default: prompt, caption or text")
    prompt_batch: int = flag("prompts a forward pass; default: 4 a chip, 32 for small models")
    seeds_per_prompt: int = flag("noises that each prompt is drawn from; default: 1, 4 for small models")
    timesteps: int = flag("noise levels at which activations are taken, from pure noise on", 1)
    buffer: int = flag("tokens harvested and shuffled together, at least; default: 65536, 131072 for small models")
    size: int | tuple | None = flag("pixels: a side, or height,width; default: 256, or the model's own if smaller")
    text_tokens: int = flag("of T5, a prompt; default: the model's own")
    lr: float | None = flag("learning rate; default: by features and k")
    seed: int = flag("of the noise, the order of training and the SAE", 0)
    dtype: str = flag("float32, bfloat16 or float16; default: float32 on a CPU, else bfloat16")
    quant: str = flag("of the model's weights: nf4, int8 or none; default: none for nano and on a CPU, else nf4")
    activation: str = flag("topk, batchtopk or jumprelu; default: topk, batchtopk for a transcoder")
    matryoshka: tuple | None = flag("ends of nested prefixes of the features, as in 512,2048")
    transcoder: int | None = flag("the layer whose output is to be written, from that of --layer")
    normalization: str = flag("pca (per dimension, then rotated to the principal axes), std (not rotated) or scale "
                              "(one factor); default: pca, std for txt and transcoders")
    init: str | None = flag("an SAE to begin from: a folder of ours, SAELens' or sparsify's, or owner/repo/folder")
    transformer: str | None = flag("a file or folder to take the transformer from")
    revision: str | None = flag("of a model on the hub")
    padding: bool | None = flag("train on the padding of text too", False)
    held_out: bool | None = flag("keep one prompt in twenty for the closing table; default: if there are enough")
    prompts_sha256: str | None = flag("of a file of prompts; the run says which it was")

    def __post_init__(self):
        for name in ("matryoshka", "size"):
            if isinstance(getattr(self, name), list):            # a tuple in JSON
                object.__setattr__(self, name, tuple(getattr(self, name)))


# What runs of older checkpoints did, which do not say it.
OLD = {"padding": True, "held_out": False, "quant": "none", "activation": "topk", "normalization": "std"}


def saved(out):
    """The Run of the checkpoint in `out`. What older ones do not say, they did as in OLD. Raises Mistake."""
    try:
        return Run(**OLD | checkpoint.load_metadata(out)["run"])
    except (KeyError, TypeError):
        raise Mistake(f"--resume: {out} was not written by this train.py") from None


def defaults(name, folder, cfg, given):
    """A Run from the flags that were given and, for the others, from the model. Raises ValueError for unfit values."""
    small = cfg.width <= 512
    transcoder = given.get("transcoder") is not None
    activation = "batchtopk" if transcoder else "topk"           # SAELens has no TopK transcoder
    given = inherited(given, cfg.width) if "init" in given else given
    source, field = ("scenes", None) if (folder / "scenes.py").is_file() else (data.DATASET, data.DATASET_FIELD)
    source = given.get("prompts", source)
    run = Run(**{
        "model": name, "layer": max(cfg.num_layers - 1, 0), "features": min(16 * cfg.width, 16384),
        "steps": 1000 if small else 10_000, "prompts": source,
        "prompt_field": None if "prompts" in given else field,
        "prompt_batch": shard.batch(1, 32) if small else shard.batch(4),
        "seeds_per_prompt": 4 if small else 1, "buffer": 2 ** 17 if small else 2 ** 16, "size": 0, "text_tokens": 0,
        "dtype": session.default_dtype(), "quant": session.default_quant(folder), "activation": activation,
        "held_out": source == "scenes", "revision": session.revision_of(folder)}
        | recipe(given.get("site"), cfg.width, transcoder) | given)
    run = replace(run, matryoshka=prefixes(run.matryoshka, run.features))
    flux.residual_names(cfg, run.layer, run.site)
    if run.transcoder is not None:
        flux.residual_names(cfg, run.transcoder, run.site)
    check_numbers(run)
    config(run, cfg.width, ())                                   # raises for what does not go together
    return replace(run, lr=rate(run.features, run.k, cfg.width, run.site, small)) if run.lr is None else run


def recipe(site, width, transcoder=False):
    """k and normalization. At k = 32, a quarter of nano's width, some 200 features, pairs of opposite directions, do
    all the work. Text tokens alone are few and alike: at k = 16 40 % of layer 0's features die, turned to the principal
    axes 8 %. Transcoders are not turned: what they read and what they write have different axes."""
    text = site == "txt"
    return {"k": 32 if text else max(1, min(32, width // 8)), "normalization": "std" if transcoder or text else "pca"}


def rate(features, k, width, site, small):
    """The learning rate. Short runs on a small model bear, and need, more than the SAE's default: 9 times it (at k =
    16, nano's layers 0 and 5 have a higher FVU at 14 times), and up to 36 times where k is a quarter of the width.
    Beyond, less again: of k = 64 half of layer 0's die at 28 times it, at equal FVU. Of text tokens few differ: at 9
    times it 34 % of layer 0's features die, at twice 4 %."""
    quarters = 4 * k / width
    times = 2 if site == "txt" else min(max(36 * quarters ** 2, 9), 36 / quarters ** 3)
    return (times if small else 1) * sae.default_lr(features)


def config(run, width, groups):
    """The SAE's Config."""
    return sae.Config(d_in=width, features=run.features, k=run.k, activation=run.activation, matryoshka=run.matryoshka,
                      d_out=None if run.transcoder is None else width, normalization=run.normalization, groups=groups,
                      lr=run.lr, **schedule(run.steps))


def schedule(steps):
    """How the rate goes, for `sae.Config`: after the warmup it falls to zero. Of nano's layer 5, 200 steps of warmup
    leave 9 % dead, 300 leave 3 %."""
    warmup = min(300, steps * 3 // 10)
    return {"warmup": warmup, "decay": (warmup, steps + 1)}


def prefixes(matryoshka, features):
    """The last prefix is all features, said or not."""
    if not matryoshka or not isinstance(matryoshka[-1], int) or matryoshka[-1] >= features:
        return matryoshka
    return (*matryoshka, features)


def inherited(given, width):
    """The flags, with those that --init decides. Raises ValueError where they contradict it."""
    _, cfg = checkpoint.load(begun_from(given["init"]))
    if cfg.d_in != width or cfg.d_out is not None or given.get("transcoder") is not None:
        raise Mistake(f"--init {given['init']}: need an SAE of width {width} and not a transcoder; it has d_in "
                         f"{cfg.d_in}, d_out {cfg.d_out}")
    if given.get("features", cfg.features) != cfg.features:
        raise Mistake(f"--features {given['features']}: the SAE of --init has {cfg.features}")
    return {"k": cfg.k, "activation": cfg.activation, "matryoshka": cfg.matryoshka} | given | {"features": cfg.features}


def begun_from(init):
    """The folder of the SAE of --init; from the hub it is fetched."""
    if Path(init).is_dir():
        return Path(init)
    owner, _, rest = str(init).partition("/")
    name, _, folder = rest.partition("/")
    if not owner or not name or owner[0] in ".~":
        raise Mistake(f"--init {init}: there is no such folder, and no repo: give owner/repo or owner/repo/folder")
    files = [f"{folder}/{file}".lstrip("/") for file in checkpoint.READ]
    return weights.download(f"{owner}/{name}", files) / folder


def check_numbers(run):
    session.check_whole({field.name: getattr(run, field.name) for field in fields(Run) if field.type is int})
    if run.lr is not None and not (isinstance(run.lr, (int, float)) and 0 < run.lr < float("inf")):
        raise Mistake(f"--lr {run.lr}: it must be a number above 0")
    session.check_dtype(run.dtype)
    session.quantized(run.quant)                                 # raises for a format that there is not
    if run.transformer and not Path(run.transformer).exists():
        raise Mistake(f"--transformer {run.transformer}: there is no such file or folder")
    if run.k > run.features:
        raise Mistake(f"--k {run.k} is more than --features {run.features}")


def identified(run, given):
    """The Run with what identifies its prompts, and whether some can be held out."""
    held_out = given.get("held_out", True) and data.divisible(run.prompts, run.prompt_field)
    if given.get("held_out") and not held_out:
        raise Mistake(f"--held_out: {run.prompts} has less than a hundred different prompts, or none to hold out")
    found = data.fingerprint(run.prompts)
    if run.prompts_sha256 not in (None, found):
        raise Mistake(f"--prompts_sha256 {run.prompts_sha256}: that of {run.prompts} is {found}")
    return replace(run, prompts=data.located(run.prompts), prompts_sha256=found, held_out=held_out)


def absolute(path):
    """The path as it is the same anywhere; as typed where there is nothing (it may be on the hub)."""
    return os.path.abspath(path) if Path(path).exists() else path


def resumed(out, model, given):
    """The Run of the checkpoint in `out`; flags may repeat what it says, and only --steps may differ."""
    run = saved(out)
    given = given if model == "auto" else {"model": session.located(model)} | given
    given |= {"matryoshka": prefixes(given["matryoshka"], run.features)} if "matryoshka" in given else {}
    if "prompts" in given and data.same(given["prompts"], run.prompts):
        given["prompts"] = run.prompts
    known = {"steps"} | ({"prompts"} if run.prompts_sha256 else set())           # a moved file has the same contents
    same = {"model": session.located, "init": absolute, "transformer": absolute}           # old runs kept them as typed
    for name, value in given.items():
        old = getattr(run, name)
        if name not in known and value != (same[name](old) if old and name in same else old):
            raise Mistake(f"--resume: {out} was trained with --{name} {old}, not {value}")
    run = replace(run, **{name: value for name, value in given.items() if name in known})
    check_numbers(run)
    if (done := step_of(out)) > run.steps:
        raise Mistake(f"--resume: {out} has {done:,} steps, more than --steps {run.steps:,}")
    if run.prompts_sha256 not in (None, data.fingerprint(run.prompts)):
        raise Mistake(f"--resume: {run.prompts} is not the file that {out} was trained on: its contents are others")
    print(f"model: {run.model} (as in {out})")
    return run


def step_of(out):
    """The step at which the state in the folder `out` stands, without reading all of it."""
    try:
        with safetensors.safe_open(out / checkpoint.STATE, "np") as file:
            return int(file.get_tensor("step"))
    except Exception as error:                                   # safetensors has its own
        raise Mistake(f"{out / checkpoint.STATE} is damaged: {error}") from None
