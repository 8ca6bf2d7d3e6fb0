"""Prompts, streamed from files, from datasets on the Hugging Face hub, or from the scenes that nano draws.

Stands alone: copy this one file (with `nano/scenes.py` for the source "scenes").

    for prompt in prompts.read("captions.jsonl.gz", "text"): ...
    for prompt in prompts.stream("hf:opendiffusionai/cc12m-cleaned", "caption_llava_short"): ...   # never ends
"""
import csv
import gzip
import importlib.util
import itertools
import json
import zlib
from pathlib import Path

DATASET, DATASET_FIELD = "hf:opendiffusionai/cc12m-cleaned", "caption_llava_short"     # the FLUX SAE paper's prompts
FIELDS = ("prompt", "caption", "text", DATASET_FIELD)            # tried in this order where no field is named
SUFFIXES = (".txt", ".csv", ".jsonl", ".ndjson", ".json", ".parquet")
HELD_OUT_SCENES = 10_000                                         # the first ones are for evaluation


class Mistake(ValueError):
    """What the caller can put right; its message is one line that names the value and what would be right."""


def read(source, field=None):
    """Prompts, streamed: from a text file (one a line), CSV or JSON lines (plain or .gz), parquet (with pyarrow), or
    `hf:owner/dataset[/file]`. Blank ones are skipped. Raises ValueError naming a file or field that does not fit."""
    if source.startswith("hf:"):
        files = _hub_files(source[3:])
    elif Path(source).is_file():
        files = [source]
    else:
        raise Mistake(f"no prompt file {source!r}; give a file, or hf:owner/dataset[/file]")
    for file in files:
        for number, prompt in enumerate(_prompts_in(Path(file), field), 1):
            if not isinstance(prompt or "", str):
                raise Mistake(f"{file}: prompt {number} is {prompt!r}, not a string")
            if prompt and prompt.strip():
                yield prompt.strip()


def stream(source, field=None):
    """Prompts without end: a finite source starts anew. "scenes": captions of nano's scenes that are not held out."""
    if source == "scenes":
        yield from scenes().captions(HELD_OUT_SCENES)
    while True:
        prompt = None
        for prompt in read(source, field):
            yield prompt
        if prompt is None:
            raise Mistake(f"{source} holds no prompts")


def take(source, field, n):
    """The first n prompts of a source, or all where it has fewer. Raises ValueError where it has none."""
    first = list(itertools.islice(read(source, field), n))
    if not first:
        raise Mistake(f"{source} holds no prompts")
    return first


def scenes():
    """The module `nano/scenes.py` beside this file; one beside other weights would be a stranger's code."""
    spec = importlib.util.spec_from_file_location("scenes", Path(__file__).parent / "nano" / "scenes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prompts_in(path, field):
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, field)
        return
    # utf-8-sig: spreadsheets put a byte order mark before the first field's name
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        try:
            if suffix == ".csv":
                rows = csv.DictReader(file)
                field = _field(rows.fieldnames or (), field, path)
                yield from (row[field] for row in rows)
            elif suffix in (".jsonl", ".ndjson", ".json"):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_prompt(line, field, f"{path}, line {number}")
            else:
                yield from file
        except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError, csv.Error) as error:
            raise Mistake(f"{path} cannot be read as {suffix or 'text'}: {error}") from None


def _json_prompt(line, field, where):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{where} is not JSON: {error}") from None
    return row[_field(row, field, where)] if isinstance(row, dict) else row


def _parquet(path, field):
    try:
        from pyarrow import parquet
    except ImportError:
        raise Mistake(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from None
    table = parquet.ParquetFile(path)
    field = _field(table.schema_arrow.names, field, path)
    for batch in table.iter_batches(columns=[field]):
        yield from batch.column(0).to_pylist()


def _field(names, field, where):
    found = [name for name in ([field] if field else FIELDS) if name in names]
    if not found:
        raise Mistake(f"{where} has no field {field or ' or '.join(FIELDS)!r}, but {', '.join(names) or 'none'}; "
                         "name it by --prompt_field")
    return found[0]


def _hub_files(name):
    """Paths of a dataset's prompt files, each downloaded when it is reached."""
    from huggingface_hub import HfApi, hf_hub_download
    owner, dataset, *file = name.split("/", 2) if name.count("/") else (name, "")
    if not owner or not dataset:
        raise Mistake(f"hf:{name}: write hf:owner/dataset or hf:owner/dataset/file")
    repo = f"{owner}/{dataset}"
    files = file or [f for f in sorted(_hub(HfApi().list_repo_files, repo))
                     if f.removesuffix(".gz").endswith(SUFFIXES) and not f.endswith((".txt", ".json"))]
    if not files:
        raise Mistake(f"the dataset {repo} holds no csv, jsonl or parquet file")
    yield from (_hub(hf_hub_download, repo, f) for f in files)


def _hub(call, repo, *file):
    from huggingface_hub import errors
    try:
        return call(repo, *file, repo_type="dataset")
    except errors.GatedRepoError:
        raise Mistake(f"the dataset {repo} is gated: accept its terms on the hub, then `hf auth login`") from None
    except Exception as error:                                   # or whatever the hub's HTTP library raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Mistake(f"cannot fetch {'/'.join((repo, *file))} from the hub: {reason}") from None
