import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")                     # no test may reach for a hub

import jax
import pytest


@pytest.fixture(scope="session")
def nano():
    """The bundled model's folder."""
    return Path(__file__).parents[1] / "nano"


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Compiled programs end with their module: each holds memory maps, of which Linux allows a process 65,530, and past
    that the compiler aborts."""
    yield
    jax.clear_caches()
    gc.collect()
