"""The house as a whole: every name that one of our files takes from another is there."""
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import flux
import sae
import session

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for folder in (".", "bench", "nano", "tests") for file in (ROOT / folder).glob("*.py"))
OURS = {file.stem for file in ROOT.glob("*.py")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_names_taken_from_our_modules_exist(file):
    """Benchmarks are not run by tests; a name that moved would only show when somebody needs them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules = {alias.asname or alias.name: alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names if alias.name in OURS}
    hidden = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    taken = {(modules[node.value.id], node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
             and isinstance(node.value, ast.Name) and node.value.id in modules.keys() - hidden}
    taken |= {(node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
              and node.module in OURS for alias in node.names}
    missing = [f"{module}.{name}" for module, name in sorted(taken)
               if not hasattr(importlib.import_module(module), name)]
    assert not missing


def test_what_prints_in_a_line(nano):
    """A model, an SAE in training, an SAE at its place: not all of their arrays."""
    cfg = sae.Config(d_in=16, features=32, k=4)
    state = sae.init(jax.random.key(0), cfg, np.random.default_rng(0).standard_normal((64, 16)))
    subject = session.Subject("ckpt", [sae.fold(state, cfg)], cfg, "nano", 3, "img", {})
    for one, words in ((flux.load(nano, last=0), "12 layers of width 128"), (state, "32 features of width 16"),
                       (subject, "32 features of layer 3 (img) of nano")):
        assert words in repr(one) and "\n" not in repr(one) and len(repr(one)) < 200


def test_importing_a_module_touches_no_device():
    code = "import {0}, jax; assert not jax._src.xla_bridge._backends, '{0}'"
    program = "; ".join(code.format(name) for name in sorted(OURS))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
