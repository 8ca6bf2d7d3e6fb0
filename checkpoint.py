"""Read and write an SAE's files: folders that SAELens loads, and the state from which a training run resumes.

Copy it with `formats.py`, `sae.py` and what they import. It needs safetensors; the hub also needs huggingface_hub,
jinja2 and `templates/`.

    checkpoint.save(folder, params, cfg, metadata={"layer": 18})         # an SAE
    checkpoint.save_state(folder, state, cfg, metadata={"layer": 18})    # the SAE, and the state of its training
    params, cfg = checkpoint.load(folder)                                # acts on raw residuals, as SAELens' SAEs do
    state, cfg, extra = checkpoint.load_state(folder)
    url = checkpoint.push(folder, "owner/repo")                          # to the Hugging Face hub, with a model card

A repo can hold SAEs of several layers and sites. Each has its own folder, as SAELens expects:
`SAE.from_pretrained("owner/repo", "layer10-img")`. state.safetensors is not pushed.
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
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

import formats
import normalize
import sae
from formats import CONFIG, WEIGHTS
from sae import Config, Mistake, Params, State

STATE = "state.safetensors"
REMOVED = "removed.safetensors"  # the arrays for `apply.removed`, which SAELens does not know
READ = (CONFIG, WEIGHTS, REMOVED, "sae.safetensors", formats.SCALER, formats.WHITENING)  # every file `load` may read
FORMAT = 2  # of state.safetensors and the meaning of its numbers; in format 1, "pca" whitened
TMP = ".fae-tmp"                                                 # suffix of unfinished saves
SAE_LENS_VERSION = "6.54.12"  # the format written; SAELens reads a file without a version >= 6 as an old one
NOUNS = {dict: "an object", int: "an integer", str: "a string"}


def save(folder: str | Path, params: Params, cfg: Config, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write an SAE on raw residuals in SAELens' format: cfg.json and sae_weights.safetensors."""
    _write(Path(folder), _sae_files(params, cfg, metadata), cfg)


def save_state(
    folder: str | Path,
    state: State,
    cfg: Config,
    *,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the folded SAE (see `save`) and state.safetensors, from which a run resumes bit for bit.

    `metadata` (JSON) says where the SAE belongs: model, revision, layer, site, seed, ... `extra` is a flat dict of
    other arrays that the run needs to resume (PRNG keys as `jax.random.key_data`). A new folder appears complete or not
    at all; in an existing one each file is replaced atomically. `state.safetensors` alone decides where a run resumes.
    If cfg has groups, the folder holds the SAE on raw residuals of the first group, and a subfolder named after each
    other group holds the same SAE on that group's residuals.
    """
    arrays = _flatten(state)
    arrays |= {f"extra/{name}": np.asarray(value) for name, value in (extra or {}).items()}
    header = {"format": FORMAT, "config": dataclasses.asdict(cfg)}
    files = {STATE: lambda path: _save_arrays(path, arrays, header)}
    for g, name in reversed(list(enumerate(cfg.groups or ("",)))):
        about = {**(metadata or {}), **({"group": name} if name else {})}
        for file, write in _sae_files(sae.fold(state, cfg, g), cfg, about).items():
            files[f"{name}/{file}" if g else file] = write
    _write(Path(folder), files, cfg)


def load(folder: str | Path) -> tuple[Params, Config]:
    """Return params on raw residuals and their config, from a folder of fae, SAELens (any version) or sparsify.

    SAELens: topk, jumprelu, gated (loaded as JumpReLU), standard (its ReLU is a threshold of 0), and transcoders with
    jumprelu or standard. sparsify: TopK SAEs. Extra operations are folded into the weights: subtracting b_dec from the
    input, decoder norms, scales from finetuning, and `normalize_activations` if SAELens left its constants in the
    folder. Files of foreign SAEs with thresholds do not say k; cfg.k is then 32. Raises Mistake, with the reason, for
    files that are missing or damaged or cannot be represented.
    """
    folder = Path(folder)
    described, cfg = _read_config(folder / CONFIG)
    path = folder / described["weights"]
    arrays, header = _load_arrays(path)
    if header.get("origin", origin := _origin(described)) != origin:
        raise Mistake(f"{path} is of another run than {folder / CONFIG}: its model, layer, site, seed, group are "
                      f"{header['origin']}, not {origin}")
    p = formats.folded(path, described, cfg, arrays)
    if cfg.removed:
        more, _ = _load_arrays(folder / REMOVED)
        normalize.check_arrays(folder / REMOVED, more, cfg.removed_shapes)
        p |= more
    return {name: jnp.asarray(p[name], jnp.float32) for name in cfg.shapes | cfg.removed_shapes}, cfg


def load_groups(folder: str | Path) -> tuple[list[Params], Config]:
    """Return the SAE of each group of tokens, in the order of cfg.groups (without groups: one), and their config."""
    params, cfg = load(folder)
    return [params, *(load(Path(folder) / name)[0] for name in cfg.groups[1:])], cfg


def load_state(folder: str | Path) -> tuple[State, Config, dict[str, np.ndarray]]:
    """Return state, config and `extra` as `save_state` wrote them, bit for bit."""
    path = Path(folder) / STATE
    arrays, header = _load_arrays(path)
    if not isinstance(header.get("config"), dict):
        raise Mistake(f"{path}: no usable config in its header")
    cfg = _made(path, header["config"])
    if (written := header.get("format", 1)) != FORMAT:
        raise Mistake(f"{path} has format {written}; this version of fae resumes from format {FORMAT} only (the SAE "
                      "beside it can still be loaded)")
    blank = _blank_sample(cfg)
    template = jax.eval_shape(lambda: sae.init(jax.random.key(0), cfg, *blank[:2], without=blank[2]))
    extra = {name[6:]: arrays.pop(name) for name in list(arrays) if name.startswith("extra/")}
    if "idle" in arrays:                                         # the name before it was since_fired
        arrays["since_fired"] = arrays.pop("idle")
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    expected = {_name(keys): leaf for keys, leaf in paths}
    normalize.check_arrays(path, arrays, {name: leaf.shape for name, leaf in expected.items()})
    for name, leaf in expected.items():
        if arrays[name].dtype != leaf.dtype:
            raise Mistake(f"{path}: {name} is {arrays[name].dtype}; need {leaf.dtype}")
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in expected]), cfg, extra


def load_metadata(folder: str | Path) -> dict[str, Any]:
    """Return the `metadata` that the SAE was saved with, and its Config as `training`."""
    return _read_config(Path(folder) / CONFIG)[0]["metadata"]


def fingerprint(params: Iterable[Params]) -> str:
    """Return one hash of all weights of the SAEs of `load_groups`. Results are stored with it, to match them later."""
    total = hashlib.sha256()
    for p in params:
        for name in sorted(p):
            total.update(np.ascontiguousarray(p[name]).data)
    return total.hexdigest()


def logged(line: bytes) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl as a dict with an int `step`, or None if the line is torn or damaged."""
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) and type(read.get("step")) is int else None


def _sae_files(params: Params, cfg: Config, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return {file name: function that writes it}. cfg.json comes last: a folder without it is no SAE."""
    described = _sealed(_description(cfg, metadata or {}))
    text = json.dumps(described, indent=2) + "\n"
    files = {WEIGHTS: cfg.shapes} | ({REMOVED: cfg.removed_shapes} if cfg.removed else {})
    parts = {file: {name: np.asarray(params[name], np.float32) for name in shapes} for file, shapes in files.items()}
    for file, shapes in files.items():
        normalize.check_arrays("params", parts[file], shapes)
    return {
        **{file: partial(_save_arrays, arrays=arrays, header={"origin": _origin(described)})
           for file, arrays in parts.items()},
        CONFIG: lambda path: path.write_text(text),
    }


def _description(cfg: Config, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of cfg.json. It states every default, because SAELens' classes disagree on them. A trained
    BatchTopK SAE is a JumpReLU SAE, in SAELens too."""
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
    """Add a digest of the fields that say how to use the weights and where they come from. Other tools may add more."""
    described = json.loads(json.dumps(described))
    described["metadata"].pop("digest", None)  # of another SAE whose metadata was copied
    shape = [name for name in described if name not in ("metadata", "dtype", "device")]
    origin = [name for name in described["metadata"] if name != "sae_lens_version"]
    digest = _digest(_values(described, shape, origin))
    described["metadata"]["digest"] = {"of": shape, "of_metadata": origin, "sha256": digest}
    return described


def _values(described: dict[str, Any], shape: list[str], origin: list[str]) -> list[Any]:
    return [[part.get(name) for name in names] for part, names in ((described, shape), (described["metadata"], origin))]


def _origin(described: Mapping[str, Any]) -> list[Any]:
    """Return where weights belong. Their own file says it too, and every checkpoint of a run says the same: a kill
    between replacing the two files leaves a pair that fits."""
    return [described["metadata"].get(name) for name in ("model", "layer", "site", "seed", "group")]


def _read_config(path: Path) -> tuple[dict[str, Any], Config]:
    """Return cfg.json, checked, in SAELens' current form, and its Config. Missing fields get SAELens' defaults."""
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
        whole = seal is None or seal["sha256"] == _digest(_values(read, seal["of"], seal["of_metadata"]))
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
    """Return the Config that cfg.json describes."""
    topk = described["architecture"] == "topk"
    training = described["metadata"].get("training") or {}
    shape = {"d_in": described["d_in"], "features": described["d_sae"]}
    shape["d_out"] = described["d_out"] if described["architecture"].endswith("transcoder") else None
    k = {"k": described["k"] if topk else training.get("k", min(32, described["d_sae"]))}
    trained = training.get("activation", "topk")
    activation = "topk" if topk else "jumprelu" if trained == "topk" else trained
    return _made(path, training | shape | k | {"activation": activation})


def _made(source: Path, given: Mapping[str, Any]) -> Config:
    """Return the Config of the fields in a file; ignore unknown ones. Raises Mistake for wrong types and values."""
    known = {f.name: f.type for f in dataclasses.fields(Config)}
    given = {name: value for name, value in given.items() if name in known}
    for name, value in given.items():
        if not _is_a(value, known[name]):
            raise Mistake(f"{source}: {name} is {value!r}; need {inspect.formatannotation(known[name])}")
    try:
        return Config(**given)
    except (TypeError, ValueError, ArithmeticError) as error:  # ArithmeticError: absurd numbers such as 10**400
        raise Mistake(f"{source}: {error}") from None


def _is_a(value: Any, kind: Any) -> bool:
    """Return whether JSON's value has the type. A list may stand for a tuple, a whole number for a float."""
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in kind.__args__)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            return False
        parts = kind.__args__[:1] * len(value) if kind.__args__[-1] is ... else kind.__args__
        return len(value) == len(parts) and all(map(_is_a, value, parts))
    return type(value) in ((int, float) if kind is float else (kind,))  # a bool is no int


def _blank_sample(cfg: Config) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return a sample, its groups and directions to remove, of the shapes that `sae.init` takes."""
    groups = np.repeat(np.arange(max(len(cfg.groups), 1)), 2)
    without = np.eye(cfg.removed, cfg.d_in) if cfg.removed else None
    without = np.stack([without] * len(cfg.groups)) if cfg.removed and cfg.groups else without
    return np.zeros((len(groups), cfg.columns), np.float32), groups if cfg.groups else None, without


def _name(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _flatten(state: State) -> dict[str, np.ndarray]:
    return {_name(keys): np.asarray(leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: dict[str, Any]) -> None:
    # safetensors writes an array's memory in its order: a transposed view would come back scrambled
    arrays = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in arrays.items()}
    # One entry of metadata: safetensors writes several in any order, but a resumed run must end in the same bytes
    save_file(arrays, path, {"fae": json.dumps(header | {"sha256": _digest(header, arrays)}, sort_keys=True)})


def _load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, header = formats.load_arrays(path)
    saved = header.pop("sha256", None)
    if saved is not None and saved != _digest(header, arrays):
        raise Mistake(f"{path} is damaged: its contents are not those that were saved")
    return arrays, header


def _digest(fields: Any, arrays: Mapping[str, np.ndarray] = types.MappingProxyType({})) -> str:
    """Return the SHA-256 of fields (JSON) and of names, types, shapes and all bits of arrays. safetensors itself does
    not notice a flipped bit."""
    total = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        total.update(arrays[name].reshape(-1).view(np.uint8))
    return total.hexdigest()


def _write(folder: Path, files: Mapping[str, Any], cfg: Config) -> None:
    """Write the files so that a kill at any moment leaves only complete ones. A new folder appears with all of them."""
    folder = folder.resolve()
    if (folder / CONFIG).exists():
        _check_replaceable(folder / CONFIG, cfg)
    _remove_leftovers(folder)
    # safetensors leaves its own temporary files beside the file it writes, so all files are made in a folder of ours.
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
    """Raise Mistake for an SAE of another shape: the two files are replaced one after the other and must always fit."""
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
    """Delete the temporary folders of killed saves: our name, and a process that has ended."""
    for parent, prefix in ((folder, "."), (folder.parent, f".{folder.name}.")):
        for path in parent.glob(f".*{TMP}") if parent.is_dir() else ():
            match = re.fullmatch(rf"{re.escape(prefix)}(\d+){re.escape(TMP)}", path.name)
            if path.is_dir() and match and not _running(int(match[1])):
                shutil.rmtree(path)


def _running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks whether it exists
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()  # our own number: an earlier save of this process failed


# ---- the hub --------------------------------------------------------------------------------------------------------

COLUMNS = {"fvu_standardized": "FVU (std.)", "fvu": "FVU (raw)", "l0": "L0", "dead": "dead", "cosine": "cosine"}


def check_push(repo: str) -> None:
    """Raise Mistake if `push` to this repo cannot work."""
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
    except Exception as error:                                   # the hub client's HTTP library has its own errors
        raise Mistake(f"--push {repo}: cannot ask the hub who you are: {_line(error)}") from None
    owners = [who["name"], *(organization["name"] for organization in who.get("orgs", ()))]
    if owner not in owners:
        raise Mistake(f"--push {repo}: you may write to repos of {', '.join(owners)}")
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise Mistake(f"--push {repo}: your token may only read; log in with another by `hf auth login`")


def push(folder: str | Path, repo: str, base: str | None = None) -> str:
    """Upload train.py's SAE in the folder to the repo, in one commit, and return the address. Create a missing repo.

    base: id of the model's repo on the hub. Raises Mistake for a broken SAE or a failed upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    folder = Path(folder)
    _, cfg = load_groups(folder)                             # refuse to upload a damaged SAE
    about, api = load_metadata(folder), HfApi()
    place = _place(folder, about)
    files = (CONFIG, WEIGHTS, *([REMOVED] if cfg.removed else []))
    names = [str(Path(group, name)) for group in ("", *cfg.groups[1:]) for name in files]
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
    """Return the SAE's folder in its repo. Raises Mistake for metadata that train.py did not write."""
    layer, site = about.get("layer"), about.get("site")
    if type(layer) is not int or layer < 0 or site not in ("img", "txt", "both"):
        raise Mistake(f"{folder / CONFIG}: metadata.layer is {layer!r}, metadata.site {site!r}; need a block's "
                      "number and img, txt or both")
    if missing := [name for name in ("model", "run", "evaluation", "normalization") if not about.get(name)]:
        raise Mistake(f"{folder / CONFIG}: metadata says no {', '.join(missing)}: it was not written by train.py")
    return f"layer{layer}-{site}"


def _line(error):
    """Return an error's message on one line."""
    return " ".join((str(error).strip() or repr(error)).split())


def _card(folder, repo, base, place, others):
    """Return README.md of the repo. place: the SAE's folder in it. others: the SAEs' folders that it already held."""
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
    """Return the command line that repeats the run, from its metadata."""
    flags = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in run.items()}
    return "python train.py " + shlex.join(f"--{name}={value}" for name, value in flags.items() if value is not None)
