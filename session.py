"""What every tool does first: read flags, say which model runs and how, hold the output folder, end well on a signal.

Copy it with `flux.py`, `prompts.py`, `quant.py`, `sae.py`, `shard.py`, and what these import.

    if __name__ == "__main__":
        session.command(main)                                    # main(*words, steps=4, overwrite=False, **unknown)
"""
import contextlib
import inspect
import os
import signal
import sys

import jax
import jax.numpy as jnp

import flux
import prompts
import quant
import sae
import shard
from weights import Mistake

MISTAKES = (Mistake, prompts.Mistake, quant.Mistake, sae.Mistake, shard.Mistake)
DTYPES = ("float32", "bfloat16", "float16")

# ---------------------------------------------------------------- the command line


def command(function):
    """Run `function` as a command line: its parameters are the flags.

    A user's mistake ends in one line on stderr and exit code 2; any other exception is a bug and shows its traceback.
    Ctrl-C ends with 130. A flag whose default is True or False takes nothing, true or false.
    """
    import fire
    from fire import decorators
    parameters = inspect.signature(function).parameters.values()
    if {"-h", "--help"} & set(sys.argv[1:]):                     # **unknown would make an unknown flag of it
        function.__signature__ = inspect.Signature([p for p in parameters if p.kind != p.VAR_KEYWORD])
        fire.Fire(function, ["--", "--help"])
    flags = {p.name: _parser(p.name, p.default) for p in parameters if p.kind != p.VAR_POSITIONAL}
    decorators.SetParseFn(str)(function)
    decorators.SetParseFns(**flags)(function)
    try:
        with contextlib.redirect_stdout(_Lasting(sys.stdout)), contextlib.redirect_stderr(_Lasting(sys.stderr)):
            fire.Fire(function)
    except (*MISTAKES, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _parser(name, default):
    """What makes a value of a flag's text. Words stay words: fire would read the prompt "1, 2" as a tuple."""
    from fire import parser

    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise Mistake(f"--{name} {text}: it takes nothing, true or false")
        return text.lower() == "true"

    return boolean if isinstance(default, bool) else str if isinstance(default, str) else parser.DefaultParseValue


class _Lasting:
    """A stream that goes on when nobody reads it any more: `train.py | head` shall end no training."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self):
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def no_unknown_flags(flags):
    """Raise Mistake where a command got flags that it does not know."""
    if flags:
        names = ", ".join(f"--{name}" for name in flags)
        raise Mistake(f"unknown flag{'s' * (len(flags) > 1)} {names} (see --help)")


def check_whole(flags):
    """Raise Mistake for one of `flags` {name: value} that is not a whole number from 1 (0 where that fits)."""
    for name, value in flags.items():
        least = 0 if name in ("layer", "size", "text_tokens", "seed") else 1
        if type(value) is not int or not least <= value < 2 ** 31:
            raise Mistake(f"--{name} {value}: it must be a whole number from {least}")


# ---------------------------------------------------------------- which model, and in which format


def announce(model):
    """Print which model runs, and why it was chosen; "auto" becomes a name."""
    name, why = default_model() if model == "auto" else (model, "as asked")
    print(f"model: {name} ({why})")
    return name


def default_model():
    """What "auto" stands for on this machine, and why: ("schnell" or "nano", reason)."""
    kind = jax.devices()[0].platform
    return ("nano", "JAX sees only a CPU") if kind == "cpu" else ("schnell", f"JAX sees a {kind.upper()}")


def default_dtype():
    """The type of a model's numbers where nobody says: float32 on a CPU, else bfloat16."""
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def default_quant(folder):
    """The format of the weights where nobody says: nf4 where JAX sees an accelerator, none for nano and on a CPU."""
    return "none" if jax.devices()[0].platform == "cpu" or (folder / "scenes.py").is_file() else "nf4"


def quantized(name):
    """Arguments of `flux.load` for weights in the format `name`: nf4, int8 or none. Raises Mistake for another."""
    return {"put": quant.put(name), "unpack": quant.unpack}


def precision(folder, run=None, dtype="", quant=""):
    """(dtype, quant) in which a tool loads the model in `folder`, also printed: the flags --dtype and --quant, else
    what the checkpoint's `run` says, else what train.py would choose. Raises Mistake for unknown ones."""
    run, said = run or {}, []
    for flag, given, default in (("dtype", dtype, default_dtype()), ("quant", quant, default_quant(folder))):
        value, why = ((given, "as asked") if given else (run[flag], "as trained") if run.get(flag) else
                      (default, "default"))
        said.append((value, why))
    (dtype, _), (quant, _) = said
    check_dtype(dtype)
    quantized(quant)
    print(f"precision: {dtype} ({said[0][1]}), quantization {quant} ({said[1][1]})")
    return dtype, quant


def check_dtype(dtype):
    if dtype not in DTYPES:
        raise Mistake(f"--dtype {dtype}: it is one of {', '.join(DTYPES)}")


def load_model(name, run=None, *, dtype="", quant="", transformer="", **options):
    """`flux.load` as `precision` says, over all devices. transformer: a file or folder to take the transformer from;
    default: the one of the checkpoint's `run`, or the model's own."""
    run = run or {}
    dtype, quant = precision(flux.resolve(name), run, dtype, quant)
    placed = shard.arguments(shard.several(), quantized(quant))
    return flux.load(name, dtype=jnp.dtype(dtype), transformer=transformer or run.get("transformer") or None,
                     **placed, **options)


# ---------------------------------------------------------------- output folders and signals


@contextlib.contextmanager
def claim(out):
    """Hold the folder `out` for this process, however it ends. Raises Mistake where another process holds it.

    The lock is a file beside the folder, or inside it where its parent cannot be written. Where the system or the file
    system has no locks, it says so and goes on without one.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.lock") if os.access(out.parent, os.W_OK) else out / ".lock"
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "w"))
        if _lock(file):
            stack.callback(path.unlink, missing_ok=True)
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise _held(out)                                 # another run has just ended, and a third begun
        yield


def _lock(file):
    """Whether the file could be locked; raises Mistake where another process has done so."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise _held(file.name) from None
    except (ImportError, OSError) as error:                      # Windows; some network file systems
        print(f"no lock on {file.name} ({error}): do not start a second run into this folder")
        return False


def _held(out):
    return Mistake(f"another run is writing {out}; wait for it, or choose another --out")


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def stopping():
    """stop(step=0): the number of the signal that asks to end (SIGTERM, as before a TPU is taken away; SIGINT, Ctrl-C;
    SIGHUP, a closed terminal), else 0. A second one ends the process at once. Several hosts agree on the step."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        yield lambda step=0: signal.SIGTERM * bool(multihost_utils.reached_preemption_sync_point(step))
        return
    asked = []

    def ask(number, _):
        if asked:
            os._exit(128 + number)
        asked.append(number)
        print(f"\n{signal.Signals(number).name}: ending soon; once more ends at once", file=sys.stderr)

    old = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield lambda step=0: asked[0] if asked else 0
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
