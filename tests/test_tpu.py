"""Every kernel through the real TPU compiler, for chips that are not there."""
import pytest
import tpu

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
