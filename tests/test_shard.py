"""Placement and walkers, on eight CPU devices in a process of their own (`devices.py`)."""
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import checkpoint
import shard

MESHES = ("fsdp 8", "data 2 x fsdp 4")


@pytest.fixture(scope="module")
def answers(nano, tmp_path_factory):
    script = Path(__file__).with_name("devices.py")
    result = subprocess.run([sys.executable, script, nano, tmp_path_factory.mktemp("devices")], capture_output=True,
                            text=True, timeout=900, check=False)
    assert not result.returncode, result.stderr[-2000:]
    return dict(json.loads(line) for line in result.stdout.splitlines() if line.startswith('["'))


@pytest.mark.parametrize("mesh", ["one device", *MESHES])
def test_same_activations_wherever_they_are_computed(answers, mesh):
    """Text encoding and residuals of nano in NF4, by the sliced walker, beside one plain scan on one device."""
    assert max(answers[f"{mesh}: activations"]) <= 1e-5


@pytest.mark.parametrize("mesh", ["one device", *MESHES])
def test_same_edits_wherever_they_are_made(answers, mesh):
    assert answers[f"{mesh}: edited"] <= 1e-5


def test_attribution_is_the_same_on_eight_devices_and_unrolls_no_blocks(answers):
    assert max(answers["attribution"]) <= 1e-4
    one, eight = answers["scans of an attribution"]
    assert eight < 4 * one                                       # a program for each of 12 blocks would be far larger


def test_without_quantization(answers):
    assert max(answers["fsdp 8, not quantized"]) <= 1e-5


@pytest.mark.parametrize("mesh", ["one device", "fsdp 8"])
def test_both_walkers_give_the_same_bits(answers, mesh):
    assert answers[f"{mesh}: scan - sliced"] == [0, 0, 0]


@pytest.mark.parametrize("mesh", MESHES)
def test_codes_and_scales_live_in_parts(answers, mesh):
    n = int(mesh[-1])
    assert answers[f"{mesh}: parts"] == [n, n, 1]                # codes, scales, bias


def test_same_sae_after_20_steps(answers):
    """With its features on eight devices and on one, from the same activations. Those of another model's split differ
    by 5e-7, and this alone may decide a choice among features differently."""
    assert max(answers["fsdp 8: SAE"].values()) <= 1e-4


def test_a_batch_that_does_not_divide(answers):
    """Eight devices fill it up, rather than that each computes all of it."""
    assert answers["three prompts on eight devices"] <= 1e-5
    assert answers["examples a device"] == [[1, True], [1, True], [1, True], [2, True]]


def test_batches_grow_with_the_devices(answers):
    """4 a device, as FLUX.1 takes; 32 in all, as nano does, or 33; the more of both."""
    assert answers["batches"] == [32, 32, 40, 32] and (shard.batch(4), shard.batch(1, 32)) == (4, 32)


def test_another_layer_compiles_nothing(answers):
    """Four layers of nano twice: at most four programs (each kind of block, plain and captured), and none later."""
    counts = answers["compilations"]
    assert counts[-1] == counts[len(counts) // 2 - 1] <= counts[0] + 3


def test_mesh_says_what_divides():
    assert shard.mesh(jax.devices()[:1]).shape == {"data": 1, "fsdp": 1}
    with pytest.raises(ValueError, match="data is 3: it must divide the number of devices, 1"):
        shard.mesh(jax.devices()[:1], data=3)


class Four:
    """What `spec` asks of a mesh."""
    shape, size = {"data": 1, "fsdp": 4}, 4


def test_what_is_split():
    big = jax.ShapeDtypeStruct((3072, 1024), jnp.bfloat16)
    assert shard.spec(Four, big, "transformer.double.img.qkv.w") == PartitionSpec("fsdp")
    scales = jax.ShapeDtypeStruct((6, 1024), jnp.float32)
    assert shard.spec(Four, scales, "transformer.double.img.qkv.w") == PartitionSpec(None, "fsdp")
    assert shard.spec(Four, big, "transformer.txt_in.w") == PartitionSpec()          # no stacked block
    assert shard.spec(Four, jax.ShapeDtypeStruct((1024,), jnp.bfloat16), "transformer.single.in.b") == PartitionSpec()
    assert shard.spec(Four, jax.ShapeDtypeStruct((66, 130), jnp.bfloat16), "t5.block.q") == PartitionSpec()    # small
    odd = jax.ShapeDtypeStruct((8190, 130), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"t5.block.q of shape \[8190, 130\] cannot be split over 4.*1, 2, 3, 5, 6"):
        shard.spec(Four, odd, "t5.block.q")
    with pytest.raises(ValueError, match="130 features cannot be split over 4 devices: take a multiple of 4"):
        shard.check(Four, 130)


def test_a_single_layer_and_none():
    """Walkers on blocks of their own, with something caught, over no layer, one, and all."""
    def block(x, p, shift):
        y = jnp.tanh(x @ p) + shift
        return y, {"y": y}

    rng = np.random.default_rng(0)
    x, stack = jnp.asarray(rng.standard_normal((3, 5))), jnp.asarray(rng.standard_normal((4, 5, 5)))
    for layers in (range(0), range(2, 3), range(4)):
        y, expected = x, []
        for i in layers:
            y, caught = block(y, stack[i], 0.5)
            expected.append(caught["y"])
        for walk in (shard.scan(), shard.sliced()):
            z, caught = walk(block, x, stack, layers, 0.5)
            np.testing.assert_allclose(z, y, rtol=1e-6, atol=1e-6)
            if layers:
                np.testing.assert_allclose(caught["y"], np.stack(expected), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- several hosts: two processes, two devices in all

FLAGS = {"layer": 5, "features": 256, "k": 8, "batch": 256, "buffer": 2048, "prompt_batch": 8, "quant": "nf4",
         "size": 64, "text_tokens": 16, "log_every": 4, "save_every": 4}


def hosts(nano, outs, devices=1, **flags):
    """One train.py for each of `outs`, its checkpoint folder, all one program on as many hosts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    environment = conftest.devices(devices)
    flags = [f"--{name}={value}" for name, value in (FLAGS | {"model": nano} | flags).items()]
    each = [[f"--out={out}"] + [f"--distributed={where},{len(outs)},{i}"] * (len(outs) > 1)
            for i, out in enumerate(outs)]
    return [subprocess.Popen([sys.executable, Path(shard.__file__).with_name("train.py"), *flags, *mine], text=True,
                             env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for mine in each]


def finish(processes, timeout=300):
    """(code, stdout, stderr) of each; none goes on where one takes too long."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, said)]


@pytest.fixture(scope="module")
def two_hosts(nano, tmp_path_factory):
    """The checkpoint folder of a run on two hosts, what they said, and the folder that the second one was given."""
    work = tmp_path_factory.mktemp("hosts")
    said = finish(hosts(nano, [work / "ckpt", work / "second"], steps=10))
    assert [code for code, *_ in said] == [0, 0], said
    return work / "ckpt", said, work / "second"


def test_two_hosts_are_as_one_with_two_devices(nano, two_hosts, tmp_path):
    """The same bytes, but for the speed in metrics.jsonl; only the first host writes and prints."""
    (code, *_, errors), = finish(hosts(nano, [tmp_path / "one"], devices=2, steps=10))
    assert code == 0, errors
    folder, said, second = two_hosts
    assert not second.exists() and "model:" not in said[1][1] and "step/s" not in said[1][2]
    for file in (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.CONFIG):
        assert (folder / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_killed_host_ends_the_other(nano, two_hosts):
    """In a resumed run; what is left says so within a minute, and the checkpoint is whole."""
    folder, *_ = two_hosts
    first, second = hosts(nano, [folder, folder], steps=100_000, resume=True)
    while first.poll() is None and '"step": 20' not in (folder / "metrics.jsonl").read_text():
        time.sleep(0.1)
    second.send_signal(signal.SIGKILL)
    (code, _, errors), _ = finish([first, second], timeout=60)
    assert code == 2 and "error: " in errors and f"go on from the checkpoint in {folder}: --resume" in errors
    assert int(checkpoint.load_state(folder)[0].step) >= 16 and checkpoint.load(folder)[1].features == 256


def test_a_signal_to_one_host_saves_and_ends_both(nano, tmp_path):
    """At one step; the exit codes say which signal it was, so that what follows after && does not run. JAX tells the
    other host as of SIGTERM."""
    first, second = hosts(nano, [tmp_path / "ckpt"] * 2, steps=100_000)
    while first.poll() is None and not (tmp_path / "ckpt" / "metrics.jsonl").exists():
        time.sleep(0.1)
    second.send_signal(signal.SIGINT)
    said = finish([first, second], timeout=120)
    assert [code for code, *_ in said] == [143, 130], said
    assert "stopped by SIGTERM; --resume goes on" in said[0][1]
    assert int(checkpoint.load_state(tmp_path / "ckpt")[0].step) >= 4
    assert checkpoint.load(tmp_path / "ckpt")[1].features == 256


def test_a_mistake_ends_every_host(nano, two_hosts, tmp_path):
    folder, *_ = two_hosts
    said = finish(hosts(nano, [folder, tmp_path / "no"], steps=20, resume=True))
    for code, _, errors in said:
        assert code == 2 and f"error: host 1: --resume: there is no checkpoint in {tmp_path / 'no'}" in errors
        assert "Traceback" not in errors


def test_bare_distributed_away_from_a_pod(nano, tmp_path):
    for flag, message in (("--distributed", "no other processes found"), ("--distributed=a,b", "host:port,processes")):
        result = subprocess.run([sys.executable, Path(shard.__file__).with_name("train.py"), "--model", nano, flag],
                                capture_output=True, text=True, cwd=tmp_path, check=False)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
