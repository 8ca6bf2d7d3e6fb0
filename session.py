"""Do what every tool does first: read flags, open an SAE and its model, lock the output folder, handle signals.

Copy it with `flux.py`, `data.py`, `quant.py`, `sae.py`, `shard.py`, and what these import.

    if __name__ == "__main__":
        session.command(main)                                    # main(*words, steps=4, overwrite=False, **unknown)
"""
import contextlib
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field, dataclass, replace
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
import variance
from weights import Mistake

MISTAKES = (Mistake, quant.Mistake, sae.Mistake, shard.Mistake, stats.Mistake, variance.Mistake)
DTYPES = ("float32", "bfloat16", "float16")

# ---------------------------------------------------------------- the command line


def command(function: Callable) -> None:
    """Run `function` as a command-line program. Its parameters are the flags.

    A user's mistake prints one line on stderr and exits with code 2; any other exception is a bug and shows its
    traceback. Ctrl-C exits with 130. A flag with the default True or False, or with the annotation `bool | None`, is
    given alone, with true, or with false.
    """
    import fire
    from fire import decorators
    parameters = inspect.signature(function).parameters.values()
    if {"-h", "--help"} & set(sys.argv[1:]):                     # else **unknown would take --help as an unknown flag
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


def with_flags(function: Callable, declared: Iterable[Field]) -> Callable:
    """Return `function`, which takes only keywords, with a flag for each declared dataclass field.

    The metadata of a field hold its `help` and, if its default depends on other flags, the rule, `auto`. Defaults
    appear in --help only: the function gets just the given flags.
    """
    own = [p for p in inspect.signature(function).parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    more = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=f.type,
                              default=_Rule() if f.metadata["auto"] else f.default) for f in declared]
    rest = inspect.Parameter("unknown", inspect.Parameter.VAR_KEYWORD)
    function.__signature__ = inspect.Signature([*more, *own, rest])
    rule = lambda field: field.metadata["auto"] and f"; default: {field.metadata['auto']}"
    function.__doc__ += "".join(f"    {f.name}: {f.metadata['help']}{rule(f)}\n    " for f in declared)
    return function


class _Rule:
    """A default that a rule decides. fire prints no default of it; the help text says the rule."""

    def __repr__(self):
        return ""


def _parser(flag):
    """Return the function that parses a flag's text. Strings stay strings: fire would read "1, 2" as a tuple."""
    from fire import parser

    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise Mistake(f"--{flag.name} {text}: this flag takes nothing, true or false")
        return text.lower() == "true"

    if isinstance(flag.default, bool) or flag.annotation == bool | None:
        return boolean
    words = isinstance(flag.default, str) or flag.annotation in (str, str | None)
    return str if words else parser.DefaultParseValue


class _Lasting:
    """Wrap a stream so that writing never fails: training continues after `train.py | head` or a closed terminal.
    Flush every line, also into a pipe."""

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
    """Raise Mistake if `flags`, which the command does not know, is not empty."""
    if flags:
        names = ", ".join(f"--{name}" for name in flags)
        raise Mistake(f"unknown flag{'s' * (len(flags) > 1)} {names} (see --help)")


def check_whole(flags: dict) -> None:
    """Raise Mistake if a value of `flags` {name: value} is not None and no whole number from 1 (or 0, if it fits)."""
    for name, value in flags.items():
        least = 0 if name in ("layer", "size", "text_tokens", "seed") else 1
        if value is not None and (type(value) is not int or not least <= value < 2 ** 31):
            raise Mistake(f"--{name} {value}: it must be a whole number from {least}")


# ---------------------------------------------------------------- which model, and in which format


def announce(model: str) -> str:
    """Print and return the model's name, and print why it was chosen. Replace "auto", and make a folder absolute."""
    name, why = default_model() if model == "auto" else (model, "as asked")
    name = located(name)
    print(f"model: {name} ({why})")
    return name


def located(model: str) -> str:
    """Return a model's name that is valid in any folder: absolute for a folder, unchanged for nano or the hub."""
    ours = (Path(flux.__file__).parent / model).resolve()
    bundled = model in flux.BUNDLED and flux.resolve(model).resolve() == ours
    return os.path.abspath(model) if Path(model).is_dir() and not bundled else model


def revision_of(folder: Path) -> str | None:
    """Return the revision of a model in the hub's cache folder, or None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def default_model() -> tuple[str, str]:
    """Return what "auto" means on this machine: ("schnell" or "nano", reason)."""
    kind = jax.devices()[0].platform
    return ("nano", "JAX sees only a CPU") if kind == "cpu" else ("schnell", f"JAX sees a {kind.upper()}")


def default_dtype() -> str:
    """Return the default dtype of a model: float32 on a CPU, else bfloat16."""
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def default_quant(folder: Path) -> str:
    """Return the default weight format: none for nano and on a CPU, nf4 on an accelerator."""
    return "none" if jax.devices()[0].platform == "cpu" or flux.draws_scenes(folder) else "nf4"


def default_steps(cfg: flux.Config) -> int:
    """Return the default number of sampling steps: 28 for models like FLUX.1-dev, else 4."""
    return 28 if cfg.guidance_embeds else 4


def default_batch(cfg: flux.Config) -> int:
    """Return the default number of images per forward pass of the tools."""
    return shard.batch(1, 16) if cfg.width <= 512 else shard.batch(4)


def quantized(name: str) -> dict:
    """Return the arguments of `flux.load` for the weight format nf4, int8 or none. Raise Mistake for another name."""
    return {"put": quant.put(name), "unpack": quant.unpack}


def precision(folder: Path, run: dict | None = None, dtype: str = "", quant: str = "") -> tuple[str, str]:
    """Return and print (dtype, quant) for the model in `folder`. The flags --dtype and --quant come first, then the
    checkpoint's `run`, then the defaults of train.py. Raise Mistake for unknown values."""
    def chosen(flag, given, default):
        saved = (run or {}).get(flag)
        return (given, "as asked") if given else (saved, "from the run") if saved else (default, "default")

    dtype, why = chosen("dtype", dtype, default_dtype())
    quant, reason = chosen("quant", quant, default_quant(folder))
    check_dtype(dtype)
    quantized(quant)
    print(f"precision: {dtype} ({why}), quantization {quant} ({reason})")
    return dtype, quant


def check_dtype(dtype: str) -> None:
    """Raise Mistake if `dtype` is not one of DTYPES."""
    if dtype not in DTYPES:
        raise Mistake(f"--dtype {dtype}: it must be one of {', '.join(DTYPES)}")


def load_model(name: str, run: dict | None = None, *, dtype: str = "", quant: str = "", transformer: str = "",
               **options) -> flux.Model:
    """Call `flux.load` with the dtype and format that `precision` returns, over all devices. transformer: a file or
    folder with the transformer; default: the run's, or the model's own. A hub model is loaded at the run's revision."""
    run, unpack = run or {}, quantized("none")["unpack"]
    if run.get("revision") and name == run["model"]:
        name = f"{name}@{run['revision']}"
    transformer = transformer or run.get("transformer") or None
    folder, _ = flux.read_config(name, transformer, unpack)          # its weights come later
    dtype, quant = precision(folder, run, dtype, quant)
    placed = shard.arguments(shard.several(), quantized(quant))
    return flux.load(name, dtype=jnp.dtype(dtype), transformer=transformer, **placed, **options)


# ---------------------------------------------------------------- an SAE and its model


@dataclass(frozen=True, eq=False, repr=False)
class Subject:
    """An SAE and its place in a model, from its metadata or from flags.

    params: one dict per group of tokens (see `checkpoint.load_groups`). run: the flags of train.py, {} for an SAE from
    elsewhere. names: the streams that the SAE reads, by the names that the blocks sow. levels: the noise levels of
    training. typical, fired [F]: see `steer.calibrated`.
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
    def timesteps(self) -> int:
        """Number of noise levels in training."""
        return self.run.get("timesteps", 1)

    @property
    def size(self) -> int | tuple[int, int] | None:
        """Image size in pixels, one side or (height, width); None: the model's own."""
        size = self.run.get("size") or None
        return tuple(size) if isinstance(size, list) else size

    @property
    def text_tokens(self) -> int | None:
        """T5 tokens per prompt; None: the model's own."""
        return self.run.get("text_tokens") or None

    @property
    def padding(self) -> bool:
        """Whether the SAE was trained on T5's padding."""
        return self.run.get("padding", True)

    def check_feature(self, feature: int) -> None:
        """Raise Mistake if the SAE has no such feature."""
        if isinstance(feature, bool) or not isinstance(feature, (int, np.integer)) or not (
                0 <= feature < self.cfg.features):
            raise Mistake(f"feature {feature}: {self.name} has features 0 to {self.cfg.features - 1}")

    def nearest(self, level: float) -> int:
        """Return the index of the training noise level nearest to `level`."""
        return int(np.abs(self.levels - level).argmin())

    def of(self, t: int) -> dict[str, sae.Params]:
        """Return {stream name: parameters} for training noise level number t. A single SAE serves all levels."""
        n = len(self.names)
        return dict(zip(self.names, self.params * n if len(self.params) == 1 else self.params[t * n:(t + 1) * n]))

    def at(self, level: float) -> dict[str, sae.Params]:
        """Return {stream name: parameters} for the training noise level nearest to `level`."""
        return self.of(self.nearest(level))


def opened(folder: str | Path, *, model: str = "", layer: int | None = None, site: str = "",
           writes: bool = True) -> Subject:
    """Return the `Subject` in a checkpoint folder without reading a model: names and levels are still missing.

    model, layer, site: needed if the checkpoint does not state them. writes: whether the SAE must reconstruct its own
    input, which a transcoder does not. Raise Mistake if a flag is missing or contradicts the checkpoint.
    """
    folder = Path(folder)
    params, cfg = checkpoint.load_groups(folder)
    if writes and cfg.d_out is not None:
        raise Mistake(f"{folder} is a transcoder, which predicts another layer: this tool needs an SAE")
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
    """Return the `Subject` with names and levels added. `flux.read_config` returns `folder` and `cfg` of its model.
    Raise Mistake if the SAE does not fit the model."""
    names = flux.residual_names(cfg, subject.layer, subject.site)
    if subject.cfg.d_in != cfg.width:
        raise Mistake(f"the SAE in {subject.name} is for width {subject.cfg.d_in}, but {subject.model} has width "
                      f"{cfg.width}")
    rows, columns = flux.check_size(folder, subject.size or min(256, flux.default_size(folder)))
    levels = flux.sigmas(flux.read_scheduler(folder), subject.timesteps, rows * columns)[:-1]
    if len(subject.params) not in (1, len(names) * len(levels)):
        raise Mistake(f"{subject.name} has SAEs for {len(subject.params)} groups of tokens; site {subject.site} with "
                      f"{len(levels)} timestep(s) needs {len(names) * len(levels)}")
    return replace(subject, names=names, levels=levels)


def subject(model: flux.Model, folder: str | Path, *, layer: int | None = None, site: str = "") -> Subject:
    """Return the `Subject` in a checkpoint folder for a loaded model. layer, site: needed if the checkpoint does not
    state them. Raise Mistake if the SAE does not fit the model."""
    found = opened(folder, model=str(model.source), layer=layer, site=site)
    return placed(found, model.source, model.cfg)


def streams(subject: Subject, acts: jax.Array, start: flux.Start) -> Iterator[tuple[int, str, jax.Array]]:
    """Split the activations [steps, B, N, D] of `flux.capture`. Yield (step, stream name, [B, tokens, D])."""
    for _, t, part in flux.token_groups(subject.site, len(acts), start.condition[0].shape[1]):
        name = subject.names[0 if len(subject.names) == 1 or part.start is None or part.start == 0 else 1]
        yield t, name, acts[t, :, part]


def encode(params: list[sae.Params], cfg: sae.Config, acts: jax.Array, site: str, text_tokens: int
           ) -> tuple[np.ndarray, np.ndarray]:
    """Encode acts [timesteps, B, N, D] with each group's SAE. Return values and indices [timesteps, B, N, k], where k
    is the most active features of a token."""
    groups = flux.token_groups(site, len(acts), text_tokens) if len(params) > 1 else [("", slice(None), slice(None))]
    if len(groups) != len(params):
        raise Mistake(f"the checkpoint has SAEs for {len(params)} groups of tokens; site {site} with {len(acts)} "
                      f"timestep(s) has {len(groups)}")
    found = [sae.encode(p, cfg, acts[t, ..., part, :]) for p, (_, t, part) in zip(params, groups)]
    shape = (*acts.shape[:3], max(values.shape[-1] for values, _ in found))
    both = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for (_, t, part), codes in zip(groups, found):
        for whole, some in zip(both, codes):
            whole[t, ..., part, :some.shape[-1]] = some
    return both


def explained(model: flux.Model, subject: Subject, prompts: Sequence[str], most: int = 64, *, seed: int = 0,
              batch: int = 16, progress: Callable[[float], object] = lambda share: None) -> variance.Shares | None:
    """Return how much of each feature's variance the position, the prompt and the noise draw explain, from images of up
    to `most` different prompts, each from the same noises; None if there is only one prompt. progress: called with the
    finished share of the prompts."""
    prompts = list(dict.fromkeys(prompts))[:most]
    if len(prompts) < 2:
        return None
    grid = flux.token_grid(model, subject.size or min(256, model.size))
    T, levels = subject.text_tokens or model.text_tokens, np.append(subject.levels, 0).astype(np.float32)
    tokens = {"txt": T, "img": grid[0] * grid[1]}
    positions = len(subject.levels) * sum(tokens[stream] for stream in flux.SITES[subject.site])
    seeds = variance.seeds_for(subject.cfg.features, positions)
    sums, size = variance.Sums(subject.cfg.features, seeds, positions), max(1, batch // seeds)
    for i in range(0, len(prompts), size):
        some = [*prompts[i:i + size], *prompts[-1:] * size][:size]       # one shape, one compile
        start = data.beginning(model, some, np.tile(np.arange(seeds), size), levels, grid, seed, T)
        acts = flux.capture(model, start, layer=subject.layer, site=subject.site).astype(jnp.float32)
        codes = encode(subject.params, subject.cfg, acts, subject.site, T)
        real = (np.ones((size, acts.shape[2]), bool) if subject.padding else
                data.real_tokens(model, some, subject.site, T, tokens["img"]))
        for j in range(min(size, len(prompts) - i)):
            values, indices = (np.moveaxis(code[:, j * seeds:(j + 1) * seeds], 0, 1) for code in codes)
            of = lambda code: code.reshape(seeds, positions, -1)
            sums.add(of(values * real[j, None, None, :, None]), of(indices))
        progress(min(1, (i + size) / len(prompts)))
    return sums.finish()


def prompts_of(subject: Subject, source: str = "", field: str = "") -> tuple[str, str | None, bool | None]:
    """Return (source, field, held_out) for `data.examples`: the given prompts, or held-out prompts of the SAE's own
    source."""
    own, field = subject.run.get("prompts"), field or subject.run.get("prompt_field")
    if source and source != own:
        return source, field, None
    if own:
        return own, field, True if subject.run.get("held_out") else None
    if flux.draws_scenes(flux.read_config(subject.model)[0]):
        return "scenes", None, None
    return data.DATASET, field or data.DATASET_FIELD, None


# ---------------------------------------------------------------- output folders and signals


@contextlib.contextmanager
def claim(out: Path | str) -> Iterator[None]:
    """Lock the folder `out` for this process until the block ends. Raise Mistake if another process has locked it, or
    if it cannot be written.

    The lock is a file beside the folder, or inside it if the folder is a mount or its parent cannot be written. On a
    system without file locks, print a warning and continue.
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
                raise _held(out)                                 # that run ended, and a third locked a new file
        else:
            file.close()                                         # Windows cannot remove an open file
            path.unlink(missing_ok=True)
        yield


def lock_of(out: Path | str) -> Path:
    """Return the path of the lock file of the folder `out`. Raise Mistake if it cannot be written."""
    whole = Path(out).resolve()
    there = next(path for path in (whole, *whole.parents) if path.is_dir())
    if not os.access(there, os.W_OK):
        raise Mistake(f"--out {out}: {there} cannot be written")
    beside = not os.path.ismount(whole) and os.access(whole.parent if there == whole else there, os.W_OK)
    return whole.with_name(f".{whole.name}.lock") if beside else whole / ".lock"


def _lock(file):
    """Return whether the file system could lock the file. Raise BlockingIOError if another process has locked it."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise
    except (ImportError, OSError) as error:                      # Windows; some network file systems
        print(f"no lock on {file.name} ({error}): do not start a second run in this folder")
        return False


def _held(out):
    return Mistake(f"another run is writing {out}; wait for it, or choose another --out")


@contextlib.contextmanager
def stopping() -> Iterator[Callable[..., int]]:
    """Yield stop(step=0), which returns the number of the signal that asks to end, or 0.

    The signals are SIGTERM (sent before a TPU is taken away), SIGINT (Ctrl-C) and SIGHUP (a closed terminal). A second
    signal ends the process at once. Several hosts stop at the same step.
    """
    asked, agreed, several = [], [], jax.process_count() > 1

    def ask(number, _):
        if asked:
            os._exit(128 + number)
        asked.append(number)
        with contextlib.suppress(OSError):                       # os.write: a print() may be in progress
            os.write(2, f"\n{signal.Signals(number).name}: ending soon; a second signal ends at once\n".encode())
        if several:
            os.kill(os.getpid(), signal.SIGTERM)                 # JAX handles this one and tells the other hosts

    def stop(step=0):
        if not several:
            return asked[0] if asked else 0
        from jax.experimental import multihost_utils
        if not agreed and multihost_utils.reached_preemption_sync_point(step):           # true only once
            agreed.append((asked or [signal.SIGTERM])[0])
        return agreed[0] if agreed else 0

    names = ("SIGINT", "SIGHUP") if several else ("SIGTERM", "SIGINT", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]             # Windows has no SIGHUP
    # Ignored signals stay ignored: SIGHUP under nohup, SIGINT in a script's background process.
    old = {number: signal.signal(number, ask) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)
