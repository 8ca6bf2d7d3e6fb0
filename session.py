"""What every tool does first: read flags, say which model runs and how, hold the output folder, end well on a signal.

Copy it with `flux.py`, `data.py`, `quant.py`, `sae.py`, `shard.py`, and what these import.

    if __name__ == "__main__":
        session.command(main)                                    # main(*words, steps=4, overwrite=False, **unknown)
"""
import contextlib
import inspect
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import checkpoint
import data
import flux
import quant
import sae
import shard
import stats
from weights import Mistake

MISTAKES = (Mistake, quant.Mistake, sae.Mistake, shard.Mistake, stats.Mistake)
DTYPES = ("float32", "bfloat16", "float16")

# ---------------------------------------------------------------- the command line


def command(function):
    """Run `function` as a command line: its parameters are the flags.

    A user's mistake ends in one line on stderr and exit code 2; any other exception is a bug and shows its traceback.
    Ctrl-C ends with 130. A flag whose default is True or False, or that is annotated as `bool | None`, takes nothing,
    true or false.
    """
    import fire
    from fire import decorators
    parameters = inspect.signature(function).parameters.values()
    if {"-h", "--help"} & set(sys.argv[1:]):                     # **unknown would make an unknown flag of it
        function.__signature__ = inspect.Signature([p for p in parameters if p.kind != p.VAR_KEYWORD])
        fire.Fire(function, ["--", "--help"])
    flags = {p.name: _parser(p) for p in parameters if p.kind != p.VAR_POSITIONAL}
    decorators.SetParseFn(str)(function)
    decorators.SetParseFns(**flags)(function)
    with contextlib.redirect_stdout(_Lasting(sys.stdout)), contextlib.redirect_stderr(_Lasting(sys.stderr)):
        try:
            fire.Fire(function)
        except (*MISTAKES, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)


def with_flags(function, declared):
    """The function, which takes keywords alone, with flags for some of them: fields of a dataclass, whose metadata hold
    their `help`. Their defaults are only for --help: the function gets what was given."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    more = [inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in declared]
    rest = inspect.Parameter("unknown", inspect.Parameter.VAR_KEYWORD)
    function.__signature__ = inspect.Signature([*more, *own, rest])
    function.__doc__ += "".join(f"    {field.name}: {field.metadata['help']}\n    " for field in declared)
    return function


def _parser(flag):
    """What makes a value of a flag's text. Words stay words: fire would read the prompt "1, 2" as a tuple."""
    from fire import parser

    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise Mistake(f"--{flag.name} {text}: it takes nothing, true or false")
        return text.lower() == "true"

    if isinstance(flag.default, bool) or flag.annotation == bool | None:
        return boolean
    words = isinstance(flag.default, str) or flag.annotation in (str, str | None)
    return str if words else parser.DefaultParseValue


class _Lasting:
    """A stream that goes on when nobody takes it any more: `train.py | head`, or a closed terminal, ends no training.
    Lines go out one by one, also into a pipe."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._try(self.stream.write, text)
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, call, *args):
        try:
            call(*args)
        except OSError:                                          # a broken pipe, no terminal, a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def no_unknown_flags(flags: dict) -> None:
    """Raise Mistake where a command got flags that it does not know."""
    if flags:
        names = ", ".join(f"--{name}" for name in flags)
        raise Mistake(f"unknown flag{'s' * (len(flags) > 1)} {names} (see --help)")


def check_whole(flags: dict) -> None:
    """Raise Mistake for one of `flags` {name: value} that is not a whole number from 1 (0 where that fits)."""
    for name, value in flags.items():
        least = 0 if name in ("layer", "size", "text_tokens", "seed") else 1
        if type(value) is not int or not least <= value < 2 ** 31:
            raise Mistake(f"--{name} {value}: it must be a whole number from {least}")


# ---------------------------------------------------------------- which model, and in which format


def announce(model: str) -> str:
    """Print which model runs, and why it was chosen; "auto" becomes a name, a folder its absolute path."""
    name, why = default_model() if model == "auto" else (model, "as asked")
    name = located(name)
    print(f"model: {name} ({why})")
    return name


def located(model: str) -> str:
    """A model's name as it is the same anywhere: of a folder the absolute path; else what is bundled or on the hub."""
    bundled = model == "nano" and flux.resolve(model).samefile(Path(flux.__file__).parent / "nano")
    return os.path.abspath(model) if Path(model).is_dir() and not bundled else model


def revision_of(folder: Path) -> str | None:
    """The revision of a model in a folder of the hub's cache; None elsewhere."""
    return folder.name if folder.parent.name == "snapshots" else None


def default_model() -> tuple[str, str]:
    """What "auto" stands for on this machine, and why: ("schnell" or "nano", reason)."""
    kind = jax.devices()[0].platform
    return ("nano", "JAX sees only a CPU") if kind == "cpu" else ("schnell", f"JAX sees a {kind.upper()}")


def default_dtype() -> str:
    """The type of a model's numbers where nobody says: float32 on a CPU, else bfloat16."""
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def default_quant(folder: Path) -> str:
    """The format of the weights where nobody says: nf4 where JAX sees an accelerator, none for nano and on a CPU."""
    return "none" if jax.devices()[0].platform == "cpu" or (folder / "scenes.py").is_file() else "nf4"


def default_steps(cfg: flux.Config) -> int:
    """Sampling steps of a model where nobody says: 28 of FLUX.1-dev's kind, else 4."""
    return 28 if cfg.guidance_embeds else 4


def default_batch(cfg: flux.Config) -> int:
    """Images a forward pass of the tools where nobody says."""
    return shard.batch(1, 16) if cfg.width <= 512 else shard.batch(4)


def quantized(name: str) -> dict:
    """Arguments of `flux.load` for weights in the format `name`: nf4, int8 or none. Raises Mistake for another."""
    return {"put": quant.put(name), "unpack": quant.unpack}


def precision(folder: Path, run: dict | None = None, dtype: str = "", quant: str = "") -> tuple[str, str]:
    """(dtype, quant) in which a tool loads the model in `folder`, also printed: the flags --dtype and --quant, else
    what the checkpoint's `run` says, else what train.py would choose. Raises Mistake for unknown ones."""
    run, said = run or {}, []
    for flag, given, default in (("dtype", dtype, default_dtype()), ("quant", quant, default_quant(folder))):
        value, why = ((given, "as asked") if given else (run[flag], "as the run has it") if run.get(flag) else
                      (default, "default"))
        said.append((value, why))
    (dtype, _), (quant, _) = said
    check_dtype(dtype)
    quantized(quant)
    print(f"precision: {dtype} ({said[0][1]}), quantization {quant} ({said[1][1]})")
    return dtype, quant


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise Mistake(f"--dtype {dtype}: it is one of {', '.join(DTYPES)}")


def load_model(name: str, run: dict | None = None, *, dtype: str = "", quant: str = "", transformer: str = "",
               **options) -> flux.Model:
    """`flux.load` as `precision` says, over all devices. transformer: a file or folder to take the transformer from;
    default: the one of the checkpoint's `run`, or the model's own. A model on the hub has the run's revision."""
    run, unpack = run or {}, quantized("none")["unpack"]
    if run.get("revision") and name == run["model"]:
        name = f"{name}@{run['revision']}"
    transformer = transformer or run.get("transformer") or None
    folder, _ = flux.read_config(name, transformer, unpack)          # not yet its weights
    dtype, quant = precision(folder, run, dtype, quant)
    placed = shard.arguments(shard.several(), quantized(quant))
    return flux.load(name, dtype=jnp.dtype(dtype), transformer=transformer, **placed, **options)


# ---------------------------------------------------------------- an SAE and its model


@dataclass(frozen=True, eq=False, repr=False)
class Subject:
    """An SAE at its place in a model, as its metadata say, or flags.

    params: of each group of tokens (see `checkpoint.load_groups`). run: train.py's flags; {} of a foreign SAE. names:
    of the streams that it reads, as blocks sow them. levels: noise levels that it was trained at. typical, fired [F]:
    see `steer.calibrated`.
    """
    name: str
    params: list
    cfg: sae.Config
    model: str
    layer: int
    site: str
    run: dict
    names: tuple[str, ...] = ()
    levels: np.ndarray | None = None
    typical: np.ndarray | None = None
    fired: np.ndarray | None = None

    def __repr__(self):
        return f"<SAE {self.name}: {self.cfg.features:,} features of layer {self.layer} ({self.site}) of {self.model}>"

    @property
    def timesteps(self):
        return self.run.get("timesteps", 1)

    @property
    def size(self):
        """Pixels, an int or (height, width); None: the model's."""
        size = self.run.get("size") or None
        return tuple(size) if isinstance(size, list) else size

    @property
    def text_tokens(self):
        """A prompt; None: the model's."""
        return self.run.get("text_tokens") or None

    @property
    def padding(self):
        """Whether it was trained on T5's padding."""
        return self.run.get("padding", True)

    def check_feature(self, feature):
        """Raise Mistake unless it is one of the SAE's features."""
        if isinstance(feature, bool) or not isinstance(feature, (int, np.integer)) or not (
                0 <= feature < self.cfg.features):
            raise Mistake(f"feature {feature}: {self.name} has features 0 to {self.cfg.features - 1}")

    def nearest(self, level: float) -> int:
        """The number of the noise level of training that is nearest to this one."""
        return int(np.abs(self.levels - level).argmin())

    def of(self, t: int) -> dict[str, sae.Params]:
        """{name of the stream: parameters} of the noise level of training number t. One SAE is for all."""
        n = len(self.names)
        return dict(zip(self.names, self.params * n if len(self.params) == 1 else self.params[t * n:(t + 1) * n]))

    def at(self, level: float) -> dict[str, sae.Params]:
        """{name of the stream: parameters} at a noise level: those of the nearest one of training."""
        return self.of(self.nearest(level))


def opened(folder: str | Path, *, model: str = "", layer: int | None = None, site: str = "",
           writes: bool = True) -> Subject:
    """The `Subject` in a checkpoint's folder, before any model is looked at: without names and levels.

    model, layer, site: of an SAE that does not say. writes: whether it has to write what it reads, which a transcoder
    does not. Raises Mistake where a flag is missing or contradicts it.
    """
    folder = Path(folder)
    params, cfg = checkpoint.load_groups(folder)
    if writes and cfg.d_out is not None:
        raise Mistake(f"{folder} is a transcoder, which writes what belongs to another layer: this needs an SAE")
    about = checkpoint.load_metadata(folder)
    for flag, value in (("layer", layer), ("site", site or None)):
        if value is not None and about.get(flag, value) != value:
            raise Mistake(f"--{flag} {value}: {folder} was trained at {flag} {about[flag]}")
    said = {"layer": about.get("layer", layer), "site": about.get("site", site or None),
            "model": model or about.get("model")}
    if missing := [f"--{flag}" for flag, value in said.items() if value is None]:
        raise Mistake(f"{folder} does not say where it belongs (it was not written by train.py): give "
                      f"{' and '.join(missing)}")
    return Subject(folder.resolve().name, params, cfg, **said, run=about.get("run") or {})


def placed(subject: Subject, folder: Path, cfg: flux.Config) -> Subject:
    """The `Subject` with names and levels, for the model in `folder` with the transformer Config `cfg` (as
    `flux.read_config` gives them). Raises Mistake where it does not fit."""
    names = flux.residual_names(cfg, subject.layer, subject.site)
    if subject.cfg.d_in != cfg.width:
        raise Mistake(f"the SAE in {subject.name} is for width {subject.cfg.d_in}, but {subject.model} has width "
                      f"{cfg.width}")
    rows, columns = flux.check_size(folder, subject.size or min(256, flux.default_size(folder)))
    levels = flux.sigmas(flux.read_scheduler(folder), subject.timesteps, rows * columns)[:-1]
    if len(subject.params) not in (1, len(names) * len(levels)):
        raise Mistake(f"{subject.name} has SAEs for {len(subject.params)} groups of tokens; site {subject.site} with "
                      f"{len(levels)} timestep(s) has {len(names) * len(levels)}")
    return replace(subject, names=names, levels=levels)


def subject(model: flux.Model, folder: str | Path, *, layer: int | None = None, site: str = "") -> Subject:
    """The `Subject` in a checkpoint's folder, in a model of `flux.load`. layer, site: of an SAE that does not say.
    Raises Mistake where it does not fit."""
    found = opened(folder, model=str(model.source), layer=layer, site=site)
    return placed(found, model.source, model.cfg)


def streams(subject, acts, start):
    """(step, name of the stream, [B, tokens, D]) of what `flux.capture` gave, [steps, B, N, D]."""
    for _, t, part in flux.token_groups(subject.site, len(acts), start.condition[0].shape[1]):
        name = subject.names[0 if len(subject.names) == 1 or part.start is None or part.start == 0 else 1]
        yield t, name, acts[t, :, part]


def prompts_of(subject: Subject, source: str = "", field: str = "") -> tuple[str, str | None, bool | None]:
    """(source, field, held_out) of the prompts to look at it with, for `data.examples`: those that are asked for, or
    those of its own source that no training step saw."""
    own, field = subject.run.get("prompts"), field or subject.run.get("prompt_field")
    if source and source != own:
        return source, field, None
    if own:
        return own, field, True if subject.run.get("held_out") else None
    if (flux.read_config(subject.model)[0] / "scenes.py").is_file():
        return "scenes", None, None
    return data.DATASET, field or data.DATASET_FIELD, None


# ---------------------------------------------------------------- output folders and signals


@contextlib.contextmanager
def claim(out):
    """Hold the folder `out` for this process, however it ends. Raises Mistake where another process holds it, or where
    it cannot be written.

    The lock is a file beside the folder, or inside it where it is a mount or its parent cannot be written. Where the
    system or the file system has no locks, it says so and goes on without one.
    """
    path = lock_of(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "w"))
        try:
            locked = _lock(file)
        except BlockingIOError:
            raise _held(out) from None
        if locked:
            stack.callback(path.unlink, missing_ok=True)
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise _held(out)                                 # another run has just ended, and a third begun
        else:
            file.close()                                         # Windows removes no open file
            path.unlink(missing_ok=True)
        yield


def lock_of(out):
    """Where `claim` locks the folder `out`. Raises Mistake where that cannot be written."""
    whole = Path(out).resolve()
    there = next(path for path in (whole, *whole.parents) if path.is_dir())
    if not os.access(there, os.W_OK):
        raise Mistake(f"--out {out}: {there} cannot be written")
    beside = not os.path.ismount(whole) and os.access(whole.parent if there == whole else there, os.W_OK)
    return whole.with_name(f".{whole.name}.lock") if beside else whole / ".lock"


def _lock(file):
    """Whether the file could be locked; raises BlockingIOError where another process has done so."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise
    except (ImportError, OSError) as error:                      # Windows; some network file systems
        print(f"no lock on {file.name} ({error}): start no second run into this folder")
        return False


def _held(out):
    return Mistake(f"another run is writing {out}; wait for it, or choose another --out")


@contextlib.contextmanager
def stopping():
    """stop(step=0): the number of the signal that asks to end (SIGTERM, as before a TPU is taken away; SIGINT, Ctrl-C;
    SIGHUP, a closed terminal), else 0. A second one ends the process at once. Several hosts agree on the step."""
    asked, agreed, several = [], [], jax.process_count() > 1

    def ask(number, _):
        if asked:
            os._exit(128 + number)
        asked.append(number)
        with contextlib.suppress(OSError):                       # print() may be in the middle of another
            os.write(2, f"\n{signal.Signals(number).name}: ending soon; once more ends at once\n".encode())
        if several:
            os.kill(os.getpid(), signal.SIGTERM)                 # JAX catches this one, and tells the other hosts

    def stop(step=0):
        if not several:
            return asked[0] if asked else 0
        from jax.experimental import multihost_utils
        if not agreed and multihost_utils.reached_preemption_sync_point(step):           # true at one step only
            agreed.append((asked or [signal.SIGTERM])[0])
        return agreed[0] if agreed else 0

    names = ("SIGINT", "SIGHUP") if several else ("SIGTERM", "SIGINT", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]             # Windows has no SIGHUP
    # What is ignored stays so: SIGHUP under nohup, SIGINT in the background of a script.
    old = {number: signal.signal(number, ask) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)
