"""Prompt sources: files of every kind, the hub's stand-in, the scenes, and errors of one line."""
import csv
import gzip
import itertools
import json
import sys
import types

import huggingface_hub
import pytest
from huggingface_hub import errors

import data

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
    content = text.encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.txt.gz", "p.csv.gz", "p.jsonl.gz"])
def test_prompt_files(tmp_path, name):
    assert list(data.read(str(write(tmp_path / name)))) == CAPTIONS


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl.gz"])
def test_prompt_fields(tmp_path, name):
    path = str(write(tmp_path / name, field="legend"))
    assert list(data.read(path, "legend")) == CAPTIONS
    for field in (None, "title"):
        with pytest.raises(ValueError, match=r"no field .*id, legend.*--prompt_field"):
            list(data.read(path, field))


def test_fields_are_tried_in_order_and_json_lines_may_be_strings(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"caption": "b", "prompt": "a"}\n"c"\n{"caption_llava_short": "d"}\n')
    assert list(data.read(str(tmp_path / "p.jsonl"))) == ["a", "c", "d"]


def test_byte_order_marks_of_spreadsheets(tmp_path):
    (tmp_path / "p.csv").write_bytes("caption\r\na red cube\r\n".encode("utf-8-sig"))
    (tmp_path / "p.txt").write_bytes("a red cube\r\n".encode("utf-8-sig"))
    assert [list(data.read(str(tmp_path / f"p.{kind}"))) for kind in ("csv", "txt")] == [["a red cube"]] * 2


GZ = gzip.compress(b"a red cube\n" * 1000, mtime=0)         # else a test's name were another one every second


@pytest.mark.parametrize("name, content, message", [
    ("p.jsonl", b'{"text": \n{"text": "a"}\n', r"line 1 is not JSON"),
    ("p.jsonl", b'\n[1]\n"a"\n', r"line 2 is \[1\], not a string"),
    ("p.jsonl", b'{"text": 5}\n', r"line 1 is 5, not a string"),
    ("p.jsonl", b'"\\ud83d"\n', r"line 1 is not UTF-8 text"),
    ("p.jsonl", b"\xff\xfe\x00garbage\n", r"line 1 is not JSON"),
    ("p.json", b'["a", "b"', r"p.json is not JSON"), ("p.json", b'{\n "text": "a"\n}', r"line 1 is not JSON"),
    ("p.json", b'[{"legend": "a"}]', r"prompt 1 has no field .*legend"), ("p.json", b"[]", r"holds no prompts"),
    ("p.txt", bytes(range(256)) * 9, r"line 1 is not UTF-8"),
    ("p.txt", "a cube".encode("utf-16"), r"is not UTF-8 text"),
    ("p.csv", b"\x89PNG\r\n\x1a\n\xff", r"no field .* but .PNG"),
    ("p.csv", b"", r"no field .* but none"), ("p.csv", b"id,text\n1,a red, big cube\n", r"line 2 has more fields"),
    ("p.csv", b"text\n" + b"x" * 200_000, r"cannot be read as .csv"),
    ("p.txt.gz", b"not gzip at all", r"cannot be read as .txt"),
    ("p.txt.gz", GZ[:12] + b"\xff" * 9 + GZ[21:], r"cannot be read as .txt"),
    ("p.txt", b"", r"holds no prompts"), ("p.csv", b"text\n", r"holds no prompts"),
    ("p.md", b"a red cube\n", r"unknown suffix '.md'.*known are .txt, .csv, .tsv"),
    ("p", b"a red cube\n", r"unknown suffix ''"), ("p.xz", b"", r"unknown suffix '.xz'"),
])
def test_prompt_files_that_do_not_fit(tmp_path, nano, name, content, message):
    """Said at the first row: before any training."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(data.Mistake, match=message) as error:
        next(data.stream(str(path)))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize("name, content, said", [
    ("p.jsonl", b'"a"\n{"text": \n[1]\n{"txt": "b"}\n{"text": 5}\n"\\ud83d"\n"\xff"\n"b"\n',
     ["line 2 is not JSON", "skipped 6 rows"]),
    ("p.json", b'["a", 5, {"x": "y"}, "", "b"]', ["prompt 2 is 5, not a string", "skipped 2 rows"]),
    ("p.txt", b"a\n\xff\xfe\nb\n", ["line 2 is not UTF-8 text"]),
    ("p.csv", b"id,text\n0,a\n1,a red, big cube\n2\n3,b\n", ["line 3 has more fields"]),
    ("p.tsv", b"id\ttext\n0\ta\n1\t\xff\n3\tb\n", ["line 3 is not UTF-8"]),
    ("p.txt.gz", gzip.compress(b"a\nb\n", mtime=0) + b"garbage", ["cannot be read as .txt, or is damaged"]),
])
def test_bad_rows_in_the_middle_are_skipped_and_counted(tmp_path, capsys, name, content, said):
    """Also when the file starts anew, but told once."""
    (tmp_path / name).write_bytes(content)
    assert list(itertools.islice(data.stream(str(tmp_path / name)), 5)) == ["a", "b", "a", "b", "a"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines)), lines


def test_json_arrays_and_tsv(tmp_path):
    for name, text in (("p.json", json.dumps([CAPTIONS[0], {"text": CAPTIONS[1]}, {"caption": CAPTIONS[2]}], indent=1)),
                       ("q.json", "\n".join(json.dumps({"text": c}) for c in CAPTIONS)),
                       ("p.tsv", "".join(f'{i}\t"{c.replace(chr(34), 2 * chr(34))}"\n'
                                         for i, c in zip(["id", *range(3)], ["text", *CAPTIONS])))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert list(data.read(str(tmp_path / name))) == CAPTIONS


# ---------------------------------------------------------------- held out


def numbered(path, n):
    path.write_text("".join(f"a red cube, number {i}\n" for i in range(n)))
    return str(path)


def test_held_out_and_training_prompts_share_none(tmp_path):
    source = numbered(tmp_path / "p.txt", 2000)
    held, rest = (set(itertools.islice(data.stream(source, None, part), 5000)) for part in (True, False))
    assert not held & rest and len(held | rest) == 2000 and 0.03 < len(held) / 2000 < 0.07
    for prompt in held:
        assert data.is_held_out(f"  {prompt.upper()} ".replace(" ", "  "))
    assert list(data.read(source)) == [f"a red cube, number {i}" for i in range(2000)]


def test_held_out_captions_of_scenes():
    scenes = data.held_out_scenes(20)
    captions = [data.scenes().caption(scene) for scene in scenes]
    assert captions == list(itertools.islice(data.stream("scenes", None, True), 20))
    assert not set(captions) & set(itertools.islice(data.stream("scenes", None, False), 1000))
    assert all(map(data.is_held_out, captions)) and data.divisible("scenes")


def test_few_prompts_are_not_divided(tmp_path, capsys):
    few, many = numbered(tmp_path / "few.txt", 99), numbered(tmp_path / "many.txt", 1000)
    (tmp_path / "same.txt").write_text("a red cube\na blue cube\n" * 500)
    assert [data.divisible(s) for s in (few, many, str(tmp_path / "same.txt"))] == [False, True, False]
    taken = data.take(many, None, 100, held_out=True)
    held = list(map(data.is_held_out, taken))
    assert len(set(taken)) == 100 and held == sorted(held, reverse=True) and 30 < sum(held) < 70
    assert f"{sum(held)} of {many} were held out of training, {100 - sum(held)} were not" in capsys.readouterr().out
    assert all(map(data.is_held_out, data.take(many, None, 10, held_out=True))) and not capsys.readouterr().out


def test_what_makes_a_source_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute = data.located(numbered(tmp_path / "p.txt", 3) and "p.txt")
    assert absolute == str(tmp_path / "p.txt") and data.located("scenes") == "scenes"
    assert data.same("./p.txt", absolute) and not data.same("q.txt", absolute)
    assert data.same("hf:o/d/f.csv", "hf:o/d@12/f.csv") and data.same("hf:o/d@12", "hf:o/d@12")
    assert not data.same("hf:o/d@13", "hf:o/d@12") and not data.same("hf:o/d", "hf:o/d@12/f.csv")
    first = data.fingerprint("p.txt")
    numbered(tmp_path / "p.txt", 4)
    assert first != data.fingerprint("p.txt") and data.fingerprint("scenes") is None
    with pytest.raises(data.Mistake, match=r"no prompt file 'absent.txt'"):
        data.located("absent.txt")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"id": [0, 1, 2, 3], "text": [*CAPTIONS, None]}), path)
    assert list(data.read(str(path))) == CAPTIONS
    with pytest.raises(ValueError, match="has no field 'legend', but id, text"):
        list(data.read(str(path), "legend"))
    with pytest.raises(ValueError, match="prompt 1 is 0, not a string"):
        list(data.read(str(path), "id"))
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError):
        list(data.read(str(path)))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        list(data.read(str(tmp_path / "p.parquet")))


def test_a_finite_source_starts_anew_and_is_streamed(tmp_path, nano):
    path = write(tmp_path / "p.txt")
    stream = data.stream(str(path))
    assert list(itertools.islice(stream, 7)) == (CAPTIONS * 3)[:7]
    pipe = tmp_path / "huge.txt"
    pipe.write_text("a red cube\n" * 500_000)                    # 5 MB, of which little may be held
    import tracemalloc
    tracemalloc.start()
    assert len(list(itertools.islice(data.read(str(pipe)), 5))) == 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_scene_captions_are_not_the_held_out_ones():
    scenes = data.scenes()
    held_out = {scenes.caption(scenes.sample(seed)) for seed in range(100)}
    drawn = list(itertools.islice(data.stream("scenes"), 100))
    assert drawn == [scenes.caption(scenes.sample(seed)) for seed in range(10_000, 10_100)] and set(drawn) != held_out


# ---------------------------------------------------------------- the hub's stand-in


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Datasets as folders {owner}/{name} of tmp_path / "hub"; the list says what was fetched."""
    root, fetched = tmp_path / "hub", []

    def list_repo_files(self, repo, *, repo_type, revision="main"):
        assert repo_type == "dataset" and revision in ("main", "12")
        return [str(path.relative_to(root / repo)) for path in (root / repo).rglob("*") if path.is_file()]

    def hf_hub_download(repo, file, *, repo_type, revision="main"):
        assert repo_type == "dataset" and revision in ("main", "12")
        fetched.append(file)
        if not (root / repo / file).is_file():
            raise errors.LocalEntryNotFoundError(f"no {file}\nand a second line")
        return str(root / repo / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: types.SimpleNamespace(sha="12"))
    return root, fetched


def test_hub_datasets_are_fetched_file_by_file(hub):
    root, fetched = hub
    folder = root / "opendiffusionai" / "cc12m-cleaned"
    (folder / "sub").mkdir(parents=True)
    write(folder / "a.jsonl.gz", "caption_llava_short")
    write(folder / "sub" / "b.jsonl", "caption_llava_short")
    for name in ("README.md", "info.json", "license.txt", ".gitattributes"):
        (folder / name).write_text("not prompts")
    stream = data.read(data.DATASET, data.DATASET_FIELD)
    assert fetched == []
    assert list(itertools.islice(stream, 3)) == CAPTIONS and fetched == ["a.jsonl.gz"]
    assert list(stream) == CAPTIONS and fetched == ["a.jsonl.gz", "sub/b.jsonl"]
    fetched.clear()
    assert list(data.read(f"{data.DATASET}/sub/b.jsonl")) == CAPTIONS and fetched == ["sub/b.jsonl"]
    assert data.located(data.DATASET) == f"{data.DATASET}@12"
    pinned = data.located(f"{data.DATASET}/sub/b.jsonl")
    assert pinned == f"{data.DATASET}@12/sub/b.jsonl" and list(data.read(pinned)) == CAPTIONS
    (folder / "sub" / "b.jsonl").write_text('{"legend": "no such field"}\n')     # a later file that does not fit
    assert list(data.read(data.DATASET)) == CAPTIONS


def test_hub_datasets_that_do_not_fit(hub, monkeypatch):
    root, _ = hub
    (root / "o" / "empty").mkdir(parents=True)
    for source, message in (("hf:o/empty", "o/empty holds no csv, tsv, jsonl"), ("hf:o", "write hf:owner/dataset"),
                            ("hf:o/", "write hf:owner/dataset"), ("hf:o/empty/no.csv", "cannot fetch o/empty/no.csv")):
        with pytest.raises(ValueError, match=message) as error:
            list(data.read(source))
        assert "\n" not in str(error.value)

    def broken(error):
        def list_repo_files(*args, **kwargs):
            raise error
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
        with pytest.raises(ValueError) as caught:
            list(data.read("hf:o/d"))
        return str(caught.value)

    gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
    assert "o/d is gated" in (line := broken(gated)) and "hf auth login" in line
    assert broken(RuntimeError("connection refused\nmore")) == "cannot fetch o/d from the hub: connection refused"
    assert broken(TimeoutError()) == "cannot fetch o/d from the hub: TimeoutError"
