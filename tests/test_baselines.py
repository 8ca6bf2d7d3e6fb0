"""The baselines of bench/sweep.py against their definitions, and the activations of bench/dead.py."""
import baselines
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def planted(n=200, d=37, atoms=150, k=3, seed=0):
    """Tokens [n, d], each the signed sum of k of the unit atoms [atoms, d]; which ones [n, k]."""
    r = np.random.default_rng(seed)
    rows = np.array(baselines.unit(jnp.asarray(r.standard_normal((atoms, d)), jnp.float32)))
    chosen = np.stack([r.choice(atoms, k, replace=False) for _ in range(n)])
    weights = r.choice([-1, 1], (n, k)) * r.uniform(0.8, 1.2, (n, k))
    return np.einsum("nk,nkd->nd", weights, rows[chosen]).astype(np.float32), rows, chosen


def gradient_pursuit(x, atoms, k):
    """One token, as Blumensath & Davies 2008 write it down, in float64."""
    left, weights, chosen = x.astype(np.float64), np.zeros(len(atoms)), set()
    for _ in range(k):
        fits = atoms @ left
        chosen.add(int(np.argmax(np.abs(fits))))
        gradient = np.zeros(len(atoms))
        gradient[list(chosen)] = fits[list(chosen)]
        change = gradient @ atoms
        step = left @ change / (change @ change)
        weights, left = weights + step * gradient, left - step * change
    return x - left, weights


def test_gradient_pursuit_is_that_of_the_paper():
    x, atoms, _ = planted(n=40)
    found, weights, chosen = baselines.pursue(x, atoms, 7, size=16)          # pieces of 16, 16 and 8
    for i, token in enumerate(x):
        expected, dense = gradient_pursuit(token, atoms.astype(np.float64), 7)
        np.testing.assert_allclose(found[i], expected, atol=1e-5)
        np.testing.assert_allclose(np.bincount(chosen[i], weights[i], len(atoms)), dense, atol=1e-4)


def test_gradient_pursuit_finds_a_planted_code():
    x, atoms, planted_atoms = planted(d=64, k=3)
    found, _, chosen = baselines.pursue(x, atoms, 6)
    assert np.mean([set(a) <= set(b) for a, b in zip(planted_atoms, chosen)]) > 0.95
    assert np.sum((x - found) ** 2) < 0.01 * np.sum(x ** 2)
    np.testing.assert_allclose(baselines.pursue(atoms, atoms, 1)[0], atoms, atol=1e-6)


def test_a_dictionary_of_tokens_composes_others_better_than_a_random_one():
    x, *_ = planted(n=1800, d=37, atoms=60, k=1)
    x = x + 0.05 * np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    train, test = x[:1500].reshape(10, 150, -1), x[1500:]
    ours = baselines.itda(train, 200, 2)
    norms = np.linalg.norm(ours, axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)
    is_token = ours @ np.asarray(baselines.unit(x[:1500])).T
    assert (is_token.max(1) > 0.9999).all()
    loss = [np.sum((test - baselines.pursue(test, atoms, 2)[0]) ** 2)
            for atoms in (ours, baselines.random_dictionary(jax.random.key(0), 200, 37))]
    assert loss[0] < 0.5 * loss[1]
    with pytest.raises(ValueError, match="3 batches of 10 tokens are too few for a dictionary of 100"):
        baselines.itda(train[:3, :10], 100, 2)


def test_itda_adds_what_it_could_not_compose():
    r = np.random.default_rng(0)
    plain = (r.standard_normal((80, 3)) @ r.standard_normal((3, 9))).astype(np.float32)      # of three dimensions
    strange = r.standard_normal((5, 9)).astype(np.float32)
    atoms = baselines.itda([plain[:40], np.concatenate([plain[40:], strange])], 9 + 2 * 5, 4)
    new, expected = ({row.tobytes() for row in np.asarray(rows)} for rows in (atoms[14:], baselines.unit(strange)))
    assert new == expected


def test_pca_is_the_best_of_its_rank():
    r = np.random.default_rng(0)
    x = (r.standard_normal((500, 11)) * np.arange(1, 12) + 3).astype(np.float32)
    found = baselines.pca(x, x, 4)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.sum((x - found) ** 2), np.sum(values[4:] ** 2), rtol=1e-4)


def test_the_largest_neurons_read_linearly():
    r = np.random.default_rng(0)
    codes = r.standard_t(4, (600, 13)).astype(np.float32) * np.arange(1, 14)
    x = (codes @ r.standard_normal((13, 7)) + 2).astype(np.float32)
    np.testing.assert_allclose(baselines.largest(codes, x, codes, 13, ridge=1e-7), x, atol=0.05)     # nothing masked
    rms = np.sqrt((codes ** 2).mean(0))
    kept = np.abs(codes / rms) >= np.sort(np.abs(codes / rms), 1)[:, -4:-3]
    design = np.c_[codes * kept, np.ones(600)]
    best = design @ np.linalg.lstsq(design, x, rcond=None)[0]
    np.testing.assert_allclose(baselines.largest(codes, x, codes, 4, ridge=1e-7), best, atol=0.05)


def test_pathological_activations_are_what_they_say():
    from dead import SHARE, Pathological
    world = Pathological(width=170, sources=900, active=9)
    x = np.asarray(world.batch(3, 30000), np.float64)
    variances = np.linalg.eigvalsh(np.cov(x, rowvar=False))
    assert abs(variances[-1] / variances.sum() - SHARE) < 0.05
    std = x.std(0)
    assert std.max() / std.min() > 3e3
    assert np.mean(np.abs(x.mean(0)) > std) > 0.5
    u = (x - x.mean(0)) / std
    assert np.mean(u ** 4) > 5                                               # of a normal distribution it is 3
    assert np.asarray(world.batch(3, 30000)).tobytes() == x.astype(np.float32).tobytes()
