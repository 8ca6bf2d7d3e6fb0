"""bench/gpu.py: its stages, tables and counts. The measurements themselves need a GPU."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import loop
import numpy as np
import pytest
import stages

import flux
import mmdit
import text

BENCH = Path(loop.__file__).parent
SCRIPT = """
import os, sys, time
sys.path.insert(0, {bench!r})
import stages

def fine(_):
    stages.tell("rates", "product", "", "1 TFLOP/s", peak=1e12)
    stages.measure([stages.Job("times", "sleep", "ours", lambda: time.sleep(0.01), 5e9, lambda _: "exact"),
                    stages.Job("times", "sleep", "theirs", lambda: 1 / 0)], lambda _: None, 3)

def missing(_):
    print("row by a library, not by us")
    with stages.cell("times", "missing", "ours"):
        import no_such_library
    with stages.cell("times", "large", "ours"):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

def broken(_): raise ValueError("a | b")
def crash(_): os.abort()
def slow(_): time.sleep(60)

STAGES = {{"fine": (fine, 30, ()), "missing": (missing, 30, ("no_such_library",)), "broken": (broken, 30, ()),
          "crash": (crash, 30, ()), "slow": (slow, 0.1, ()), "late": (fine, 30, ())}}
if sys.argv[1:2] == ["--stage"]:
    stages.perform(STAGES, sys.argv[2], None)
else:
    stages.run(__file__, STAGES, list(STAGES)[:-1], 1)
    stages.run(__file__, STAGES, ["late"], 0)
"""


@pytest.fixture(scope="module")
def gpu():
    """bench/gpu.py, beside which tests/gpu.py has the same name."""
    spec = importlib.util.spec_from_file_location("bench_gpu", BENCH / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    kept, sys.modules["bench_gpu"] = dict(os.environ), module    # dataclasses look their module up
    spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(kept)
    return module


def test_a_stage_that_fails_costs_its_own_results_only(tmp_path):
    script = tmp_path / "small.py"
    script.write_text(SCRIPT.format(bench=str(BENCH)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"OUT": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    first = done.stdout.split("| stages |")[0]
    time, share = first.split("sleep | ours: ")[1].split("\n")[0].split(" ms, exact ")
    assert 10 <= float(time) < 1000 and 0 < int(share.strip("(%)")) <= 50                # 5 GFLOP at 1 TFLOP/s: 5 ms
    for words in ("sleep | theirs: ZeroDivisionError: division by zero",
                  "missing | ours: not installed: no_such_library",
                  "large | ours: does not fit", "broken | error: ValueError: a / b", "crash | error: exit -6",
                  "slow | error: stopped after 0 s", "late | error: no time left"):
        assert words in done.stdout
    assert "row by a library" in (tmp_path / "small.log").read_text()
    assert json.loads((tmp_path / "small.json").read_text()) == [
        {"table": "stages", "row": "late", "column": "error", "text": "no time left"}]
    assert (tmp_path / "small.md").read_text().startswith("| stages | error |\n|---|--:|\n| late | no time left |")


def test_tables_have_a_cell_for_each_row_and_column():
    rows = [{"table": "t", "row": row, "column": column, "text": f"{row}{column}"} for row, column in
            (("a", "x"), ("b", "y"), ("a", "z"))]
    assert stages.tables(rows) == "| t | x | y | z |\n|---|--:|--:|--:|\n| a | ax |  | az |\n| b |  | by |  |\n"


def test_operations_are_those_of_the_programs(gpu):
    cfg, B, T, side = flux.Config(), 3, 40, 6
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    params = jax.tree.map(lambda t: shape(*() if t.layers is None else (t.layers,), *t.shape), mmdit.table(cfg))
    x = shape(B, side ** 2, 64), shape(B, T, 4096), shape(B, 768), shape(B)
    counted = loop.flops(lambda p, *x: flux.velocity(p, cfg, *x, grid=(side, side)), params, *x)
    assert gpu.block_flops(cfg, B, T, side ** 2, 19, 38) == pytest.approx(counted, rel=0.01)     # without the ends
    t5 = text.T5Config()
    params = jax.tree.map(lambda t: shape(*() if t.layers is None else (t.layers,), *t.shape), text.t5_table(t5))
    counted = loop.flops(lambda p, ids: text.t5(p, t5, ids), params, jax.ShapeDtypeStruct((B, T), jnp.int32))
    assert gpu.t5_flops(t5, B, T) == pytest.approx(counted, rel=0.01)


def test_noise_looks_random(gpu):
    one, two = (np.asarray(gpu.noise((5, 33, 400), jnp.float32, seed, 3.0, 2.0)) for seed in (0, 1))
    assert abs(one.mean() - 3) < 0.05 and abs(one.std() - 2) < 0.05
    for a, b in ((one, two), (one[0], one[1]), (one[:, :-1], one[:, 1:]), (one[..., :-1], one[..., 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03
    codes = np.asarray(gpu.noise((64, 400), jnp.uint8, 0, 0.0, 0.0))
    assert np.bincount(codes.ravel(), minlength=256).min() > 50


def test_random_weights_have_the_shapes_of_quantized_ones(gpu):
    table = mmdit.table(gpu.SMALL.flux)
    for kind in ("nf4", "int8"):
        params = gpu.random_params(table, "transformer", kind)
        for tensor, leaf in zip(jax.tree.leaves(table["double"]), jax.tree.leaves(
                params["double"], is_leaf=lambda leaf: hasattr(leaf, "scales"))):
            assert leaf.shape == (tensor.layers, *tensor.shape) and leaf.dtype == jnp.bfloat16
            assert hasattr(leaf, "scales") == (len(tensor.shape) == 2)
