"""What the other tests rest on: warnings that are errors, and skips for libraries that are not installed."""
import subprocess
import sys
import warnings

import conftest
import pytest


def warn(module):
    warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)


@pytest.mark.parametrize("module", ["flux", "harvest", "scenes", "test_sae", "conftest"])
def test_our_deprecation_warnings_are_errors(module):
    with pytest.raises(DeprecationWarning):
        warn(module)
    code = f"import warnings; warnings.warn_explicit('old', DeprecationWarning, 'file.py', 1, module={module!r})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("module", ["jax", "torch.nn", "jax.flux", "fluxes"])
def test_those_of_others_are_not(module):
    warn(module)


def test_only_a_library_that_is_not_installed_is_skipped(monkeypatch):
    monkeypatch.setattr(conftest, "OPTIONAL", ("absent", "jax"))
    library, (function,) = conftest.optional("absent.part"), conftest.optional("absent", "function")
    for call in (library, library.part.function, function):
        with pytest.raises(ModuleNotFoundError) as error:
            call(1)
        assert conftest.lacking(error.value) == "absent"
    for module in ("jax.absent", "another"):
        with pytest.raises(ModuleNotFoundError):
            conftest.optional(module)
