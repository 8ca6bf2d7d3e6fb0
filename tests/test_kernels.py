"""The sparse kernels against their dense references, and against the promise to build nothing of [B, F] backwards."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import kernels

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


def compare_decoders(values, indices, W_dec):
    target = normal(9, values.shape[0], W_dec.shape[1])

    def loss(decode, values, W_dec):
        out = decode(values, indices, W_dec)
        return jnp.sum((out - target) ** 2), out

    def run(decode):
        return jax.jit(jax.value_and_grad(loss, (1, 2), has_aux=True), static_argnums=0)(decode, values, W_dec)

    assert_close(run(kernels.sparse_decode), run(kernels.sparse_decode_dense))


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

    assert_close(run(kernels.sparse_encode), run(kernels.sparse_encode_dense))


def test_selecting_from_masked_preactivations():
    """Fewer candidates than k: the rest has value 0, and neither value nor gradient becomes NaN."""
    x, W, b = normal(0, 8, 5), normal(1, 12, 5), np.ones(12, np.float32)
    allowed = np.arange(12) < 2

    def loss(W):
        pre = jnp.where(allowed, kernels.preactivations(x, W, b), -jnp.inf)
        values, indices = kernels.select(pre, 6, x, W, b)
        return jnp.sum(values**2), (values, indices)

    result = jax.jit(jax.value_and_grad(loss, has_aux=True))(W)
    values, indices, gradient = map(np.asarray, (*result[0][1], result[1]))
    assert np.isfinite(gradient).all() and (gradient[2:] == 0).all() and (gradient[:2] != 0).all()
    assert (values[:, 2:] == 0).all() and (indices[:, :2] < 2).all()


def test_topk_is_exact_and_checks_k():
    x = np.random.default_rng(0).standard_normal((17, 301)).astype(np.float32)
    values, indices = kernels.topk(x, 23)
    np.testing.assert_array_equal(values, -np.sort(-x, axis=1)[:, :23])
    np.testing.assert_array_equal(np.take_along_axis(x, np.asarray(indices), 1), values)
    np.testing.assert_array_equal(kernels.topk(jnp.asarray([[1.0, 3, 3, 3, 2]]), 2)[1], [[1, 2]])
    for f in (1024, 1027):  # in two stages, and not; most values are equal, so that their order counts
        coarse = np.round(normal(f, 37, f) * 2)
        values, indices = jax.jit(kernels.topk, static_argnums=1)(coarse, 5)
        order = np.argsort(-coarse, axis=1, kind="stable")[:, :5]
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_array_equal(values, np.take_along_axis(coarse, order, 1))
    for k in (0, 302):
        with pytest.raises(ValueError, match=f"k = {k} of F = 301"):
            kernels.topk(x, k)


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
    return autoencode(kernels.sparse_encode_dense, kernels.sparse_decode_dense, *args)


def test_backward_builds_nothing_of_size_b_by_f():
    args = normal(0, B, D), normal(1, F, D), np.zeros(F, np.float32), normal(2, F, D)

    def count(f):
        return sum(np.prod(shape) >= B * F for shape in shapes_built(jax.make_jaxpr(f)(*args).jaxpr))

    assert count(jax.grad(sparse, (0, 1, 2, 3))) == count(sparse)
    assert count(jax.grad(dense, (0, 1, 2, 3))) > count(dense)  # the count does see them


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
