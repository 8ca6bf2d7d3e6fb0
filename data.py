"""Read prompts, hold some of them out, and number the noises from which images are drawn.

Copy it with `flux.py`, and with `nano/scenes.py` for the source "scenes". Prompts come from files, from
datasets on the Hugging Face hub, or from the scenes that nano draws:

    for prompt in data.read("captions.jsonl.gz", "text"): ...
    for prompt in data.stream("hf:opendiffusionai/cc12m-cleaned", "caption_llava_short"): ...      # never ends
    unseen = data.take("captions.tsv", None, 100, held_out=True)         # train.py has not trained on these

One prompt in twenty is held out of training. A hash of the prompt decides, so a repeated caption is always on the same
side, also if it comes from another file. A source with few prompts holds none out (see `divisible`).
"""
import csv
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np

import flux
from weights import Mistake

DATASET, DATASET_FIELD = "hf:opendiffusionai/cc12m-cleaned", "caption_llava_short"     # the FLUX SAE paper's prompts
FIELDS = ("prompt", "caption", "text", DATASET_FIELD)            # tried in this order if the user names no field
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
HELD_OUT_SCENES = 10_000                                         # the scenes before this number are for evaluation
SHARE = 20                                                       # one in 20 prompts is held out
UNREADABLE = (gzip.BadGzipFile, zlib.error, EOFError, csv.Error)                  # errors that end a file


# ---------------------------------------------------------------- sources


def read(source: str, field: str | None = None, held_out: bool | None = None, say: Callable = print) -> Iterator[str]:
    """Yield the prompts of a source, without blank ones.

    source: a text file (one prompt per line), CSV, TSV, JSON (lines or one array), each plain or .gz; parquet (needs
    pyarrow); `hf:owner/dataset[@revision][/file]`; or "scenes", which never ends.
    held_out: True for prompts held out of training, False for the others, None for all. Bad rows are skipped, and
    say() tells how many. Raise Mistake if a bad row comes before the first good one.
    """
    good = False
    for file in _files(source):
        bad = 0
        start = 0 if held_out else HELD_OUT_SCENES
        rows = scenes().captions(start) if file == "scenes" else _checked(Path(file), field)
        for prompt in rows:
            if isinstance(prompt, Mistake):
                if not good:
                    raise prompt
                bad += 1
                if bad == 1:
                    say(f"prompts: skipped: {prompt}")
            elif prompt := prompt.strip():
                good = True
                if held_out is None or held_out == is_held_out(prompt):
                    yield prompt
        if bad > 1:
            say(f"prompts: skipped {bad:,} rows of {file}")


def stream(source: str, field: str | None = None, held_out: bool | None = None) -> Iterator[str]:
    """Repeat `read` forever. Raise Mistake if the source holds no prompts."""
    say = print
    while True:
        prompt = None
        for prompt in read(source, field, held_out, say):
            yield prompt
        if prompt is None:
            raise Mistake(f"{source} holds no prompts")
        say = _silent                                            # report skipped rows only once


def take(source: str, field: str | None, n: int, held_out: bool | None = None) -> list[str]:
    """Return the first n prompts of a source, or all if it has fewer. Raise Mistake if it has none.

    held_out: as in `read`, but True adds prompts of the training set if fewer than n are held out.
    """
    first = list(itertools.islice(read(source, field, held_out), n))
    if held_out and len(first) < n:
        seen = list(itertools.islice(read(source, field, False, _silent), n - len(first)))
        print(f"prompts: {len(first)} of {source} were held out of training, {len(seen)} were not")
        first += seen
    if not first:
        raise Mistake(f"{source} holds no prompts")
    return first


def examples(source: str, field: str | None, held_out: bool | None, n: int) -> tuple[list[str], list | None]:
    """Return (`take`, None). For the source "scenes", return n held-out captions and their scenes."""
    if source != "scenes":
        return take(source, field, n, held_out), None
    drawn = held_out_scenes(n)
    return list(map(scenes().caption, drawn)), drawn


def is_held_out(prompt: str) -> bool:
    """Return whether a prompt is held out of training. Case and spaces do not matter."""
    words = " ".join(prompt.casefold().split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) % SHARE == 0


def divisible(source: str, field: str | None = None) -> bool:
    """Return whether a source can hold prompts out: it has 100 different prompts, and at least one is held out."""
    first = set(itertools.islice(read(source, field, say=_silent), 1000))
    return len(first) >= 100 and any(map(is_held_out, first))


def located(source: str) -> str:
    """Return a name of the source that stays valid elsewhere: with a file's absolute path or a dataset's revision."""
    if not source.startswith("hf:"):
        return source if source == "scenes" else os.path.abspath(_existing(source))
    repo, revision, file = _hub_name(source[3:])
    if not revision:
        from huggingface_hub import HfApi
        revision = _hub(HfApi().repo_info, repo).sha
    return f"hf:{'/'.join([f'{repo}@{revision}', *file])}"


def same(given: str, source: str) -> bool:
    """Return whether `given`, as the user typed it, names `source`, which `located` returned."""
    if given.startswith("hf:") and source.startswith("hf:"):
        (repo, revision, file), whole = _hub_name(given[3:]), _hub_name(source[3:])
        return (repo, revision or whole[1], file) == whole
    return given == source or os.path.abspath(given) == os.path.abspath(source)


def fingerprint(source: str) -> str | None:
    """Return the SHA-256 of a prompt file, or None if the source is not a file."""
    if source == "scenes" or source.startswith("hf:"):
        return None
    with open(_existing(source), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing(source):
    if not Path(source).is_file():
        raise Mistake(f"no prompt file {source!r}; give a file, or hf:owner/dataset[@revision][/file]")
    return source


def _files(source):
    """Return the paths of a source's files, or ["scenes"]. Files on the hub are downloaded when they are reached."""
    if source.startswith("hf:"):
        return _hub_files(source[3:])
    return [source if source == "scenes" else _existing(source)]


def _silent(text):
    pass


# ---------------------------------------------------------------- scenes


def scenes() -> ModuleType:
    """Import `nano/scenes.py` beside this file. Never import one beside other weights: it could be foreign code."""
    spec = importlib.util.spec_from_file_location("scenes", Path(__file__).parent / "nano" / "scenes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held_out_scenes(n: int) -> list:
    """Return the first n scenes whose captions are held out."""
    world = scenes()
    drawn = map(world.sample, itertools.count())
    return list(itertools.islice((scene for scene in drawn if is_held_out(world.caption(scene))), n))


# ---------------------------------------------------------------- files


def _checked(path, field):
    """Yield each row of a file: its prompt, "" for an empty row, or a Mistake for a bad row."""
    try:
        for where, prompt in _rows(path, field):
            if prompt is None or isinstance(prompt, Mistake):
                yield prompt or ""
            elif not isinstance(prompt, str):
                yield Mistake(f"{where} is {str(prompt)[:60]}, not a string")
            else:
                yield prompt if _is_text(prompt) else Mistake(f"{where} is not UTF-8 text: {prompt[:60]!r}")
    except UNREADABLE as error:
        yield Mistake(f"{path} cannot be read as {_kind(path)}, or is damaged: {error}")
    except Mistake as error:                                     # about the whole file: missing field, unknown suffix
        yield error


def _is_text(prompt):
    try:
        return b"\0" not in prompt.encode()
    except UnicodeEncodeError:                                   # half of a surrogate pair
        return False


def _kind(path):
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _rows(path, field):
    """Return an iterator of (place, prompt or None or Mistake), one per row."""
    kind = _kind(path)
    if kind not in SUFFIXES:
        raise Mistake(f"{path}: unknown suffix {kind!r} of a prompt file; known are {', '.join(SUFFIXES)}; .gz may "
                      "follow")
    return _parquet(path, field) if kind == ".parquet" else _text(path, kind, field)


def _text(path, kind, field):
    # utf-8-sig: spreadsheets write a byte order mark before the first field. Invalid UTF-8 becomes surrogates.
    with (gzip.open if path.suffix.lower() == ".gz" else open)(
            path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if kind in (".csv", ".tsv"):
            yield from _table(csv.DictReader(file, delimiter="," if kind == ".csv" else "\t"), field, path)
        elif kind == ".txt":
            yield from ((f"{path}, line {number}", line) for number, line in enumerate(file, 1))
        else:
            yield from _json(file, kind, field, path)


def _table(rows, field, path):
    field, ended = _field(rows.fieldnames or (), field, path), object()
    while (row := next(rows, ended)) is not ended:
        where = f"{path}, line {rows.line_num}"
        # A comma in an unquoted caption starts another field: without this error the caption would be cut off.
        yield where, Mistake(f"{where} has more fields than the first line") if None in row else row[field]


def _json(file, kind, field, path):
    lines = ((f"{path}, line {number}", line) for number, line in enumerate(file, 1) if line.strip())
    for where, line in lines:
        if kind == ".json" and line.lstrip().startswith("["):    # one array; on a later line an array is a bad row
            rows = _parsed(line + file.read(), path)
            for number, row in enumerate([rows] if isinstance(rows, Mistake) else rows, 1):
                where = f"{path}, prompt {number}"
                yield where, _of(row, field, where)
        else:
            yield where, _of(_parsed(line, where), field, where)


def _parsed(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Mistake(f"{where} is not JSON: {error}")


def _of(row, field, where):
    try:
        return row[_field(row, field, where)] if isinstance(row, dict) else row
    except Mistake as error:
        return error


def _parquet(path, field):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise Mistake(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from None
    try:
        table, number = parquet.ParquetFile(path), itertools.count(1)
        field = _field(table.schema_arrow.names, field, path)
        for batch in table.iter_batches(columns=[field]):
            yield from ((f"{path}, prompt {next(number)}", prompt) for prompt in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise Mistake(f"{path} cannot be read as .parquet: {' '.join(str(error).split())}") from None


def _field(names, field, where):
    found = [name for name in ([field] if field else FIELDS) if name in names]
    if not found:
        known = ", ".join(names).encode(errors="replace").decode()[:300]
        raise Mistake(f"{where} has no field {field or ' or '.join(FIELDS)!r}, but {known or 'none'}; name the field "
                      "with --prompt_field")
    return found[0]


# ---------------------------------------------------------------- the hub


def _hub_name(name):
    """Split owner/dataset[@revision][/file] into (owner/dataset, revision or "", [file] or [])."""
    owner, dataset, *file = name.split("/", 2) if name.count("/") else (name, "")
    dataset, _, revision = dataset.partition("@")
    if not owner or not dataset:
        raise Mistake(f"hf:{name}: write hf:owner/dataset, hf:owner/dataset/file or hf:owner/dataset@revision")
    return f"{owner}/{dataset}", revision, file


def _hub_files(name):
    """Yield the paths of a dataset's prompt files. Each is downloaded when it is reached."""
    from huggingface_hub import HfApi, hf_hub_download
    repo, revision, file = _hub_name(name)
    at = {"revision": revision} if revision else {}
    files = file or [f for f in sorted(_hub(HfApi().list_repo_files, repo, **at))
                     if f.removesuffix(".gz").endswith(SUFFIXES) and not f.endswith((".txt", ".json"))]
    if not files:
        raise Mistake(f"the dataset {repo} holds no csv, tsv, jsonl or parquet file")
    yield from (_hub(hf_hub_download, repo, f, **at) for f in files)


def _hub(call, repo, *file, **at):
    from huggingface_hub import errors
    try:
        return call(repo, *file, repo_type="dataset", **at)
    except errors.GatedRepoError:
        raise Mistake(f"the dataset {repo} is gated: accept its terms on the hub, then `hf auth login`") from None
    except Exception as error:                                   # the hub's HTTP library has its own exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Mistake(f"cannot fetch {'/'.join((repo, *file))} from the hub: {reason}") from None


# ---------------------------------------------------------------- noise

# Each noise has a number. Training starts at 0. Training never uses the ranges that start here: the noise of its final
# table, of images that tools draw (the same noise for the same prompts), and of scores.
TABLE, DRAWN, SCORED = 1_000_000_000, 1_500_000_000, 1_750_000_000


def beginning(model: flux.Model, prompts: Sequence[str], numbers: Sequence[int], levels: np.ndarray,
              grid: tuple[int, int], seed: int, text_tokens: int | None = None, first: int = SCORED) -> flux.Start:
    """Return the `flux.Start` of images whose noises have the numbers first + `numbers`, at these noise levels. With
    several images per prompt, the images of the first prompt come first."""
    condition, each = flux.condition(model, prompts, text_tokens), len(numbers) // len(prompts)
    condition = tuple(jnp.repeat(x, each, 0) if each > 1 and x is not None else x for x in condition)
    noise = flux.draw_noise(seed, first + np.asarray(numbers), (grid[0] * grid[1], model.cfg.in_channels))
    return flux.Start(noise, condition, levels, grid)


def real_tokens(model: flux.Model, prompts: Sequence[str], site: str, text_tokens: int,
                image_tokens: int) -> np.ndarray:
    """Return which tokens of a site are not T5's padding: [B, N] bool, in the order of `flux.residual`."""
    lengths = [len(words) for words in model.words(prompts, text_tokens)]
    real = {"txt": np.arange(text_tokens) < np.array(lengths)[:, None],
            "img": np.ones((len(prompts), image_tokens), bool)}
    return np.concatenate([real[stream] for stream in flux.SITES[site]], 1)
