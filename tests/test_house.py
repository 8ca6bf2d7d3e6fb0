"""The house as a whole: every name that one of our files takes from another is there."""
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_importing_a_module_touches_no_device():
    code = "import {0}, jax; assert not jax._src.xla_bridge._backends, '{0}'"
    program = "; ".join(code.format(name) for name in sorted(OURS))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
