"""What every tool does first: flags, models, output folders, signals, broken pipes."""
import contextlib
import importlib
import inspect
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoint
import data
import flux
import sae
import session
import shard

ROOT = Path(session.__file__).parent
TOOLS = ("train", "dash", "score", "steer", "flux")


def run(monkeypatch, function, *flags):
    monkeypatch.setattr(sys, "argv", ["tool.py", *flags])
    session.command(function)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("flags, expected", [
    ([], (False, True, None)), (["--overwrite"], (True, True, None)), (["--overwrite", "false"], (False, True, None)),
    (["--overwrite=False"], (False, True, None)), (["--overwrite=true", "--nopages"], (True, False, None)),
    (["--nooverwrite", "--pages=FALSE"], (False, False, None)), (["--padding", "false"], (False, True, False)),
    (["--nopadding"], (False, True, False)), (["--padding"], (False, True, True)),
    (["--padding", "--overwrite"], (True, True, True))])
def test_boolean_flags_take_nothing_true_or_false(monkeypatch, flags, expected):
    got = []

    def main(overwrite=False, pages=True, padding: bool | None = None, **unknown):
        got.append((overwrite, pages, padding))

    run(monkeypatch, main, *flags)
    assert got == [expected]


def booleans():
    for tool in TOOLS:
        for flag in inspect.signature(importlib.import_module(tool).main).parameters.values():
            if isinstance(flag.default, bool):
                yield tool, flag.name
    yield from (("train", "padding"), ("train", "held_out"))


@pytest.mark.parametrize("tool, flag", booleans())
def test_anything_else_is_an_error_in_every_tool(monkeypatch, capsys, tmp_path, tool, flag):
    monkeypatch.chdir(tmp_path)
    for text in ([f"--{flag}=no"], [f"--{flag}", "0"], [f"--{flag}="], [f"--{flag}", "a/folder"]):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, importlib.import_module(tool).main, *text)
        assert ended.value.code == 2
        assert f"error: --{flag} " in (said := capsys.readouterr().err) and "nothing, true or false" in said
    assert not list(tmp_path.iterdir())


def test_overwrite_false_destroys_nothing(monkeypatch, capsys, tmp_path):
    import train
    (tmp_path / "cfg.json").write_text("{}")
    for flags in (["--overwrite", "false"], ["--overwrite=False"], ["--nooverwrite"]):
        with pytest.raises(SystemExit):
            run(monkeypatch, train.main, f"--out={tmp_path}", *flags)
        assert "already holds a checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cfg.json"]


def test_words_stay_words(monkeypatch):
    got = []
    run(monkeypatch, lambda *words, size=None, name="": got.append((words, size, name)), "1, 2", "True", "--size=3,4",
        "--name=5")
    assert got == [(("1, 2", "True"), (3, 4), "5")]


@pytest.mark.parametrize("error, code", [
    (session.Mistake("no"), 2), (data.Mistake("no"), 2), (shard.Mistake("no"), 2), (FileNotFoundError("no"), 2),
    (KeyboardInterrupt(), 130), (ValueError("a bug"), None), (TypeError("a bug"), None)])
def test_a_mistake_is_one_line_and_a_bug_shows_itself(monkeypatch, capsys, error, code):
    def main(**unknown):
        raise error

    with pytest.raises(SystemExit if code else type(error)) as ended:
        run(monkeypatch, main)
    assert code is None or ended.value.code == code
    assert capsys.readouterr().err == ("error: no\n" if code == 2 else "")


def test_several_hosts_let_bugs_be_bugs(monkeypatch):
    """`shard.together` makes one line of a mistake on any host, and of nothing else."""
    def fails(error):
        raise error

    monkeypatch.setattr(shard.jax, "process_count", lambda: 2)
    monkeypatch.setattr(shard, "of_all", lambda x: np.stack([np.full_like(x, ord(" ")), x]))
    for error in (data.Mistake("no"), flux.Mistake("no"), OSError("no")):
        with pytest.raises(shard.Mistake, match="host 1: no"):
            shard.together(fails, error)
    with pytest.raises(ValueError, match=r"^a bug$"):
        shard.together(fails, ValueError("a bug"))


# ---------------------------------------------------------------- models


def test_names_of_models_are_the_same_anywhere(monkeypatch, tmp_path, nano):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(nano.parent)
    for name, expected in (("nano", "nano"), ("schnell", "schnell"), ("me/flux", "me/flux"), (str(nano), str(nano)),
                           ("models/nano", str(tmp_path / "models" / "nano"))):
        assert session.located(name) == expected
    monkeypatch.chdir(nano.parent)                               # where nano is also a folder
    assert session.located("nano") == "nano" and session.located("./nano") == str(nano)
    other = tmp_path / "other"
    (other / "nano").mkdir(parents=True)
    (other / "nano" / "model_index.json").write_text("{}")
    monkeypatch.chdir(other)
    assert session.located("nano") == str(other / "nano")
    assert session.revision_of(Path("hub/models--me--flux/snapshots/12ab")) == "12ab"
    assert session.revision_of(nano) is None


def test_a_revision_is_asked_of_the_hub(monkeypatch):
    import huggingface_hub
    asked = []
    fetch = lambda *args, **kwargs: asked.append((args, kwargs)) or "x"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert flux.resolve("schnell@12ab", ["a"]) == Path("x") == flux.resolve("me/flux", ["a"])
    assert asked == [(("black-forest-labs/FLUX.1-schnell",), {"allow_patterns": ["a"], "revision": "12ab"}),
                     (("me/flux",), {"allow_patterns": ["a"]})]


def test_real_tokens_are_those_of_transformers(nano):
    """Its attention mask, for prompts short and long, and an empty one."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.T5TokenizerFast.from_pretrained(nano / "tokenizer_2")
    model = flux.load(nano, last=0)
    texts = ["a red cube", "", "a small blue sphere left of a large green cone, seen from above, on grey ground " * 3]
    expected = tokenizer(texts, padding="max_length", truncation=True, max_length=32)["attention_mask"]
    text, image, both = (data.real_tokens(model, texts, site, 32, 5) for site in ("txt", "img", "both"))
    np.testing.assert_array_equal(text, np.array(expected, bool))
    assert 0 < text[0].sum() < 32 and text[2].all() and image.all() and image.shape == (3, 5)
    np.testing.assert_array_equal(both, np.concatenate([text, image], 1))


# ---------------------------------------------------------------- folders


def test_one_process_holds_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with session.claim(Path("out")):
        with pytest.raises(session.Mistake, match="another run is writing out; wait"), session.claim(Path("out")):
            pass
        with session.claim(Path("other")):
            pass
    with session.claim(Path("out")):
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("without", ["flock", "fcntl"])
def test_without_locks_it_goes_on_and_says_so(tmp_path, monkeypatch, capsys, without):
    if without == "fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)          # Windows
    else:
        fcntl = pytest.importorskip("fcntl")

        def flock(*_):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", flock)
    with session.claim(tmp_path / "out"), session.claim(tmp_path / "out"):
        said = capsys.readouterr().out
        assert said.count("no lock on") == 2 and "do not start a second run in this folder" in said
    assert not list(tmp_path.iterdir())


def test_where_the_lock_lies(tmp_path, monkeypatch):
    """Beside the folder, or in it: where that is a mount, or its parent cannot be written."""
    (tmp_path / "there").mkdir()
    assert session.lock_of(tmp_path / "there") == tmp_path / ".there.lock"
    assert session.lock_of(tmp_path / "a" / "new") == tmp_path / "a" / ".new.lock"
    monkeypatch.chdir(tmp_path / "there")
    assert session.lock_of(".") == tmp_path / ".there.lock"
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: True)
        assert session.lock_of(tmp_path / "there") == tmp_path / "there" / ".lock"
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    with session.claim(tmp_path / "there"):
        assert (tmp_path / "there" / ".lock").exists()
        with pytest.raises(session.Mistake, match="another run"), session.claim(tmp_path / "there"):
            pass
    with pytest.raises(session.Mistake, match=f"{tmp_path} cannot be written"), session.claim(tmp_path / "new"):
        pass
    assert not list((tmp_path / "there").iterdir())


# ---------------------------------------------------------------- signals and pipes


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_asks_to_end(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with session.stopping() as stop:
        assert stop() == 0
        os.kill(os.getpid(), number)
        assert stop() == stop(7) == number
    assert signal.getsignal(number) is before


def test_what_is_ignored_stays_so(monkeypatch):
    """SIGHUP under nohup. And on Windows there is none."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with session.stopping() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop() == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    monkeypatch.delattr(signal, "SIGHUP")
    with session.stopping() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == signal.SIGTERM


def child(code, **options):
    code = f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport session\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"JAX_PLATFORMS": "cpu"}, **options)


def test_a_second_signal_ends_at_once():
    process = child("""
        with session.stopping() as stop:
            print("ready", flush=True)
            for _ in range(600):                                 # a signal just before one long sleep would wait for it
                time.sleep(0.1)
        """)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert "SIGINT: ending soon; a second signal ends at once" in process.stderr.readline() + process.stderr.readline()
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_a_broken_pipe_ends_nothing(tmp_path):
    code = """
        def main():
            print("first")                                       # goes out at once, also into a pipe
            sys.stdin.readline()
            for i in range(1000):
                print("x" * 100)
                print("y" * 100, file=sys.stderr)
            open("end", "w").close()
            sys.exit(5)

        session.command(main)
        """
    process = child(code, stdin=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.wait(60) == 5 and (tmp_path / "end").exists()


def test_head_ends_no_training(nano, tmp_path):
    """`python train.py … | head -1`, as a shell runs it, with the exit code of train.py."""
    flags = ("--layer=0 --features=64 --k=4 --steps=2 --batch=16 --buffer=16 --prompt_batch=1 --seeds_per_prompt=1 "
             "--size=32 --text_tokens=8")
    command = f"{sys.executable} {ROOT / 'train.py'} --model={nano} {flags} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"model: {nano} (as asked)\n" and (tmp_path / "ckpt" / "cfg.json").exists()
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the file that is always full is Linux'")
def test_a_log_on_a_full_disk_ends_nothing():
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(session._Lasting(full)):
        for _ in range(1000):
            print("x" * 100)


@pytest.mark.parametrize("tool", ["dash", "score", "steer"])
@pytest.mark.parametrize("run, flags, expected", [
    (None, {}, ("bfloat16", "nf4", "default")),                  # a foreign SAE
    ({"dtype": "float16", "quant": "int8"}, {}, ("float16", "int8", "from the run")),
    ({"dtype": "float16", "quant": "int8"}, {"dtype": "float32", "quant": "none"}, ("float32", "none", "as asked"))])
def test_all_tools_load_the_model_by_one_rule(monkeypatch, capsys, tmp_path, nano, tool, run, flags, expected):
    """On an accelerator, where float32 without quantization would be 67 GB of FLUX.1."""
    class Loaded(Exception):
        pass

    def load(name, *, dtype, put, transformer, **options):
        raise Loaded(jnp.dtype(dtype).name, put, transformer)

    folder = tmp_path / "model"
    shutil.copytree(nano, folder, ignore=shutil.ignore_patterns("scenes.py", "*.jpg"))
    monkeypatch.setattr(session.jax, "devices", lambda *_: [SimpleNamespace(platform="gpu", device_kind="gpu")])
    monkeypatch.setattr(session.quant, "put", lambda name: name)
    monkeypatch.setattr(session.shard, "several", lambda: None)
    monkeypatch.setattr(flux, "load", load)
    about = {"model": str(folder), "layer": 2, "site": "img"}
    about |= {"run": about | {"prompts": "scenes", "size": 64} | run} if run else {}
    cfg = sae.Config(d_in=128, features=16, k=2)
    draw = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    params = {"W_enc": draw(128, 16), "b_enc": draw(16), "W_dec": draw(16, 128), "b_dec": draw(128)}
    checkpoint.save(tmp_path / "sae", params, cfg, metadata=about)
    monkeypatch.chdir(tmp_path)
    words = {"dash": (), "score": (), "steer": ("a red cube",)}[tool]
    more = {"steer": {"set": "1*2", "prompts": "p.txt"}, "dash": {"prompts": "p.txt", "n": 2},
            "score": {"prompts": "p.txt", "n": 2}}[tool]
    Path("p.txt").write_text("a red cube\na blue cone\n")
    with pytest.raises(Loaded) as loaded:
        importlib.import_module(tool).main(str(tmp_path / "sae"), *words, transformer=str(nano / "transformer"), **more,
                                              **flags)
    dtype, quantization, why = expected
    assert loaded.value.args == (dtype, quantization, str(nano / "transformer"))
    assert f"precision: {dtype} ({why}), quantization {quantization} ({why})" in capsys.readouterr().out


def test_the_family_is_known_by_its_folders(nano, tmp_path, monkeypatch):
    """Models beside nano draw its scenes, whatever their folder is called here; others do not."""
    for name in ("nano", "nano-dev", "other"):
        shutil.copytree(nano, tmp_path / name, ignore=shutil.ignore_patterns("work", "*.py", "*.safetensors"))
    assert not flux.draws_scenes(tmp_path / "nano-dev")          # no scenes.py, so another world's
    (tmp_path / "nano" / "scenes.py").touch()
    assert [flux.draws_scenes(tmp_path / name) for name in ("nano", "nano-dev", "other")] == [True, True, False]
    monkeypatch.chdir(tmp_path)
    assert session.located("nano-dev") == str(tmp_path / "nano-dev")     # a user's own folder goes first
    assert flux.read_config("nano-dev")[0] == Path("nano-dev")
