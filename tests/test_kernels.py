"""The sparse kernels against their dense references, and against the promise to build nothing of [B, F] backwards."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

import kernels
import kernels_gpu
import kernels_tpu

# B, F, D, k: one row, one active feature, one feature, k = F, and nothing that is a power of two
SIZES = [(1, 7, 5, 3), (5, 13, 3, 1), (4, 1, 6, 1), (7, 11, 4, 11), (61, 257, 31, 8)]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def some(seed, b, f, k):
    """k different indices below f for each of b rows."""
    return np.argsort(normal(seed, b, f), axis=1)[:, :k].astype(np.int32)


def assert_close(actual, expected):
    """To 1e-5 of the largest entry."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * max(1.0, np.abs(np.asarray(b)).max())


def decode_dense(values, indices, W_dec):
    """Scatters the values to [B, F], then one product."""
    scattered = jnp.zeros((len(values), len(W_dec)), values.dtype)
    scattered = scattered.at[jnp.arange(len(values))[:, None], indices].add(values)
    return jnp.matmul(scattered, W_dec, precision=jax.lax.Precision.HIGHEST)


def encode_dense(x, W_enc, b_enc, k):
    """JAX's own derivative, through [B, F]."""
    values, indices = kernels.topk(jnp.matmul(x, W_enc.T, precision=jax.lax.Precision.HIGHEST) + b_enc, k)
    return jax.nn.relu(values), indices


def compare_decoders(values, indices, W_dec, mesh=None):
    target = normal(9, values.shape[0], W_dec.shape[1])

    def loss(decode, values, W_dec):
        out = decode(values, indices, W_dec)
        return jnp.sum((out - target) ** 2), out

    def run(decode):
        return jax.jit(jax.value_and_grad(loss, (1, 2), has_aux=True), static_argnums=0)(decode, values, W_dec)

    ours = partial(kernels.sparse_decode, mesh=mesh)
    assert_close(run(ours), run(decode_dense))


@pytest.mark.parametrize("size", SIZES)
def test_sparse_decode_equals_dense(size):
    b, f, d, k = size
    compare_decoders(normal(0, b, k), some(1, b, f, k), normal(2, f, d))


def test_sparse_decode_adds_repeated_indices():
    """Within a row and across rows."""
    indices = np.asarray([[2, 2, 2, 0], [0, 2, 0, 2], [1, 1, 1, 1]])
    compare_decoders(normal(0, 3, 4), indices, normal(1, 5, 7))


def test_sparse_decode_gives_zero_values_their_gradient():
    values = normal(0, 6, 4)
    values[:, 1:3] = values[2] = 0
    compare_decoders(values, some(1, 6, 9, 4), normal(2, 9, 5))


@pytest.mark.parametrize("features", [1, 8200, 2**29, 2**31 - 1])
def test_entries_by_feature(features):
    """In one number of 32 bits, or where they have no room there, in two."""
    indices = np.random.default_rng(0).integers(max(0, features - 40), features, (37, 5)).astype(np.int32)
    found, places = jax.jit(kernels._by_feature, static_argnums=1)(indices, features)
    order = np.argsort(indices.reshape(-1), kind="stable")
    np.testing.assert_array_equal(places, order)
    np.testing.assert_array_equal(found, indices.reshape(-1)[order])


def test_large_gradients_are_summed_feature_by_feature():
    """Those that no cache holds; some features twice in a row, one in all of them, most in none."""
    b, f, d, k = 37, 8200, 521, 5
    indices = some(1, b, f, k)
    indices[:, 0], indices[3, 1:3] = 8199, 77
    compare_decoders(normal(0, b, k), indices, normal(2, f, d))


@pytest.mark.parametrize("size", SIZES)
def test_sparse_encode_equals_dense(size):
    b, f, d, k = size
    bias = normal(2, f) * 0.1 - 1.5 * (b % 2)  # on odd B many of the top k are negative, so the ReLU cuts them
    args = normal(0, b, d), normal(1, f, d) / d**0.5, bias
    weight = normal(3, b, k)

    def loss(encode, *args):
        values, indices = encode(*args, k)
        return jnp.sum(weight * values**2 + values), (values, indices)

    def run(encode):
        return jax.jit(jax.value_and_grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)(encode, *args)

    assert_close(run(kernels.sparse_encode), run(encode_dense))


@pytest.fixture
def one_device(monkeypatch):
    """A mesh on which everything is done by the TPU kernels, in Pallas' interpreter. MiB of VMEM may be set."""
    def plan(mesh, values, rows):
        chip = kernels_tpu.Chip(plan.vmem, 1, 1)
        return kernels_tpu.cut(chip, values.shape[0], rows.shape[1])._replace(interpret=True)

    plan.vmem = 100
    monkeypatch.setattr(kernels, "plan", plan)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "tensor")
    return lambda vmem=100: setattr(plan, "vmem", vmem) or mesh


# B, F, D, k, MiB of VMEM: one row and one feature; blocks, chunks and groups that are not full; rows of 3, 8, 9 and
# 2 x 8 registers' parts; more entries than a chunk; D in slices
@pytest.mark.parametrize("size", [(1, 1, 128, 1, 100), (61, 777, 384, 5, 100), (300, 515, 1024, 11, 100),
                                  (37, 300, 1152, 33, 100), (37, 515, 2048, 64, 20)])
def test_tpu_kernels_equal_dense(one_device, size):
    b, f, d, k, vmem = size
    mesh = one_device(vmem)
    assert kernels.plan(mesh, np.zeros((b, k)), np.zeros((f, d))).slices == (2 if d == 2048 else 1)
    compare_decoders(normal(0, b, k), some(1, b, f, k), normal(2, f, d), mesh)


def test_tpu_kernels_add_repeated_indices(one_device):
    """Within a row and across rows, in one group and over the ends of groups and chunks."""
    indices = np.random.default_rng(1).integers(0, 3, (61, 40)) * 255
    compare_decoders(normal(0, 61, 40), indices, normal(1, 777, 128), one_device())


def test_tpu_kernels_give_the_encoders_gradient(one_device):
    compare_encoders(777, one_device())


def compare_encoders(f, mesh):
    args, weight = (normal(0, 61, 256), normal(1, f, 256) / 16, normal(2, f) * 0.1), normal(3, 61, 8)

    def loss(encode, *args):
        values, indices = encode(*args, 8)
        return jnp.sum(weight * values**2 + values), (values, indices)

    def run(encode):
        return jax.jit(jax.value_and_grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)(encode, *args)

    assert_close(run(partial(kernels.sparse_encode, mesh=mesh)), run(encode_dense))


@pytest.fixture
def one_gpu(monkeypatch):
    """A mesh on which everything is done by the GPU kernels, in Pallas' interpreter."""
    monkeypatch.setattr(kernels, "plan", interpreted_on_a_gpu)
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), "tensor")


def interpreted_on_a_gpu(mesh, values, rows):
    """Blocks of 16 columns or more, so that small rows need several."""
    return kernels_gpu.cut(*values.shape[:1], *rows.shape)._replace(columns=16, together=4, interpret=True)


# B, F, D, k: SIZES and rows of several blocks of columns; more entries of one feature than a piece has
@pytest.mark.parametrize("size", [*SIZES, (13, 40, 70, 6), (300, 3, 33, 2)])
def test_gpu_kernels_equal_dense(one_gpu, size):
    b, f, d, k = size
    compare_decoders(normal(0, b, k), some(1, b, f, k), normal(2, f, d), one_gpu)


@pytest.mark.parametrize("features", [3, 257])
def test_gpu_kernels_add_repeated_indices(one_gpu, monkeypatch, features):
    """Within a row and across rows; with 3 features each has many pieces, with 257 most have no entry."""
    monkeypatch.setattr(kernels_gpu, "PIECE", 8)
    indices = np.random.default_rng(1).integers(0, 3, (61, 12)) * (features // 3)
    compare_decoders(normal(0, 61, 12), indices, normal(1, features, 37), one_gpu)


@pytest.mark.parametrize("features", [9, 77])
def test_gpu_kernels_give_the_encoders_gradient(one_gpu, features):
    compare_encoders(features, one_gpu)


def test_gpu_kernels_sort_once_for_both_gradients(one_gpu):
    """The compiler finds that both sort the same numbers."""
    x, W = normal(0, 8, 6), normal(1, 40, 6)

    def loss(W_enc, W_dec):
        values, indices = kernels.sparse_encode(x, W_enc, jnp.zeros(40), 3, one_gpu)
        return jnp.sum((kernels.sparse_decode(values, indices, W_dec, one_gpu) - x) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(W, W).compile().as_text()
    assert len([line for line in compiled.splitlines() if " sort(" in line and "s32[24]" in line]) == 1


def test_entries_are_cut_into_pieces(monkeypatch):
    """Each entry lies in one piece of its feature, in the order of tokens; those of other devices lie in none."""
    monkeypatch.setattr(kernels_gpu, "PIECE", 4)
    indices = np.random.default_rng(0).integers(-2, 9, (23, 5))
    indices[:, 0] = 3
    entries = jax.tree.map(np.asarray, kernels_gpu.sorted_entries(jnp.asarray(indices), 7))
    found = [[] for _ in range(7)]
    for number, (feature, first, last) in enumerate(zip(*entries[1:])):
        assert (last - first <= 4 and feature == number) if number < 7 else (last > first) == (feature < 7)
        if last > first:
            found[feature] += entries.places[first:last].tolist()
    assert found == [np.flatnonzero(indices == feature).tolist() for feature in range(7)]


def test_gpu_topk():
    """Equal values, masked ones, rising ones, and all large ones in few groups: then a row has too many candidates."""
    check_topk(lambda x, k: kernels_gpu.topk(x, k, interpret=True))
    x = normal(0, 5, 1500)
    places = np.arange(1500)
    for row in (np.where(places < 3, x, -np.inf), np.sort(x), np.where(places % 256 == 3, x + 9, x), -np.abs(x),
                np.where(places % 256 == 3, 9, x)):
        values, indices = kernels_gpu.topk(jnp.asarray(row, jnp.float32).reshape(5, 1, 1500), 32, interpret=True)
        order = np.argsort(-row, axis=1, kind="stable")[:, :32]
        np.testing.assert_array_equal(indices[:, 0], order)
        np.testing.assert_array_equal(values[:, 0], np.take_along_axis(row.astype(np.float32), order, 1))


def test_features_split_over_devices():
    """By all four ways, on four devices, which need a process of their own."""
    environment = conftest.devices(4)
    path = os.pathsep.join([str(Path(kernels.__file__).parent), *sys.path])
    subprocess.run([sys.executable, __file__], env=environment | {"PYTHONPATH": path}, check=True, timeout=600)


def on_four_devices():
    mesh, split = jax.sharding.Mesh(np.array(jax.devices()), "tensor"), jax.sharding.PartitionSpec(None, "tensor")
    assert mesh.size == 4
    check_topk(partial(kernels.topk, mesh=mesh))
    x = jax.ShapeDtypeStruct((61, 772), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, split))
    sent = jax.jit(lambda x: kernels.topk(x, 5, mesh)).lower(x).compile().as_text()
    assert set(re.findall(r"\[([0-9,]+)\][^ ]* all-gather\(", sent)) <= {"61,20"}  # four times five, not all of x
    for plan in (kernels.plan, lambda *_: "dense", interpreted_on_a_gpu, lambda mesh, values, rows: kernels_tpu.cut(
            kernels_tpu.CHIPS["v5e"], values.shape[0], rows.shape[1])._replace(interpret=True)):
        kernels.plan = plan
        compare_decoders(normal(0, 61, 5), some(1, 61, 772, 5), normal(2, 772, 128), mesh)
        compare_encoders(772, mesh)


def test_plan():
    """Few active features of many are the kernels', many of few dense; what a kernel cannot hold is dense as well."""
    def ask(kind, k, D=3072, F=65536, dtype=jnp.float32):
        device = SimpleNamespace(platform="cpu" if kind == "cpu" else "tpu", device_kind=kind)
        mesh = SimpleNamespace(devices=np.array([device]), size=1)
        how = kernels.plan(mesh, jax.ShapeDtypeStruct((4096, k), dtype), jax.ShapeDtypeStruct((F, D), dtype))
        return how if isinstance(how, str) else how.slices

    assert ask("cpu", 32) == "scan" and kernels.plan(None, None, None) == "scan"
    assert ask("TPU v5 lite", 64) == 1 and ask("TPU v6 lite", 64) == 1 and ask("TPU v5", 64) == 2
    assert ask("TPU v5 lite", 2048, F=4096) == "dense"
    assert ask("TPU v5 lite", 32, D=3000) == "dense" and ask("TPU v5 lite", 32, dtype=jnp.bfloat16) == "dense"
    assert ask("TPU v4", 64) == 8


def test_plan_for_a_gpu():
    """Few active features of many are the kernels', many of few dense. Without Triton, all in plain XLA."""
    def ask(k, F, kind="9.0", D=3072, dtype=jnp.float32):
        device = SimpleNamespace(platform="gpu", compute_capability=kind)
        mesh = SimpleNamespace(devices=np.array([device]), size=1)
        how = kernels.plan(mesh, jax.ShapeDtypeStruct((8192, k), dtype), jax.ShapeDtypeStruct((F, D), dtype))
        return how if isinstance(how, str) else how.columns

    assert ask(32, 16384) == 512 and ask(64, 65536) == 128 and ask(32, 16384, D=130) == 256
    assert ask(32, 2048) == "dense" and ask(512, 16384) == "dense"
    assert ask(32, 16384, "7.5") == ask(32, 16384, "gfx90a") == ask(32, 16384, dtype=jnp.bfloat16) == "scan"


@pytest.mark.parametrize("size", SIZES)
def test_dense_products_equal_the_sparse_ones(monkeypatch, size):
    """Those of TPUs without kernels."""
    b, f, d, k = size
    monkeypatch.setattr(kernels, "plan", lambda *args: "dense")
    compare_decoders(normal(0, b, k), some(1, b, f, k), normal(2, f, d))


def test_selecting_from_masked_preactivations():
    """Fewer candidates than k: the rest has value 0, and neither value nor gradient becomes NaN."""
    x, W, b = normal(0, 8, 5), normal(1, 12, 5), np.ones(12, np.float32)
    allowed = np.arange(12) < 2

    def masked(W):
        return kernels.select(jnp.where(allowed, kernels.preactivations(x, W, b), -jnp.inf), 6, x, W, b)

    def without_bias(W):
        return kernels.sparse_encode(x, W, jnp.where(allowed, b, -jnp.inf), 6)

    for encode in (masked, without_bias):
        def loss(W, encode=encode):
            values, indices = encode(W)
            return jnp.sum(values**2), (values, indices)

        result = jax.jit(jax.value_and_grad(loss, has_aux=True))(W)
        values, indices, gradient = map(np.asarray, (*result[0][1], result[1]))
        assert np.isfinite(gradient).all() and (gradient[2:] == 0).all() and (gradient[:2] != 0).all()
        assert (values[:, 2:] == 0).all() and (indices[:, :2] < 2).all()


@pytest.mark.parametrize("rows", [512, 1536, 1540])
def test_encoding_in_pieces(rows):
    """The same features, in the same rows, as of all at once."""
    x, W, b = normal(0, rows, 6), normal(1, 40, 6), normal(2, 40)
    values, indices = jax.jit(kernels.sparse_encode, static_argnums=3)(x, W, b, 5)
    expected, places = encode_dense(x, W, b, 5)
    np.testing.assert_array_equal(indices, places)
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_topk_is_exact_and_checks_k():
    check_topk(kernels.topk)
    np.testing.assert_array_equal(kernels.topk(jnp.asarray([[1.0, 3, 3, 3, 2]]), 2)[1], [[1, 2]])
    for k in (0, 302):
        with pytest.raises(ValueError, match=f"k = {k} of F = 301"):
            kernels.topk(normal(0, 17, 301), k)


@pytest.mark.parametrize("size", [16, 128])
def test_topk_of_blocks(size):
    check_topk(partial(kernels._topk_of_blocks, size=size))


def check_topk(topk):
    """In two stages, and not; most values are equal, so that their order counts."""
    for f, k in [(1024, 5), (1028, 5), (2048, 5), (4096, 16), (772, 200), (772, 772)]:
        coarse = np.round(normal(f, 37, f) * 2) + 0.0  # no negative zeros, which top_k holds for less
        values, indices = jax.jit(topk, static_argnums=1)(coarse, k)
        order = np.argsort(-coarse, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_array_equal(values, np.take_along_axis(coarse, order, 1))


def test_bfloat16_is_summed_in_float32():
    values, W = jnp.ones((1, 512), jnp.bfloat16), jnp.ones((512, 3), jnp.bfloat16)
    out = kernels.sparse_decode(values, jnp.arange(512)[None], W)
    assert out.dtype == jnp.bfloat16 and (out == 512).all()  # in bfloat16, 256 + 1 = 256


def shapes_built(jaxpr):
    """The shape of every value that any equation of a jaxpr builds, nested ones included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: isinstance(p, Jaxpr)):
            if isinstance(parameter, ClosedJaxpr | Jaxpr):
                yield from shapes_built(getattr(parameter, "jaxpr", parameter))


B, F, D, K = 24, 1013, 7, 3


def autoencode(encode, decode, x, W_enc, b_enc, W_dec):
    values, indices = encode(x, W_enc, b_enc, K)
    return jnp.sum((decode(values, indices, W_dec) - x) ** 2)


def sparse(*args):
    return autoencode(kernels.sparse_encode, kernels.sparse_decode, *args)


def dense(*args):
    return autoencode(encode_dense, decode_dense, *args)


def test_backward_builds_nothing_of_size_b_by_f(monkeypatch):
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, cpu=None, default=None, **_: (cpu or default)(*args))
    args = normal(0, B, D), normal(1, F, D), np.zeros(F, np.float32), normal(2, F, D)

    def count(f):
        return sum(np.prod(shape) >= B * F for shape in shapes_built(jax.make_jaxpr(f)(*args).jaxpr))

    assert count(jax.grad(sparse, (0, 1, 2, 3))) == count(sparse)
    assert count(jax.grad(dense, (0, 1, 2, 3))) > count(dense)  # the count does see them


@pytest.mark.parametrize(("b", "f", "d", "k"), [(1, 1, 1, 1), (13, 101, 7, 1), (24, 1013, 9, 5), (64, 40, 33, 12)])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("chip", ["gpu", "tpu"])
def test_what_another_chip_runs_equals_the_dense_form(monkeypatch, b, f, d, k, repeated, chip):
    """The branches that `platform_dependent` takes on a GPU, and on a TPU without a mesh."""
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, **of: of.get(chip, default)(*args))
    rng = np.random.default_rng(b + k)
    indices = jnp.asarray(rng.integers(0, f, (b, k)) if repeated else np.argsort(rng.random((b, f)), 1)[:, :k])
    values, W, g = map(jnp.asarray, (normal(0, b, k), normal(1, f, d), normal(2, b, d)))
    ours, pull = jax.vjp(lambda v, W: kernels.sparse_decode(v, indices, W), values, W)
    theirs, pull_dense = jax.vjp(lambda v, W: decode_dense(v, indices, W), values, W)
    assert_close((ours, *pull(g)), (theirs, *pull_dense(g)))
    vector = jnp.asarray(normal(3, f))
    slope = jax.grad(lambda vector: jnp.vdot(kernels.gather(vector, indices), values))(vector)
    np.testing.assert_allclose(slope, jax.grad(lambda vector: jnp.vdot(vector[indices], values))(vector), atol=1e-5)
    if not repeated:
        args = tuple(map(jnp.asarray, (normal(4, b, d), normal(5, f, d), normal(6, f), normal(7, f, d))))
        run = lambda encode, decode: jax.grad(lambda *args: jnp.sum(decode(*encode(*args[:3], k), args[3]) ** 2),
                                              (0, 1, 2, 3))(*args)
        assert_close(run(kernels.sparse_encode, kernels.sparse_decode),
                     run(encode_dense, decode_dense))


def test_what_a_gpu_runs_adds_floats_in_no_scatter_of_rows(monkeypatch):
    """A GPU's scatter adds in any order. What is scattered here are single values, one to a place."""
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, **_: default(*args))
    args = normal(0, B, D), normal(1, F, D), np.zeros(F, np.float32), normal(2, F, D)
    jaxpr = jax.make_jaxpr(jax.grad(sparse, (0, 1, 2, 3)))(*args)
    scattered = [eqn.invars[2].aval.shape for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "scatter-add"]
    assert scattered and set(scattered) == {(B, K)}


def equations(jaxpr):
    """Every equation of a jaxpr, nested ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: isinstance(p, Jaxpr)):
            if isinstance(parameter, ClosedJaxpr | Jaxpr):
                yield from equations(getattr(parameter, "jaxpr", parameter))


def test_compiled_gradient_needs_room_for_one_b_by_f_array():
    b, f, d = 256, 4096, 8
    args = normal(0, b, d), normal(1, f, d), np.zeros(f, np.float32), normal(2, f, d)
    compiled = jax.jit(jax.grad(sparse, (1, 2, 3))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * b * f


@pytest.mark.parametrize("features", [1, 7, 128, 130, 300])
def test_by_rows_is_the_function_itself(features):
    """Also where pieces do not divide the rows."""
    rows = normal(features, features, 5)

    def unit(rows):
        return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)

    ours = jax.jit(lambda rows: kernels.by_rows(unit, rows))(rows)
    np.testing.assert_allclose(ours, unit(rows), rtol=1e-6)


if __name__ == "__main__":
    on_four_devices()
