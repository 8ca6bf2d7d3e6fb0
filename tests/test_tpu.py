"""Every kernel, and FLUX.1's own programs, through the real TPU compiler, for chips that are not there."""
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tpu

import kernels_tpu

SIZE, CHIPS = (3072, 1024), ("v4", "v5e", "v5p", "v6e")
PROGRAMS = {"v4-8:nf4:step at 256": 1.7, "v5e-1:nf4:capture at 18": 6}           # GiB a chip that weights may take


@pytest.fixture(scope="module")
def compiled():
    """{what: a future of its answers}: the compiler has one thread, most machines two."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with jax[tpu]")
    with ThreadPoolExecutor(2) as pool:
        jobs = {program: (fit, program) for program in PROGRAMS}
        jobs |= {chip: (tpu.run, chip, dense(chip) + sparse(*tpu.SPARSE), False) for chip in CHIPS}
        jobs["counted"] = tpu.run, "v5e", [{"kernel": "nf4 transposed", "rows": 32, "size": (512, 256)},
                                           {"kernel": tpu.SPARSE[1], "rows": 256, "size": (1000, 512), "k": 8}]
        yield {name: pool.submit(*job) for name, job in jobs.items()}


def dense(chip):
    jobs = [{"kernel": "nf4", "rows": 4096, "size": SIZE}, {"kernel": "nf4 transposed", "rows": 256, "size": SIZE}]
    return jobs + ([{"kernel": "int8", "rows": 256, "size": SIZE}] if chip != "v4" else [])


def sparse(*kernels):
    return [{"kernel": kernel, "rows": 4096, "size": (1000, 3072), "k": 8} for kernel in kernels]


def fit(program):
    """The line of bench/fit.py's table, as cells."""
    script = Path(__file__).parents[1] / "bench" / "fit.py"
    result = subprocess.run([sys.executable, script, program], capture_output=True, text=True, check=True)
    return [cell.strip() for cell in result.stdout.splitlines()[-1].split("|")[1:-1]]


@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_compile_and_fit(compiled, chip):
    """With the tiles that `quant.plan` picks, the largest ones for NF4, and as many tokens as a large SAE step has. The
    compiler refuses what VMEM cannot hold; v4 and v5p have to cut D into slices."""
    answers = compiled[chip].result()
    assert not [answer for answer in answers if "error" in answer]
    assert {answer["tiles"]["slices"] for answer in answers if "k" in answer} == {{"v4": 8, "v5p": 2}.get(chip, 1)}


def test_bundles_are_counted(compiled):
    product, gradients = compiled["counted"].result()
    assert product["bundles"] > 100 and len(gradients["loops"]) == 8
    assert max(gradients["loops"][3:6]) < 8 * kernels_tpu.GROUP  # bundles for as many entries


@pytest.mark.parametrize("program", PROGRAMS)
def test_flux_fits(compiled, program):
    """At its real size, beside all else that stays on the chips."""
    cells = compiled[program].result()
    assert cells[-1] == "yes" and 0.5 < float(cells[4]) <= PROGRAMS[program], cells
