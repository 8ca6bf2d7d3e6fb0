"""Dashboards: statistics against brute force, pages in a real Chromium, hostile prompts, and errors of one line."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import checkpoint
import dash
import data
import flux
import pages
import sae
import session
import stats

ROOT = Path(dash.__file__).parent
HOSTILE = [
    "<script>window.hacked = 1</script>", "</textarea></title><img src=x onerror='window.hacked = 2'>",
    "\"'><svg onload=window.hacked=3>", "right \u202eto left\u202c and \u200fmarks", "🦊 emoji 👩\u200d👧 and 立方体",
    "&lt;b&gt; is not <b>", "a  cube\twith   spaces", "x" * 10_000, "${window.hacked = 4}` + '\\u003c",
    "\x00\x07 bell", "]]></script><!-- --><script>window.hacked=5</script>", "two\nlines and \u2028 another"]


def random_codes(rng, n, S, F, k):
    """values, indices [n, S, k] as an SAE makes them: distinct features, some values zero, unequal features."""
    popularity = rng.exponential(size=F) ** 2
    popularity[: F // 8] = 0                                     # never fire
    indices = np.stack([[rng.choice(F, k, replace=False, p=popularity / popularity.sum()) for _ in range(S)]
                        for _ in range(n)])
    values = np.where(rng.random((n, S, k)) < 0.2, 0, rng.lognormal(size=(n, S, k))).astype(np.float32)
    return values, indices


def dense_of(values, indices, F):
    n, S, _ = values.shape
    dense = np.zeros((n, S, F), np.float32)
    np.put_along_axis(dense, indices, values, 2)
    return dense


LAYOUTS = [stats.Layout(*shape) for shape in ((1, 0, (3, 4)), (2, 5, (2, 3)), (3, 7, (0, 0)), (1, 0, (1, 1)))]


@pytest.mark.parametrize("layout, F, batched", [*((layout, 40, 2 ** 22) for layout in LAYOUTS), (LAYOUTS[1], 41, 50),
                                                (LAYOUTS[0], 307, 999)], ids=str)
def test_statistics_are_those_of_the_raw_activations(layout, F, batched, monkeypatch):
    monkeypatch.setattr(stats, "BATCHED", batched)                # small: what waits joins the rest many times
    rng, n, k = np.random.default_rng(0), 60, 4
    values, indices = random_codes(rng, n, layout.positions, F, k)
    labels = rng.random((n, 3)) < 0.4
    W_dec = rng.standard_normal((F, 9))
    counts = stats.Counts(F, layout)
    maxima = np.zeros((n, F), np.float32)
    for i in range(n):
        alive, peak = counts.add(i, values[i], indices[i], seed=0)
        maxima[i, alive] = peak
    found = counts.finish(W_dec, labels, maxima, np.full((F, 4), 0.25), {"images": n, "attributes": list("abc")})
    dense = dense_of(values, indices, F)
    flat = dense.reshape(-1, F)
    assert found.info["tokens"] == len(flat)
    np.testing.assert_array_equal(found.fired, (flat > 0).sum(0))
    np.testing.assert_array_equal(found.images, (dense > 0).any(1).sum(0))
    np.testing.assert_array_equal(found.maximum, flat.max(0))
    np.testing.assert_allclose(found.density, (flat > 0).mean(0))
    np.testing.assert_allclose(found.total, flat.sum(0, dtype=np.float64), rtol=1e-6)
    edges = [*stats.EDGES, np.inf]
    for f in range(F):
        np.testing.assert_array_equal(found.histogram[f], np.histogram(flat[flat[:, f] > 0, f], edges)[0])
        assert found.top_image[f].tolist() == top(dense[:, :, f].max(1), stats.KEPT)
        for image, value, values_map in zip(found.top_image[f], found.top_value[f], found.top_map[f]):
            if image >= 0:
                np.testing.assert_array_equal(values_map, dense[image, :, f])
                assert value == dense[image, :, f].max()
        check_quantiles(found, f, dense[:, :, f])
    check_shapes(found, layout, dense)
    on = (flat > 0).astype(np.float64)
    both = on.T @ on
    jaccard = both / np.maximum(on.sum(0)[:, None] + on.sum(0) - both, 1)
    check_neighbours(found.together, found.together_jaccard, jaccard)
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    check_neighbours(found.nearest, found.nearest_cosine, unit @ unit.T)
    peaks = dense.max(1)
    for a in range(3):
        yes, no = peaks[labels[:, a]], peaks[~labels[:, a]]
        wins = (yes[:, None] > no).mean((0, 1)) + 0.5 * (yes[:, None] == no).mean((0, 1))
        np.testing.assert_allclose(found.auroc[:, a], wins, atol=1e-6)


def top(peaks, count):
    order = [int(i) for i in np.argsort(-peaks, kind="stable") if peaks[i] > 0][:count]
    return order + [-1] * (count - len(order))


def check_quantiles(found, f, activations):
    peaks, shown = activations.max(1), found.quantile_image[f]
    drawn = shown[shown >= 0]
    assert len(set(drawn)) == len(drawn) and not set(drawn) & set(found.top_image[f])
    assert (peaks[drawn] > 0).all()
    below = int((peaks > 0).sum()) - int((found.top_image[f] >= 0).sum())
    assert len(drawn) >= min(below, 4) // 2                      # images below the top are shown where there are any
    previous = np.inf
    for q in range(4):
        group = found.quantile_image[f, q][found.quantile_image[f, q] >= 0]
        for image, value, values_map in zip(group, found.quantile_value[f, q], found.quantile_map[f, q]):
            np.testing.assert_array_equal(values_map, activations[image])
            assert value == peaks[image] <= previous
        previous = peaks[group].min() if len(group) else previous


def check_shapes(found, layout, dense):
    if not layout.image_tokens:
        return
    n, _, F = dense.shape
    maps = dense.reshape(n, layout.timesteps, -1, F)[:, :, layout.text_tokens:].mean(1, dtype=np.float64)
    np.testing.assert_allclose(found.mean_map, maps.mean(0).T, rtol=1e-5, atol=1e-7)
    ys, xs = (np.arange(layout.image_tokens) // layout.grid[1] + 0.5) / layout.grid[0], \
             (np.arange(layout.image_tokens) % layout.grid[1] + 0.5) / layout.grid[1]
    for f in range(F):
        areas, concentrations, spreads = [], [], []
        for v in maps[:, :, f]:
            if v.sum() > 0:
                w = v / v.sum()
                areas.append((v > 0).mean())
                concentrations.append(1 - v.sum() ** 2 / (len(v) * (v ** 2).sum()))
                spreads.append(np.sqrt((w * ((xs - w @ xs) ** 2 + (ys - w @ ys) ** 2)).sum()))
        for got, expected in ((found.area, areas), (found.concentration, concentrations), (found.spread, spreads)):
            np.testing.assert_allclose(got[f], np.mean(expected) if expected else 0, rtol=1e-5, atol=1e-6)


def check_neighbours(index, value, score, first=0):
    """index, value: of the features from `first` on; score: of these with all."""
    score = score.copy()
    score[np.arange(len(score)), np.arange(first, first + len(score))] = -np.inf
    for f in range(len(score)):
        expected = np.sort(score[f])[::-1][:10]
        np.testing.assert_allclose(value[f][index[f] >= 0], expected[expected > 0], rtol=1e-5)
        others = index[f][index[f] >= 0]
        assert first + f not in others and len(set(others)) == len(others)
        np.testing.assert_allclose(score[f, others], value[f][: len(others)], rtol=1e-5)


def test_nearest_features_of_blocks_that_do_not_divide():
    """The last block of rows may be one row."""
    rng = np.random.default_rng(0)
    for F in (3, 2897):                                          # 2 ** 23 // 2897 = 2895 rows, then 2
        unit = rng.standard_normal((F, 5))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        index, value = stats._nearest(unit)
        check_neighbours(index[-4:], value[-4:], (unit @ unit.T)[-4:], first=F - 4 if F > 4 else 0)


def test_the_random_examples_are_a_uniform_sample():
    """Every image of a feature that fires on 200 is drawn about equally often."""
    layout, drawn = stats.Layout(1, 0, (1, 1)), np.zeros(200)
    counts = stats.Counts(400, layout)
    for i in range(200):                                         # 400 features that all fire, with equal values
        counts.add(i, np.ones((1, 400), np.float32), np.arange(400)[None], seed=1)
    np.add.at(drawn, counts.a["some_image"].ravel(), 1)
    expected = 400 * stats.RESERVOIR / 200
    assert drawn.sum() == 400 * stats.RESERVOIR and abs(drawn - expected).max() < 5 * np.sqrt(expected)


def test_noise_of_tools_is_none_of_trainings():
    """Numbers are int32: 250 million for each tool, behind those of training and its closing table."""
    starts = [data.TABLE, data.DRAWN, data.SCORED, 2 ** 31]
    assert np.diff(starts).min() >= 250_000_000
    numbers = np.array([starts[0], *(n - 1 for n in starts[1:])])
    assert len(np.unique(flux.draw_noise(0, numbers, (1,)))) == len(numbers)


def test_auroc_without_both_sides_is_nan():
    scores = np.array([[0.0], [1.0], [2.0]])
    labels = np.array([[True, False, False], [True, False, True], [True, False, True]])
    np.testing.assert_array_equal(stats.auroc(scores, labels), [[np.nan, np.nan, 1.0]])


@pytest.mark.parametrize("text, expected", [("", range(8)), ("2", [2]), ("0:3", [0, 1, 2]), ("6:", [6, 7]),
                                            (":2,5", [0, 1, 5]), ("(3, 1)", [1, 3]), (4, [4])])
def test_feature_ranges(text, expected):
    assert dash.feature_range(text, 8) == list(expected)


@pytest.mark.parametrize("text", ["8", "-1", "3:3", "5:2", "0:9", "a", "1,,2", "1.5", "0:1:2"])
def test_feature_ranges_that_do_not_fit(text):
    with pytest.raises(ValueError, match=r"--features .* from 0 to 7"):
        dash.feature_range(text, 8)


# ---------------------------------------------------------------- a dashboard of nano


@pytest.fixture(scope="module")
def model(nano):
    return flux.load(nano, dtype=jnp.float32)


def made(folder, model, *, site="img", timesteps=1, features=96, k=6, model_name="nano"):
    """An SAE that was fitted to nothing but the activations' mean and spread: quick, and alive enough."""
    import jax
    prompts = [f"a {color} cube" for color in ("red", "blue", "green", "white")]
    acts = flux.residuals(model, prompts, layer=2, site=site, size=64, text_tokens=12)
    cfg = sae.Config(d_in=model.cfg.width, features=features, k=k)
    state = sae.init(jax.random.key(0), cfg, np.asarray(acts).reshape(-1, model.cfg.width))
    run = {"model": str(model_name), "layer": 2, "site": site, "timesteps": timesteps, "size": 64, "text_tokens": 12,
           "dtype": "float32", "prompts": "scenes", "prompt_field": None}
    about = {name: run[name] for name in ("model", "layer", "site")}
    checkpoint.save(folder, sae.fold(state, cfg), cfg, metadata={**about, "run": run})
    lines = [{"step": s, "loss": 1 / s, "fvu": 0.5 / s, "l0": 6.0, "dead": 0.01, "tokens": s} for s in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    return folder


@pytest.fixture(scope="module")
def built(model, nano, tmp_path_factory):
    """The dashboard of 40 scenes at the site img: (folder, checkpoint)."""
    folder = tmp_path_factory.mktemp("img")
    ckpt = made(folder / "ckpt", model, model_name=nano)
    dash.main(str(ckpt), out=str(folder / "dash"), n=40, steps=1, batch=16)
    return folder / "dash", ckpt


@pytest.fixture(scope="module")
def hostile(model, nano, tmp_path_factory):
    """A dashboard of hostile prompts, both sites, two timesteps."""
    folder = tmp_path_factory.mktemp("hostile")
    ckpt = made(folder / "ckpt", model, site="both", timesteps=2, model_name=nano)
    params, cfg = checkpoint.load(ckpt)
    dash_folder = folder / "dash"
    found = dash.collect(model, params, cfg, HOSTILE, dash_folder, layer=2, site="both", timesteps=2, steps=1, size=64,
                         text_tokens=12, info={"model": "<img src=x onerror=window.hacked=9>"})
    pages.write(found, dash_folder)
    return dash_folder, found


def test_pages_hold_what_raw_activations_say(built, model):
    """Brute force: the activations once more, by flux.residuals and the saved weights alone."""
    folder, ckpt = built
    found = dash.load(folder / "collect")
    with safe_open(ckpt / "sae_weights.safetensors", "np") as file:
        W_enc, b_enc = file.get_tensor("W_enc"), file.get_tensor("b_enc")
    noise = flux.draw_noise(0, data.DRAWN + np.arange(40), (16, model.cfg.in_channels))
    acts = np.asarray(flux.residuals(model, found.info["prompts"], layer=2, site="img", size=64, text_tokens=12,
                                     noise=noise))
    dense = np.maximum(acts @ W_enc + b_enc, 0)
    dense *= dense >= np.sort(dense, -1)[..., -6, None]
    np.testing.assert_allclose(found.density, (dense > 0).mean((0, 1)), atol=2 / dense[..., 0].size)
    np.testing.assert_allclose(found.maximum, dense.max((0, 1)), rtol=1e-3, atol=1e-4)
    f = int(found.fired.argmax())
    best = dense[:, :, f].max(1).argmax()
    np.testing.assert_allclose(found.top_map[f, 0], dense[best, :, f], rtol=1e-3, atol=1e-3)
    page = (folder / "feature" / f"{f}.html").read_text()
    assert f"<dd>{found.density[f]:.4g}</dd>" in page and f"<dd>{found.maximum[f]:.4g}</dd>" in page


def test_thresholds_and_groups_of_tokens(model, tmp_path):
    """A JumpReLU SAE for text and image tokens at two timesteps: the weights of each group, all that fires."""
    import jax
    where = {"layer": 2, "site": "both", "size": 64, "text_tokens": 12}
    groups = flux.token_groups("both", 2, 12)
    acts = np.asarray(flux.residuals(model, HOSTILE, steps=2, **where))
    number = np.zeros(acts.shape[:-1], int)
    for g, (_, t, part) in enumerate(groups):
        number[t, :, part] = g
    names = [name for name, *_ in groups]
    cfg = sae.Config(d_in=model.cfg.width, features=96, k=6, activation="jumprelu", groups=names)
    state = sae.init(jax.random.key(0), cfg, acts.reshape(-1, acts.shape[-1]), number.reshape(-1))
    checkpoint.save_state(tmp_path / "ckpt", state, cfg)
    params, cfg = checkpoint.load_groups(tmp_path / "ckpt")
    found = dash.collect(model, params, cfg, HOSTILE, tmp_path / "dash", timesteps=2, steps=1, **where)
    noise = flux.draw_noise(0, data.DRAWN + np.arange(len(HOSTILE)), (16, model.cfg.in_channels))
    acts = np.asarray(flux.residuals(model, HOSTILE, steps=2, noise=noise, **where))
    fired = np.zeros(96)
    for p, (_, t, part) in zip(params, groups):
        fired += np.sum(acts[t, :, part] @ p["W_enc"] + p["b_enc"] > p["threshold"], (0, 1))
    assert fired.sum() > 6 and np.abs(found.fired - fired).max() <= 2    # within rounding of a threshold
    with pytest.raises(ValueError, match="SAEs for 4 groups"):
        dash.collect(model, params, cfg, HOSTILE, tmp_path / "other", steps=1, **where)


def test_images_are_those_of_generate(built, model):
    from PIL import Image
    folder, _ = built
    prompts = dash.load(folder / "collect").info["prompts"]
    noise = flux.draw_noise(0, data.DRAWN + np.arange(40), (16, model.cfg.in_channels))
    drawn = flux.generate(model, prompts, steps=1, size=64, noise=noise, text_tokens=12)
    for i in (0, 17, 39):
        stored = np.asarray(Image.open(folder / "images" / f"{i}.webp").convert("RGB"), float)
        assert np.abs(stored - drawn[i]).mean() < 6              # lossy, but this image and no other


def test_the_scene_truth(built):
    import scenes
    found, drawn = dash.load(built[0] / "collect"), data.held_out_scenes(40)
    names, table = dash.scene_attributes(scenes, drawn)
    assert found.info["attributes"] == names and found.info["prompts"][3] == scenes.caption(drawn[3])
    assert all(map(data.is_held_out, found.info["prompts"]))
    for i in range(40):
        row = dict(zip(names, table[i]))
        solids = drawn[i].solids
        assert {n for n in row if n.startswith("color") and row[n]} == {f"color: {s.color}" for s in solids}
        assert sum(row[f"light: {side}"] for side in scenes.SIDES) == 1 and row[f"objects: {len(solids)}"]
    assert found.auroc.shape == (96, len(names)) and found.best_attribute(int(found.fired.argmax()))[0] in names


def test_pages_are_rebuilt_without_the_model(built, tmp_path, monkeypatch):
    folder, ckpt = built
    shutil.copytree(folder, tmp_path / "dash")
    shutil.rmtree(tmp_path / "dash" / "feature")
    monkeypatch.setattr(flux, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    dash.main(str(ckpt), out=str(tmp_path / "dash"), pages_only=True, features="3:5")
    assert sorted(p.name for p in (tmp_path / "dash" / "feature").iterdir()) == ["3.html", "4.html"]
    assert (tmp_path / "dash" / "feature" / "3.html").read_text() != (folder / "feature" / "3.html").read_text()
    dash.main(str(ckpt), out=str(tmp_path / "dash"), pages_only=True)
    for path in folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / "dash" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
    assert not [p for p in tmp_path.iterdir() if p.name != "dash"]


def test_scores_that_came_later_are_shown_when_pages_are_rebuilt(built, tmp_path):
    """train.py, dash.py, score.py, dash.py --pages_only; and not beside another SAE."""
    folder, ckpt = built
    shutil.copytree(folder, tmp_path / "dash")
    shutil.copytree(ckpt, tmp_path / "ckpt")
    part = {"clean": 0.5, "spliced": 0.625, "zero": 2.0, "mean": 1.5, "recovered_zero": 0.9166, "recovered_mean": 0.875}
    found = {"kind": "fae score", "weights": checkpoint.fingerprint(checkpoint.load_groups(ckpt)[0]), "images": 7,
             "data": "cards",
             "loss": part, "loss_where_trained": part, "per_timestep": [part | {"t": 1.0, "trained": True}],
             "image": {"steps": 4, **{name: {"rmse": 3.0, "psnr": None} for name in ("spliced", "zero", "mean")}},
             "sae": {"fvu": 0.25, "fvu_standardized": 0.25, "l0": 8.0, "dead": 0.5,
                     "density": {"never": 48, "log10_from": [-2.0], "features": [48]}},
             "decoder_norm": {"median": 1.0}, "encoder_decoder_cosine": {"median": 0.5}}
    for weights, shown in ((found["weights"], True), ("of another SAE", False)):
        (tmp_path / "ckpt" / "eval.json").write_text(json.dumps(found | {"weights": weights}))
        dash.main(str(tmp_path / "ckpt"), out=str(tmp_path / "dash"), pages_only=True)
        page = (tmp_path / "dash" / "run.html").read_text()
        assert ("7 images, cards" in page and "0.917" in page) == shown == ("What the SAE leaves out" in page)


def test_a_stopped_run_leaves_the_old_pages_and_goes_on(built, model, nano, tmp_path, monkeypatch):
    folder, ckpt = built
    out = tmp_path / "dash"
    shutil.copytree(folder, out)
    (out / "index.html").write_text("old")
    original, calls = stats.Counts.add, []

    class Stop(Exception):
        pass

    def add(self, number, *args, **kwargs):
        calls.append(number)
        if len(calls) == 30:
            raise Stop
        return original(self, number, *args, **kwargs)

    monkeypatch.setattr(dash.Partial.__init__, "__defaults__", (0,))         # saves after every batch
    monkeypatch.setattr(stats.Counts, "add", add)
    monkeypatch.setattr(flux, "load", lambda *a, **k: model)
    flags = {"out": str(out), "n": 40, "steps": 1, "batch": 8}
    with pytest.raises(Stop):
        dash.main(str(ckpt), **flags)
    assert (out / "index.html").read_text() == "old" and (out / "feature" / "5.html").exists()
    calls.clear()
    calls.extend(range(100))                                     # no more stops
    dash.main(str(ckpt), **flags)
    assert calls[100:] == list(range(24, 40))                    # whole batches were kept
    fresh, resumed = dash.load(folder / "collect"), dash.load(out / "collect")
    for name in ("fired", "images", "histogram", "top_image", "quantile_image", "together"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(fresh, name), name)
    np.testing.assert_array_equal(resumed.top_map[:], fresh.top_map[:])
    np.testing.assert_array_equal(resumed.quantile_map[:], fresh.quantile_map[:])
    assert not [p for p in tmp_path.iterdir() if p.name != "dash"]
    assert not list(out.glob("partial*"))
    with pytest.raises(Stop):                                    # other arguments: nothing of the old state is used
        calls.clear()
        dash.main(str(ckpt), **flags | {"seed": 1})
    calls[:] = range(100)
    dash.main(str(ckpt), **flags | {"seed": 2})
    assert calls[100:] == list(range(40))


def test_other_dashboards_and_foreign_files_stay(built, model, nano, tmp_path, monkeypatch):
    folder, _ = built
    out, other = tmp_path / "dash", made(tmp_path / "other", model, features=80, model_name=nano)
    shutil.copytree(folder, out)
    monkeypatch.setattr(flux, "load", lambda *a, **k: model)
    flags = {"out": str(out), "n": 2, "steps": 1, "batch": 2}
    with pytest.raises(ValueError, match="dashboard of another checkpoint"):
        dash.main(str(other), **flags)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no part of a dashboard: notes\.txt"):
        dash.main(str(other), **flags, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    with session.claim(out), pytest.raises(ValueError, match="another run is writing"):
        dash.main(str(other), **flags, overwrite=True)
    dash.main(str(other), **flags, overwrite=True)
    assert dash.load(out / "collect").features == 80


@pytest.mark.parametrize("where", [".", "mount"])
def test_a_folder_that_cannot_be_renamed_is_written_in_place(built, tmp_path, monkeypatch, where):
    folder, ckpt = built
    out = tmp_path / "dash"
    shutil.copytree(folder, out)
    (out / "run.html").write_text("old")
    inode = out.stat().st_ino
    monkeypatch.chdir(out if where == "." else tmp_path)
    if where == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    dash.main(str(ckpt), out="." if where == "." else str(out), pages_only=True)
    assert out.stat().st_ino == inode and "What the numbers mean" in (out / "run.html").read_text()
    assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_saves_what_was_collected(built, model, tmp_path, monkeypatch, name):
    import signal
    folder, ckpt = built
    original, calls, number = stats.Counts.add, [], getattr(signal, name)

    def add(self, image, *args):
        calls.append(image)
        if len(calls) == 9:
            os.kill(os.getpid(), number)
        return original(self, image, *args)

    monkeypatch.setattr(stats.Counts, "add", add)
    monkeypatch.setattr(flux, "load", lambda *a, **k: model)
    flags = {"out": str(tmp_path / "dash"), "n": 40, "steps": 1, "batch": 8}
    with pytest.raises(SystemExit) as end:
        dash.main(str(ckpt), **flags)
    assert end.value.code == 128 + number and len(calls) == 16   # to the end of the batch
    dash.main(str(ckpt), **flags)
    assert calls[16:] == list(range(16, 40))
    for field in ("fired", "top_image", "quantile_image"):
        np.testing.assert_array_equal(getattr(dash.load(tmp_path / "dash" / "collect"), field),
                                      getattr(dash.load(folder / "collect"), field))


def test_maps_take_the_room_of_what_fires():
    """Of 3,000 features 4 fire at a position: dense maps would take [3000, 48, 64] floats."""
    rng, layout = np.random.default_rng(0), stats.Layout(1, 0, (8, 8))
    counts = stats.Counts(3000, layout)
    for i in range(200):
        indices = np.stack([rng.choice(3000, 4, replace=False) for _ in range(64)])
        counts.add(i, rng.random((64, 4), np.float32) + 0.1, indices, seed=0)
    state = counts.settled()
    assert state["value"].nbytes + state["position"].nbytes <= 200 * 64 * 4 * 8 * 2
    rest = [array.nbytes for name, array in state.items() if name not in ("pair", "pair_count", "histogram")]
    assert sum(rest) < 3000 * 48 * 64 * 4 / 5


@pytest.mark.parametrize("flags, message", [
    (["absent"], "absent/cfg.json is missing"), (["{ckpt}", "--n=0"], "--n 0"),
    (["{ckpt}", "--steps=-1"], "--steps -1"), (["{ckpt}", "--prompts=absent.txt"], "no prompt file"),
    (["{ckpt}", "--features=96"], "from 0 to 95"), (["{ckpt}", "--colour=1"], "unknown flag --colour"),
    (["{ckpt}", "--out={tmp}"], "exists and is not a dashboard"),
    (["{ckpt}", "--pages_only"], "there is no dashboard"), (["{half}"], "sae_weights.safetensors is"),
    (["{ckpt}", "--model=schnelll"], "unknown model 'schnelll'"), (["{foreign}"], "does not say where it belongs"),
    (["{ckpt}", "--n=2.5"], "--n 2.5"), (["{gated}"], "'temporal'"), (["{wide}"], "width")])
def test_mistakes_end_in_one_line(built, model, tmp_path, flags, message):
    """As commands; only those that load nothing, so that each takes a second or two."""
    _, ckpt = built
    (tmp_path / "something").write_text("else")
    places = {"ckpt": ckpt, "tmp": tmp_path, **{n: tmp_path / n for n in ("half", "foreign", "gated", "wide")}}
    shutil.copytree(ckpt, places["half"])
    data = (ckpt / "sae_weights.safetensors").read_bytes()
    (places["half"] / "sae_weights.safetensors").write_bytes(data[:len(data) // 2])
    params, cfg = checkpoint.load(ckpt)
    checkpoint.save(places["foreign"], params, cfg)
    shutil.copytree(ckpt, places["gated"])
    (places["gated"] / "cfg.json").write_text((ckpt / "cfg.json").read_text().replace('"topk"', '"temporal"'))
    wide = sae.Config(d_in=64, features=8, k=2)
    checkpoint.save(places["wide"], {"W_enc": jnp.ones((64, 8)), "b_enc": jnp.ones(8), "W_dec": jnp.ones((8, 64)),
                              "b_dec": jnp.ones(64)}, wide, metadata=checkpoint.load_metadata(ckpt) | {"training": {}})
    command = [sys.executable, str(ROOT / "dash.py"), *(flag.format(**places) for flag in flags)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert (tmp_path / "something").read_text() == "else" and not (tmp_path / "dash").exists()


def test_strips_are_drawn_once_and_stay(built, model, visit, tmp_path, monkeypatch):
    """--steer: what flux draws with the feature's values multiplied by hand; drawn again only where it is missing."""
    from PIL import Image
    folder, ckpt = built
    out = tmp_path / "dash"
    shutil.copytree(folder, out)
    monkeypatch.setattr(flux, "load", lambda *a, **k: model)
    dash.main(str(ckpt), out=str(out), pages_only=True, steer=2)
    found = dash.load(out / "collect")
    wanted = dash.most_frequent(found, 2)
    assert found.images[wanted].min() >= np.sort(found.images)[-2]
    assert {p.name for p in (out / "steer").iterdir()} == {f"{f}-{s}.webp" for f in wanted for s in (0, 2, 4, 8)}
    params, f = checkpoint.load(ckpt)[0], wanted[0]
    values = lambda x: jnp.maximum(x @ params["W_enc"] + params["b_enc"], 0)
    def scaled(name, x, each, shared):
        v = values(x)
        v = jnp.where(v >= jnp.sort(v, -1)[..., -6, None], v, 0)[..., f, None]
        return x + 3 * v * params["W_dec"][f]                    # times 4

    edit = flux.Edit(2, ("double.img",), scaled)
    image = int(found.top_image[f, 0])
    expected = flux.generate(model, [found.info["prompts"][image]], steps=1, size=64, text_tokens=12, edits=lambda i: [
        edit], noise=flux.draw_noise(0, data.DRAWN + np.array([image]), (16, model.cfg.in_channels)))[0]
    stored = np.asarray(Image.open(out / "steer" / f"{f}-4.webp").convert("RGB"), float)
    assert np.abs(stored - expected).mean() < 6
    page = (out / "feature" / f"{f}.html").read_text()
    assert page.count("../steer/") == 4 and f"../images/{image}.webp" in page and "ablated" in page
    browsed = visit(out / "feature" / f"{f}.html")
    strip = browsed.get_by_role("region", name="Steered")
    strip.scroll_into_view_if_needed()
    browsed.wait_for_function("[...document.querySelectorAll('[aria-labelledby=steer] img')]"
                              ".filter(image => image.complete && image.naturalWidth === 64).length === 5")
    assert strip.locator("figcaption").all_inner_texts() == ["ablated", "×1, unchanged", "×2", "×4", "×8"]
    strip.get_by_role("button", name="Enlarge: ×8").click()
    assert browsed.locator("dialog[open] img").get_attribute("src") == f"../steer/{f}-8.webp"
    before = {p: p.read_bytes() for p in (out / "steer").iterdir()}
    monkeypatch.setattr(dash, "strip", lambda *a: pytest.fail("drawn again"))
    dash.main(str(ckpt), out=str(out), pages_only=True, steer=1)
    dash.main(str(ckpt), out=str(out), pages_only=True)
    assert {p: p.read_bytes() for p in (out / "steer").iterdir()} == before
    other = json.loads((ckpt / "cfg.json").read_text())
    shutil.copytree(ckpt, tmp_path / "other")
    other["metadata"]["note"] = "another"
    (tmp_path / "other" / "cfg.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="is of another checkpoint"):
        dash.main(str(tmp_path / "other"), out=str(out), pages_only=True, steer=1)


@pytest.mark.parametrize("name", [".git/config", "notes.txt", "images/mine.png", "feature/deep/er.html", "steer"])
def test_files_of_others_are_named_and_stay(built, tmp_path, monkeypatch, name):
    """Also hidden ones, deep ones and links: the whole folder would be replaced."""
    folder, ckpt = built
    out = tmp_path / "dash"
    shutil.copytree(folder, out)
    (tmp_path / "elsewhere").mkdir()
    if name == "steer":
        (out / name).symlink_to(tmp_path / "elsewhere")
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    monkeypatch.setattr(flux, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    for flags in ({}, {"pages_only": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=rf"no part of a dashboard: .*{name.split('/')[0]}"):
            dash.main(str(ckpt), out=str(out), **flags)
    assert (out / name).exists() and {p.name for p in tmp_path.iterdir()} == {"dash", "elsewhere"}


# ---------------------------------------------------------------- in Chromium


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:                                                 # the gate installs it, and may not do without
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(path, **context) opens a page from disk; afterwards: no error on the console, nothing but files fetched."""
    contexts, problems = [], []

    def open_page(path, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith("file:") else problems.append(r.url))
        page.on("requestfailed", lambda r: None if "ABORTED" in r.failure else problems.append(f"missing: {r.url}"))
        page.on("dialog", lambda d: problems.append("a dialog"))
        page.goto(Path(path).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def column(page, place):
    return page.locator(f"#table tbody td:nth-child({place})").all_inner_texts()


def test_index_sorts_filters_and_searches(built, visit):
    folder, _ = built
    found = dash.load(folder / "collect")
    page = visit(folder / "index.html")
    alive = int((found.fired > 0).sum())
    assert page.inner_text("#count") == f"{alive} of 96 features"
    assert page.locator("#table tbody tr").count() == min(alive, 50)
    page.click("[data-sort=density]")
    assert page.get_attribute("th:has([data-sort=density])", "aria-sort") == "descending"
    order = sorted(np.flatnonzero(found.fired), key=lambda f: (-float(f"{found.density[f]:.4g}"), f))
    assert column(page, 2) == [str(f) for f in order[:50]]
    page.click("[data-sort=density]")
    shown = [float(v) for v in column(page, 3)]
    assert shown == sorted(shown) and shown[0] == pytest.approx(found.density[found.fired > 0].min(), rel=1e-3)
    for key in ("max", "mean", "images", "spread", "concentration", "auroc", "feature"):
        page.click(f"[data-sort={key}]")
        assert page.get_attribute(f"th:has([data-sort={key}])", "aria-sort") in ("ascending", "descending")
    middle = float(np.median(found.density[found.fired > 0]))
    page.fill("#low", str(middle))
    kept = [float(v) for v in column(page, 3)]
    assert kept and min(kept) >= middle * 0.999
    page.fill("#high", str(middle * 1.01))
    assert all(middle * 0.999 <= float(v) <= middle * 1.011 for v in column(page, 3))
    page.fill("#low", "")
    page.fill("#high", "")
    page.select_option("#alive", "dead")
    assert page.inner_text("#count") == f"{96 - alive} of 96 features"
    page.select_option("#alive", "all")
    word = "red cube"
    page.fill("#search", word)
    hits = {i for i, prompt in enumerate(found.info["prompts"]) if word in prompt}
    expected = [f for f in range(96) if hits & set(found.top_image[f].tolist())]
    assert page.inner_text("#count") == f"{len(expected)} of 96 features"
    page.fill("#search", "no prompt says this")
    assert page.inner_text("#count") == "0 of 96 features"


def test_index_pages_thumbnails_and_links(built, visit):
    folder, _ = built
    page = visit(folder / "index.html")
    page.wait_for_selector("#table tbody canvas")
    assert page.evaluate("document.querySelector('#table canvas').width") == 4
    if page.is_enabled("#after"):
        first = column(page, 2)
        page.click("#after")
        assert not set(column(page, 2)) & set(first)
        page.click("#before")
        assert column(page, 2) == first
    name = column(page, 2)[0]
    page.click("#table tbody tr:first-child td:nth-child(2) a")
    assert page.inner_text("h1") == f"Feature {name}"
    page.click("header >> text=All features")
    page.click("header >> text=Run")
    assert "What the numbers mean" in page.inner_text("main") and "load_from_disk" in page.inner_text("pre")


def test_every_dot_of_the_scatter_links_to_its_feature(built, visit):
    folder, _ = built
    page = visit(folder / "index.html", viewport={"width": 1280, "height": 900})
    page.locator("#scatter").scroll_into_view_if_needed()
    dots = page.evaluate("dots.map(([x, y, i]) => [x, y, DATA.feature[i]])")
    assert sorted(d[2] for d in dots) == np.flatnonzero(dash.load(folder / "collect").fired).tolist()
    alone = max(dots, key=lambda a: min((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 for b in dots if b is not a))
    box = page.locator("#scatter").bounding_box()
    page.mouse.move(box["x"] + alone[0], box["y"] + alone[1])
    assert f"feature {alone[2]}:" in page.inner_text("#dot")
    page.mouse.click(box["x"] + alone[0], box["y"] + alone[1])
    assert page.inner_text("h1") == f"Feature {alone[2]}"


def liveliest(folder):
    found = dash.load(folder / "collect")
    return found, int(found.images.argmax())


def test_feature_page_heatmap_tip_and_enlarging(built, visit):
    folder, _ = built
    found, f = liveliest(folder)
    page = visit(folder / "feature" / f"{f}.html")
    alpha = ("(() => { const c = document.querySelector('.grid canvas'); return [...c.getContext('2d').getImageData("
             "0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3) })()")
    strong = page.evaluate(alpha)
    assert len(strong) == 16 and max(strong) > 100
    page.locator("#strength").fill("0")
    assert set(page.evaluate(alpha)) == {0}
    page.locator("#strength").fill("100")
    assert sum(page.evaluate(alpha)) > sum(strong)
    box = page.locator(".grid .pic").first.bounding_box()
    for token in (0, 6, 15):
        y, x = divmod(token, 4)
        page.mouse.move(box["x"] + (x + 0.5) * box["width"] / 4, box["y"] + (y + 0.5) * box["height"] / 4)
        row, value = page.inner_text("#tip").split(": ")
        assert row == f"row {y}, column {x}" and float(value) == pytest.approx(found.top_map[f, 0][token], rel=1e-3)
    page.locator(".grid .pic").first.click()
    assert page.locator("#large").evaluate("d => d.open")
    assert page.locator("#large img").bounding_box()["width"] > 1.5 * box["width"]
    assert found.info["prompts"][found.top_image[f, 0]] in page.inner_text("#large")
    page.keyboard.press("ArrowRight")                            # means nothing while a dialog is open
    page.keyboard.press("Escape")
    assert not page.locator("#large").evaluate("d => d.open")
    assert page.inner_text("h1") == f"Feature {f}"


def test_feature_pages_by_keyboard(built, visit):
    page = visit(built[0] / "feature" / "10.html")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**/11.html")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**/10.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/index.html")


def test_every_link_and_picture_is_there(built):
    import re
    folder, _ = built
    for path in folder.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#]+)"', path.read_text()):
            assert (path.parent / link).is_file(), f"{path}: {link}"


def test_accessible_names_and_contrast(built, visit):
    folder, _ = built
    _, f = liveliest(folder)
    for name in ("index.html", "run.html", f"feature/{f}.html"):
        for scheme in ("light", "dark"):
            page = visit(folder / name, color_scheme=scheme)
            assert page.evaluate("[...document.images].every(i => i.hasAttribute('alt'))")
            assert page.evaluate("[...document.querySelectorAll('button, a')].every(e => e.textContent.trim() || "
                                 "e.getAttribute('aria-label') || e.getAttribute('aria-hidden'))")
            assert page.evaluate("[...document.querySelectorAll('input, select')].every(e => e.labels.length)")
            assert page.locator("h1").count() == 1 and page.get_attribute("html", "lang") == "en"
            assert page.evaluate(CONTRAST) >= 4.5


CONTRAST = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  let least = 21;
  for (const e of document.querySelectorAll('main *, header *')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || !e.offsetParent || e.closest('svg')
        || e.matches('.off, :disabled, option')) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((p, q) => q - p);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
})()"""


@pytest.mark.parametrize("width", [390, 1280])
def test_narrow_and_wide_screens(built, visit, width):
    folder, _ = built
    _, f = liveliest(folder)
    for name in ("index.html", "run.html", f"feature/{f}.html"):
        page = visit(folder / name, viewport={"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_mode(built, visit):
    ground = {scheme: visit(built[0] / "index.html", color_scheme=scheme).evaluate(
        "getComputedStyle(document.body).backgroundColor") for scheme in ("light", "dark")}
    assert ground["light"] == "rgb(251, 250, 248)" and ground["dark"] == "rgb(20, 22, 26)"


def test_hostile_prompts_appear_as_typed_and_run_nothing(hostile, visit):
    folder, found = hostile
    page = visit(folder / "index.html")
    assert page.evaluate("window.hacked") is None and "<img src=x" in page.inner_text("h1")
    assert page.evaluate("DATA.prompts") == HOSTILE
    seen = set()
    for f in np.flatnonzero(found.fired)[:12]:
        page.goto((folder / "feature" / f"{f}.html").as_uri())
        assert page.evaluate("window.hacked") is None and page.locator("main script, main svg[onload]").count() == 0
        alts = page.evaluate("[...document.querySelectorAll('figure .pic img')].map(i => i.alt)")
        seen |= {alt.removeprefix("Drawn for: ") for alt in alts}
    pictures = str.maketrans(pages.CONTROLS)
    assert {prompt[:200].translate(pictures) for prompt in HOSTILE} <= seen


def test_tokens_of_the_prompt_are_highlighted_by_their_values(hostile, visit):
    folder, found = hostile
    layout = found.layout
    f = int(layout.text_part(found.top_map[:, 0]).max((1, 2)).argmax())
    page = visit(folder / "feature" / f"{f}.html")
    image, step = found.top_image[f, 0], found.top_map[f, 0].reshape(2, -1).max(1).argmax()
    values, words = layout.text_part(found.top_map[f, 0])[step], found.info["words"][image]
    spans = page.locator(".grid figure").first.locator(".tokens span:not(.pad)")
    assert spans.count() == len(words)
    for i, (word, value) in enumerate(zip(words, values)):
        span = spans.nth(i)
        assert span.text_content() == word.translate(str.maketrans(pages.CONTROLS))
        if value > 0:
            assert float(span.get_attribute("title")) == pytest.approx(value, rel=1e-3)
    assert f", step {step + 1} of 2" in page.locator(".grid figure").first.inner_text()


def test_prompts_are_cut_into_their_own_letters(model):
    prompts = ["a red cube,  left of", "grüner Würfel", "", "x" * 300]
    for prompt, words in zip(prompts, model.words(prompts, 12)):
        assert len(words) <= 12 and words[-1] == "</s>"
        assert all(word in prompt or word.startswith("<") for word in words[:-1])


def test_a_large_dashboard_paints_and_sorts_quickly_enough(tmp_path, visit):
    """16,384 features. The bounds are ten times what the issue asks: this checks for blunders, the bench for speed."""
    found = large(16_384)
    pages.write(found, tmp_path, [0, 16_383])
    (tmp_path / "data.js").write_text(f"const DATA = {json.dumps(pages.index_data(found, list(range(16_384))))};\n")
    (tmp_path / "images").mkdir()
    for i in range(20):
        dash.save_image(tmp_path / "images" / f"{i}.webp", np.zeros((32, 32, 3), np.uint8))
    page = visit(tmp_path / "index.html")
    assert page.inner_text("#count") == "16,384 of 16,384 features"
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 10_000
    took = page.evaluate("(() => { const t = performance.now(); sortBy('max', -1); return performance.now() - t; })()")
    assert took < 2_000


def large(F, n=20):
    """A `Collected` of random numbers."""
    rng = np.random.default_rng(0)
    layout = stats.Layout(1, 0, (8, 8))
    top = rng.integers(0, n, (F, stats.KEPT)).astype(np.int32)
    maps = np.zeros((F, stats.KEPT, 64), np.float32)
    maps[:, 0] = rng.random((F, 64)) * (rng.random((F, 64)) < 0.2)
    none = np.full((F, stats.QUANTILES, stats.SHOWN), -1, np.int32)
    info = {"prompts": [f"prompt {i}" for i in range(n)], "layout": dataclasses.asdict(layout), "layer": 3,
            "site": "img", "images": n, "tokens": 64 * n, "attributes": [], "edges": stats.EDGES.tolist(), "size": 128,
            "steps": 4,
            "seed": 0, "first_noise": 0, "model": "random"}
    ones, maximum = np.ones(F), rng.lognormal(size=F).astype(np.float32)
    histogram = np.zeros((F, len(stats.EDGES)), np.int64)
    histogram[:, 40] = 3
    neighbours = np.zeros((F, 10), np.int32), np.ones((F, 10), np.float32)
    return stats.Collected(rng.integers(1, 64 * n, F), rng.integers(1, n, F), ones, maximum, histogram,
                          rng.random((F, 64)).astype(np.float32), ones, ones, rng.random(F),
                          np.sort(rng.random((F, stats.KEPT)).astype(np.float32))[:, ::-1], top, maps,
                          np.zeros(none.shape, np.float32), none, np.zeros((*none.shape, 64), np.float32), *neighbours,
                          *neighbours, np.zeros((F, 0), np.float32), np.full((F, 4), 0.25), info)
