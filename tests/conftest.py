import atexit
import gc
import importlib
import importlib.util
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")                     # no test may reach for a hub
# Tests spend most of their time compiling. XLA compiles faster without LLVM's optimizations (`.ci/run` tests with them
# on the newest Python), and all processes of a session share their compiled programs.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="fae-programs-"),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

ROOT = Path(__file__).parents[1]
OURS = sorted(file.stem for folder in (".", "nano", "tests") for file in (ROOT / folder).glob("*.py"))
OPTIONAL = ("torch", "diffusers", "transformers", "sae_lens", "bitsandbytes")    # there is no PyTorch for every Python


def pytest_configure(config):
    """Deprecation warnings of our own files are errors, also in the processes that tests start; others' are not."""
    config.addinivalue_line("filterwarnings", f"error::DeprecationWarning:({'|'.join(OURS)})$")
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:           # as nohup, or a shell's background, leaves them
            signal.signal(number, handler)
    os.environ["PYTHONWARNINGS"] = ",".join(f"error::DeprecationWarning:{name}" for name in ("__main__", *OURS))


class Missing:
    """Stands for a library that is not installed, and for all in it: a test that calls it is skipped."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_, **__):
        raise ModuleNotFoundError(f"No module named {self.name!r}", name=self.name)


def optional(module, *names):
    """Import `module`, or several `names` of it, which most tests of a file can do without."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not lacking(error):
            raise
        found = Missing(error.name)
    return [getattr(found, name) for name in names] if names else found


def lacking(error):
    """The optional library for want of which `error` was raised, if any."""
    name = (error.name or "").split(".")[0] or ("torch" if "PyTorch" in str(error) else "")     # as transformers says
    return name if name in OPTIONAL and importlib.util.find_spec(name) is None else ""


def skipping(item):
    """Skip a test, instead of failing it, for an optional library that is not installed."""
    try:
        return (yield)
    except ImportError as error:
        if not (name := lacking(error)):
            raise
        pytest.skip(f"needs {name}")


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(skipping)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(skipping)


def pytest_collection_modifyitems(items):
    """The longest files first: two processes then end at about the same time."""
    first = ["test_tpu", "test_gpu", "test_shard", "test_train", "test_dash", "test_score"]
    items.sort(key=lambda item: (first.index(item.path.stem) if item.path.stem in first else len(first)))


def devices(count):
    """Return the environment of a process with so many CPU devices."""
    return os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"}


@pytest.fixture(scope="session")
def nano():
    """The bundled model's folder."""
    return ROOT / "nano"


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Compiled programs end with their module: each holds memory maps, of which Linux allows a process 65,530, and past
    that the compiler aborts."""
    yield
    jax.clear_caches()
    gc.collect()
