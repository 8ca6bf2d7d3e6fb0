"""Where a residual keeps the model's input: against least squares and made-up subspaces; SAEs without it."""
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import apply
import checkpoint
import flux
import inputs
import normalize
import sae
import score
import session
import train

D, C, Q = 24, 3, 3
TINY = {"layer": 2, "features": 256, "k": 8, "steps": 4, "batch": 64, "prompt_batch": 2, "seeds_per_prompt": 2,
        "buffer": 256, "size": 64, "text_tokens": 16, "log_every": 2, "save_every": 2, "activation": "topk"}


@pytest.fixture(scope="module")
def model(nano):
    return flux.load(nano, dtype=jnp.float32)


def residuals(n=4000, seed=0, strength=2.0):
    """Residuals [n, D] that hold latents [n, C] in C directions beside a signal; also these directions."""
    rng = np.random.default_rng(seed)
    where = np.random.default_rng(99).standard_normal((C, D))
    z, eight = rng.standard_normal((n, C)), np.random.default_rng(98).standard_normal((8, D))
    signal = rng.standard_normal((n, 8)) @ eight
    x = strength * z @ where + signal + 0.1 * rng.standard_normal((n, D)) + 5
    return x.astype(np.float32), z.astype(np.float32), where


# ---------------------------------------------------------------- the regression


def test_directions_are_those_of_least_squares():
    """In pieces, with a mean far away and latents that are correlated: the fitted values are numpy's."""
    x, z, _ = residuals()
    z = z @ np.array([[1, 0.5, 0], [0, 1, 0], [0.2, 0, 2]], np.float32) + 3
    moments = inputs.Moments(D, C, full=True)
    for i in range(0, len(x), 700):
        moments.add(1000 + x[i:i + 700], z[i:i + 700])
    design = np.column_stack([z, np.ones(len(z))]).astype(np.float64)
    fitted = design @ np.linalg.lstsq(design, x.astype(np.float64), rcond=None)[0]
    rows = moments.directions()
    np.testing.assert_allclose(rows.T @ rows, np.cov(fitted, rowvar=False), rtol=1e-3, atol=1e-3)
    own = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(moments.covariances()[2], own, rtol=1e-3, atol=1e-3)


def test_described_finds_share_dimension_and_angles():
    """The strongest directions are the latents', so the axes of the raw residual lie in the subspace."""
    x, z, _ = residuals(strength=20.0)
    moments = inputs.Moments(D, C, full=True)
    moments.add(x, z)
    found = inputs.described(moments)["raw"]
    assert found["dimension"] == C and 0.95 < found["linear"] < 1 and found["variance"] >= found["linear"] - 1e-3
    assert max(found["angles"]) < 5 and found["overlap"] > 0.99 and found["chance"] == C / D
    assert len(found["dominant"]) == 3 and all(one["angle"] < 5 for one in found["dominant"])
    assert sum(one["share"] for one in found["dominant"]) == pytest.approx(found["linear"], abs=0.02)


def test_noise_that_is_not_there_explains_nothing():
    """The share is corrected for the number of fitted coefficients: on 60 tokens plain R² would say 5 %."""
    x, _, _ = residuals(60, strength=0.0)
    moments = inputs.Moments(D, C, full=True)
    moments.add(x, np.random.default_rng(5).standard_normal((60, C)))
    assert inputs.described(moments)["standardized"]["linear"] < 0.04
    constant = inputs.Moments(D, C)
    constant.add(x, np.zeros((60, C)))
    assert not constant.directions().any()


def test_mistakes():
    x, z, _ = residuals(4)
    moments = inputs.Moments(D, C)
    moments.add(x, z)
    with pytest.raises(session.Mistake, match="4 tokens"):
        moments.directions()
    with pytest.raises(session.Mistake, match="NaN"):
        moments.add(x * np.nan, z)


# ---------------------------------------------------------------- SAEs without some directions


@pytest.mark.parametrize("normalization", ["std", "pca"])
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_an_sae_neither_reads_nor_writes_removed_directions(normalization, activation):
    x, z, where = residuals()
    cfg = sae.Config(d_in=D, features=64, k=4, normalization=normalization, activation=activation, removed=Q, lr=1e-3,
                     warmup=1)
    state = sae.init(jax.random.key(0), cfg, x, without=where)
    step = jax.jit(sae.step, static_argnums=1)
    for i in range(30):
        state, metrics = step(state, cfg, x[i * 64:(i + 1) * 64])
    assert np.isfinite(metrics["fvu"])
    u = np.asarray(normalize.standardize(x, state.mean, state.std, state.basis, None))
    assert np.linalg.matrix_rank(u, tol=1e-2) == D - Q
    params = sae.fold(state, cfg)
    moved = x + (10 * z @ where).astype(np.float32)              # other latents: the same code, and a shifted splice
    for a, b in zip(sae.encode(params, cfg, x[:50]), sae.encode(params, cfg, moved[:50])):
        np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(a).max())
    spliced, other = (np.asarray(apply.splice(params, cfg, y[:50])) for y in (x, moved))
    np.testing.assert_allclose(other - spliced, moved[:50] - x[:50], atol=2e-3 * np.abs(moved).max())
    kept = x - np.asarray(apply.removed(params, x))
    assert abs(np.corrcoef((kept - kept.mean(0)) @ np.linalg.pinv(where), z, rowvar=False)[:Q, Q:]).max() < 0.2
    there = apply.removed(params, apply.decode(params, cfg, *sae.encode(params, cfg, x[:50])))
    np.testing.assert_allclose(there, np.broadcast_to(np.asarray(there)[0], there.shape), atol=1e-3)
    found = apply.evaluate(params, cfg, x)                       # relative to what is kept
    error = kept - np.asarray(apply.decode(params, cfg, *sae.encode(params, cfg, x)))
    assert found.fvu == pytest.approx((error ** 2).sum() / ((kept - kept.mean(0)) ** 2).sum(), rel=1e-3)


def test_files_of_an_sae_without_directions(tmp_path):
    """SAELens loads the folder as any other; ours also holds what was removed, and says so when it is missing."""
    x, _, where = residuals()
    cfg = sae.Config(d_in=D, features=40, k=4, normalization="pca", removed=Q, groups=("img-t0", "img-t1"))
    group = np.arange(len(x)) % 2
    state = sae.init(jax.random.key(0), cfg, x, group, without=np.stack([where, 2 * where]))
    checkpoint.save_state(tmp_path / "sae", state, cfg)
    params, read = checkpoint.load_groups(tmp_path / "sae")
    assert read == cfg
    for g, p in enumerate(params):
        for name, value in sae.fold(state, cfg, g).items():
            np.testing.assert_array_equal(p[name], value)
    again, _, _ = checkpoint.load_state(tmp_path / "sae")
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    (tmp_path / "sae" / checkpoint.REMOVED).unlink()
    with pytest.raises(sae.Mistake, match=checkpoint.REMOVED):
        checkpoint.load(tmp_path / "sae")
    sae_lens, torch = pytest.importorskip("sae_lens"), pytest.importorskip("torch")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    with torch.no_grad():
        back = theirs.decode(theirs.encode(torch.tensor(x[:20]))).numpy()
    ours = apply.decode(params[0], cfg, *sae.encode(params[0], cfg, x[:20]))
    np.testing.assert_allclose(ours, back, atol=1e-3 * np.abs(back).max())


@pytest.mark.parametrize("bad", [{"removed": D}, {"removed": 2, "normalization": "scale"},
                                 {"removed": 2, "d_out": 8, "activation": "jumprelu"}])
def test_impossible_configs(bad):
    with pytest.raises(sae.Mistake, match="removed = "):
        sae.Config(**{"d_in": D, "features": 40, "k": 4} | bad)


def test_directions_must_fit_the_config():
    x, _, where = residuals(100)
    cfg = sae.Config(d_in=D, features=40, k=4, removed=Q)
    for given in (None, where[:2]):
        with pytest.raises(sae.Mistake, match=r"cfg\.removed = 3 needs"):
            sae.init(jax.random.key(0), cfg, x, without=given)
    with pytest.raises(sae.Mistake, match="needs None"):
        sae.init(jax.random.key(0), dataclasses.replace(cfg, removed=0), x, without=where)


# ---------------------------------------------------------------- the tools


@pytest.fixture
def start(nano, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flux, "load", lambda *args, **kwargs: model)
    return lambda **flags: train.main(**({"model": str(nano), "without": "input"} | TINY | flags))


@pytest.mark.parametrize("flags", [{}, {"timesteps": 2, "normalization": "std"}])
def test_training_without_the_input(start, model, tmp_path, flags):
    """What is linear in the input noise is gone. A resumed run ends in the same bytes."""
    start(steps=2, **flags)
    train.main(resume=True, steps=4, log_every=2, save_every=2)
    params, cfg = checkpoint.load(tmp_path / "ckpt")
    assert cfg.removed == model.cfg.in_channels and (tmp_path / "ckpt" / checkpoint.REMOVED).is_file()
    start_ = flux.prepare(model, ["a red cube"] * 40, steps=1, size=64, seed=3)
    x = np.asarray(flux.capture(model, start_, layer=2, site="img")[0]).reshape(-1, model.cfg.width)
    z = np.asarray(start_.latents).reshape(len(x), -1)
    linear = []
    for kept in (x, x - np.asarray(apply.removed(params, x))):
        moments = inputs.Moments(model.cfg.width, model.cfg.in_channels, full=True)
        moments.add(kept, z)
        linear.append(inputs.described(moments)["raw"]["linear"])
    assert linear[0] > 0.2 and linear[1] < linear[0] / 3, linear
    if not flags:
        start(out="straight")
        for name in (checkpoint.STATE, checkpoint.REMOVED):
            whole, halves = tmp_path / "straight" / name, tmp_path / "ckpt" / name
            assert name == checkpoint.STATE or whole.read_bytes() == halves.read_bytes()


@pytest.mark.parametrize("flags", [{"site": "both"}, {"site": "txt"}, {"transcoder": 4, "activation": "batchtopk"},
                                   {"normalization": "scale"}, {"without": "noise"}])
def test_runs_that_cannot_leave_the_input_out(start, flags, tmp_path):
    with pytest.raises(session.Mistake, match="--without"):
        start(**flags)
    assert not list(tmp_path.iterdir())


def test_closing_table_says_what_explains_the_features(start, capsys, tmp_path):
    start(without="nothing", buffer=4096)
    lines = capsys.readouterr().out.splitlines()
    row = checkpoint.load_metadata(tmp_path / "ckpt")["evaluation"]["SAE"]
    assert sum(row["variance_of_input"].values()) == pytest.approx(1)
    assert 0 < row["variance"]["follow_prompt_or_image"] <= row["variance"]["varying"] <= 256
    assert lines[-5].split() == ["explained", "by", "position", "prompt", "noise", "both"]
    assert f"of {row['variance']['varying']} features follow the prompt" in lines[-2]


def test_inputs_at_every_step_are_those_of_sampling(model):
    start_ = flux.prepare(model, ["a red cube", "a blue cone"], steps=3, size=64, seed=1)
    seen, latents = flux.inputs(model, start_), start_.latents
    assert seen.shape == (3, *latents.shape)
    for i in range(3):
        np.testing.assert_allclose(seen[i], latents, atol=1e-5)
        v = flux.velocity(model.params, model.cfg, latents, *flux.at(start_, i), grid=start_.grid)
        latents = latents + (start_.sigmas[i + 1] - start_.sigmas[i]) * v


def test_score_input_prints_a_table_for_any_model(nano, monkeypatch, tmp_path, capsys):
    """One layer by hand, from the same noise; the table in JSON; and mistakes."""
    file = tmp_path / "in.json"
    flags = ["--input", f"--model={nano}", "--layer=2", "--tokens=512", "--batch=8", f"--out={file}"]
    monkeypatch.setattr(sys, "argv", ["score.py", *flags])
    session.command(score.main)
    found = json.loads(file.read_text())["layers"]["2"]
    printed = capsys.readouterr()
    assert f"{found['standardized']['linear']:.1%}" in printed.out + printed.err
    assert 0 < found["raw"]["linear"] <= 1 and found["standardized"]["dimension"] <= 16
    assert len(found["standardized"]["angles"]) == found["standardized"]["dimension"]
    wrong = {"layer 99": ["--input", f"--model={nano}", "--layer=99"], "missing": ["nowhere", "--input"]}
    for said, flags in wrong.items():
        monkeypatch.setattr(sys, "argv", ["score.py", *flags])
        with pytest.raises(SystemExit) as error:
            session.command(score.main)
        assert error.value.code == 2 and said in capsys.readouterr().err
