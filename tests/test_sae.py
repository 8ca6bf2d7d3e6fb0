"""The SAE: training against its definitions, recovery of a known dictionary, files, SAELens both ways."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import apply
import checkpoint
import kernels
import normalize
import sae

CFG = sae.Config(d_in=12, features=50, k=4, lr=1e-3)
STEP = jax.jit(sae.step, static_argnums=1)


def residuals(n=512, d=12, seed=0):
    """Raw residuals with FLUX's troubles: scales over four orders of magnitude, means far from zero, heavy tails."""
    r = np.random.default_rng(seed)
    fixed = np.random.default_rng(99)
    scale, mean = 10 ** fixed.uniform(-2, 2, d), 5 * fixed.standard_normal(d)
    x = r.standard_t(4, (n, d)) + 2 * r.standard_t(4, (n, 1)) * fixed.standard_normal(d)
    return (scale * (x + mean)).astype(np.float32)


def trained(steps=5, cfg=CFG):
    state = sae.init(jax.random.key(0), cfg, residuals())
    for i in range(steps):
        state, _ = STEP(state, cfg, residuals(64, seed=i))
    return state


def assert_same(a, b):
    """Bit for bit, types and structure included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()


# ---- training -------------------------------------------------------------------------------------------------------


def test_init_takes_normalization_and_bias_from_the_data_and_ties_the_weights():
    x = residuals()
    x[:, 3] = 7.0  # a constant dimension
    x[:, 5] = 0.0
    state = sae.init(jax.random.key(0), CFG, x)
    np.testing.assert_allclose(state.mean, x.mean(0, dtype=np.float64), rtol=1e-5)
    changing = x.std(0) > 0
    np.testing.assert_allclose(state.std[changing], x.std(0, dtype=np.float64)[changing], rtol=1e-5)
    assert (state.std > 0).all()
    p = state.params
    np.testing.assert_allclose(jnp.linalg.norm(p["dec"], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(p["enc"] / jnp.linalg.norm(p["enc"], axis=1, keepdims=True), p["dec"], atol=1e-6)
    u = (x - np.asarray(state.mean)) / np.asarray(state.std)

    def distance(center):
        return np.linalg.norm(u - center, axis=1).sum()

    assert distance(np.asarray(p["b_dec"])) < distance(np.median(u, axis=0)) and distance(p["b_dec"]) < distance(0)
    _, metrics = STEP(state, CFG, x[:64])
    assert all(np.isfinite(value) for value in metrics.values())


def test_metrics_against_numpy():
    state, x = trained(), residuals(96, seed=5)
    _, metrics = STEP(state, CFG, x)
    p = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    u = (x - np.asarray(state.mean, np.float64)) / np.asarray(state.std, np.float64)
    pre = (u - p["b_dec"]) @ p["enc"].T + p["b_enc"]
    z = np.where(pre >= -np.sort(-pre, axis=1)[:, [CFG.k - 1]], np.maximum(pre, 0), 0)
    out = z @ p["dec"] + p["b_dec"]
    r = [np.corrcoef(u[:, d], out[:, d])[0, 1] for d in range(CFG.d_in)]
    cosine = (u * out).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(out, axis=1)
    fvu = ((u - out) ** 2).sum() / ((u - u.mean(0)) ** 2).sum()
    expected = {"fvu": fvu, "loss": fvu, "aux": 0, "l0": (z > 0).sum(1).mean(), "dead": 0}
    expected |= {"cosine": cosine.mean(), "variance_explained": np.mean(np.square(r))}
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, err_msg=name)
    assert metrics.keys() == expected.keys()


def test_fvu_divides_by_the_variance():
    """Predicting the mean has an FVU of 1, however far the mean is from zero, and a 'variance explained' of 0."""
    cfg = sae.Config(d_in=4, features=8, k=2)
    params = {"W_enc": jnp.zeros((4, 8)), "b_enc": jnp.zeros(8), "W_dec": jnp.zeros((8, 4))}
    x = residuals(500, 4) + 1000
    found = apply.evaluate(params | {"b_dec": jnp.asarray(x.mean(0))}, cfg, x)
    np.testing.assert_allclose([found.fvu, found.fvu_standardized], 1, rtol=1e-3)
    assert found.variance_explained < 1e-6 and found.l0 == 0 and found.dead == 1 and found.tokens == 500


def test_residuals_of_another_place_warn():
    params, x = sae.fold(trained(), CFG), residuals(300, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply.evaluate(params, CFG, x)
    with pytest.warns(UserWarning, match=r"FVU \d+\.\d: .* Are these residuals of the model, layer and site"):
        assert apply.evaluate(params, CFG, 3 * np.roll(x, 5, 1) - 20).fvu_standardized > 2


def test_evaluate_against_numpy_and_over_any_batches():
    state, x = trained(), residuals(700, seed=3)
    params = sae.fold(state, CFG)
    values, indices = map(np.asarray, sae.encode(params, CFG, x))
    out, x64 = np.asarray(sae.decode(params, CFG, values, indices), np.float64), x.astype(np.float64)
    error, deviation = ((x64 - out) ** 2).sum(0), ((x64 - x64.mean(0)) ** 2).sum(0)
    r = [np.corrcoef(x64[:, d], out[:, d])[0, 1] for d in range(CFG.d_in)]
    density = np.bincount(indices[values > 0], minlength=CFG.features) / len(x)
    cosine = ((x64 * out).sum(1) / np.linalg.norm(x64, axis=1) / np.linalg.norm(out, axis=1)).mean()
    expected = {"tokens": 700, "fvu": error.sum() / deviation.sum(), "fvu_standardized": np.mean(error / deviation)}
    expected |= {"l0": (values > 0).sum(1).mean(), "cosine": cosine, "dead": np.mean(density == 0)}
    expected |= {"variance_explained": np.mean(np.square(r)), "density": density}
    for batches in (x, x.reshape(7, 100, 12), [x[:100], x[100:350], x[350:]], (x[i : i + 350] for i in (0, 350))):
        for name, value in apply.evaluate(params, CFG, batches)._asdict().items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-9, err_msg=name)
    with pytest.raises(ValueError, match="no residuals"):
        apply.evaluate(params, CFG, [])


def test_decoder_rows_stay_unit_and_gradients_orthogonal():
    rows = np.asarray(trained().params["dec"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    gradient = np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32)
    left = np.asarray(sae.remove_parallel(gradient, rows))
    assert np.abs((left * rows).sum(1)).max() < 1e-5
    along = (gradient * rows).sum(1, keepdims=True) * rows
    np.testing.assert_allclose(left + along, gradient, atol=1e-5)


@pytest.mark.parametrize("clip", [1e3, 1e-2])
def test_update_is_clipped_adam(clip):
    """Of the gradient without what changes the lengths of decoder rows, clipped by its global norm: optax's own."""
    cfg, r = dataclasses.replace(CFG, features=300, warmup=3, clip=clip), np.random.default_rng(0)
    state = sae.init(jax.random.key(0), cfg, residuals())
    optimizer = optax.chain(optax.clip_by_global_norm(clip), sae._optimizer(cfg))
    params, opt = state.params, optimizer.init(state.params)
    for _ in range(4):
        grads = {name: r.standard_normal(p.shape).astype(np.float32) for name, p in state.params.items()}
        ours, moments = jax.jit(sae._updated, static_argnums=1)(state, cfg, grads, jnp.zeros(cfg.features, int))
        state = state._replace(params=ours, opt=moments)
        along = np.sum(grads["dec"] * params["dec"], axis=1, keepdims=True)
        updates, opt = optimizer.update(grads | {"dec": grads["dec"] - along * params["dec"]}, opt, params)
        params = optax.apply_updates(params, updates)
        params["dec"] /= np.linalg.norm(params["dec"], axis=1, keepdims=True)
        for name in params:
            np.testing.assert_allclose(state.params[name], params[name], atol=1e-6, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(state.opt), jax.tree.leaves(opt)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_aux_makes_dead_features_point_at_the_error():
    """The sign: descending AuxK's gradient lowers |e - e_hat|, for e = u - u_hat, and moves dead features only."""
    state, x = trained(), residuals(256, seed=8)
    u = (x - state.mean) / state.std
    _, (_, _, _, u_hat) = sae._reconstruct(state.params, CFG, u)
    dead, error = jnp.arange(CFG.features) < 20, u - u_hat

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return sae._aux_loss(params, CFG, u, dead, error)

    params, (before, _) = state.params, loss(state.params)
    for _ in range(30):
        _, gradient = loss(params)
        for name in ("enc", "dec", "b_enc"):
            assert (gradient[name][20:] == 0).all() and (gradient[name][:20] != 0).any()
        assert (gradient["b_dec"] == 0).all()
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    assert loss(params)[0] < 0.97 * before


@pytest.mark.parametrize("dead", [(), (7,), (4, 40), (0, 3, 9, 20, 31, 49), (1, 2, 3, 5, 8, 13, 21)])
def test_aux_of_few_dead_features_is_that_of_many(dead):
    """Where k_aux are dead, or fewer, each token has them all, and dense products do: the same loss and gradient. If
    more are dead, 64 of the 256 tokens count."""
    cfg = dataclasses.replace(CFG, k_aux=6)
    state, x = trained(cfg=cfg), residuals(256, seed=8)
    u, dead = (x - state.mean) / state.std, jnp.isin(jnp.arange(50), jnp.array(dead, int))
    (_, (_, _, _, out)), grads = jax.value_and_grad(sae._reconstruct, has_aux=True)(state.params, cfg, u)
    loss, total = jax.jit(sae._with_aux, static_argnums=(2, 6))(grads, state.params, cfg, u, dead, u - out, None)
    tokens = 64 if dead.sum() > 6 else 256
    expected, added = jax.value_and_grad(sae._aux_loss)(state.params, cfg, u[:tokens], dead, (u - out)[:tokens], None)
    np.testing.assert_allclose(loss, expected if dead.any() else 0, rtol=1e-5)
    for name, gradient in grads.items():
        wanted = np.asarray(added[name]) * (cfg.aux_coefficient if dead.any() else 0)
        np.testing.assert_allclose(total[name] - gradient, wanted, atol=1e-5 * np.abs(gradient).max(), rtol=1e-3)


def test_aux_of_many_dead_features_has_a_quarter_of_the_entries():
    """However many features are dead; but a variance needs some tokens."""
    large = sae.Config(d_in=3072, features=65536, k=64)
    assert large.k_aux == 512 and sae.aux_tokens(large, 4096) == 128 and 4 * 128 * 512 == 4096 * 64
    assert sae.aux_tokens(large, 1024) == 64 and sae.aux_tokens(large, 40) == 40


@pytest.mark.parametrize("coefficient", [0.0, 1 / 32])
def test_auxk_revives_dead_features(coefficient):
    """30 of 50 features whose encoder is too weak to reach any top-k, long silent, with and without AuxK."""
    cfg = dataclasses.replace(CFG, aux_coefficient=coefficient, lr=1e-2, dead_after=640, k_aux=6, warmup=1,
                              restraint=0.15 if coefficient else 1e9)       # without AuxK the living shall move freely
    state, dead = sae.init(jax.random.key(0), cfg, residuals()), np.arange(50) < 30
    weak = state.params["enc"] * np.where(dead, 0.1, 1.0)[:, None].astype(np.float32)
    state = state._replace(params=state.params | {"enc": weak}, since_fired=jnp.asarray(dead * 10**6, jnp.int32))
    for i in range(200):
        state, metrics = STEP(state, cfg, residuals(64, seed=i))
        if i == 0:
            assert metrics["dead"] >= 0.5 and np.isfinite(metrics["aux"]) and metrics["aux"] > 0
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))
    assert metrics["dead"] < 0.2 if coefficient else metrics["dead"] > 0.5, metrics["dead"]


def test_init_in_the_space_of_another_state():
    """Its mean, std and axes; the rest is what a state of that sample standardized so would have."""
    cfg = dataclasses.replace(CFG, normalization="pca")
    other, x = sae.init(jax.random.key(1), cfg, 3 * residuals(300, seed=1) + 1), residuals(300, seed=2)
    fresh = sae.init(jax.random.key(0), cfg, x, like=other)
    for name in ("mean", "std", "basis"):
        np.testing.assert_array_equal(getattr(fresh, name), getattr(other, name))
    u = np.asarray(normalize.standardize(x, other.mean, other.std, other.basis, None))
    np.testing.assert_allclose(fresh.params["b_dec"], normalize.geometric_median(u), atol=1e-5)


def test_idle_counts_tokens_since_a_feature_fired():
    state, x = trained(0), residuals(64, seed=1)
    params = sae.fold(state, CFG)
    values, indices = map(np.asarray, sae.encode(params, CFG, x))
    fired = np.isin(np.arange(CFG.features), indices[values > 0])
    assert 0 < fired.sum() < CFG.features
    state, _ = STEP(state._replace(since_fired=jnp.full(CFG.features, 5, jnp.int32)), CFG, x)
    np.testing.assert_array_equal(state.since_fired, np.where(fired, 0, 5 + 64))
    assert int(state.step) == 1


def test_learning_rate_gives_way_while_features_fall_silent():
    """As many of them as cfg.restraint halve the steps of the living; the dead, and those that never fired, do not
    count as falling, or are AuxK's, which keeps its rate."""
    cfg, x = dataclasses.replace(CFG, aux_coefficient=0.0, dead_after=6400), residuals(8, seed=1)
    state = trained(0)
    values, indices = map(np.asarray, sae.encode(sae.fold(state, cfg), cfg, x))
    silent = np.flatnonzero(~np.isin(np.arange(cfg.features), indices[values > 0]))
    assert len(silent) > 4

    def moved(since_fired, restraint):
        mine = dataclasses.replace(cfg, restraint=restraint)
        new, _ = STEP(state._replace(since_fired=jnp.asarray(since_fired, jnp.int32)), mine, x)
        return {name: np.asarray(new.params[name]) - np.asarray(state.params[name]) for name in ("enc", "b_dec")}

    since_fired = np.zeros(cfg.features)
    free = moved(since_fired, 1e9)
    for tokens, share in ((0, 1.0), (1600, 0.5), (6400, 0.5), (sae.NEVER, 1.0)):
        since_fired[silent[:3]] = tokens
        held = moved(since_fired, 3 / cfg.features)
        for name in free:
            np.testing.assert_allclose(held[name], share * free[name], rtol=1e-4, atol=1e-7)


def test_recovers_a_known_dictionary():
    """Sparse sums of 64 known atoms, standardization undone: >= 90 % are found at cosine > 0.9."""
    r = np.random.default_rng(0)
    atoms = r.standard_normal((64, 32)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    scale = 10 ** r.uniform(-2, 2, 32)

    def data(n):
        z = np.zeros((n, 64), np.float32)
        chosen = np.argsort(r.random((n, 64)), axis=1)[:, :3]
        np.put_along_axis(z, chosen, r.uniform(0.5, 1.5, (n, 3)).astype(np.float32), axis=1)
        return ((z @ atoms + 1.0) * scale).astype(np.float32)

    cfg = sae.Config(d_in=32, features=96, k=3, lr=3e-3, decay=(500, 700))
    state = sae.init(jax.random.key(0), cfg, data(4096))
    for _ in range(700):
        state, metrics = STEP(state, cfg, data(512))
    W_dec = np.asarray(sae.fold(state, cfg)["W_dec"]) / scale
    cosine = (atoms @ (W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)).T).max(1)
    assert np.mean(cosine > 0.9) >= 0.9, f"{np.mean(cosine > 0.9):.3f} found, {metrics}"
    assert metrics["fvu"] < 0.1


def test_sharp_errors_for_shapes():
    state = trained(0)
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\); need \[B, 12\]"):
        sae.step(state, CFG, jnp.zeros((3, 7)))
    with pytest.raises(ValueError, match=r"sample has shape \(5, 7\)"):
        sae.init(jax.random.key(0), CFG, np.zeros((5, 7)))
    with pytest.raises(ValueError, match="not finite in 1 of 12"):
        sae.init(jax.random.key(0), CFG, np.where(np.arange(12) == 3, np.nan, residuals()))
    with pytest.raises(ValueError, match="k = 9, features = 8"):
        sae.Config(d_in=4, features=8, k=9)
    with pytest.raises(ValueError, match="k_aux = 0"):
        sae.Config(d_in=4, features=8, k=2, k_aux=0)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_change_and_splice_against_brute_force(activation):
    """Also of features that are not active, that are equal, and of scales and sums of each token's own."""
    cfg, r = dataclasses.replace(CFG, activation=activation), np.random.default_rng(0)
    x, params = residuals(60, seed=3).reshape(3, 20, 12), sae.fold(trained(cfg=cfg), cfg)
    params["W_enc"], params["b_enc"] = params["W_enc"].at[:, 7].set(params["W_enc"][:, 3]), params["b_enc"].at[7].set(
        params["b_enc"][3])
    values, indices = map(np.asarray, sae.encode(params, cfg, x, cfg.features if activation != "topk" else None))
    dense = np.zeros((3, 20, 50))
    np.put_along_axis(dense, indices, values, -1)
    dense = np.where(dense > 0, dense, 0)
    features = np.array([*np.argsort(-(dense > 0).sum((0, 1)))[:4], 3, 7])
    assert (dense[..., features] > 0).any() and (dense[..., features] == 0).any()
    W_dec = np.asarray(params["W_dec"], np.float64)
    for shape in ((6,), (3, 1, 6)):
        scale, add = r.uniform(-1, 3, shape).astype(np.float32), r.standard_normal(shape).astype(np.float32)
        by = ((scale - 1.0) * dense[..., features] + add) @ W_dec[features]
        ours = jax.jit(apply.change, static_argnums=1)(params, cfg, x, features, scale, add)
        np.testing.assert_allclose(ours, x + by, rtol=2e-5, atol=1e-4 * np.abs(by).max())
    expected = dense @ W_dec + np.asarray(params["b_dec"], np.float64)
    np.testing.assert_allclose(apply.splice(params, cfg, x), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_change_to_nothing_changes_no_bit(dtype):
    x = jnp.asarray(residuals(40), dtype).at[0, 0].set(-0.0)
    params, features = sae.fold(trained(), CFG), jnp.arange(8)
    run = jax.jit(apply.change, static_argnums=1)
    assert_same(run(params, CFG, x, features, jnp.ones(8), jnp.zeros(8)), x)
    here = jnp.arange(40)[:, None] < 5                           # elsewhere nothing is asked
    some = run(params, CFG, x, features, jnp.ones(8), jnp.where(here, 100.0, 0.0))
    assert_same(some[5:], x[5:])
    assert some.dtype == dtype and (some[:5] != x[:5]).any(1).all()


def test_a_change_is_differentiated():
    """The derivative along the encoder of what is active, and through x itself, against differences in float64."""
    params, features = sae.fold(trained(), CFG), jnp.arange(10)
    x, scale, add = residuals(6, seed=5), jnp.linspace(0, 2, 10), jnp.linspace(-1, 1, 10)
    out = np.random.default_rng(0).standard_normal((6, 12))
    loss = lambda x, add: jnp.sum(out * apply.change(params, CFG, x, features, scale, add))
    by_x, by_add = jax.grad(loss, (0, 1))(x, add)
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    pre = x @ p["W_enc"] + p["b_enc"]
    on = (pre > 0) & (pre >= np.sort(pre, 1)[:, [-CFG.k]])
    pull = (out @ p["W_dec"][:10].T)
    expected = out + ((np.asarray(scale) - 1) * on[:, :10] * pull) @ p["W_enc"][:, :10].T
    np.testing.assert_allclose(by_x, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(by_add, pull.sum(0), rtol=1e-4, atol=1e-3)



# ---- files ----------------------------------------------------------------------------------------------------------


def test_folded_equals_training_space():
    state, x = trained(), residuals(128, seed=4)
    params = sae.fold(state, CFG)
    u = (x - state.mean) / state.std
    _, (_, values, indices, u_hat) = sae._reconstruct(state.params, CFG, u)
    raw_values, raw_indices = sae.encode(params, CFG, x)
    np.testing.assert_array_equal(raw_indices, indices)
    np.testing.assert_allclose(raw_values, values, rtol=1e-4, atol=1e-4)
    out = sae.decode(params, CFG, raw_values, raw_indices)
    np.testing.assert_allclose((out - state.mean) / state.std, u_hat, rtol=1e-3, atol=1e-4)
    batched = sae.encode(params, CFG, x.reshape(2, 64, 12))
    np.testing.assert_array_equal(batched[1].reshape(128, -1), indices)
    assert sae.decode(params, CFG, *batched).shape == (2, 64, 12)


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


def assert_agrees_with_saelens(theirs, params, cfg, x):
    """Features, and reconstructions per dimension in units of its spread, to 1e-5."""
    import torch

    values, indices = sae.encode(params, cfg, x)
    dense = np.zeros((len(x), cfg.features), np.float32)
    np.put_along_axis(dense, np.asarray(indices), np.asarray(values), axis=1)
    with torch.no_grad():
        z = theirs.encode(torch.from_numpy(x))
        assert relative(dense, z.numpy()) < 1e-5
        theirs_out = theirs.decode(z).numpy()
    out = np.asarray(sae.decode(params, cfg, values, indices))
    size = np.abs(theirs_out).max(0)
    assert (np.abs(out - theirs_out) / size).max() < 1e-5


def test_saelens_reads_ours(tmp_path):
    from sae_lens import SAE

    state, x = trained(20), residuals(300, seed=6)
    assert np.asarray(state.std).max() / np.asarray(state.std).min() > 1e3
    checkpoint.save_state(tmp_path / "sae", state, CFG, metadata={"model": "nano", "layer": 3, "site": "img"})
    params, cfg = checkpoint.load(tmp_path / "sae")
    assert cfg == CFG and checkpoint.load_metadata(tmp_path / "sae")["layer"] == 3
    assert_same(params, sae.fold(state, CFG))
    theirs = SAE.load_from_disk(tmp_path / "sae")
    assert theirs.cfg.architecture() == "topk" and theirs.cfg.k == CFG.k and theirs.cfg.metadata.site == "img"
    assert_same(theirs.W_dec.detach().numpy(), np.asarray(params["W_dec"]))  # nothing renormalized
    assert_agrees_with_saelens(theirs, params, cfg, x)


@pytest.mark.parametrize("apply_b_dec", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_we_read_saelens(tmp_path, apply_b_dec, rescale):
    import torch
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    theirs = TopKSAE(TopKSAEConfig(9, 31, k=5, apply_b_dec_to_input=apply_b_dec, rescale_acts_by_decoder_norm=rescale))
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter)
    theirs.save_model(tmp_path)
    params, cfg = checkpoint.load(tmp_path)
    assert (cfg.d_in, cfg.features, cfg.k) == (9, 31, 5)
    assert_agrees_with_saelens(
        theirs, params, cfg, np.random.default_rng(0).standard_normal((64, 9)).astype(np.float32)
    )


def test_resumed_run_is_bit_identical(tmp_path):
    cfg = dataclasses.replace(CFG, dead_after=128, warmup=4, decay=(8, 12))
    straight = trained(12, cfg)
    key, position = jax.random.key_data(jax.random.key(7)), np.int64(2**40)
    checkpoint.save_state(tmp_path / "run", trained(5, cfg), cfg, extra={"key": key, "position": position})
    state, loaded, extra = checkpoint.load_state(tmp_path / "run")
    assert loaded == cfg and set(extra) == {"key", "position"}
    assert_same((extra["key"], extra["position"]), (np.asarray(key), np.asarray(position)))
    assert_same(state, trained(5, cfg))
    for i in range(5, 12):
        state, _ = STEP(state, cfg, residuals(64, seed=i))
    assert_same(state, straight)


SAVER = """
import checkpoint, sys, itertools, jax, numpy as np, sae
folder, cfg = sys.argv[1], sae.Config(d_in=64, features=512, k=4)
state = sae.init(jax.random.key(0), cfg, np.random.default_rng(0).standard_normal((64, 64)))
for i in itertools.count(1):
    state = state._replace(step=state.step + 1, params=state.params | {"b_enc": state.params["b_enc"] + 1})
    checkpoint.save_state(folder, state, cfg, metadata={"step": i}, extra={"step": np.int64(i)})
    print(i, flush=True)
"""


def test_killed_while_saving(tmp_path):
    """kill -9 at random moments, the first creation included: afterwards the folder is absent or whole."""
    r, folder = np.random.default_rng(0), tmp_path / "run"
    for round in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, folder], stdout=subprocess.PIPE, cwd=Path(sae.__file__).parent
        )
        if round:
            process.stdout.readline()
            time.sleep(r.uniform(0, 0.3))
        else:
            while not list(tmp_path.iterdir()):  # in the middle of the first creation
                time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if folder.exists():
            params, cfg = checkpoint.load(folder)
            state, _, extra = checkpoint.load_state(folder)
            assert cfg.features == 512 and params["W_enc"].shape == (64, 512)
            assert int(extra["step"]) == int(state.step) == state.params["b_enc"][0] >= 1
    (folder / ".notes.fae-tmp").write_text("not ours")
    (folder / ".999999999.fae-tmp").mkdir()                      # as a process that is no more would have left it
    (folder / ".999999999.fae-tmp" / ".tmpN94RWz").write_text("what safetensors leaves when it is killed")
    checkpoint.save_state(folder, state, cfg)
    names = {p.name for p in folder.iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "state.safetensors", ".notes.fae-tmp"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_saving_leaves_other_files_and_other_saes_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    checkpoint.save_state(tmp_path, trained(0), CFG)
    other = dataclasses.replace(CFG, k=3)
    with pytest.raises(ValueError, match="k is 4, not 3"):
        checkpoint.save(tmp_path, sae.fold(trained(0), CFG), other)
    checkpoint.save(tmp_path, sae.fold(trained(0), CFG), CFG)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n" and checkpoint.load(tmp_path)[1] == CFG


def edit_config(folder, **changes):
    path = folder / "cfg.json"
    edited = json.loads(path.read_text()) | changes
    edited["metadata"].pop("digest")                             # else it would be taken for damage
    path.write_text(json.dumps(edited))


def edit_weights(folder, change):
    path = folder / "sae_weights.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


def truncate(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-10])


BROKEN = {
    "cfg.json is missing": lambda f: (f / "cfg.json").unlink(),
    "sae_weights.safetensors is missing": lambda f: (f / "sae_weights.safetensors").unlink(),
    "cfg.json is not JSON": lambda f: truncate(f, "cfg.json"),
    "sae_weights.safetensors is damaged": lambda f: truncate(f, "sae_weights.safetensors"),
    "architecture is 'temporal'; need one of topk, jumprelu": lambda f: edit_config(f, architecture="temporal"),
    "d_sae is '50'": lambda f: edit_config(f, d_sae="50"),
    "k is None": lambda f: edit_config(f, k=None),
    "normalize_activations is 'layer_norm'": lambda f: edit_config(f, normalize_activations="layer_norm"),
    r"W_dec has shape \[50, 12\]; its config says \[50, 13\]": lambda f: edit_config(f, d_in=13),
    r"missing tensors \['b_enc'\], unknown tensors \[\]": lambda f: edit_weights(f, lambda a: a.pop("b_enc")),
    r"unknown tensors \['threshold'\]": lambda f: edit_weights(f, lambda a: a.update(threshold=a["b_enc"])),
    "W_dec holds 1 values that are not finite": lambda f: edit_weights(
        f, lambda a: a["W_dec"].__setitem__((3, 4), np.nan)
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_folders_are_named(tmp_path, message):
    checkpoint.save(tmp_path / "sae", sae.fold(trained(0), CFG), CFG)
    BROKEN[message](tmp_path / "sae")
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(tmp_path / "sae")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def damaged(data, r):
    """One of four kinds: cut short, a bit flipped, a piece overwritten, something appended."""
    kind, at = r.integers(4), int(r.integers(len(data)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << int(r.integers(8))]) + data[at + 1:]
    piece = r.bytes(int(r.integers(1, 64)))
    return data[:at] + piece + data[at + len(piece):] if kind == 2 else data + piece


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors", "state.safetensors"])
def test_damage_is_an_error_or_does_not_matter(tmp_path, name):
    """40 times: never another SAE, never an error of another kind than ValueError."""
    r, folder = np.random.default_rng(len(name)), tmp_path / "run"
    checkpoint.save_state(folder, trained(0), CFG, metadata={"layer": 3, "run": {"model": "nano"}})
    read = (lambda: (checkpoint.load_state(folder)[:2])) if name.startswith("state") else (
        lambda: (*checkpoint.load(folder), *map(checkpoint.load_metadata(folder).get, ("run", "layer"))))
    whole, expected, harmless = (folder / name).read_bytes(), read(), 0
    for _ in range(40):
        (folder / name).write_bytes(damaged(whole, r))
        try:
            found = read()
        except ValueError as error:
            assert str(folder / name) in str(error) or "shape" in str(error), error
            continue
        harmless += 1
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert harmless < 12                                         # spaces, versions, names of what is not needed


def test_weights_of_another_run_are_refused(tmp_path):
    """Of the same shapes, whole, and yet not those that cfg.json tells of."""
    state = trained(0)
    for layer in (3, 4):
        checkpoint.save_state(tmp_path / f"{layer}", state, CFG, metadata={"layer": layer})
    weights = "sae_weights.safetensors"
    shutil.copy(tmp_path / "3" / weights, tmp_path / "4" / weights)
    with pytest.raises(ValueError, match="is of another run"):
        checkpoint.load(tmp_path / "4")
    before = (tmp_path / "3" / weights).read_bytes()
    checkpoint.save_state(tmp_path / "3", trained(1), CFG, metadata={"layer": 3, "evaluation": {}})
    (tmp_path / "3" / weights).write_bytes(before)                # killed between the two: an earlier step's weights
    checkpoint.load(tmp_path / "3")


def test_foreign_files(tmp_path):
    checkpoint.save_state(tmp_path / "run", trained(0), CFG)
    for content in (b"", b"PK\x03\x04 a torch file", b"[]", b"{}", b"null", b"\xff" * 64):
        for name in ("cfg.json", "sae_weights.safetensors"):
            checkpoint.save_state(tmp_path / "run", trained(0), CFG)
            (tmp_path / "run" / name).write_bytes(content)
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                checkpoint.load(tmp_path / "run")
            (tmp_path / "run" / name).unlink()


def test_broken_states_are_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'state.safetensors'} is missing")):
        checkpoint.load_state(tmp_path)
    checkpoint.save_state(tmp_path / "run", trained(0), CFG)
    path = tmp_path / "run" / "state.safetensors"
    arrays = load_file(path)
    save_file(arrays, path)
    with pytest.raises(ValueError, match="no usable config in its header"):
        checkpoint.load_state(tmp_path / "run")
    header = {"fae": json.dumps({"config": dataclasses.asdict(CFG), "format": checkpoint.FORMAT})}
    save_file(arrays | {"since_fired": arrays["since_fired"].astype(np.float32)}, path, header)
    with pytest.raises(ValueError, match="since_fired is float32; need int32"):
        checkpoint.load_state(tmp_path / "run")
    save_file({"idle" if name == "since_fired" else name: a for name, a in arrays.items()}, path, header)
    np.testing.assert_array_equal(checkpoint.load_state(tmp_path / "run")[0].since_fired, arrays["since_fired"])
    save_file(arrays, path, {"fae": json.dumps({"config": dataclasses.asdict(CFG)})})
    with pytest.raises(ValueError, match="has format 1; this version of fae resumes from format 2 only"):
        checkpoint.load_state(tmp_path / "run")


def test_nothing_broken_is_written(tmp_path):
    params = sae.fold(trained(0), CFG)
    with pytest.raises(ValueError, match="b_dec holds 12 values that are not finite"):
        checkpoint.save(tmp_path / "sae", params | {"b_dec": params["b_dec"] * jnp.nan}, CFG)
    with pytest.raises(ValueError, match="W_enc has shape"):
        checkpoint.save(tmp_path / "sae", params | {"W_enc": params["W_enc"].T}, CFG)
    assert not (tmp_path / "sae").exists()


# ---- other activations, dictionaries and normalizations -----------------------------------------------------------

VARIANTS = {
    "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu"},
    "matryoshka": {"matryoshka": (7, 20, 50)},
    "matryoshka batchtopk": {"matryoshka": (7, 50), "activation": "batchtopk"},
    "pca": {"normalization": "pca"},
    "scale": {"normalization": "scale"},
    "groups": {"groups": ("txt", "img-t0", "img-t1")},
    "groups pca jumprelu": {"groups": ("a", "b"), "normalization": "pca", "activation": "jumprelu"},
    "transcoder": {"d_out": 9, "activation": "batchtopk"},
    "transcoder jumprelu": {"d_out": 15, "activation": "jumprelu", "groups": ("a", "b")},
}


def batch(cfg, n, seed):
    """x [n, C], groups [n] or None; each group has its own place and spread, a transcoder's target follows x."""
    x = residuals(n, cfg.d_in, seed)
    if cfg.d_out:
        mix = np.random.default_rng(7).standard_normal((cfg.d_in, cfg.d_out)).astype(np.float32)
        x = np.concatenate([x, np.tanh(x / x.std(0)) @ mix + 3], 1)
    if not cfg.groups:
        return x, None
    group = np.random.default_rng(seed).integers(0, len(cfg.groups), n)
    return (x * 3.0 ** group[:, None] - group[:, None]).astype(np.float32), group


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """(config, state after some steps)"""
    cfg = dataclasses.replace(CFG, lr=3e-3, warmup=2, **VARIANTS[request.param])
    state = sae.init(jax.random.key(0), cfg, *batch(cfg, 2048, 0))
    first = None
    for i in range(100):
        state, metrics = STEP(state, cfg, *batch(cfg, 256, i + 1))
        first = first or metrics
    assert metrics["fvu"] < 0.9 * first["fvu"] and abs(metrics["l0"] - cfg.k) < 1.2, (first, metrics)
    return cfg, state


def test_variants_fold_exactly(variant):
    """Raw residuals in, the same features and reconstructions out as in training, by the SAE of each group."""
    cfg, state = variant
    x, group = batch(cfg, 300, 999)
    u = np.asarray(normalize.standardize(x, state.mean, state.std, state.basis, group))
    _, (_, values, indices, out) = sae._reconstruct(state.params, cfg, u)
    pre = kernels.preactivations(sae._seen(state.params, cfg, u), state.params["enc"], state.params["b_enc"])
    for g in range(max(len(cfg.groups), 1)):
        rows = slice(None) if group is None else group == g
        params = sae.fold(state, cfg, g)
        expected = dense(values, indices, cfg.features)[rows]
        if cfg.activation == "batchtopk":  # by threshold, once it is trained
            expected = np.where(pre > state.threshold, np.maximum(pre, 0), 0)[rows]
        read = x[rows, : cfg.d_in]
        found = dense(*sae.encode(params, cfg, read), cfg.features)
        other = (found > 0) != (expected > 0)  # within rounding of its threshold, or of the k-th
        assert np.mean(other) < 1e-4
        assert (np.abs(found - expected) * ~other).max() < 2e-4 * expected.max()
        if cfg.activation != "batchtopk":
            y = sae.decode(params, cfg, *sae.encode(params, cfg, read))
            mean, std = (cfg.split(a)[1] for a in normalize._of_group(state, cfg, g))
            back = (y - mean) / std @ (np.eye(y.shape[1]) if state.basis is None else state.basis)
            assert np.median(np.abs(back - out[rows])) < 1e-3 and y.shape[1] == (cfg.d_out or cfg.d_in)


@pytest.mark.parametrize("groups", [(), ("a", "b")])
def test_pca_only_turns(groups):
    """It changes no distance, and leaves no correlation between the axes."""
    u = {}
    for name in ("std", "pca"):
        cfg = dataclasses.replace(CFG, normalization=name, groups=groups)
        x, group = batch(cfg, 4096, 0)
        state = sae.init(jax.random.key(0), cfg, x, group)
        u[name] = np.asarray(normalize.standardize(x, state.mean, state.std, state.basis, group), np.float64)
    np.testing.assert_allclose(u["pca"] @ u["pca"][:50].T, u["std"] @ u["std"][:50].T, atol=1e-3)
    covariance = np.cov(u["pca"].T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-3
    assert np.abs(np.cov(u["std"].T) - np.eye(CFG.d_in)).max() > 0.02    # there was something to turn


def dense(values, indices, features):
    out = np.zeros((len(values), features), np.float32)
    np.maximum.at(out, (np.arange(len(values))[:, None], np.asarray(indices)), np.asarray(values))
    return out


def test_variants_in_saelens(variant, tmp_path):
    """Every architecture loads there as it stands, and gives the same features and reconstructions on raw residuals."""
    import torch
    from sae_lens import SAE
    cfg, state = variant
    checkpoint.save_state(tmp_path / "sae", state, cfg, metadata={"layer": 3})
    x, group = batch(cfg, 300, 998)
    names = {"topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
    for g, name in enumerate(cfg.groups or ("",)):
        folder = tmp_path / "sae" / (name if g else "")
        params, read = checkpoint.load(folder)
        assert read == cfg and checkpoint.load_metadata(folder).get("group", "") == name
        theirs = SAE.load_from_disk(folder)
        assert theirs.cfg.architecture() == names[cfg.activation] + ("_transcoder" if cfg.d_out else "")
        rows = x[slice(None) if group is None else group == g, : cfg.d_in]
        values, indices = sae.encode(params, cfg, rows)
        with torch.no_grad():
            z = theirs.encode(torch.from_numpy(rows))
            y = theirs.decode(z).numpy()
        assert relative(dense(values, indices, cfg.features), z.numpy()) < 1e-5
        ours = np.asarray(sae.decode(params, cfg, values, indices))
        assert (np.abs(ours - y) / np.abs(y).max(0)).max() < 1e-5
    restored, again, _ = checkpoint.load_state(tmp_path / "sae")
    assert again == cfg
    assert_same(restored, state)
    checkpoint.save_state(tmp_path / "sae", state, cfg)                 # replaces all of them


def test_unfold_takes_an_sae_up_again(variant):
    cfg, state = variant
    if cfg.d_out:
        pytest.skip("a transcoder starts anew")
    fresh = sae.init(jax.random.key(5), cfg, *batch(cfg, 2048, 0))
    again = sae.unfold(sae.fold(state, cfg), cfg, fresh)
    for name, value in state.params.items():
        np.testing.assert_allclose(again.params[name], value, atol=3e-3 * np.abs(value).max(), err_msg=name)
    _, old = STEP(state, cfg, *batch(cfg, 256, 997))
    _, new = STEP(again, cfg, *batch(cfg, 256, 997))
    np.testing.assert_allclose(new["fvu"], old["fvu"], rtol=1e-2)
    with pytest.raises(ValueError, match="W_enc has shape"):
        sae.unfold(sae.fold(state, cfg), dataclasses.replace(cfg, features=60, matryoshka=None), fresh)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "transcoder", "jumprelu_transcoder"])
def test_we_read_other_architectures_of_saelens(tmp_path, architecture):
    import torch
    from sae_lens.registry import get_sae_class
    kind, config = get_sae_class(architecture)
    torch.manual_seed(0)
    shape = {"d_out": 7, "apply_b_dec_to_input": False} if "transcoder" in architecture else {}
    theirs = kind(config(9, 31, **shape))
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter)
    theirs.save_model(tmp_path)
    params, cfg = checkpoint.load(tmp_path)
    assert (cfg.d_in, cfg.features, cfg.d_out) == (9, 31, shape.get("d_out"))
    assert_agrees_with_saelens(theirs, params, cfg, normal(64, 9))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_batchtopk_selects_as_saelens():
    import torch
    from sae_lens.saes.batchtopk_sae import BatchTopK
    cfg = sae.Config(d_in=9, features=40, k=4, activation="batchtopk")
    x, params = normal(31, 9), {"enc": normal(40, 9, seed=1), "b_enc": normal(40, seed=2) / 3}
    pre = kernels.preactivations(x, params["enc"], params["b_enc"])
    values, indices, _ = sae._activate(params, cfg, x)
    theirs = BatchTopK(4)(torch.from_numpy(np.array(pre))).numpy()
    assert (theirs > 0).sum(1).max() <= cfg.width and len(set((theirs > 0).sum(1))) > 1
    np.testing.assert_allclose(dense(values, indices, 40), theirs, atol=1e-5)


def test_jumprelu_derivatives_are_saelens():
    """Of the reconstruction and of L0, for weights and thresholds: theirs take the threshold itself."""
    import torch
    from sae_lens.saes.jumprelu_sae import JumpReLU, Step
    cfg = sae.Config(d_in=9, features=14, k=4, activation="jumprelu", bandwidth=0.5)
    x, target = normal(31, 9), normal(31, 9, seed=4)
    params = {"enc": normal(14, 9, seed=1), "b_enc": normal(14, seed=2) / 3, "dec": normal(14, 9, seed=3)}
    params = jax.tree.map(jnp.asarray, params | {"log_threshold": np.full(14, np.log(0.8), np.float32)})

    def loss(params):
        values, indices, penalty = sae._activate(params, cfg, x)
        return jnp.sum((kernels.sparse_decode(values, indices, params["dec"]) - target) ** 2) + penalty

    value, grads = jax.value_and_grad(loss)(params)
    t = {name: torch.tensor(np.array(value), requires_grad=True) for name, value in params.items()}
    threshold = torch.full((14,), 0.8, requires_grad=True)
    pre = torch.from_numpy(x) @ t["enc"].T + t["b_enc"]
    out = JumpReLU.apply(pre, threshold, 0.4, False) @ t["dec"]
    l0 = Step.apply(pre, threshold, 0.4, False).sum() / 31
    theirs = ((out - torch.from_numpy(target)) ** 2).sum() + (l0 / 4 - 1) ** 2
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    for name in ("enc", "b_enc", "dec"):
        np.testing.assert_allclose(grads[name], t[name].grad.numpy(), rtol=1e-3, atol=1e-3)
    assert np.abs(grads["log_threshold"]).max() > 0.1
    np.testing.assert_allclose(grads["log_threshold"], 0.8 * threshold.grad.numpy(), rtol=1e-3, atol=1e-3)


def test_nested_prefixes_against_numpy():
    cfg = sae.Config(d_in=9, features=40, k=4, matryoshka=(5, 17, 40))
    params = sae.init(jax.random.key(0), cfg, normal(100, 9)).params
    u = normal(31, 9, seed=6)
    loss, (_, values, indices, _) = sae._reconstruct(params, cfg, u)
    z = dense(values, indices, 40)
    outs = [z[:, :end] @ np.asarray(params["dec"])[:end] + np.asarray(params["b_dec"]) for end in (5, 17, 40)]
    expected = np.mean([((u - out) ** 2).sum() / ((u - u.mean(0)) ** 2).sum() for out in outs])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_encode_with_thresholds_keeps_all_that_fire():
    """Also where one token has nearly all features; under jit the width is the caller's."""
    cfg = sae.Config(d_in=9, features=70, k=2, activation="jumprelu")
    state = sae.init(jax.random.key(0), cfg, normal(100, 9))
    params = sae.fold(state, cfg) | {"threshold": jnp.full(70, -1.0), "b_enc": jnp.full(70, 5.0)}
    values, _ = sae.encode(params, cfg, normal(2, 3, 9))
    assert values.shape == (2, 3, 70) and (values > 0).mean() > 0.8
    with pytest.raises(ValueError, match="needs `width` under jit"):
        jax.jit(lambda x: sae.encode(params, cfg, x))(normal(3, 9))
    inside = jax.jit(lambda x: sae.encode(params, cfg, x, 70)[0])(normal(2, 3, 9))
    np.testing.assert_allclose(inside, values, rtol=1e-5)


def test_groups_and_choices_are_checked():
    cfg = dataclasses.replace(CFG, groups=("a", "b"))
    x = residuals(64)
    with pytest.raises(ValueError, match="the group of each token is needed"):
        sae.init(jax.random.key(0), cfg, x)
    with pytest.raises(ValueError, match="the group of each token is needed"):
        sae.step(trained(0), CFG, x, np.zeros(64, int))
    with pytest.raises(ValueError, match="fewer than two tokens of the group b"):
        sae.init(jax.random.key(0), cfg, x, np.zeros(64, int))
    wrongs = [({"activation": "relu"}, "activation is 'relu'"), ({"matryoshka": (9, 4, 50)}, "prefixes rise"),
              ({"matryoshka": (9, 49)}, "to all 50"), ({"normalization": "zca"}, "normalization is 'zca'"),
              ({"d_out": 4}, "a transcoder has"), ({"d_out": 4, "normalization": "pca"}, "no PCA")]
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CFG, **wrong)


# ---- exact on every chip --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [5, 300])
def test_raw_residuals_far_from_zero_choose_the_features_of_float64(ratio, tmp_path):
    """One float32 product at 300 standard deviations from zero chooses others once in 2,000 times."""
    r = np.random.default_rng(ratio)
    d, scale = 96, np.exp(r.standard_normal(96))
    x = (scale * (r.standard_normal((1024, d)) + ratio * r.choice([-1, 1], d))).astype(np.float32)
    cfg = sae.Config(d_in=d, features=1000, k=8)
    params = sae.fold(sae.init(jax.random.key(0), cfg, x[:512]), cfg)
    checkpoint.save(tmp_path / "sae", params, cfg)
    pre = x[512:].astype(np.float64) @ np.asarray(params["W_enc"], np.float64) + np.asarray(params["b_enc"], np.float64)
    exact = np.argsort(-pre, 1)[:, :8]
    for p in (params, checkpoint.load(tmp_path / "sae")[0]):
        values, indices = sae.encode(p, cfg, x[512:])
        same = np.mean([np.isin(a, b).mean() for a, b in zip(np.asarray(indices), exact)])
        assert same >= 0.9999
        np.testing.assert_allclose(values, np.maximum(np.take_along_axis(pre, np.asarray(indices), 1), 0), atol=2e-4)
        three = jnp.asarray(indices[0, :3])
        changed = apply.change(p, cfg, x[512:], three, jnp.zeros(3), jnp.zeros(3))
        own = np.where(np.asarray(indices)[..., None] == three, np.asarray(values)[..., None], 0).sum(1)
        by = -own @ np.asarray(p["W_dec"])[np.asarray(three)]
        np.testing.assert_allclose(changed - x[512:], by, atol=2e-3 * scale.max() * ratio ** 0.5)


def test_encoding_is_in_full_precision_and_training_is_not():
    """HIGH is TF32 on a GPU, three passes of bfloat16 on a TPU."""
    cfg = sae.Config(d_in=12, features=50, k=4, activation="batchtopk")
    state = sae.init(jax.random.key(0), cfg, residuals())
    params, x = sae.fold(state, cfg), residuals(8)
    for run in (lambda x: sae.encode(params, cfg, x, 4), partial(apply.splice, params, cfg),
                lambda x: apply.change(params, cfg, x, jnp.arange(2), jnp.zeros(2), jnp.zeros(2))):
        text = str(jax.make_jaxpr(run)(x))
        assert "HIGHEST" in text and "Precision.HIGH," not in text.replace("HIGHEST", "")
    assert "Precision.HIGH" in str(jax.make_jaxpr(lambda x: sae.step(state, cfg, x))(x))


@pytest.mark.parametrize("dense", [1, 40, 601])
def test_splice_uses_all_that_fires(dense, tmp_path):
    """Also where far more than k features of a token lie above their thresholds, as in SAEs of others."""
    r = np.random.default_rng(dense)
    d, features = 24, 700
    cfg = sae.Config(d_in=d, features=features, k=4, activation="jumprelu")
    arrays = {"W_enc": r.standard_normal((d, features)), "b_enc": np.zeros(features),
              "W_dec": r.standard_normal((features, d)), "b_dec": r.standard_normal(d)}
    x = r.standard_normal((3, 11, d)).astype(np.float32)
    pre = x @ arrays["W_enc"].astype(np.float32)
    level = np.sort(pre.reshape(33, -1), 1)[:, -dense].min()
    near = np.sort(pre[np.abs(pre - level) < 0.1].reshape(-1))
    gap = np.diff(near).argmax()                                 # no value so close that rounding decides
    arrays["threshold"] = np.full(features, max(near[gap:gap + 2].mean(), 1e-3))
    checkpoint.save(tmp_path / "sae", {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()}, cfg)
    params, cfg = checkpoint.load(tmp_path / "sae")
    values = np.where(pre > arrays["threshold"], pre, 0)
    expected = values @ arrays["W_dec"] + arrays["b_dec"]
    assert (values > 0).sum(-1).max() >= min(dense, 300)         # 32 were the most
    for run in (apply.splice, jax.jit(apply.splice, static_argnums=1)):
        np.testing.assert_allclose(run(params, cfg, x), expected, atol=2e-4 * np.abs(expected).max())
    assert apply.splice(params, cfg, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_gradients_along_the_rows_alone_are_no_nan():
    """What is left of them is rounding, and may be less than nothing."""
    state = trained()
    for seed in range(200):
        r = np.random.default_rng(seed)
        grads = jax.tree.map(jnp.zeros_like, state.params)
        grads["dec"] = state.params["dec"] * r.standard_normal((CFG.features, 1)).astype(np.float32)
        params, _ = UPDATED(state, CFG, grads, state.since_fired)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)), seed


UPDATED = jax.jit(sae._updated, static_argnums=1)


def test_jumprelu_gradients_where_the_chip_is_a_gpu(monkeypatch):
    cfg = sae.Config(d_in=12, features=50, k=4, activation="jumprelu", lr=1e-3)
    state = sae.init(jax.random.key(0), cfg, residuals())
    run = lambda: sae._gradients(state.params, cfg, jnp.asarray(residuals(64)) / 100, None)[1]
    expected = run()
    monkeypatch.setattr(kernels.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    for name, gradient in run().items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/x", "a/b", "..", ".hidden", "", "a\\b", "x y"])
def test_groups_are_folders_inside_the_checkpoint(name, tmp_path):
    with pytest.raises(ValueError, match="no name of a group"):
        sae.Config(d_in=4, features=8, k=2, groups=("a", name))
    cfg = sae.Config(d_in=4, features=8, k=2, groups=("a", "b"))
    state = sae.init(jax.random.key(0), cfg, residuals(64, 4), np.arange(64) % 2)
    checkpoint.save_state(tmp_path / "ckpt", state, cfg)
    file = tmp_path / "ckpt" / "cfg.json"
    described = json.loads(file.read_text())
    described["metadata"]["training"]["groups"][1] = name
    described["metadata"].pop("digest")
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="no name of a group"):
        checkpoint.load_groups(tmp_path / "ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]
