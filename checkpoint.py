"""An SAE's files: folders that SAELens loads, and everything that a training run needs to go on.

Copy `sae.py` and `formats.py` with this file; it needs safetensors, for the hub also huggingface_hub, jinja2 and
`templates/`.

    checkpoint.save(folder, params, cfg, metadata={"layer": 18})         # an SAE
    checkpoint.save_state(folder, state, cfg, metadata={"layer": 18})    # and what a resumed run needs
    params, cfg = checkpoint.load(folder)                                # acts on raw residuals, as SAELens does
    state, cfg, extra = checkpoint.load_state(folder)
    url = checkpoint.push(folder, "owner/repo")                          # to the Hugging Face hub, with a model card

A repo may hold SAEs of several layers and sites, each in a folder of its own as SAELens wants it:
`SAE.from_pretrained("owner/repo", "layer10-img")`. What a run needs to go on, state.safetensors, stays at home.
"""
import dataclasses
import hashlib
import inspect
import json
import os
import re
import shlex
import shutil
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

import formats
import sae
from formats import CONFIG, WEIGHTS
from sae import Config, Mistake, Params, State

STATE = "state.safetensors"
READ = (CONFIG, WEIGHTS, "sae.safetensors", formats.SCALER, formats.WHITENING)  # all that `load` may read of a folder
FORMAT = 2  # of state.safetensors, and of what its numbers mean; in 1 "pca" whitened
TMP = ".fae-tmp"                                                 # how names of unfinished saves end
SAE_LENS_VERSION = "6.54.12"  # the format written; SAELens takes a file that names no version >= 6 for an old one
NOUNS = {dict: "an object", int: "an integer", str: "a string"}


def save(folder: str | Path, params: Params, cfg: Config, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes an SAE on raw residuals as SAELens reads it: cfg.json and sae_weights.safetensors."""
    _write(Path(folder), _sae_files(params, cfg, metadata), cfg)


def save_state(
    folder: str | Path,
    state: State,
    cfg: Config,
    *,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes the folded SAE (see `save`) and state.safetensors, from which a run goes on bit for bit.

    `metadata` says what the SAE belongs to (model, revision, layer, site, seed, ...; JSON). `extra` holds what else the
    run needs to resume: a flat dict of arrays (PRNG keys as `jax.random.key_data`). A folder that is not there yet
    appears whole or not at all; in one that is, each file is replaced whole. `state.safetensors` alone decides where a
    resumed run goes on. Where cfg has groups, the folder is the SAE on raw residuals of the first one, and a subfolder
    for each of the others, named like it, the same SAE on theirs.
    """
    arrays = _flatten(state._replace(spare=None))
    arrays |= {f"extra/{name}": np.asarray(value) for name, value in (extra or {}).items()}
    header = {"format": FORMAT, "config": dataclasses.asdict(cfg)}
    files = {STATE: lambda path: _save_arrays(path, arrays, header)}
    for g, name in reversed(list(enumerate(cfg.groups or ("",)))):
        told = {**(metadata or {}), **({"group": name} if name else {})}
        for file, write in _sae_files(sae.fold(state, cfg, g), cfg, told).items():
            files[f"{name}/{file}" if g else file] = write
    _write(Path(folder), files, cfg)


def load(folder: str | Path) -> tuple[Params, Config]:
    """A folder written by us, by SAELens of any version or by sparsify -> params on raw residuals and their config.

    Of SAELens: topk, jumprelu, gated (which is a JumpReLU), standard (its ReLU is a threshold of 0), and transcoders of
    jumprelu and standard. Of sparsify: TopK SAEs. What these put around the weights is folded into them: b_dec
    subtracted first, decoder norms, scales from finetuning, and of `normalize_activations` those whose constants
    SAELens left in the folder. cfg.k of a foreign SAE with thresholds, which files do not say, is 32. Raises Mistake,
    in one line that says why, for what is missing, damaged or cannot be represented.
    """
    folder = Path(folder)
    described, cfg = _read_config(folder / CONFIG)
    path = folder / described["weights"]
    arrays, header = _load_arrays(path)
    if header.get("origin", origin := _origin(described)) != origin:
        raise Mistake(f"{path} is of another run than {folder / CONFIG}: its model, layer, site, seed, group are "
                      f"{header['origin']}, not {origin}")
    p = formats.folded(path, described, cfg, arrays)
    return {name: jnp.asarray(p[name], jnp.float32) for name in sae.shapes(cfg)}, cfg


def load_groups(folder: str | Path) -> tuple[list[Params], Config]:
    """As `load`, the SAE of each group of tokens, in the order of cfg.groups; one where there are none."""
    params, cfg = load(folder)
    return [params, *(load(Path(folder) / name)[0] for name in cfg.groups[1:])], cfg


def load_state(folder: str | Path) -> tuple[State, Config, dict[str, np.ndarray]]:
    """What `save_state` wrote: state, config and `extra`, bit for bit."""
    path = Path(folder) / STATE
    arrays, header = _load_arrays(path)
    if not isinstance(header.get("config"), dict):
        raise Mistake(f"{path}: no usable config in its header")
    cfg = _made(path, header["config"])
    if (written := header.get("format", 1)) != FORMAT:
        raise Mistake(f"{path} is of format {written}, of another version; this one goes on from format "
                         f"{FORMAT} only (the SAE beside it can be loaded all the same)")
    template = jax.eval_shape(lambda: sae.init(jax.random.key(0), cfg, *_blank_sample(cfg)))._replace(spare=None)
    extra = {name[6:]: arrays.pop(name) for name in list(arrays) if name.startswith("extra/")}
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    expected = {_name(keys): leaf for keys, leaf in paths}
    sae.check_arrays(path, arrays, {name: leaf.shape for name, leaf in expected.items()})
    for name, leaf in expected.items():
        if arrays[name].dtype != leaf.dtype:
            raise Mistake(f"{path}: {name} is {arrays[name].dtype}; need {leaf.dtype}")
    state = jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in expected])
    return state._replace(spare=sae.spare(state.params)), cfg, extra


def load_metadata(folder: str | Path) -> dict[str, Any]:
    """What the SAE in this folder belongs to: the `metadata` it was saved with, and `training`, its Config."""
    return _read_config(Path(folder) / CONFIG)[0]["metadata"]


def fingerprint(params: Iterable[Params]) -> str:
    """One hash of all weights of `load_groups`' SAEs, by which what was found out about them knows them again."""
    total = hashlib.sha256()
    for p in params:
        for name in sorted(p):
            total.update(np.ascontiguousarray(p[name]).data)
    return total.hexdigest()


def logged(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl: a dict with an int as `step`. None where it is torn or damaged."""
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) and type(read.get("step")) is int else None


def _sae_files(params: Params, cfg: Config, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Name -> a function that writes that file. cfg.json last: without it a folder is not taken for an SAE."""
    arrays = {name: np.asarray(params[name], np.float32) for name in sae.shapes(cfg)}
    sae.check_arrays("params", arrays, sae.shapes(cfg))
    described = _sealed(_description(cfg, metadata or {}))
    text = json.dumps(described, indent=2) + "\n"
    return {
        WEIGHTS: lambda path: _save_arrays(path, arrays, {"origin": _origin(described)}),
        CONFIG: lambda path: path.write_text(text),
    }


def _description(cfg: Config, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json. Every default is stated, because SAELens' classes disagree on them. Once trained, BatchTopK SAEs are
    JumpReLU SAEs, there as here."""
    topk = {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    return {
        "architecture": ("topk" if cfg.activation == "topk" else "jumprelu") + ("_transcoder" if cfg.d_out else ""),
        "d_in": cfg.d_in,
        "d_sae": cfg.features,
        **(topk if cfg.activation == "topk" else {}),
        **({"d_out": cfg.d_out} if cfg.d_out else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, "training": dataclasses.asdict(cfg), **metadata},
    }


def _sealed(described: dict[str, Any]) -> dict[str, Any]:
    """With a digest of what decides how the weights are used and where they come from. Other tools may add to it."""
    described = json.loads(json.dumps(described))
    described["metadata"].pop("digest", None)  # of another SAE, whose metadata this one continues
    shape = [name for name in described if name not in ("metadata", "dtype", "device")]
    origin = [name for name in described["metadata"] if name != "sae_lens_version"]
    told = _told(described, shape, origin)
    described["metadata"]["digest"] = {"of": shape, "of_metadata": origin, "sha256": _digest(told)}
    return described


def _told(described: dict[str, Any], shape: list[str], origin: list[str]) -> list[Any]:
    return [[part.get(name) for name in names] for part, names in ((described, shape), (described["metadata"], origin))]


def _origin(described: Mapping[str, Any]) -> list[Any]:
    """What weights belong to, in their own file too: the same in every checkpoint of a run, so that a kill between the
    replacing of one file and of the other leaves a pair that fits."""
    return [described["metadata"].get(name) for name in ("model", "layer", "site", "seed", "group")]


def _read_config(path: Path) -> tuple[dict[str, Any], Config]:
    """cfg.json in SAELens' form of today, checked. Defaults where a file is silent are those of SAELens' classes."""
    if not path.is_file():
        raise Mistake(f"{path} is missing: {path.parent} is not an SAE folder")
    read = formats.read_json(path)
    about = {} if read.get("metadata") is None else read["metadata"]
    _check_metadata(path, about)
    defaults = {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False, "reshape_activations": "none",
                "finetuning_scaling_factor": False}
    described = defaults | read | {"weights": WEIGHTS, "metadata": about} | formats.described(path, read, about)
    formats.check_described(path, described)
    seal = about.get("digest")
    try:
        whole = seal is None or seal["sha256"] == _digest(_told(read, seal["of"], seal["of_metadata"]))
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise Mistake(f"{path} is damaged: its digest is another (if it was edited on purpose, remove the digest)")
    return described, _config(path, described)


def _check_metadata(path: Path, about: Any) -> None:
    kinds = {"training": dict, "run": dict, "evaluation": dict, "layer": int, "site": str, "model": str, "group": str}
    if type(about) is not dict:
        raise Mistake(f"{path}: metadata is {about!r}; need an object")
    for name, kind in kinds.items():
        if about.get(name) is not None and type(about[name]) is not kind:
            raise Mistake(f"{path}: metadata.{name} is {about[name]!r}; need {NOUNS[kind]}")


def _config(path: Path, described: Mapping[str, Any]) -> Config:
    """What cfg.json says of the shape, and of training as far as it says so."""
    topk = described["architecture"] == "topk"
    training = described["metadata"].get("training") or {}
    shape = {"d_in": described["d_in"], "features": described["d_sae"]}
    shape["d_out"] = described["d_out"] if described["architecture"].endswith("transcoder") else None
    k = {"k": described["k"] if topk else training.get("k", min(32, described["d_sae"]))}
    said = training.get("activation", "topk")
    activation = "topk" if topk else "jumprelu" if said == "topk" else said
    return _made(path, training | shape | k | {"activation": activation})


def _made(source: Path, said: Mapping[str, Any]) -> Config:
    """The Config of which a file says this. Raises Mistake for other types and values; other names are left out."""
    known = {f.name: f.type for f in dataclasses.fields(Config)}
    said = {name: value for name, value in said.items() if name in known}
    for name, value in said.items():
        if not _is_a(value, known[name]):
            raise Mistake(f"{source}: {name} is {value!r}; need {inspect.formatannotation(known[name])}")
    try:
        return Config(**said)
    except (TypeError, ValueError, ArithmeticError) as error:  # of numbers that no SAE has: 10**400
        raise Mistake(f"{source}: {error}") from None


def _is_a(value: Any, kind: Any) -> bool:
    """Whether JSON's value is of the type; lists stand for tuples, whole numbers for floats too."""
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in kind.__args__)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            return False
        parts = kind.__args__[:1] * len(value) if kind.__args__[-1] is ... else kind.__args__
        return len(value) == len(parts) and all(map(_is_a, value, parts))
    return type(value) in ((int, float) if kind is float else (kind,))  # a bool is no int


def _blank_sample(cfg: Config) -> tuple[np.ndarray, np.ndarray | None]:
    groups = np.repeat(np.arange(max(len(cfg.groups), 1)), 2)
    return np.zeros((len(groups), cfg.columns), np.float32), groups if cfg.groups else None


def _name(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _flatten(state: State) -> dict[str, np.ndarray]:
    return {_name(keys): np.asarray(leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: dict[str, Any]) -> None:
    # safetensors writes an array's memory as it lies there: a transposed view would come back scrambled
    arrays = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in arrays.items()}
    # One entry of metadata: safetensors writes several in any order, and a resumed run is to end in the same bytes
    save_file(arrays, path, {"fae": json.dumps(header | {"sha256": _digest(header, arrays)}, sort_keys=True)})


def _load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, header = formats.load_arrays(path)
    saved = header.pop("sha256", None)
    if saved is not None and saved != _digest(header, arrays):
        raise Mistake(f"{path} is damaged: its contents are not those that were saved")
    return arrays, header


def _digest(said: Any, arrays: Mapping[str, np.ndarray] = types.MappingProxyType({})) -> str:
    """SHA-256 of what JSON can hold, and of names, types, shapes and every bit of arrays: safetensors itself would not
    notice a flipped one."""
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        total.update(arrays[name].reshape(-1).view(np.uint8))
    return total.hexdigest()


def _write(folder: Path, files: Mapping[str, Any], cfg: Config) -> None:
    """Writes each file so that a kill at any moment leaves only whole ones; a new folder appears with all of them."""
    folder = folder.resolve()
    if (folder / CONFIG).exists():
        _check_replaceable(folder / CONFIG, cfg)
    _remove_leftovers(folder)
    # Files are made in a folder of ours, for safetensors leaves temporaries of its own beside what it was writing.
    new = not folder.exists()
    mine = f"{os.getpid()}{TMP}"
    building = folder.parent / f".{folder.name}.{mine}" if new else folder / f".{mine}"
    building.mkdir(parents=True)
    try:
        for name, write in files.items():
            (building / name).parent.mkdir(exist_ok=True)
            write(building / name)
            _sync(building / name)
    except (OSError, safetensors.SafetensorError) as error:  # a full disk
        shutil.rmtree(building)
        raise OSError(f"cannot save {folder}: {error}; what was there before is as it was") from None
    if new:
        for parent in {(building / name).parent for name in files}:
            _sync(parent)
        os.rename(building, folder)
        _sync(folder.parent)
    else:
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(building / name, folder / name)
            _sync((folder / name).parent)
        shutil.rmtree(building)


def _check_replaceable(path: Path, cfg: Config) -> None:
    """Weights and cfg.json are replaced one after the other, so both must fit whichever of the other is there."""
    new, (old, _) = _description(cfg, {}), _read_config(path)
    for name in new.keys() - {"dtype", "device", "metadata"}:
        if old.get(name) != new[name]:
            raise Mistake(f"{path}: {name} is {old.get(name)!r}, not {new[name]!r}; save another SAE to another folder")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Deletes folders of saves that were killed: ours by their name, and their process no longer there."""
    for parent, prefix in ((folder, "."), (folder.parent, f".{folder.name}.")):
        for path in parent.glob(f".*{TMP}") if parent.is_dir() else ():
            match = re.fullmatch(rf"{re.escape(prefix)}(\d+){re.escape(TMP)}", path.name)
            if path.is_dir() and match and not _running(int(match[1])):
                shutil.rmtree(path)


def _running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()  # our own name on a temporary means that an earlier save of ours failed


# ---- the hub --------------------------------------------------------------------------------------------------------

COLUMNS = {"fvu_standardized": "FVU (std.)", "fvu": "FVU (raw)", "l0": "L0", "dead": "dead", "cosine": "cosine"}


def check_push(repo):
    """Raises ValueError, in one line, where `push` to this repo could not work."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import validate_repo_id
    try:
        owner, _ = repo.split("/")
        validate_repo_id(repo)
    except ValueError:
        raise Mistake(f"--push {repo}: it takes the id of a repo, owner/name") from None
    try:
        who = HfApi().whoami()
    except errors.LocalTokenNotFoundError:
        raise Mistake(f"--push {repo}: there is no token; log in with `hf auth login`") from None
    except Exception as error:                                   # the HTTP library of the hub client raises its own
        raise Mistake(f"--push {repo}: cannot ask the hub who you are: {_line(error)}") from None
    owners = [who["name"], *(organization["name"] for organization in who.get("orgs", ()))]
    if owner not in owners:
        raise Mistake(f"--push {repo}: you may write to repos of {', '.join(owners)}")
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise Mistake(f"--push {repo}: your token may only read; log in with another by `hf auth login`")


def push(folder, repo, base=None):
    """The SAE in the folder, written by train.py, in one commit to the repo, which is made where there is none. base:
    id of its model's repo on the hub. Returns the address. Raises ValueError for a broken SAE or a failed upload."""
    from huggingface_hub import CommitOperationAdd, HfApi
    folder = Path(folder)
    _, cfg = load_groups(folder)                             # nothing damaged is put on the hub
    about, api = load_metadata(folder), HfApi()
    place = _place(folder, about)
    names = [str(Path(group, name)) for group in ("", *cfg.groups[1:]) for name in (CONFIG, WEIGHTS)]
    names += ["metrics.jsonl"] if (folder / "metrics.jsonl").is_file() else []
    try:
        api.create_repo(repo, exist_ok=True)
        others = {name.rsplit("/", 1)[0] for name in api.list_repo_files(repo) if name.endswith(f"/{CONFIG}")}
        added = {f"{place}/{name}": folder / name for name in names}
        beside = sorted(other for other in others if f"{other}/".split("/", 1)[0] != place)
        added["README.md"] = _card(folder, repo, base, place, beside).encode()
        api.create_commit(repo, [CommitOperationAdd(name, data) for name, data in added.items()],
                          commit_message=f"SAE of layer {about['layer']} ({about['site']})")
    except Exception as error:
        raise Mistake(f"cannot push to {repo}: {_line(error)}") from None
    return f"{api.endpoint}/{repo}"


def _place(folder, about):
    """The SAE's folder in its repo. Raises Mistake for metadata that train.py did not write: a path is made of them."""
    layer, site = about.get("layer"), about.get("site")
    if type(layer) is not int or layer < 0 or site not in ("img", "txt", "both"):
        raise Mistake(f"{folder / CONFIG}: metadata.layer is {layer!r}, metadata.site {site!r}; need a block's "
                      "number and img, txt or both")
    if missing := [name for name in ("model", "run", "evaluation", "normalization") if not about.get(name)]:
        raise Mistake(f"{folder / CONFIG}: metadata says no {', '.join(missing)}: it was not written by train.py")
    return f"layer{layer}-{site}"


def _line(error):
    """What an error says, on one line."""
    return " ".join((str(error).strip() or repr(error)).split())


def _card(folder, repo, base, place, others):
    """README.md of the repo. place: the SAE's folder in it; others: those that it held before."""
    import jinja2
    from huggingface_hub import ModelCardData
    about, described = load_metadata(folder), formats.read_json(folder / CONFIG)
    front = ModelCardData(base_model=base, library_name="saelens",
                          tags=["sparse-autoencoder", "interpretability", "fae"]).to_yaml()
    run, name, rows = about["run"], base or Path(about["model"]).name, about["evaluation"].values()
    sides = run["size"] if isinstance(run["size"], list) else [run["size"]] * 2
    template = jinja2.Template((Path(__file__).parent / "templates" / "card.md").read_text(encoding="utf-8"),
                               trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return template.render(
        front=front, about=about, described=described, run=run, name=name, repo=repo, place=place, others=others,
        source=f"[{base}](https://huggingface.co/{base})" if base else f"`{name}`",
        site={"img": "image tokens", "txt": "text tokens"}.get(about["site"], "text and image tokens"),
        size=f"of {' x '.join(map(str, sides))} pixels" if run["size"] else "of the model's own size",
        groups=about["training"].get("groups") or [], command=_command(run),
        title="held-out" if run.get("held_out", True) else "seen prompts, new noise",
        columns={key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}) + "\n"


def _command(run):
    """The command line that makes the run again, from its metadata."""
    flags = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in run.items()}
    return "python train.py " + shlex.join(f"--{name}={value}" for name, value in flags.items() if value is not None)
