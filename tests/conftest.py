import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")                     # no test may reach for a hub

import pytest


@pytest.fixture(scope="session")
def nano():
    """The bundled model's folder."""
    return Path(__file__).parents[1] / "nano"
