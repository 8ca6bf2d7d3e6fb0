"""Prompt sources: files of every kind, the hub's stand-in, the scenes, and errors of one line."""
import csv
import gzip
import itertools
import json
import sys

import huggingface_hub
import pytest
from huggingface_hub import errors

import prompts

CAPTIONS = ["a red cube", "ein grüner Würfel, 立方体", "a \"quoted\", comma"]


def write(path, field="caption"):
    """CAPTIONS in the format that the name says, with blank prompts between."""
    kind = path.name.split(".")[1]
    if kind == "csv":
        opened = (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="")
        with opened as file:
            csv.writer(file).writerows([["id", field], *([i, text] for i, text in enumerate([*CAPTIONS, " ", ""]))])
        return path
    if kind == "jsonl":
        text = "".join(json.dumps({"id": i, field: c}, ensure_ascii=i % 2 == 0) + "\n\n"
                       for i, c in enumerate([*CAPTIONS, "", None]))
    else:
        text = "\r\n".join(["", *CAPTIONS, "   ", ""])
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.txt.gz", "p.csv.gz", "p.jsonl.gz"])
def test_prompt_files(tmp_path, name):
    assert list(prompts.read(str(write(tmp_path / name)))) == CAPTIONS


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl.gz"])
def test_prompt_fields(tmp_path, name):
    path = str(write(tmp_path / name, field="legend"))
    assert list(prompts.read(path, "legend")) == CAPTIONS
    for field in (None, "title"):
        with pytest.raises(ValueError, match=r"no field .*id, legend.*--prompt_field"):
            list(prompts.read(path, field))


def test_fields_are_tried_in_order_and_json_lines_may_be_strings(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"caption": "b", "prompt": "a"}\n"c"\n{"caption_llava_short": "d"}\n')
    assert list(prompts.read(str(tmp_path / "p.jsonl"))) == ["a", "c", "d"]


def test_byte_order_marks_of_spreadsheets(tmp_path):
    (tmp_path / "p.csv").write_bytes("caption\r\na red cube\r\n".encode("utf-8-sig"))
    (tmp_path / "p.txt").write_bytes("a red cube\r\n".encode("utf-8-sig"))
    assert [list(prompts.read(str(tmp_path / f"p.{kind}"))) for kind in ("csv", "txt")] == [["a red cube"]] * 2


GZ = gzip.compress(b"a red cube\n" * 1000)


@pytest.mark.parametrize("name, data, message", [
    ("p.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2 is not JSON"),
    ("p.jsonl", b'"a"\n\n[1]\n', r"prompt 2 is \[1\], not a string"),
    ("p.jsonl", b'{"text": 5}\n', r"prompt 1 is 5, not a string"),
    ("p.jsonl", b"\xff\xfe\x00garbage\n", r"cannot be read as .jsonl"),
    ("p.txt", bytes(range(256)) * 9, r"cannot be read as .txt"),
    ("p.csv", b"\x89PNG\r\n\x1a\n\xff", r"cannot be read as .csv"),
    ("p.csv", b"", r"no field .* but none"),
    ("p.txt.gz", b"not gzip at all", r"cannot be read as .txt"),
    ("p.txt.gz", GZ[:-12], r"cannot be read as .txt"),
    ("p.txt.gz", GZ[:12] + b"\xff" * 9 + GZ[21:], r"cannot be read as .txt"),
    ("p.txt", b"", r"holds no prompts"), ("p.csv", b"text\n", r"holds no prompts"),
])
def test_prompt_files_that_do_not_fit(tmp_path, nano, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        list(itertools.islice(prompts.stream(str(path)), 10_000))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"id": [0, 1, 2, 3], "text": [*CAPTIONS, None]}), path)
    assert list(prompts.read(str(path))) == CAPTIONS
    with pytest.raises(ValueError, match="has no field 'legend', but id, text"):
        list(prompts.read(str(path), "legend"))
    with pytest.raises(ValueError, match="prompt 2 is 1, not a string"):
        list(prompts.read(str(path), "id"))
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError):
        list(prompts.read(str(path)))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        list(prompts.read(str(tmp_path / "p.parquet")))


def test_a_finite_source_starts_anew_and_is_streamed(tmp_path, nano):
    path = write(tmp_path / "p.txt")
    stream = prompts.stream(str(path))
    assert list(itertools.islice(stream, 7)) == (CAPTIONS * 3)[:7]
    pipe = tmp_path / "huge.txt"
    pipe.write_text("a red cube\n" * 500_000)                    # 5 MB, of which little may be held
    import tracemalloc
    tracemalloc.start()
    assert len(list(itertools.islice(prompts.read(str(pipe)), 5))) == 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_scene_captions_are_not_the_held_out_ones():
    scenes = prompts.scenes()
    held_out = {scenes.caption(scenes.sample(seed)) for seed in range(100)}
    drawn = list(itertools.islice(prompts.stream("scenes"), 100))
    assert drawn == [scenes.caption(scenes.sample(seed)) for seed in range(10_000, 10_100)] and set(drawn) != held_out


# ---------------------------------------------------------------- the hub's stand-in


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Datasets as folders {owner}/{name} of tmp_path / "hub"; the list says what was fetched."""
    root, fetched = tmp_path / "hub", []

    def list_repo_files(self, repo, *, repo_type):
        assert repo_type == "dataset"
        return [str(path.relative_to(root / repo)) for path in (root / repo).rglob("*") if path.is_file()]

    def hf_hub_download(repo, file, *, repo_type):
        assert repo_type == "dataset"
        fetched.append(file)
        if not (root / repo / file).is_file():
            raise errors.LocalEntryNotFoundError(f"no {file}\nand a second line")
        return str(root / repo / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return root, fetched


def test_hub_datasets_are_fetched_file_by_file(hub):
    root, fetched = hub
    folder = root / "opendiffusionai" / "cc12m-cleaned"
    (folder / "sub").mkdir(parents=True)
    write(folder / "a.jsonl.gz", "caption_llava_short")
    write(folder / "sub" / "b.jsonl", "caption_llava_short")
    for name in ("README.md", "info.json", "license.txt", ".gitattributes"):
        (folder / name).write_text("not prompts")
    stream = prompts.read(prompts.DATASET, prompts.DATASET_FIELD)
    assert fetched == []
    assert list(itertools.islice(stream, 3)) == CAPTIONS and fetched == ["a.jsonl.gz"]
    assert list(stream) == CAPTIONS and fetched == ["a.jsonl.gz", "sub/b.jsonl"]
    fetched.clear()
    assert list(prompts.read(f"{prompts.DATASET}/sub/b.jsonl")) == CAPTIONS and fetched == ["sub/b.jsonl"]


def test_hub_datasets_that_do_not_fit(hub, monkeypatch):
    root, _ = hub
    (root / "o" / "empty").mkdir(parents=True)
    for source, message in (("hf:o/empty", "o/empty holds no csv, jsonl"), ("hf:o", "write hf:owner/dataset"),
                            ("hf:o/", "write hf:owner/dataset"), ("hf:o/empty/no.csv", "cannot fetch o/empty/no.csv")):
        with pytest.raises(ValueError, match=message) as error:
            list(prompts.read(source))
        assert "\n" not in str(error.value)

    def broken(error):
        def list_repo_files(*args, **kwargs):
            raise error
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
        with pytest.raises(ValueError) as caught:
            list(prompts.read("hf:o/d"))
        return str(caught.value)

    gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
    assert "o/d is gated" in (line := broken(gated)) and "hf auth login" in line
    assert broken(RuntimeError("connection refused\nmore")) == "cannot fetch o/d from the hub: connection refused"
    assert broken(TimeoutError()) == "cannot fetch o/d from the hub: TimeoutError"
