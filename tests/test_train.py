"""Training runs: prompts, harvested chunks, checkpoints that resume bit for bit, and errors of one line."""
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import errors

import activations
import checkpoint
import dash
import data
import flux
import sae
import session
import train

ROOT = Path(train.__file__).parent
PROMPTS = [f"{color} {shape}" for shape in ("cube", "cone", "sphere") for color in ("red", "blue", "green", "grey")]
TINY = {"layer": 2, "features": 256, "k": 8, "steps": 6, "batch": 64, "prompt_batch": 2, "seeds_per_prompt": 2,
        "buffer": 256, "size": 64, "text_tokens": 16,            # chunks of 4 forward passes: 8 prompts, 4 batches
        "activation": "topk", "without": "nothing"}
LOGGED = {"log_every": 2, "save_every": 2}
FLAGS = [f"--{name}={value}" for name, value in (TINY | LOGGED).items()]


@pytest.fixture(scope="module")
def model(nano):
    return flux.load(nano, dtype=jnp.float32)


@pytest.fixture
def start(nano, model, monkeypatch, tmp_path):
    """train.main on tiny sizes, in a folder of its own, with the weights loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flux, "load", lambda *args, **kwargs: model)
    return lambda **flags: train.main(**({"model": str(nano)} | TINY | LOGGED | flags))


@pytest.fixture(scope="module")
def trained(nano, model, tmp_path_factory):
    """A finished run's checkpoint, left as it is by every test."""
    out = tmp_path_factory.mktemp("trained") / "ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux, "load", lambda *args, **kwargs: model)
        train.main(model=str(nano), out=str(out), **TINY, **LOGGED)
    return out


def run_of(nano, **flags):
    return train.defaults(str(nano), Path(nano), flux.read_config(nano)[1], TINY | flags)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    for name in (checkpoint.STATE, checkpoint.WEIGHTS, checkpoint.CONFIG):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


class Stop(Exception):
    """Stands for a power cut."""


def stop_after(monkeypatch, saves):
    """Let a run die right after its n-th checkpoint."""
    original, count = checkpoint.save_state, itertools.count(1)

    def save_state(*args, **kwargs):
        original(*args, **kwargs)
        if next(count) == saves:
            raise Stop

    monkeypatch.setattr(checkpoint, "save_state", save_state)


def fails(monkeypatch, capsys, *flags):
    """The one line on stderr in which the command ends."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(SystemExit) as error:
        session.command(train.main)
    *_, line = printed = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert error.value.code == 2 and line.startswith("error: ") and "Traceback" not in str(printed)
    assert sum(text.startswith("error: ") for text in printed) == 1
    return line


# ---------------------------------------------------------------- what a run leaves


def test_checkpoint_loads_here_and_in_sae_lens_and_both_agree_on_real_residuals(trained, model):
    sae_lens = pytest.importorskip("sae_lens")
    torch = pytest.importorskip("torch")
    assert set(files(trained)) == {checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.STATE, "metrics.jsonl"}
    params, cfg = checkpoint.load(trained)
    assert (cfg.d_in, cfg.features, cfg.k) == (model.cfg.width, 256, 8)
    theirs = sae_lens.SAE.load_from_disk(str(trained))
    x = np.asarray(flux.residuals(model, PROMPTS[:4], layer=2, site="img", seed=9, size=64, text_tokens=16))
    x = x.reshape(-1, model.cfg.width)
    with torch.no_grad():
        expected = theirs.encode(torch.tensor(x))
        back = theirs.decode(expected).numpy()
    values, indices = sae.encode(params, cfg, x)
    dense = np.zeros((len(x), cfg.features), np.float32)
    np.put_along_axis(dense, np.asarray(indices), np.asarray(values), 1)
    assert (dense > 0).sum() > len(x)                            # features do fire
    np.testing.assert_allclose(dense, expected.numpy(), atol=1e-3)
    np.testing.assert_allclose(sae.decode(params, cfg, values, indices), back, atol=1e-3 * np.abs(back).max())


def test_metrics_have_a_line_every_log_every_steps(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6] and [line["tokens"] for line in lines] == [128, 256, 384]
    for line in lines:
        assert line.keys() >= {"step", "tokens", "loss", "fvu", "l0", "dead", "cosine", "tokens_per_s"}
        assert all(np.isfinite(value) for value in line.values()) and 0 < line["l0"] <= 8 and line["tokens_per_s"] > 0


def test_metadata_says_how_to_make_it_again(trained, nano):
    metadata = checkpoint.load_metadata(trained)
    assert (metadata["model"], metadata["layer"], metadata["site"], metadata["seed"]) == (str(nano), 2, "img", 0)
    assert metadata["versions"].keys() >= {"jax", "numpy"} and "normalization" in metadata and "revision" in metadata
    assert metadata["run"] == TINY | {"model": str(nano), "site": "img", "prompts": "scenes", "prompt_field": None,
                                      "timesteps": 1, "lr": 9 * sae.default_lr(256), "seed": 0, "dtype": "float32",
                                      "quant": "none", "matryoshka": None,
                                      "transcoder": None, "normalization": "pca", "init": None, "transformer": None,
                                      "revision": None, "padding": False, "held_out": True, "prompts_sha256": None}
    rows = metadata["evaluation"]
    assert list(rows) == ["SAE", "PCA, 8 components", "random features"]
    assert 0 < rows["PCA, 8 components"]["fvu_standardized"] < rows["random features"]["fvu_standardized"]


def test_output_of_a_run(start, capsys):
    start()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "chunks of 256 tokens, from 8 prompts each" in printed.out
    assert lines[-1] == "checkpoint: ckpt" and lines[-10].startswith("held-out") and "FVU" in lines[-10]
    assert "FVU" in printed.err and "L0" in printed.err and "dead" in printed.err and "tokens/s" in printed.err
    assert "100%" in printed.err


@pytest.mark.parametrize("flags", [{"site": "txt"}, {"site": "both", "timesteps": 2, "layer": 5}])
def test_other_sites_and_more_timesteps(start, flags, tmp_path):
    start(**flags)
    run = checkpoint.load_metadata(tmp_path / "ckpt")["run"]
    assert run == run | flags
    assert metrics(tmp_path / "ckpt")[-1]["step"] == 6


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("saves, save_every", [(2, 2), (2, 3), (3, 2), (4, 2)])
def test_a_stopped_run_goes_on_bit_for_bit(start, trained, monkeypatch, tmp_path, saves, save_every):
    """The first save is the fresh SAE's; 3 lies between two log lines, 4 at the end of a chunk, the last at the end."""
    with monkeypatch.context() as patch:
        stop_after(patch, saves)
        with pytest.raises(Stop):
            start(save_every=save_every)
    with open(tmp_path / "ckpt" / "metrics.jsonl", "a") as file:
        file.write('{"step": 100, "loss": 1.0}\n{"step": 3, "lo')   # a lost step's line, and a torn one
    train.main(resume=True, **LOGGED)
    assert_same_run(tmp_path / "ckpt", trained)


def test_a_finished_run_resumes_to_the_same_and_goes_on_with_more_steps(start, trained, tmp_path, monkeypatch):
    start()
    train.main(resume=True, **LOGGED)                            # held-out prompts stay held out
    assert_same_run(tmp_path / "ckpt", trained)

    def loop(run, harvest, state, cfg, *_):
        assert int(state.step) == 6 and run.steps == 10
        assert cfg.decay == (1, 11) and cfg.lr == run.lr         # or the rate would stay at zero
        raise Stop

    monkeypatch.setattr(train, "loop", loop)
    with pytest.raises(Stop):
        train.main(resume=True, steps=10, **LOGGED)


@pytest.mark.parametrize("flag", [
    {"layer": 4}, {"site": "txt"}, {"k": 32}, {"batch": 2048}, {"seed": 1}, {"timesteps": 2}, {"features": 512},
    {"prompts": "x.txt"}, {"model": "schnell"}, {"lr": 0.1}])
def test_resume_refuses_another_run(trained, monkeypatch, capsys, flag):
    """Also where the flag repeats the usual default but the run was another."""
    old = files(trained)
    (name, value), = flag.items()
    line = fails(monkeypatch, capsys, "--resume", f"--out={trained}", f"--{name}={value}")
    assert f"was trained with --{name}" in line and files(trained) == old


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import checkpoint, session, train
original, written = os.replace, []

def replace(a, b):
    original(a, b)
    written.append(b.name)
    if written.count(checkpoint.STATE) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
session.command(train.main)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """For processes of their own: what one of them compiled serves the others."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache


def test_kill_in_the_middle_of_a_save_leaves_a_checkpoint_that_resumes(start, nano, tmp_path, trained, environment):
    """At the worst moment: the state is of step 4, the weights beside it still of step 2."""
    command = [sys.executable, "-c", KILLED.format(root=str(ROOT)), f"--model={nano}", *FLAGS]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment).returncode == -signal.SIGKILL
    checkpoint.load(tmp_path / "ckpt")
    assert int(checkpoint.load_state(tmp_path / "ckpt")[0].step) == 4
    train.main(resume=True, **LOGGED)
    assert_same_run(tmp_path / "ckpt", trained)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert files(tmp_path / "ckpt").keys() == files(trained).keys()


# Runs `session.command(train.main)` in children that need not import anything again: a fork before JAX has threads.
FORKED = """
import json, os, pathlib, random, signal, sys, time
sys.path.insert(0, {root!r})
import checkpoint, fire, flux, optax, sae, safetensors.numpy, session, shard, text, train, vae

def run(*flags):
    if child := os.fork():
        return child
    sys.argv = ["train.py", *flags]
    os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    try:
        session.command(train.main)
    except BaseException as error:
        os._exit(getattr(error, "code", None) or 1)
    os._exit(0)

kills, *flags = sys.argv[1:]
code = os.waitpid(run("--out=straight", *flags), 0)[1]
moments, state = random.Random(int(kills)), pathlib.Path("ckpt", checkpoint.STATE)
saved = lambda: state.stat().st_mtime_ns if state.exists() else 0
found, OVER = [], os.WEXITED | os.WNOHANG | os.WNOWAIT
while not code:
    start, before, saves, most = time.monotonic(), saved(), 0, moments.choice([1, 2, 5])
    end = start + moments.uniform(0, 2) if most == 5 else float("inf")       # else a little after its first or second
    child = run("--out=ckpt", *flags, *["--resume"] * state.exists())
    if len(found) == int(kills):
        code = os.waitpid(child, 0)[1]
        break
    while saves < most and time.monotonic() < end and not os.waitid(os.P_PID, child, OVER):
        if saved() != before:
            before, saves = saved(), saves + 1
        time.sleep(0.0002)
    time.sleep(moments.expovariate(1 / 0.02) if most < 5 else 0)
    os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1]
    step = int(checkpoint._load_arrays(state)[0]["step"]) if state.exists() else None
    found.append([round(time.monotonic() - start, 2), ended, step])
print(json.dumps([code, found]))
"""


def test_kills_at_random_moments_end_in_the_same_bytes(nano, tmp_path, environment):
    """kill -9 while loading, in the first harvest, in a step or a save; then --resume. KILLS=20 for as many."""
    kills = int(os.environ.get("KILLS", 3))
    flags = TINY | {"batch": 60, "steps": 10 * kills, "log_every": 3, "save_every": 1, "model": str(nano)}
    command = [sys.executable, "-c", FORKED.format(root=str(ROOT)), str(kills)]
    command += [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True)
    code, found = json.loads(done.stdout)
    print(found)
    assert code == 0, (tmp_path / "log").read_text()
    assert [ended for _, ended, _ in found] == [signal.SIGKILL] * kills
    assert_same_run(tmp_path / "ckpt", tmp_path / "straight")
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "straight", "log"}
    assert files(tmp_path / "ckpt").keys() == files(tmp_path / "straight").keys()


@pytest.mark.parametrize("call, number", [(1, signal.SIGTERM), (3, signal.SIGHUP), (6, signal.SIGTERM),
                                          (6, signal.SIGINT), (6, signal.SIGHUP), (9, signal.SIGINT)])
def test_signals_save_and_end_well(start, trained, tmp_path, monkeypatch, capsys, call, number):
    """As a TPU is taken away, a terminal closed: within the first forward passes, within one that runs beside the first
    step, or within the closing table's (9)."""
    original, count, before = flux.capture, itertools.count(1), signal.getsignal(number)

    def capture(*args, **kwargs):
        if next(count) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(flux, "capture", capture)
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 128 + number and f"stopped by {number.name}" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    if call < 5:                                                 # nothing has been trained yet
        assert not list(tmp_path.iterdir())
        return
    assert int(checkpoint.load_state(tmp_path / "ckpt")[0].step) == (2 if call == 6 else 6)
    train.main(resume=True, **LOGGED)
    assert_same_run(tmp_path / "ckpt", trained)


def stops_at(step):
    """A `session.stopping` that asks to end before that step."""
    return lambda: contextlib.nullcontext(lambda now=0: signal.SIGTERM * (now >= step))


def test_sigterm_between_steps(start, trained, tmp_path, monkeypatch):
    """Before step 3, of which metrics.jsonl has no line yet."""
    monkeypatch.setattr(session, "stopping", stops_at(3))
    with pytest.raises(SystemExit):
        start(save_every=100)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert int(checkpoint.load_state("ckpt")[0].step) == 3
    train.main(resume=True, **LOGGED)
    assert_same_run(tmp_path / "ckpt", trained)


def test_two_runs_into_one_folder(start, tmp_path, monkeypatch, capsys):
    with session.claim(Path("ckpt")):
        assert "another run is writing ckpt" in fails(monkeypatch, capsys, "--out=ckpt")
        with session.claim(Path("other")):
            pass
    with session.claim(Path("ckpt")):
        pass
    assert not list(tmp_path.iterdir())


def damaged(data, r):
    """One of six kinds: cut short, a bit flipped, a piece overwritten, something appended, another file, none."""
    kind, at, piece = r.integers(6), int(r.integers(len(data))), r.bytes(int(r.integers(1, 64)))
    flipped = bytes([data[at] ^ 1 << int(r.integers(8))])
    return [data[:at], data[:at] + flipped + data[at + 1:], data[:at] + piece + data[at + len(piece):], data + piece,
            [b"PK\x03\x04 a torch file", b"{}", b"[]\n", b"null"][int(r.integers(4))], b""][kind]


@pytest.fixture(scope="module")
def stopped(nano, model, tmp_path_factory):
    """The checkpoint of step 3 of `trained`'s run."""
    out = tmp_path_factory.mktemp("stopped") / "ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux, "load", lambda *args, **kwargs: model)
        patch.setattr(session, "stopping", stops_at(3))
        with pytest.raises(SystemExit):
            train.main(model=str(nano), out=str(out), **TINY, **LOGGED)
    return out


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.STATE, checkpoint.WEIGHTS, "metrics.jsonl"])
def test_resume_from_damaged_files(start, stopped, trained, tmp_path, monkeypatch, name):
    """6 times: an error that names the file, and nothing changed, or a run that ends as it should have."""
    folder, r, ended = tmp_path / "ckpt", np.random.default_rng(len(name)), 0
    whole = files(stopped)
    forward, answers = flux.capture, {}

    def capture(model, start, **where):                          # the same few passes each time
        key = np.asarray(start.latents).tobytes()
        answers[key] = answers[key] if key in answers else forward(model, start, **where)
        return answers[key]

    monkeypatch.setattr(flux, "capture", capture)
    for _ in range(6):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stopped, folder)
        (folder / name).write_bytes(damaged(whole[name], r))
        before = files(folder)
        try:
            train.main(resume=True, **LOGGED)
        except ValueError as error:
            assert name in str(error) or "not written by this train.py" in str(error), error
            assert files(folder) == before
            continue
        ended += 1
        for file in (checkpoint.STATE, checkpoint.WEIGHTS):
            assert (folder / file).read_bytes() == (trained / file).read_bytes()
        assert checkpoint.load_metadata(folder)["evaluation"] == checkpoint.load_metadata(trained)["evaluation"]
        if name != "metrics.jsonl":
            assert metrics(folder) == metrics(trained)
    assert ended == 6 if name in (checkpoint.WEIGHTS, "metrics.jsonl") else ended < 4      # these are not needed


def test_files_of_another_run_in_between(start, stopped, tmp_path, monkeypatch, capsys):
    """Whole, of the same shapes, and yet not to be gone on with."""
    start(seed=1, out="other")
    for name in (checkpoint.STATE, checkpoint.CONFIG):
        shutil.copytree(stopped, tmp_path / name)
        shutil.copy(tmp_path / "other" / name, tmp_path / name)
        line = fails(monkeypatch, capsys, "--resume", f"--out={tmp_path / name}")
        assert "is of another run" in line and "its seed is" in line


def test_metrics_that_cannot_be_read_are_dropped(tmp_path):
    good = b'{"step": 2, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(
        good + b'\xff\xfe{\n[]\n5\n{"step": null}\n{}\n{"step": 9}\n' + b"[" * 99_999 + b'\n{"step": 4}\n{"step": 3')
    assert [line["step"] for line in dash.read_metrics(tmp_path / "metrics.jsonl")] == [2, 9, 4]
    train.trim_metrics(tmp_path, 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == good + b'{"step": 4}\n'


FULL = """
import resource, sys
sys.path.insert(0, {root!r})
import checkpoint, session, train
original, saves = checkpoint.save_state, []

def save_state(*args, **kwargs):
    saves.append(1)
    if len(saves) == 2:                                          # no file may grow beyond a tenth of the state
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    original(*args, **kwargs)

checkpoint.save_state = save_state
session.command(train.main)
"""


def test_full_disk(nano, tmp_path, environment):
    command = [sys.executable, "-c", FULL.format(root=str(ROOT)), f"--model={nano}", *FLAGS]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: cannot save" in result.stderr and "what was there before is as it was" in result.stderr
    assert int(checkpoint.load_state(tmp_path / "ckpt")[0].step) == 0 and checkpoint.load(tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert files(tmp_path / "ckpt").keys() <= {checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.STATE, "metrics.jsonl"}


# ---------------------------------------------------------------- what is there already


def test_existing_checkpoints_are_kept_unless_told(start, trained, tmp_path, monkeypatch, capsys):
    start(seed=1)
    old = files(tmp_path / "ckpt")
    assert "--resume" in (line := fails(monkeypatch, capsys, *FLAGS)) and "--overwrite" in line
    assert "exclude" in fails(monkeypatch, capsys, "--resume", "--overwrite")
    assert files(tmp_path / "ckpt") == old
    (tmp_path / "ckpt" / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in fails(monkeypatch, capsys, "--overwrite", *FLAGS)
    (tmp_path / "ckpt" / "thesis.tex").unlink()
    with monkeypatch.context() as patch:                         # an overwriting run that fails early changes nothing
        patch.setattr(sae, "init", lambda *args, **_: (_ for _ in ()).throw(ValueError("no")))
        with pytest.raises(ValueError):
            start(overwrite=True)
    assert files(tmp_path / "ckpt") == old
    start(overwrite=True)
    assert_same_run(tmp_path / "ckpt", trained)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_overwrite_follows_a_link(start, trained, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "ckpt").symlink_to(tmp_path / "disk")            # an empty folder may be used
    start()
    start(overwrite=True)
    assert (tmp_path / "ckpt").is_symlink()
    assert_same_run(tmp_path / "disk", trained)


@pytest.mark.parametrize("place", ["here", "mount", "read-only parent"])
def test_folders_that_cannot_be_renamed(start, trained, tmp_path, monkeypatch, place):
    """The working folder, a mount, one whose parent cannot be written: files are written into it."""
    folder, rename, access = tmp_path / "disk", os.rename, os.access
    folder.mkdir()
    (folder / ".git").mkdir()                                    # hidden files are nobody's business

    def stays(a, b):
        assert folder not in (Path(a), Path(b))
        rename(a, b)

    monkeypatch.setattr(os, "rename", stays)
    if place == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    if place == "read-only parent":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    if place == "here":
        monkeypatch.chdir(folder)
    out = "." if place == "here" else str(folder)
    start(seed=1, out=out)
    train.main(resume=True, out=out, **LOGGED)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        start(out=out)
    (folder / "eval.json").write_text("{}")                      # of the old SAE
    start(out=out, overwrite=True)
    assert_same_run(folder, trained)
    assert {path.name for path in folder.iterdir()} == {".git", *files(trained)}
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_overwriting_leaves_nothing_of_groups_and_nothing_outside(start, tmp_path):
    start(site="both", timesteps=2, layer=5)
    assert (tmp_path / "ckpt" / "img-t0" / checkpoint.CONFIG).exists()
    (tmp_path / "mine").write_text("mine")
    described = json.loads((tmp_path / "ckpt" / checkpoint.CONFIG).read_text())
    del described["metadata"]["digest"]
    described["metadata"]["training"]["groups"] += ["..", "../mine"]
    (tmp_path / "ckpt" / checkpoint.CONFIG).write_text(json.dumps(described))
    with contextlib.suppress(ValueError):                        # names that leave the folder may also be refused
        start(overwrite=True)
        assert not [path for path in (tmp_path / "ckpt").iterdir() if path.is_dir()]
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_kill_between_the_files_of_an_overwriting_run(start, trained, tmp_path, monkeypatch):
    """Whichever was the last one: --overwrite starts anew."""
    for kill in range(1, 5):
        start(out="ckpt", seed=1, overwrite=kill > 1)
        with monkeypatch.context() as patch:
            replace, count = os.replace, itertools.count(1)

            def dies(a, b, replace=replace, count=count, kill=kill):
                replace(a, b)
                if ".new" in str(a) and next(count) == kill:
                    raise Stop

            patch.setattr(os, "replace", dies)
            with contextlib.suppress(Stop):
                start(overwrite=True)
        start(overwrite=True)
        assert_same_run(tmp_path / "ckpt", trained)
        assert files(tmp_path / "ckpt").keys() == files(trained).keys()


def test_a_folder_that_cannot_be_written_is_said_before_any_work(monkeypatch, capsys, tmp_path, nano):
    access, ours = os.access, tmp_path / "there"
    ours.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in (tmp_path, ours) and access(path, mode))
    monkeypatch.setattr(flux, "read_config", lambda *_: pytest.fail("work began"))
    for out, place in (("new", tmp_path), ("a/b/c", tmp_path), ("there", ours)):
        line = fails(monkeypatch, capsys, f"--out={tmp_path / out}", f"--model={nano}")
        assert f"--out {tmp_path / out}: {place} cannot be written" in line
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_out_that_is_not_a_checkpoint(monkeypatch, capsys, tmp_path, trained):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for out in ("file", "folder"):
        for flag in ("--overwrite", "--nooverwrite"):
            assert "not a checkpoint" in fails(monkeypatch, capsys, f"--out={tmp_path / out}", flag)
        assert "no checkpoint" in fails(monkeypatch, capsys, f"--out={tmp_path / out}", "--resume")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"
    assert "no checkpoint" in fails(monkeypatch, capsys, f"--out={tmp_path / 'nothing'}", "--resume")
    state, cfg, _ = checkpoint.load_state(trained)
    checkpoint.save_state(tmp_path / "foreign", state, cfg)
    assert "not written by" in fails(monkeypatch, capsys, f"--out={tmp_path / 'foreign'}", "--resume")


# ---------------------------------------------------------------- other SAEs


LONGER = {"steps": 40, "save_every": 10}                         # what takes more than six steps to show


@pytest.mark.parametrize("flags, architecture", [
    ({"activation": "batchtopk", "normalization": "std"} | LONGER, "jumprelu"),
    ({"activation": "jumprelu"}, "jumprelu"),
    ({"matryoshka": (16, 100)}, "topk"), ({"matryoshka": 64, "activation": "batchtopk"}, "jumprelu"),
    ({"transcoder": 4, "activation": "batchtopk"} | LONGER, "jumprelu_transcoder"),
    ({"site": "both", "timesteps": 2} | LONGER, "topk")])
def test_other_saes_train_load_in_sae_lens_and_resume(start, monkeypatch, tmp_path, model, flags, architecture):
    from sae_lens import SAE
    start(**flags, out="straight")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2)
        start(**flags, out="ckpt")
    start(**flags, out="ckpt", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "ckpt")
    _, cfg = checkpoint.load_groups("ckpt")
    assert SAE.load_from_disk("ckpt").cfg.architecture() == architecture
    assert cfg.matryoshka == {(16, 100): (16, 100, 256), 64: (64, 256)}.get(flags.get("matryoshka"))
    rows = checkpoint.load_metadata("ckpt")["evaluation"]
    assert 0 < rows["SAE"]["fvu_standardized"] < rows["random features"]["fvu_standardized"]
    assert 2 < rows["SAE"]["l0"] < 32
    if "transcoder" in flags:
        here, there = (flux.residuals(model, PROMPTS[:4], layer=layer, site="img", size=64, text_tokens=16)
                       .reshape(-1, 128) for layer in (2, 4))
        out = sae.decode(checkpoint.load("ckpt")[0], cfg, *sae.encode(checkpoint.load("ckpt")[0], cfg, here))
        assert jnp.sum((out - there) ** 2) < jnp.sum((there - there.mean(0)) ** 2)


def test_each_group_of_tokens_has_its_normalization(start, model):
    """Text and image tokens of two timesteps: each group's SAE holds the mean of its own residuals, and only that."""
    start(site="both", timesteps=2, buffer=2048, padding=True)
    state, cfg, _ = checkpoint.load_state("ckpt")
    assert cfg.groups == ("txt-t0", "img-t0", "txt-t1", "img-t1") and state.mean.shape == (4, 128)
    captions, _ = data.examples("scenes", None, True, 48)
    x = flux.residuals(model, captions, layer=2, site="both", steps=2, size=64, text_tokens=16, seed=3)
    for g, (name, t, part) in enumerate(flux.token_groups("both", 2, 16)):
        assert name == cfg.groups[g]
        tokens = x[t, :, part].reshape(-1, 128)
        distances = [np.linalg.norm((tokens.mean(0) - mean) / std) for mean, std in zip(state.mean, state.std)]
        assert int(np.argmin(distances)) == g, distances
        assert checkpoint.load(Path("ckpt") / (name if g else ""))[1] == cfg
    start(site="both", timesteps=2, buffer=2048, overwrite=True)
    (Path("ckpt") / "sae.safetensors").touch()                   # --init may read such a file, but no run writes it
    with pytest.raises(ValueError, match=r"not ours: sae\.safetensors"):
        start(site="both", timesteps=2, overwrite=True)
    (Path("ckpt") / "sae.safetensors").unlink()
    (Path("ckpt") / "mine").mkdir()
    with pytest.raises(ValueError, match="not ours: mine"):
        start(site="both", timesteps=2, overwrite=True)


def test_init_starts_from_an_sae(start, trained, tmp_path, monkeypatch):
    """Of a folder, of SAELens, of the hub: the first step is as good as the SAE was, and the shape is its own."""
    import torch
    from sae_lens import SAE
    theirs = SAE.load_from_disk(trained)
    with torch.no_grad():
        theirs.W_dec *= 2                                        # as nothing of ours would be
        theirs.W_enc /= 2
        theirs.b_enc /= 2
    theirs.save_model(tmp_path / "theirs" / "sub")
    asked = []

    def snapshot(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return tmp_path / "theirs"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    flags = {"features": None, "k": None, "steps": 2, "log_every": 1}
    start(**flags | {"features": 256, "k": 8}, out="anew")
    for out, init in (("a", str(trained)), ("b", str(tmp_path / "theirs" / "sub")), ("c", "someone/saes/sub")):
        start(**flags, out=out, init=init)
        assert checkpoint.load(out)[1].features == 256 and checkpoint.load(out)[1].k == 8
        assert metrics(Path(out))[0]["fvu"] < 0.9 * metrics(Path("anew"))[0]["fvu"]
    assert asked[0] == ("someone/saes", [f"sub/{name}" for name in checkpoint.READ])


@pytest.mark.parametrize("flags, message", [
    (["--init", "nowhere"], "no such folder"), (["--init", "TRAINED", "--features", 99], "the SAE of --init has 256"),
    (["--init", "TRAINED", "--transcoder", 3], "not a transcoder"), (["--matryoshka", "9,4"], "prefixes rise"),
    (["--matryoshka", "a,b"], "prefixes"), (["--activation", "relu"], "topk, batchtopk, jumprelu"),
    (["--transcoder", 99], "layers 0 to 11"), (["--transcoder", 3, "--activation", "topk"], "no TopK transcoder"),
    (["--normalization", "zca"], "std, pca, scale"), (["--matryoshka", "512"], "to all 256")])
def test_mistakes_about_other_saes(monkeypatch, capsys, tmp_path, nano, trained, flags, message):
    monkeypatch.chdir(tmp_path)
    flags = [str(flag).replace("TRAINED", str(trained)) for flag in flags]
    given = ["--features", 256] if "--features" not in flags else []
    assert message in fails(monkeypatch, capsys, "--model", nano, *given, *flags)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- chunks


def harvest(nano, model, **flags):
    run = run_of(nano, **flags)
    return activations.Activations(run, model, iter(itertools.cycle(PROMPTS)))


def chunk(h, c):
    """The activations of a chunk [N, D], in the order of its steps."""
    batches = []
    for step in range(c * h.batches, (c + 1) * h.batches):
        assert h.ready(step)
        batches.append(h.batch(step))
    return np.concatenate(batches)


def sort(rows):
    return rows[np.lexsort(rows.T[::-1])]


def test_chunks_repeat_differ_and_are_shuffled_across_prompts(nano, model):
    h = harvest(nano, model)
    assert (h.tokens, h.forwards, h.batches) == (256, 4, 4)
    first, second = chunk(h, 0), chunk(h, 1)
    assert first.shape == (256, model.cfg.width) and first.dtype == np.float32
    np.testing.assert_array_equal(chunk(harvest(nano, model), 1), second)     # skips chunk 0's prompts
    np.testing.assert_array_equal(chunk(harvest(nano, model), 0), first)
    assert not np.isin(first[:, 0], second[:, 0]).any()          # other prompts, other noise
    parts = harvest(nano, model)
    plain = np.concatenate([parts.fetch(parts.send(PROMPTS[2 * i:2 * i + 2], 4 * i)) for i in range(4)])
    np.testing.assert_array_equal(sort(plain), sort(first))
    places = [np.flatnonzero((plain == row).all(1))[0] for row in first[:64]]
    assert len(set(np.array(places) // 32)) == 8                 # one batch holds tokens of every prompt
    other = chunk(harvest(nano, model, seed=1), 0)
    assert not np.isin(first[:, 0], other[:, 0]).any()


def test_chunks_do_not_depend_on_the_prompts_of_a_forward_pass(nano, model, monkeypatch):
    def capture(model, start, **_):                              # tells noise and prompt apart, and needs no compiling
        noise, text = np.asarray(start.latents), np.asarray(start.condition[0])
        return np.concatenate([noise, text[:, :, :model.cfg.width - noise.shape[-1]]], -1)[None]

    monkeypatch.setattr(flux, "capture", capture)
    two, four = harvest(nano, model), harvest(nano, model, prompt_batch=4)
    for c in (0, 1):
        np.testing.assert_allclose(chunk(two, c), chunk(four, c), atol=1e-4)


@pytest.mark.parametrize("batch", [24, 56, 64, 72, 100, 250])
def test_harvesting_between_steps_gives_the_batches_of_whole_chunks(nano, model, monkeypatch, batch):
    """Also where a chunk has tokens left over, and from whatever step a run is resumed."""
    def capture(model, start, **_):                              # needs no compiling
        return np.tile(np.asarray(start.latents), (1, 1, model.cfg.width // model.cfg.in_channels))[None]

    monkeypatch.setattr(flux, "capture", capture)
    make = lambda: harvest(nano, model, batch=batch, steps=11)
    plain, expected = make(), []
    for c in range(plain.chunks):
        acts = np.concatenate([plain.fetch(plain.send(PROMPTS[:2], 4 * (c * plain.forwards + i)))
                               for i in range(plain.forwards)])
        acts = acts[np.random.default_rng((0, c)).permutation(256)]
        expected += [acts[b * batch:(b + 1) * batch] for b in range(plain.batches)]
    for start in (0, 1, 3, 4, 5, 10):
        h = make()
        for step in range(start, 11):
            assert h.ready(step) and h.rows.shape[1] == 256
            np.testing.assert_array_equal(h.batch(step), expected[step])
        assert h.starts[h.chunks] == plain.chunks * plain.forwards * 2


def test_passes_of_the_next_chunk_are_sent_between_steps(nano, model, monkeypatch):
    """A step's share, and one more, which is under way; none beyond the last chunk; stop() is asked before each."""
    def passes(steps, **flags):
        h, asked, sent, fetched = harvest(nano, model, steps=steps, **flags), [], [], []
        send, fetch = h.send, h.fetch
        monkeypatch.setattr(h, "send", lambda *args: sent.append(args) or send(*args))
        monkeypatch.setattr(h, "fetch", lambda one: fetched.append(one) or fetch(one))
        seen = []
        for step in range(steps):
            assert h.ready(step, lambda: asked.append(step))
            seen.append((len(fetched), len(sent) - len(fetched)))
        return h, seen, asked

    h, seen, asked = passes(7, batch=32)
    assert (h.forwards, h.batches, h.chunks) == (4, 8, 1) and seen == [(4, 0)] * 7 and asked == [0] * 4
    h, seen, asked = passes(10)
    assert (h.forwards, h.batches, h.chunks) == (4, 4, 3)
    assert seen == [(4 + n, 1) for n in range(8)] + [(12, 0)] * 2 and asked == [0] * 4 + [*range(1, 9)]
    h = harvest(nano, model, steps=10)
    assert h.ready(0) and not h.ready(1, lambda: True)


@pytest.mark.parametrize("layer, site, timesteps, N", [(2, "img", 1, 16), (5, "both", 2, 32)])
def test_activations_are_those_of_flux_residuals(nano, model, layer, site, timesteps, N):
    h = harvest(nano, model, layer=layer, site=site, timesteps=timesteps, buffer=1, padding=True)
    found = chunk(h, 0)
    repeated = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    # image n of prompt p has the noise number 2 p + n, which is flux.residuals' own numbering of these four
    expected = np.asarray(flux.residuals(model, repeated, layer=layer, site=site, seed=0, steps=timesteps, size=64,
                                         text_tokens=16)).reshape(-1, model.cfg.width)
    assert expected.shape == found.shape == (4 * N * timesteps, model.cfg.width)
    order = np.random.default_rng((0, 0)).permutation(len(found))
    np.testing.assert_allclose(found, expected[order], atol=1e-5 * np.abs(expected).max())
    images = expected.reshape(timesteps, 4, N, -1)[0]
    assert np.abs(images[0] - images[1]).max() > 1e-2            # seeds of one prompt differ in their noise


# ---------------------------------------------------------------- text without padding


def real(h, prompts):
    """How many tokens a prompt has, as the tokenizer counts them."""
    ids = h.model.tokenize(prompts, h.run.text_tokens)[0]
    return (ids != 0).sum(1)                                     # T5 pads with 0


@pytest.mark.parametrize("site, timesteps", [("txt", 1), ("both", 2)])
def test_padding_is_left_out(nano, model, site, timesteps):
    """A chunk is filled with real tokens, pass by pass; what does not fit into it is left."""
    options = {"site": site, "timesteps": timesteps, "buffer": 300 * timesteps, "batch": 60, "steps": 12}
    h, whole = harvest(nano, model, **options), harvest(nano, model, **options, padding=True)
    assert not h.all_taken and whole.all_taken and h.tokens == whole.tokens
    found, rows, group, i = chunk(h, 0), [], [], 0
    while sum(map(len, rows)) < h.tokens:
        prompts = [PROMPTS[(i + n) % 12] for n in range(2)]
        kept = np.concatenate([np.arange(16) < n for n in real(h, prompts).repeat(2)]).reshape(4, 16)
        kept = np.concatenate([kept, np.ones((4, 16), bool)], 1) if site == "both" else kept
        kept = np.broadcast_to(kept, (timesteps, *kept.shape)).reshape(-1)
        assert 0 < kept.sum() < len(kept)
        rows.append(whole.fetch(whole.send(prompts, 2 * i))[kept])
        group.append(whole.pattern[kept])
        i += 2
    order = np.random.default_rng((0, 0)).permutation(h.tokens)
    rows, group = (np.concatenate(x)[:h.tokens][order] for x in (rows, group))
    np.testing.assert_array_equal(found, rows[:len(found)])
    again = harvest(nano, model, **options)
    again.ready(0)
    if site == "both":
        np.testing.assert_array_equal(again.groups_of(again.order(0)), group)
    assert again.starts == {0: 0, 1: i}


def test_a_chunk_without_padding_starts_where_the_one_before_it_ended(nano, model):
    """And a run may begin there again, if it is told where: at any step."""
    options = {"site": "txt", "buffer": 300, "batch": 50, "steps": 30}
    h = harvest(nano, model, **options)
    expected, places = [], []
    for step in range(30):
        assert h.ready(step)
        expected.append(h.batch(step))
        places.append(int(h.place(step)["position"]))
    assert h.chunks == 5 and h.stored == 5 * h.tokens
    assert len(set(places)) == 5 and places == sorted(places)
    for start in (1, 5, 6, 11, 13, 29):
        h = harvest(nano, model, **options)
        h.seek(start // h.batches, places[start])
        for step in range(start, 30):
            assert h.ready(step)
            np.testing.assert_array_equal(h.batch(step), expected[step])
            assert h.place(step)["position"] == places[step]


def test_a_run_on_text_goes_on_bit_for_bit(start, tmp_path, monkeypatch):
    flags = {"site": "txt", "steps": 20, "k": 4}
    start(out="straight", **flags)
    about = checkpoint.load_metadata("straight")
    assert about["run"]["padding"] is False
    for saves in (2, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, saves)
            with pytest.raises(Stop):
                start(out=f"to{saves}", save_every=3, **flags)
        train.main(resume=True, out=f"to{saves}", **LOGGED)
        assert_same_run(tmp_path / f"to{saves}", tmp_path / "straight")
    start(out="padded", padding=True, **flags)
    assert checkpoint.load_metadata("padded")["evaluation"]["SAE"] != about["evaluation"]["SAE"]
    with pytest.raises(ValueError, match="was trained with --padding False, not True"):
        train.main(resume=True, out="straight", padding=True)


# ---------------------------------------------------------------- noise, and what is held out


@pytest.mark.parametrize("seeds", [1, 4, 43, 1000])
def test_noise_of_the_closing_table_is_never_that_of_training(nano, model, monkeypatch, seeds):
    """For any number of seeds: numbers of training end below those of the table, and these below other tools'."""
    asked, capture = [], lambda model, start, **_: jnp.zeros((1, *start.latents.shape[:2], model.cfg.width))
    monkeypatch.setattr(flux, "capture", capture)
    monkeypatch.setattr(flux, "draw_noise", lambda seed, numbers, shape: asked.append(numbers) or
                        jnp.zeros((len(numbers), *shape)))
    monkeypatch.setattr(train, "scores", lambda *_: [])
    monkeypatch.setattr(train, "mean_score", lambda _: {})
    monkeypatch.setattr(sae, "init", lambda *_, **__: None)
    monkeypatch.setattr(sae, "fold", lambda *_: {})
    some, draws = SimpleNamespace(summary=dict, pooled={}), []
    monkeypatch.setattr(train, "explained", lambda *args: draws.append(args[-1]) or (some, some))
    run = run_of(nano, seeds_per_prompt=seeds, prompt_batch=1, steps=2, batch=16 * seeds, buffer=16 * seeds)
    h = activations.Activations(run, model, iter(itertools.cycle(PROMPTS)))
    assert h.ready(0) and h.ready(1)
    np.testing.assert_array_equal(np.concatenate(asked), np.arange(2 * seeds))
    asked.clear()
    train.evaluate(run, h, None, train.config(run, model.cfg, ()))
    numbers = np.concatenate(asked)
    assert draws == [numbers.max() + 1]
    assert numbers.min() == data.TABLE and numbers.max() < data.DRAWN and len(set(numbers)) == len(numbers)
    with pytest.raises(ValueError, match="noise number 1,000,000,"):
        h.send(PROMPTS[:1], data.TABLE - seeds + 1, data.TABLE)
    a, b = (h.send(PROMPTS[:1], n) for n in (0, data.DRAWN - seeds))
    assert a and b


def test_some_prompts_of_a_file_are_held_out(start, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("".join(f"a red cube, number {i}\n" for i in range(300)))
    (tmp_path / "few.txt").write_text("\n".join(PROMPTS))
    encode, seen = flux.encode_text, []
    monkeypatch.setattr(flux, "encode_text", lambda model, some, n: seen.extend(some) or encode(model, some, n))
    start(prompts="p.txt", steps=4)
    printed = capsys.readouterr().out
    assert "one in twenty held out" in printed and "\nheld-out  " in printed
    trained, table = seen[:-16], seen[-16:]                      # 8 prompts, and 2 in 4 passes for the variances
    assert not any(map(data.is_held_out, trained)) and all(map(data.is_held_out, table))
    seen.clear()
    start(prompts="few.txt", out="few")
    assert "\nseen prompts, new noise " in capsys.readouterr().out and set(seen) == set(PROMPTS)
    assert [checkpoint.load_metadata(out)["run"]["held_out"] for out in ("ckpt", "few")] == [True, False]
    with pytest.raises(ValueError, match=r"--held_out: .*few.txt has fewer than 100"):
        start(prompts="few.txt", held_out=True, out="no")
    start(prompts="p.txt", held_out=False, steps=4, out="all")
    assert "\nseen prompts, new noise " in capsys.readouterr().out


# ---------------------------------------------------------------- what a run is


def test_another_file_of_prompts_is_refused_and_a_moved_one_is_not(start, trained, tmp_path, monkeypatch):
    lines = "\n".join(PROMPTS)
    (tmp_path / "p.txt").write_text(lines)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            start(prompts="p.txt")
    run = checkpoint.load_metadata("ckpt")["run"]
    assert run["prompts"] == str(tmp_path / "p.txt") and len(run["prompts_sha256"]) == 64
    (tmp_path / "p.txt").write_text(lines + "\none more")
    (tmp_path / "moved.txt").write_text(lines)
    for flags in ({}, {"prompts": "./p.txt"}):
        with pytest.raises(ValueError, match=r"p.txt is not the file that ckpt was trained on"):
            train.main(resume=True, **flags)
    train.main(resume=True, prompts="moved.txt", **LOGGED)
    assert checkpoint.load_metadata("ckpt")["run"]["prompts"].endswith("moved.txt")
    train.main(resume=True, prompts=str(tmp_path / "moved.txt"), **LOGGED)
    with pytest.raises(ValueError, match=r"--prompts_sha256 no: the SHA-256 of p.txt is"):
        start(prompts="p.txt", prompts_sha256="no", out="other")


def test_paths_are_kept_as_they_are_anywhere(start, nano, tmp_path, monkeypatch):
    """A relative --model and --transformer, resumed from another folder."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "flux").symlink_to(nano)
    (tmp_path / "elsewhere").mkdir()
    loaded, load, config = [], flux.load, flux.read_config
    monkeypatch.setattr(flux, "load", lambda name, **options: loaded.append((name, options)) or load(name))
    monkeypatch.setattr(flux, "read_config", lambda name, transformer=None, unpack=None: config(name))
    start(model="models/flux", transformer="models/flux/transformer")
    run = checkpoint.load_metadata("ckpt")["run"]
    paths = [str(tmp_path / "models" / "flux"), str(tmp_path / "models" / "flux" / "transformer")]
    assert [run["model"], run["transformer"]] == paths == [loaded[0][0], loaded[0][1]["transformer"]]
    train.main(resume=True, model="models/flux", transformer="models/flux/transformer", **LOGGED)
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main(resume=True, model="../models/flux", out="../ckpt", **LOGGED)
    assert [loaded[-1][0], loaded[-1][1]["transformer"]] == paths
    with pytest.raises(ValueError, match="was trained with --model"):
        train.main(resume=True, model="nano", out="../ckpt")
    with pytest.raises(ValueError, match="--transformer nowhere: there is no such file"):
        start(transformer="nowhere", out="other")


def test_a_model_on_the_hub_keeps_its_revision(start, nano, tmp_path, monkeypatch):
    """Also when the hub has another one by then."""
    cache, asked, main = tmp_path / "cache" / "snapshots", [], ["aa"]
    cache.mkdir(parents=True)
    for revision in ("aa", "bb"):
        (cache / revision).symlink_to(nano)

    def snapshot_download(repo, allow_patterns, revision=None):
        asked.append((repo, revision))
        return str(cache / (revision or main[0]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded, load = [], flux.load
    monkeypatch.setattr(flux, "load", lambda name, **options: loaded.append(name) or load(name))
    start(model="me/flux", prompts="scenes")
    about = checkpoint.load_metadata("ckpt")
    assert about["model"] == "me/flux" and about["revision"] == about["run"]["revision"] == "aa"
    main[0] = "bb"
    train.main(resume=True, model="me/flux", **LOGGED)
    assert loaded == ["me/flux@aa"] * 2 and ("me/flux", "aa") in asked
    start(model="me/flux", prompts="scenes", revision="aa", overwrite=True)
    assert loaded[2] == "me/flux@aa"


def test_a_checkpoint_from_before_goes_on_as_it_began(start, tmp_path, monkeypatch):
    """It has padding, holds nothing out, and its state does not say at which prompt it stands."""
    old = {"padding": True, "held_out": False}
    start(out="straight", site="txt", **old)
    new = ("transformer", "revision", "padding", "held_out", "prompts_sha256")
    with monkeypatch.context() as patch:
        patch.setattr(train, "asdict", lambda run: {k: v for k, v in vars(run).items() if k not in new})
        patch.setattr(activations.Activations, "place", lambda *_: {})
        stop_after(patch, 2)
        with pytest.raises(Stop):
            start(site="txt", **old)
    assert "padding" not in checkpoint.load_metadata("ckpt")["run"]
    train.main(resume=True, **LOGGED)
    assert_same_run(tmp_path / "ckpt", tmp_path / "straight")


def test_a_resumed_run_keeps_its_config_whatever_the_defaults_are_now(start, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            start()
    monkeypatch.setattr(train, "config", lambda *_: pytest.fail("a config of today's defaults"))
    train.main(resume=True, **LOGGED)
    assert_same_run(tmp_path / "ckpt", trained)


def test_fewer_steps_than_there_are(trained, stopped, monkeypatch, capsys):
    old = files(trained)
    monkeypatch.setattr(flux, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    assert "has 6 steps, more than --steps 5" in fails(monkeypatch, capsys, "--resume", f"--out={trained}", "--steps=5")
    assert "has 3 steps, more than --steps 2" in fails(monkeypatch, capsys, "--resume", f"--out={stopped}", "--steps=2")
    assert files(trained) == old


def test_height_and_width(start, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--size=32,96", f"--model={model.source}"])
    session.command(train.main)
    assert checkpoint.load_metadata("ckpt")["run"]["size"] == [32, 96]
    train.main(resume=True, size=(32, 96), **LOGGED)
    with pytest.raises(ValueError, match=re.escape("trained with --size (32, 96), not (96, 32)")):
        train.main(resume=True, size=(96, 32))
    for size in ("32,97", "32,96,64", "0,32", "32,x", "True", "-32", "32.5"):
        assert "size is" in fails(monkeypatch, capsys, *FLAGS, f"--size={size}", "--out=other")


# ---------------------------------------------------------------- defaults and mistakes


def test_defaults_fit_nano(nano):
    cfg = flux.read_config(nano)[1]
    run = train.defaults("nano", Path(nano), cfg, {})
    assert (run.layer, run.site, run.features, run.k, run.activation) == (10, "img", 128, 24, "batchtopk")
    assert (run.prompts, run.without, run.normalization, run.dtype, run.steps) == (
        "scenes", "input", "pca", "float32", 1000) and run.buffer >= run.batch
    assert train.defaults("nano", Path(nano), cfg, {"prompts": "x.txt"}).prompts == "x.txt"
    scaled = train.defaults("nano", Path(nano), cfg, {"normalization": "scale"})
    assert (scaled.layer, scaled.without) == (10, "nothing")


@pytest.mark.parametrize("given, k, normalization, activation", [
    ({"site": "both"}, 16, "pca", "topk"), ({"site": "txt"}, 32, "std", "topk"),
    ({"transcoder": 7}, 16, "std", "batchtopk")])
def test_defaults_for_other_tokens_of_nano(nano, given, k, normalization, activation):
    cfg = flux.read_config(nano)[1]
    run = train.defaults("nano", Path(nano), cfg, given)
    assert (run.layer, run.features, run.without) == (cfg.num_layers - 1, 16 * cfg.width, "nothing")
    assert (run.k, run.normalization, run.activation) == (k, normalization, activation)
    assert run.lr == (2 if given.get("site") == "txt" else 9) * sae.default_lr(run.features)


@pytest.mark.parametrize("platform, dtype", [("cpu", "float32"), ("tpu", "bfloat16")])
def test_defaults_fit_schnell(tmp_path, monkeypatch, platform, dtype):
    device = type("Device", (), {"platform": platform, "device_kind": "TPU v4"})
    monkeypatch.setattr(train.jax, "devices", lambda: [device])
    run = train.defaults("schnell", tmp_path, flux.Config(), {})
    assert (run.layer, run.features, run.k, run.site, run.dtype) == (18, 16384, 32, "img", dtype)
    assert (run.prompts, run.prompt_field) == ("hf:opendiffusionai/cc12m-cleaned", "caption_llava_short")
    assert run.lr == sae.default_lr(16384) and run.quant == ("none" if platform == "cpu" else "nf4")
    given = train.defaults("schnell", tmp_path, flux.Config(), {"layer": 10, "features": 512, "prompts": "p.csv"})
    assert (given.layer, given.features, given.prompts, given.prompt_field) == (10, 512, "p.csv", None)
    assert given.lr == sae.default_lr(512)


@pytest.mark.parametrize("flag, message", [
    ("--layer=12", "unknown layer 12: the model has layers 0 to 11"), ("--layer=-1", "unknown layer -1"),
    ("--layer=x", "unknown layer 'x'"), ("--layer", "layer True"), ("--site=image", "unknown site 'image'"),
    ("--laier=3", "unknown flag --laier"), ("--model=nonsense", "unknown model 'nonsense'"),
    ("--model={tmp}", "config.json is missing"), ("--prompts=absent.txt", "no prompt file 'absent.txt'"),
    ("--prompts={tmp}", "no prompt file"), ("--prompts=5", "no prompt file '5'"), ("--features=0", "--features 0"),
    ("--size=65", "size is 65"),
    ("--features=many", "--features many"), ("--steps=1.5", "--steps 1.5"), ("--k=-3", "--k -3"),
    ("--k=5000", "--k 5000 is more than --features 128"), ("--batch=0", "--batch 0"),
    ("--timesteps=0", "--timesteps 0"), ("--seeds_per_prompt=0", "--seeds_per_prompt 0"), ("--lr=0", "--lr 0"),
    ("--lr=fast", "--lr fast"),
    ("--lr=1e999", "--lr"), ("--seed=-1", "--seed -1"), ("--seed=3000000000", "--seed 3000000000"),
    ("--dtype=int8", "--dtype int8"), ("--quant=int4", "unknown quantization 'int4': use one of nf4, int8, none"),
    ("--log_every=0", "--log_every 0"), ("--save_every=often", "--save_every often"),
])
def test_mistakes_end_in_one_line_before_any_work(monkeypatch, capsys, tmp_path, nano, flag, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flux, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    given = [flag.format(tmp=tmp_path)]
    model = [] if flag.startswith("--model") else [f"--model={nano}"]
    assert message in fails(monkeypatch, capsys, *model, *given)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_quantized_weights(nano, tmp_path, monkeypatch, name):
    """Train on a quantized model: other activations, said in the checkpoint; --resume may not change it."""
    monkeypatch.chdir(tmp_path)
    train.main(model=str(nano), quant=name, **TINY, **LOGGED)
    assert checkpoint.load_metadata("ckpt")["run"]["quant"] == name
    with pytest.raises(ValueError, match=f"trained with --quant {name}, not none"):
        train.main(resume=True, quant="none")


def test_a_gated_model_without_a_token(monkeypatch, capsys, tmp_path):
    def snapshot_download(*args, **kwargs):
        raise errors.GatedRepoError.__new__(errors.GatedRepoError)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    line = fails(monkeypatch, capsys, "--model=schnell", "--layer=10", "--features=16384")
    assert "black-forest-labs/FLUX.1-schnell is gated" in line


@pytest.mark.parametrize("call, step", [(1, 0), (6, 4)])
def test_activations_that_are_not_finite_are_never_trained_on(start, monkeypatch, tmp_path, call, step):
    original, count = flux.capture, itertools.count(1)

    def capture(*args, **kwargs):
        acts = original(*args, **kwargs)
        return acts.at[0, 0, 0, 0].set(jnp.nan) if next(count) == call else acts

    monkeypatch.setattr(flux, "capture", capture)
    # A forward pass has two prompts; capture spoils the first image, of the first prompt's first seed.
    prompt = next(itertools.islice(data.stream("scenes", None, False), 2 * (call - 1), None))
    with pytest.raises(ValueError, match=f"step {step} .*NaN.*{re.escape(repr(prompt))}"):
        start()
    assert (tmp_path / "ckpt").exists() == (step > 0)
    if step:                                                     # found while the chunk before it is trained on
        assert int(checkpoint.load_state(tmp_path / "ckpt")[0].step) == 2


def test_bfloat16_activations(nano, model):
    half = replace(model, params=flux.jax.tree.map(lambda w: w.astype(jnp.bfloat16), model.params))
    found, exact = chunk(harvest(nano, half, dtype="bfloat16"), 0), chunk(harvest(nano, model), 0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), exact, atol=0.05 * np.abs(exact).max())


def test_the_flags_of_the_command_are_those_of_a_run():
    import inspect
    flags = inspect.signature(train.main).parameters
    assert {field.name for field in fields(train.Run)} < flags.keys()


def test_the_command_as_a_user_types_it(nano, tmp_path, trained, environment):
    """On a folder that holds a pipeline and nothing else, with prompts from a file."""
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    for part in nano.iterdir():
        if part.is_dir() or part.suffix == ".json":
            os.symlink(part, pipeline / part.name)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [sys.executable, str(ROOT / "train.py"), "--model", "pipeline", "--prompts", "prompts.txt", *FLAGS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"model: {pipeline} (as asked)") and done.stdout.endswith("checkpoint: ckpt\n")
    assert checkpoint.load_metadata(tmp_path / "ckpt")["run"]["prompts"] == str(tmp_path / "prompts.txt")
    assert set(files(tmp_path / "ckpt")) == set(files(trained))
