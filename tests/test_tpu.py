"""Every kernel through the real TPU compiler, for chips that are not there."""
import pytest
import tpu

SIZE = (3072, 1024)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e"])
def test_kernels_compile_and_fit(chip):
    """With the tiles that `quant.plan` picks for few rows and for many; the compiler refuses what VMEM cannot hold."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with jax[tpu]")
    jobs = [{"kernel": "nf4", "rows": rows, "size": SIZE} for rows in (256, 4096)]
    jobs += [{"kernel": "nf4 transposed", "rows": 256, "size": SIZE}]
    jobs += [{"kernel": "int8", "rows": 256, "size": SIZE}] if chip != "v4" else []
    answers = tpu.run(chip, jobs)
    assert not [answer for answer in answers if "error" in answer]
    assert all(answer["bundles"] > 100 for answer in answers)


def test_what_does_not_fit_is_refused():
    """Else the test above would prove nothing."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with jax[tpu]")
    answer, = tpu.run("v4", [{"kernel": "nf4", "rows": 4096, "size": SIZE, "tiles": (4096, 1024, 512)}])
    assert "vmem" in answer["error"].lower()
