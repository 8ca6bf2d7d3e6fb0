"""The analysis of variance against effects that were drawn, against projections, and in the tools."""
import itertools

import numpy as np
import pytest

import variance

P, S, N, F = 12, 4, 9, 5


def shares(x):
    """`Shares` of dense x [P, S, N, F]."""
    sums = variance.Sums(x.shape[3], x.shape[1], x.shape[2])
    for one in x:
        sums.add(one)
    return sums.finish()


@pytest.mark.parametrize("axes, name", [("n", "position"), ("p", "prompt"), ("np", "prompt"), ("s", "noise"),
                                        ("ns", "noise"), ("ps", "both"), ("nps", "both")])
def test_a_single_effect_is_found_under_its_name(axes, name):
    """Each feature depends on these axes alone. What the estimate adds to the other shares is chance."""
    rng = np.random.default_rng(0)
    shape = [size if axis in axes else 1 for axis, size in zip("psn", (40, 16, 30))]
    x = 7 + rng.standard_normal((*shape, F)) * np.arange(1, F + 1)
    found = shares(np.broadcast_to(x, (40, 16, 30, F)))
    assert (getattr(found, name) > 0.9).all()
    np.testing.assert_allclose(found.table.sum(1), 1)


def test_components_are_unbiased():
    """The mean over many tables comes close to the variances that they were drawn with."""
    rng, names = np.random.default_rng(1), ["n", "p", "s", "np", "ns", "ps", "nps"]
    wanted, sums = rng.uniform(0.5, 1.5, (7, F)), 0
    for _ in range(60):
        parts = [rng.standard_normal([size if a in name else 1 for a, size in zip("psn", (20, 8, 16))] + [F])
                 * np.sqrt(v) for name, v in zip(names, wanted)]
        found = shares(sum(parts))
        sums = sums + found.table * found.total[:, None] / 60
    n, p, s, np_, ns, ps, nps = wanted
    np.testing.assert_allclose(sums, np.stack([n, p + np_, s + ns, ps + nps], 1), rtol=0.2)


def test_mean_squares_are_those_of_projections():
    """Against the textbook: each effect's sum of squares is the squared length of a projection of the table."""
    x = np.random.default_rng(2).standard_normal((P, S, N, 1)) + np.arange(P)[:, None, None, None]
    sizes, squares, mean_square = {"p": P, "s": S, "n": N}, {}, {}
    for size in range(4):
        for axes in itertools.combinations("psn", size):
            total = x[..., 0].sum(tuple("psn".index(a) for a in "psn" if a not in axes))
            squares[frozenset(axes)] = np.array([(total ** 2).sum()])
            parts = [np.eye(sizes[a]) - 1 / sizes[a] if a in axes else np.full([sizes[a]] * 2, 1 / sizes[a])
                     for a in "psn"]
            projected = np.einsum("ip,jt,kn,ptn->ijk", *parts, x[..., 0])
            mean_square["".join(axes)] = (projected ** 2).sum() / np.prod([sizes[a] - 1 for a in axes])
    found = variance.components(squares, sizes)
    rest = mean_square["psn"]
    assert found["nps"][0] == pytest.approx(rest)
    assert found["ps"][0] == pytest.approx(max((mean_square["ps"] - rest) / N, 0))
    wanted = (mean_square["p"] - mean_square["ps"] - mean_square["pn"] + rest) / (S * N)
    assert wanted > 1 and found["p"][0] == pytest.approx(wanted)


def test_sparse_codes_are_dense_tables():
    """Entries of value 0 carry an index without meaning: here that of feature 7, which never fires."""
    rng, k = np.random.default_rng(3), 3
    values = np.maximum(rng.standard_normal((P, S, N, k)), 0).astype(np.float32)
    indices = np.argsort(rng.random((P, S, N, 7)), -1)[..., :k]
    dense = np.zeros((P, S, N, 8), np.float32)
    np.put_along_axis(dense, indices, values, -1)
    indices[values == 0] = 7
    sums = variance.Sums(8, S, N)
    for v, i in zip(values, indices):
        sums.add(v, i)
    found, wanted = sums.finish(), shares(dense)
    np.testing.assert_allclose(found.table, wanted.table, rtol=1e-6)
    assert np.isnan(found.table[7]).all() and found.total[7] == 0 and found.summary()["varying"] == 7


def test_summary_counts_features():
    """One feature of the prompt, one of the noise, one of a noise that only acts for one prompt, one that is silent."""
    rng = np.random.default_rng(4)
    x = np.zeros((P, S, N, 4))
    x[..., 0] = rng.standard_normal((P, 1, 1))
    x[..., 1] = rng.standard_normal((1, S, N))
    x[..., 2] = rng.standard_normal((P, S, N)) * (np.arange(P) == 0)[:, None, None]
    found = shares(x)
    assert {**found.summary(), **dict.fromkeys(variance.NAMES)} == dict.fromkeys(variance.NAMES) | {
        "varying": 3, "follow_prompt": 1, "follow_prompt_or_image": 2}
    assert sum(found.mean.values()) == pytest.approx(1) and sum(found.pooled.values()) == pytest.approx(1)
    assert variance.Shares(*[np.full(2, np.nan)] * 4, total=np.zeros(2)).summary()["varying"] == 0


def test_mistakes():
    with pytest.raises(variance.Mistake, match="1 noises"):
        variance.Sums(F, 1, N)
    with pytest.raises(variance.Mistake, match="at least 2"):
        sums = variance.Sums(F, S, N)
        sums.add(np.zeros((S, N, F)))
        sums.finish()
    with pytest.raises(variance.Mistake, match=r"must be \[4, 9, 5\]"):
        variance.Sums(F, S, N).add(np.zeros((S, N, F + 1)))


def test_seeds_bound_the_memory():
    assert variance.seeds_for(16384, 256) == 8 and variance.seeds_for(65536, 2048) == 2
    assert variance.seeds_for(65536, 1024) == 4
