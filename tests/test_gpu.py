"""FLUX.1's programs, an SAE's step and the kernels, through XLA's real GPU compiler, for cards that are not there."""
from concurrent.futures import ThreadPoolExecutor

import gpu
import pytest

CARDS = ("h100", "a100-40", "4090", "3090")                      # of each generation for which there are kernels
CAPTURE, STEP = {"fit": "capture at 18"}, {"fit": "SAE step, 16,384"}
# A job for each function in gpu.KERNELS, at sizes that are no powers of two
KERNELS = [{"kernel": "topk", "B": 300, "F": 5000, "k": 32}, {"kernel": "spmm", "B": 300, "F": 5000, "D": 1000, "k": 7},
           {"kernel": "outer", "B": 300, "F": 5000, "D": 1000, "k": 7},
           {"kernel": "outer", "B": 300, "F": 500, "D": 100, "k": 1}]


@pytest.fixture(scope="module")
def compiled():
    """{what: a future of its answers}: each compiler uses about one core, most machines have two."""
    if not gpu.installed():
        pytest.skip("no compiler for GPUs: tests/gpu.py says how to install it")
    four = {"gpus": 4, "weights": "none"}
    with ThreadPoolExecutor(2) as pool:
        jobs = {"one": ("h100", [CAPTURE, STEP]), "four": ("h100", [CAPTURE | four, STEP | four])}
        jobs |= {card: (card, KERNELS) for card in CARDS}
        yield {name: pool.submit(gpu.run, *job) for name, job in jobs.items()}


def test_flux_and_an_sae_fit_one_card(compiled):
    """GiB: 19 blocks in NF4 and batch 4; an SAE's state with its optimizer, for which Triton kernels compute."""
    capture, step = compiled["one"].result()
    assert 3 < capture["arguments"] < 3.6 and capture["temporaries"] < 0.8 and not capture["collectives"]
    assert 1.1 < step["arguments"] < 1.3 and step["temporaries"] < 0.7 and step["outputs"] < 0.01
    assert "__gpu$xla.gpu.triton" in step["calls"] and not step["collectives"]


def test_four_cards_share_weights_and_features(compiled):
    """GiB: of 12.3 in bfloat16 each card holds a quarter, and gathers two layers at a time (0.63 each). Nothing
    transposes all of its quarter, which would take as much again. Of an SAE each holds a quarter too."""
    capture, step = compiled["four"].result()
    assert capture["arguments"] < 3.2 and capture["temporaries"] < 1.5 and set(capture["collectives"]) == {"all-gather"}
    assert step["arguments"] < 0.4 and step["temporaries"] < 0.5
    assert step["collectives"]["all-reduce"] and "__gpu$xla.gpu.triton" in step["calls"]


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile(compiled, card):
    """The compiler refuses what a card's shared memory or registers cannot hold."""
    answers = compiled[card].result()
    assert not [answer for answer in answers if "error" in answer]
    assert all("__gpu$xla.gpu.triton" in answer["calls"] for answer in answers)
