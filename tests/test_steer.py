"""Steering: what is added where and when, against the arithmetic done by hand; files, and errors of one line."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import apply
import blocks
import checkpoint
import data
import flux
import mmdit
import sae
import session
import steer

ROOT = Path(steer.__file__).parent
PROMPTS = ["a red cube", "a blue sphere left of a white cone"]
WHERE = {"size": 64, "text_tokens": 12}                          # 16 image tokens, 4 x 4
RUN = {"steps": 2, **WHERE}


@pytest.fixture(scope="module")
def model(nano):
    return flux.load(nano, dtype=jnp.float32)


def made(folder, model, *, layer=2, site="img", timesteps=1, source="scenes", seed=0, **metadata):
    """An SAE that was fitted to nothing but its groups' means and spreads, as train.py would save it; its last feature
    never fires."""
    acts = np.asarray(flux.residuals(model, PROMPTS, layer=layer, site=site, steps=timesteps, **WHERE))
    acts = acts.reshape(timesteps, -1, *acts.shape[-2:])
    groups = flux.token_groups(site, timesteps, 12)
    number = np.zeros(acts.shape[:-1], int)
    for g, (_, t, part) in enumerate(groups):
        number[t, :, part] = g
    names = tuple(name for name, *_ in groups) if len(groups) > 1 else ()
    cfg = sae.Config(d_in=model.cfg.width, features=96, k=6, groups=names)
    state = sae.init(jax.random.key(seed), cfg, acts.reshape(-1, acts.shape[-1]), number.reshape(-1) if names else None)
    state.params["b_enc"] = state.params["b_enc"].at[-1].set(-1e9)
    about = {"model": str(model.source), "layer": layer, "site": site}
    run = {**about, **WHERE, "timesteps": timesteps, "prompts": source, "prompt_field": None}
    checkpoint.save_state(folder, state, cfg, metadata={**about, "run": run, **metadata})
    return folder


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    """Checkpoints by name."""
    folder = tmp_path_factory.mktemp("steer")
    return {"img": made(folder / "img", model), "late": made(folder / "late", model, layer=9, seed=1),
            "txt": made(folder / "txt", model, site="txt"),
            "both": made(folder / "both", model, site="both", timesteps=2)}


@pytest.fixture(scope="module")
def loaded(model, built):
    return {name: steer.load(folder, model, prompts=PROMPTS) for name, folder in built.items()}


def dense(params, x, k=6):
    """What all features are at x, by numpy."""
    pre = np.maximum(np.asarray(x, np.float64) @ np.asarray(params["W_enc"]) + np.asarray(params["b_enc"]), 0)
    return pre * (pre >= np.sort(pre, -1)[..., [-k]])


def test_typical_is_the_mean_of_what_is_above_zero(model, built, loaded):
    noise = flux.draw_noise(0, data.DRAWN + np.arange(2), (16, model.cfg.in_channels))
    for name in ("img", "both"):
        place = loaded[name]
        acts = flux.residuals(model, PROMPTS, layer=2, site=place.site, steps=place.timesteps, noise=noise, **WHERE)
        acts, (params, _) = np.reshape(acts, (place.timesteps, 2, -1, 128)), checkpoint.load_groups(built[name])
        values = np.concatenate([dense(p, acts[t, :, part]).reshape(-1, 96) for p, (_, t, part) in zip(
            params, flux.token_groups(place.site, place.timesteps, 12))])
        count = (values > 0).sum(0)
        expected = values.sum(0) / np.maximum(count, 1)
        expected[count == 0] = np.median(expected[count > 0])
        np.testing.assert_array_equal(loaded[name].fired, count > 0)
        assert 0 < (count == 0).sum() < 96
        np.testing.assert_allclose(loaded[name].typical, expected, rtol=1e-3)


@pytest.mark.parametrize("name, boxes, during, changed", [
    ("img", (), None, [(3, 1, 4.0), (9, 1, -2.0)]), ("img", [(1, 0, 3, 2), (0, 3, 1, 4)], (1, 2), [(3, 0, 1.0)]),
    ("txt", (), (0, 1), [(5, 3, 0)]), ("both", (), None, [(3, 0, 4.0)]), ("both", [(0, 0, 2, 4)], None, [(3, 1, 4.0)])])
def test_steered_residuals_are_those_by_hand(model, loaded, name, boxes, during, changed):
    """In the first step, before anything else differs, and in the second from the latents that came of it."""
    ours = loaded[name]
    start = flux.prepare(model, PROMPTS, steps=2, **WHERE)
    x = flux.residual(model.params, model.cfg, start.latents, *flux.at(start, 0), grid=start.grid, layer=2, site="both")
    often = (dense(ours.params[0], x[:, :12] if name == "txt" else x[:, 12:]) > 0).sum((0, 1))
    f = min(int(often.argmax()), len(often) - 2)                 # this one fires in the first step
    changes = [steer.Change(ours, f + i, scale, add) for i, (_, scale, add) in enumerate(changed)]
    edits = steer.edits(model, start, changes, strength=0.5, during=during, boxes=boxes)
    inside = np.zeros((4, 4), bool) if boxes else np.ones((4, 4), bool)
    for a, b, c, d in boxes:
        inside[a:c, b:d] = True
    latents = start.latents
    for i in range(2):
        plain, steered = (flux.residual(model.params, model.cfg, latents, *flux.at(start, i), grid=start.grid, layer=2,
                                        site="both", edits=e) for e in ((), edits(i)))
        expected = np.array(plain, np.float64)
        for stream, part in (("txt", slice(0, 12)), ("img", slice(12, None))):
            if ours.site not in (stream, "both") or (during and not during[0] <= i < during[1]):
                continue
            params = ours.params[2 * i + (stream == "img")] if name == "both" else ours.params[0]
            x = expected[:, part]
            values, by = dense(params, x), 0
            for c in changes:
                amount = 0.5 * ((c.scale - 1) * values[..., [c.feature]] + c.add * ours.typical[c.feature])
                by = by + amount * np.asarray(params["W_dec"][c.feature])
            where = inside.reshape(-1) if stream == "img" else np.full(12, not boxes)
            expected[:, part] = np.where(where[:, None], x + by, x)
        assert np.abs(np.asarray(steered) - expected).max() <= 1e-3 * np.abs(expected).max()
        assert (np.abs(expected - plain).max() > 1e-2) == (not during or during[0] <= i < during[1])
        v = flux.velocity(model.params, model.cfg, latents, *flux.at(start, i), grid=start.grid, edits=edits(i))
        latents = flux._euler(latents, v, *start.sigmas[i:i + 2])
    np.testing.assert_array_equal(latents, flux.sample(model, start, edits=edits))


def test_changes_to_nothing_are_the_image_to_the_bit(model, loaded):
    plain = flux.generate(model, PROMPTS, **RUN)
    f = int(np.flatnonzero(loaded["img"].fired)[0])
    same = lambda change, **options: np.array_equal(steer.draw(model, PROMPTS, [change], **RUN, **options), plain)
    assert same(steer.Change(loaded["img"], f)) and same(steer.Change(loaded["img"], f, 0, 9), strength=0)
    assert not same(steer.Change(loaded["img"], f, 0, 9))
    beside = steer.Change(loaded["img"], f), steer.Change(loaded["late"], 3, add=1e-30)      # an edit of nothing
    assert np.array_equal(steer.draw(model, PROMPTS, beside, **RUN), plain)


def test_an_edit_of_nothing_changes_no_bit_of_nano(model, loaded):
    start = flux.prepare(model, PROMPTS, steps=1, **WHERE)
    for name, dtype in (("img", jnp.float32), ("late", jnp.bfloat16)):
        params = jax.tree.map(lambda w: w.astype(dtype), model.params)
        ours = loaded[name]
        shared = {ours.names[0]: {**steer._padded(ours.params[0], [(3, 1.0, 0.0)]), "where": np.ones(16, bool)}}
        edit = flux.Edit(ours.layer, ours.names, steer._changing(ours.cfg), shared=shared)
        plain, edited = (flux.velocity(params, model.cfg, start.latents, *flux.at(start, 0), grid=start.grid, edits=e)
                         for e in ((), [edit]))
        np.testing.assert_array_equal(np.asarray(edited), np.asarray(plain))


def test_another_feature_strength_or_prompt_compiles_nothing(model, loaded):
    sizes = []
    for n, (prompt, f, scale, boxes) in enumerate([("a red cube", 3, 2, ()), ("a green cone", 5, 0, [(0, 0, 1, 1)]),
                                                   ("a ball", 7, 0.5, ())]):
        changes = [steer.Change(loaded["img"], f + i, scale, i) for i in range((3, 4, 3)[n])]
        changes += [steer.Change(loaded["late"], f + i, add=1.0) for i in range(n + 1)]
        steer.draw(model, prompt, changes, **RUN, during=(0, 1 + n % 2), boxes=boxes)
        sizes.append((blocks._scan._cache_size(), mmdit._block.cache_info().misses, apply._candidates._cache_size()))
    assert sizes[0] == sizes[1] == sizes[2]


def test_set_is_read():
    cfg = sae.Config(d_in=4, features=200, k=2)
    a, b = (session.Subject(name, [], cfg, "nano", 2, "img", {}) for name in ("layer3", "layer8"))
    read = lambda text, of: [(c.of.name, c.feature, c.scale, c.add) for c in steer.parsed(text, of)]
    assert read("123*+8, 77*0", [a]) == [("layer3", 123, 1, 8), ("layer3", 77, 0, 0)]
    assert read("1+8,2-.5,3*2.5,4*0+8,5*0*-1,6*1", [a]) == [
        ("layer3", 1, 1, 8), ("layer3", 2, 1, -0.5), ("layer3", 3, 2.5, 0), ("layer3", 4, 0, 8), ("layer3", 5, 0, -1),
        ("layer3", 6, 1, 0)]
    assert read("layer8:3*4, 0:3+1, layer3:4 + 1e-1", [a, b]) == [("layer8", 3, 4, 0), ("layer3", 3, 1, 1),
                                                                  ("layer3", 4, 1, 0.1)]
    for text, of, message in [("200*2", [a], "200.*layer3 has features 0 to 199"), ("3", [a], "write 123"),
                              ("3**2", [a], "write 123"), ("x", [a], "write 123"), ("3*-", [a], "write 123"),
                              ("", [a], "no feature"),
                              ("3+1,3*2", [a], "feature 3 is changed twice"), ("3+1", [a, b], "which checkpoint"),
                              ("2:3+1", [a, b], "'2' names no checkpoint.*layer3 .or 0., layer8"),
                              ("layer3:3+1", [a, a], "more than one checkpoint"), ("3*1e999", [a], "must be finite")]:
        with pytest.raises(ValueError, match=message):
            steer.parsed(text, of)


# ---------------------------------------------------------------- the command line


def test_command_writes_a_grid_and_replaces_only_its_own(model, built, tmp_path, monkeypatch, capsys):
    from PIL import Image
    monkeypatch.setattr(flux, "load", lambda *a, **k: model)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    flags = {"set": "img:3*0, late:95+2", "steps": 2, "size": 64, "calibrate": 16, "out": str(out),
             "box": "0,0,4,4"}
    steer.main(str(built["img"]), str(built["late"]), *PROMPTS, grid="1,2", **flags)
    said = capsys.readouterr().out
    assert "late, feature 95: " in said and "never fired on 16 prompts" in said
    assert str(out / "steer.png") in said
    names = {f"{row}-x{s}.png" for row in (0, 1) for s in (0, 1, 2)} | {"steer.png", "steer.json"}
    assert {p.name for p in out.iterdir()} == names | {"mine.txt"}
    about = json.loads((out / "steer.json").read_text())
    assert set(about["files"]) == names and about["strengths"] == [0, 1, 2] and about["boxes"] == [[0, 0, 4, 4]]
    plain = flux.generate(model, PROMPTS, steps=2, size=64)
    images = {name: np.asarray(Image.open(out / name)) for name in names if "-" in name}
    for row in (0, 1):
        np.testing.assert_array_equal(images[f"{row}-x0.png"], plain[row])
    assert (images["0-x1.png"] != images["0-x0.png"]).any() and (images["0-x2.png"] != images["0-x1.png"]).any()
    sheet = np.asarray(Image.open(out / "steer.png"))
    assert sum((sheet[y:y + 64, x:x + 64] == plain[0]).all() for y in range(60) for x in range(8)) == 1
    steer.main(str(built["img"]), str(built["late"]), PROMPTS[0], grid="3", **flags)         # ours are replaced
    assert {p.name for p in out.iterdir()} == {"0-x0.png", "0-x3.png", "steer.png", "steer.json", "mine.txt"}
    (out / "0-x5.png").write_text("mine")
    with pytest.raises(ValueError, match=r"0-x5\.png exists and was not written by steer\.py"):
        steer.main(str(built["img"]), str(built["late"]), PROMPTS[0], grid="5", **flags)
    assert (out / "0-x5.png").read_text() == (out / "mine.txt").read_text() == "mine"


def test_names_in_steer_json_are_checked(tmp_path):
    """Only what steer.py may have written is deleted or replaced, and no link is followed."""
    out, images = tmp_path / "out", np.zeros((1, 1, 32, 32, 3), np.uint8)
    about = {"kind": "fae steering", "strengths": [0], "prompts": ["a"], "set": "1+1"}
    out.mkdir()
    (tmp_path / "above.png").write_text("mine")
    (out / "mine.txt").write_text("mine")
    names = ["mine.txt", "../above.png", "..", ".", "", 3, None, str(tmp_path / "above.png"), "7-x1.png", "0-x0.png"]
    names += ["steer.json", "steer.png"]
    (out / "steer.json").write_text(json.dumps(about | {"files": list(map(str, names))}))
    (out / "7-x1.png").write_text("old")
    (out / "0-x0.png").symlink_to(tmp_path / "above.png")
    steer.write(out, images, ["0-x0.png"], about)
    assert (tmp_path / "above.png").read_text() == (out / "mine.txt").read_text() == "mine"
    assert {p.name for p in out.iterdir()} == {"mine.txt", "0-x0.png", "steer.json", "steer.png"}
    assert not (out / "0-x0.png").is_symlink()
    (out / "0-x1.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"0-x1\.png exists and was not written by steer\.py"):
        steer.write(out, images, ["0-x1.png"], about)
    assert not (tmp_path / "nowhere.png").exists()


def test_writing_that_fails_leaves_the_old_images(tmp_path, monkeypatch):
    about = {"kind": "fae steering", "strengths": [0], "prompts": ["a"], "set": "1+1"}
    steer.write(tmp_path, np.zeros((1, 1, 32, 32, 3), np.uint8), ["0-x0.png"], about)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(steer, "sheet", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        steer.write(tmp_path, np.ones((1, 1, 32, 32, 3), np.uint8), ["0-x0.png"], about)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_foreign_sae_needs_to_be_told_where_it_belongs(model, built, tmp_path):
    params, cfg = checkpoint.load(built["img"])
    checkpoint.save(tmp_path / "foreign", params, cfg)
    with pytest.raises(ValueError, match=r"does not say where it belongs .* give --layer and --site and --model"):
        session.opened(tmp_path / "foreign")
    ours = steer.load(tmp_path / "foreign", model, layer=2, site="img", prompts=16)
    assert session.prompts_of(ours) == ("scenes", None, None) and ours.fired.any()


MISTAKES = [
    (["{img}", "a cube", "--set=96+1"], "img has features 0 to 95"), (["{img}", "a cube"], "--set says no feature"),
    (["{img}", "--set=1+1"], "no prompt given"),
    (["absent", "a cube", "--set=1+1"], "absent is not a checkpoint's folder"),
    (["{img}", "{img}x/", "a cube", "--set=1+1"], "there is no folder"),
    ([], "no argument is not a checkpoint's folder"),
    (["{tmp}", "a cube", "--set=1+1"], "cfg.json is missing"),
    (["{img}", "a", "--set=1+1", "--colour=1"], "unknown flag"),
    (["{img}", "a", "--set=1+1", "--during=2:9"], "during 2:9: need 0 <= first < end <= 4"),
    (["{img}", "a", "--set=1+1", "--during=x"], "--during x"),
    (["{img}", "a", "--set=1+1", "--box=1,2,3"], "--box 1,2,3"),
    (["{img}", "a", "--set=1+1", "--box=0,0,9,8"], "box 0,0,9,8: the image has 8 rows and 8 columns"),
    (["{img}", "a", "--set=1+1", "--box=0,0,4,8", "--size=48"], "the image has 3 rows"),
    (["{img}", "a", "--set=1+1", "--size=50"], "size is 50"), (["{img}", "a", "--set=1+1", "--steps=0"], "--steps 0"),
    (["{img}", "a", "--set=1+1", "--grid=a"], "--grid a"),
    (["{txt}", "a", "--set=1+1", "--box=0,0,1,1"], "text tokens"),
    (["{img}", "{late}", "a", "--set=1+1"], "which checkpoint?"), (["{wide}", "a", "--set=1+1"], "is for width 64"),
    (["{img}", "{other}", "a", "--set=0:1+1"], "belong to different models"),
    (["{img}", "a", "--set=1+1", "--layer=3"], "--layer 3: "), (["{deep}", "a", "--set=1+1"], "unknown layer 40"),
    (["{img}", "a", "--set=1+1", "--out={tmp}/file"], "is not a folder"),
    (["{img}", "a", "--set=1+1", "--model=schnelll"], "unknown model 'schnelll'"),
    (["{img}", "a", "--set=1+1", "--quant=int5"], "int5"), (["{half}", "a", "--set=1+1"], "sae_weights.safetensors"),
    (["{img}", "a", "--set=1+1", "--prompts=absent.txt"], "no prompt file"),
    (["{across}", "a", "--set=1+1"], "is a transcoder")]


def test_mistakes_end_in_one_line_before_the_model_is_loaded(model, built, tmp_path, monkeypatch):
    monkeypatch.setattr(flux, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("else")
    params, cfg = checkpoint.load(built["img"])
    about = {k: v for k, v in checkpoint.load_metadata(built["img"]).items() if k not in ("training", "digest")}
    checkpoint.save(tmp_path / "deep", params, cfg, metadata=about | {"layer": 40})
    checkpoint.save(tmp_path / "other", params, cfg, metadata=about | {"model": "schnell"})
    for name, small in {"wide": {"d_in": 64}, "across": {"d_in": 128, "d_out": 64, "activation": "jumprelu"}}.items():
        small = sae.Config(features=8, k=2, **small)
        arrays = {name: jnp.ones(shape) for name, shape in small.shapes.items()}
        checkpoint.save(tmp_path / name, arrays, small, metadata=about)
    shutil.copytree(built["img"], tmp_path / "half")
    data = (built["img"] / "sae_weights.safetensors").read_bytes()
    (tmp_path / "half" / "sae_weights.safetensors").write_bytes(data[:len(data) // 2])
    places = {**built, "tmp": tmp_path, **{n: tmp_path / n for n in ("deep", "other", "wide", "across", "half")}}
    for words, message in MISTAKES:
        words = [word.format(**places) for word in words]
        flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
        flags = {k: int(v) if v.isdigit() and k != "grid" else v for k, v in flags.items()}
        with pytest.raises(ValueError) as caught:
            steer.main(*(word for word in words if not word.startswith("--")), **{"out": str(tmp_path / "out")} | flags)
        assert message in str(caught.value) and "\n" not in str(caught.value), words
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "else"


def test_a_mistake_on_the_command_line(built, tmp_path):
    command = [sys.executable, str(ROOT / "steer.py"), str(built["img"]), "1, 2", "--set", "123*+8, 77*0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.strip() == "error: --set 123*+8: feature 123: img has features 0 to 95"


def test_nothing_imports_steer():
    import re
    for path in ROOT.glob("*.py"):
        assert path.name == "steer.py" or not re.search(r"^\s*(import|from) steer\b", path.read_text(), re.M), path
    imported = set(re.findall(r"^import (\w+)$", Path(steer.__file__).read_text(), re.M))
    assert imported & {p.stem for p in ROOT.glob("*.py")} == {"apply", "data", "flux", "sae", "session", "shard"}
