"""Every kernel, and FLUX.1's own programs, through the real TPU compiler, for chips that are not there."""
import subprocess
import sys
from pathlib import Path

import pytest
import tpu

import kernels

SIZE = (3072, 1024)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e"])
def test_kernels_compile_and_fit(chip):
    """With the tiles that `quant.plan` picks, the largest ones for NF4; the compiler refuses what VMEM cannot hold."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with jax[tpu]")
    jobs = [{"kernel": "nf4", "rows": 4096, "size": SIZE}, {"kernel": "nf4 transposed", "rows": 256, "size": SIZE}]
    jobs += [{"kernel": "int8", "rows": 256, "size": SIZE}] if chip != "v4" else []
    answers = tpu.run(chip, jobs)
    assert not [answer for answer in answers if "error" in answer]
    assert all(answer["bundles"] > 100 for answer in answers)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e"])
def test_sparse_kernels_compile_and_fit(chip):
    """With as many tokens as a large step has, which fill VMEM; v4 has to cut D into slices. Both kernels on one chip,
    on the others the larger one."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with jax[tpu]")
    wanted = tpu.SPARSE if chip == "v5e" else tpu.SPARSE[1:]
    answers = tpu.run(chip, [{"kernel": kernel, "rows": 4096, "size": (1000, 3072), "k": 8} for kernel in wanted])
    assert not [answer for answer in answers if "error" in answer]
    assert all(answer["tiles"]["slices"] == (8 if chip == "v4" else 1) for answer in answers)
    assert [len(answer["loops"]) for answer in answers] == [6, 8][-len(answers):]
    assert all(max(answer["loops"][3:6]) < 8 * kernels.GROUP for answer in answers)     # bundles for as many entries


@pytest.mark.parametrize("program, arguments", [("v4-8:nf4:step at 256", 1.7), ("v5e-1:nf4:capture at 18", 6)])
def test_flux_fits(program, arguments):
    """At its real size, beside all else that stays on the chips; arguments: GiB a chip that its weights may take."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with jax[tpu]")
    script = Path(__file__).with_name("bench_fit.py")
    result = subprocess.run([sys.executable, script, program], capture_output=True, text=True, check=True)
    *_, line = result.stdout.splitlines()
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[-1] == "yes" and 0.5 < float(cells[4]) <= arguments, line
