"""Every command and snippet of the README, as printed, in one folder, one after the other; in a small size."""
import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import session

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
# What keeps each command short. The README's own flags come first.
SMALL = {"train.py": ["--steps=12", "--buffer=4096", "--batch=512", "--size=64"],
         "dash.py": ["--n=6", "--features=120:125", "--steps=1"], "steer.py": ["--calibrate=8", "--size=128"],
         "score.py": ["--n=2", "--levels=2", "--steps=1", "--tokens=256"], "flux.py": ["--size=64"]}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands():
    """[(file, words)] of all lines that run one of our tools."""
    lines = [line.split("#")[0].split("&&")[-1].strip() for block in blocks("sh") for line in block.splitlines()]
    return [(words[1], words[2:]) for words in map(shlex.split, lines) if words[:1] == ["python"]]


def test_the_readme_runs_as_printed(tmp_path, monkeypatch, capsys, nano):
    monkeypatch.chdir(tmp_path)
    ran = []
    for file, words in commands():
        if "16384" in words:                                     # FLUX.1 on an accelerator
            continue
        small = [flag for flag in SMALL[file] if not set(words) & {flag.split("=")[0], "--pages_only"}]
        small += ["--layer=3"] if "--input" in words else []     # one layer instead of all
        monkeypatch.setattr(sys, "argv", [file, *words, *small])
        session.command(importlib.import_module(Path(file).stem).main)
        ran.append(file)
    assert set(ran) == set(SMALL) and len(ran) >= 12, capsys.readouterr()
    for name in ("ckpt/cfg.json", "ckpt/eval.json", "dash/index.html", "dash/feature/123.html", "steer/steer.png"):
        assert Path(name).is_file()
    assert Path("out_0.png").is_file()


def test_flags_of_all_commands_exist():
    """Also of those that need an accelerator."""
    import inspect
    for file, words in commands():
        known = inspect.signature(importlib.import_module(Path(file).stem).main).parameters
        flags = [word[2:].split("=")[0] for word in words if word.startswith("--")]
        assert {*flags} <= {*known}, file


def test_snippets_run(tmp_path, monkeypatch, nano):
    pytest.importorskip("sae_lens")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model=nano", *SMALL["train.py"]])
    session.command(importlib.import_module("train").main)
    (snippet,) = blocks("python")
    found = {}
    exec(snippet, found)
    x, x_hat = np.asarray(found["x"]), np.asarray(found["x_hat"])
    assert x.shape == x_hat.shape == (1, 64, 128)
    theirs = found["sae_lens_sae"]
    assert theirs.cfg.d_sae == found["cfg"].features
