"""Scores against forward passes by hand, attributions against finite differences, and errors of one line."""
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import apply
import attribution
import blocks
import checkpoint
import dash
import data
import flux
import mmdit
import pages
import sae
import score
import session
import train

pytestmark = pytest.mark.filterwarnings("ignore:FVU")            # the SAEs here are random
PROMPTS = ["a red cube", "a small blue sphere, lit from the left", "two solids: a green cone and a white cube"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiling takes far longer than running here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model(nano):
    return flux.load(nano, dtype=jnp.float32)


def random_sae(features=48, k=6, seed=0, width=128):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {"W_enc": draw(width, features) / width, "b_enc": 0.1 * draw(features), "W_dec": draw(features, width),
              "b_dec": draw(width)}
    return params, sae.Config(d_in=width, features=features, k=k)


def subject(model, layer, site, timesteps=1, groups=1, **shape):
    saes = [random_sae(seed=g, **shape) for g in range(groups)]
    levels = flux.sigmas(model.scheduler, timesteps, 64)[:-1]
    names = flux.residual_names(model.cfg, layer, site)
    return session.Subject("random", [p for p, _ in saes], saes[0][1], "nano", layer, site, {}, names, levels)


def images(n=3):
    return np.random.default_rng(0).integers(0, 255, (n, 128, 128, 3), dtype=np.uint8)


double, single = jax.jit(mmdit._double_block, static_argnums=1), jax.jit(mmdit._single_block, static_argnums=(1, 5))


def by_hand(model, start, i, z, layer, change):
    """The velocity where the streams {"txt", "img"} that leave block `layer` become change(them)."""
    params, cfg = model.params, model.cfg
    ends = {name: p for name, p in params.items() if name not in ("double", "single")}
    (img, txt), vec, mod, rope = mmdit._begin(ends, cfg, z, *flux.at(start, i), grid=start.grid)
    for number in range(cfg.layers):
        kind, place = ("double", number) if number < cfg.num_layers else ("single", number - cfg.num_layers)
        p, T = jax.tree.map(lambda w: w[place], params[kind]), txt.shape[1]
        if kind == "double":
            img, txt = double(p, cfg, img, txt, mod, rope)
        else:
            x = single(p, cfg, jnp.concatenate([txt, img], 1), mod, rope, T)
            txt, img = x[:, :T], x[:, T:]
        if number == layer:
            new = change({"txt": txt, "img": img})
            txt, img = new["txt"], new["img"]
    return mmdit._end(params["out"], img, vec)


@pytest.mark.parametrize("layer, site, timesteps, groups", [(6, "both", 2, 4), (3, "txt", 1, 1)])
def test_losses_are_those_of_forward_passes_by_hand(model, layer, site, timesteps, groups):
    who, data = subject(model, layer, site, timesteps, groups), score.dataset(model, PROMPTS, images())
    starts = list(score.prepared(model, data, 3, 0, 2))
    loss, change = score.losses(model, who, data, starts, lambda share: None)
    assert loss.shape == change.shape == (4, 3, 3)
    noise = np.concatenate([np.asarray(start.latents)[:len(rows)] for rows, start in starts])
    text, pooled = flux.encode_text(model, PROMPTS)
    sigmas = flux.sigmas(model.scheduler, 3, 64)
    start = flux.Start(jnp.asarray(noise), (text, pooled, None), sigmas, (8, 8))
    wanted = [name.split(".")[1] for name in who.names]
    for i, level in enumerate(sigmas[:-1]):
        z, caught = (1 - level) * data.latents + level * noise, {}
        clean = by_hand(model, start, i, z, layer, lambda x: caught.update(x) or x)
        nearest = int(np.abs(who.levels - level).argmin()) if groups > 1 else 0
        saes = {s: who.params[nearest * len(wanted) + n if groups > 1 else 0] for n, s in enumerate(wanted)}

        def spliced(x, p, s):
            pre = np.maximum(np.asarray(x[s]) @ np.asarray(p["W_enc"]) + np.asarray(p["b_enc"]), 0)
            pre[pre < np.sort(pre, -1)[..., -who.cfg.k, None]] = 0
            return jnp.asarray(pre @ np.asarray(p["W_dec"]) + np.asarray(p["b_dec"]))

        variants = {"clean": lambda x: x, "zero": lambda x: x | {s: jnp.zeros_like(x[s]) for s in wanted},
                    "mean": lambda x: x | {s: jnp.zeros_like(x[s]) + caught[s].mean((0, 1)) for s in wanted},
                    "spliced": lambda x: x | {s: spliced(x, saes[s], s) for s in wanted}}
        for name, function in variants.items():
            v, at = by_hand(model, start, i, z, layer, function), score.VARIANTS.index(name)
            np.testing.assert_allclose(loss[at, i], ((v - (noise - data.latents)) ** 2).mean((1, 2)), rtol=2e-4)
            np.testing.assert_allclose(change[at, i], ((v - clean) ** 2).mean((1, 2)), rtol=2e-3, atol=1e-6)


def test_the_clean_loss_is_that_of_diffusers(model, nano):
    import torch
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
    data, levels = score.dataset(model, PROMPTS, images()), flux.sigmas(model.scheduler, 2, 64)
    starts = list(score.prepared(model, data, 2, 0, 3))
    loss, _ = score.losses(model, subject(model, 3, "img"), data, starts, lambda share: None)
    theirs, (text, pooled) = {}, (torch.from_numpy(np.array(x)) for x in flux.encode_text(model, PROMPTS))
    for name, kind in (("vae", AutoencoderKL), ("transformer", FluxTransformer2DModel)):
        theirs[name] = kind.from_pretrained(nano / name, torch_dtype=torch.float32)
    vae, transformer = theirs["vae"], theirs["transformer"]
    with torch.no_grad():
        x0 = vae.encode(torch.from_numpy(images()).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
        x0 = (x0 - vae.config.shift_factor) * vae.config.scaling_factor
        x0, noise = FluxPipeline._pack_latents(x0, *x0.shape), torch.from_numpy(np.array(starts[0][1].latents))
        ids = FluxPipeline._prepare_latent_image_ids(3, 8, 8, "cpu", torch.float32)
        for i, level in enumerate(levels[:-1]):
            v = transformer((1 - level) * x0 + level * noise, text, pooled, torch.full((3,), float(level)), ids,
                            torch.zeros(text.shape[1], 3), return_dict=False)[0]
            wanted = (v - (noise - x0)).square().mean((1, 2)).numpy()
            np.testing.assert_allclose(loss[score.VARIANTS.index("clean"), i], wanted, rtol=1e-3)


@pytest.mark.parametrize("layer, site", [(1, "both")])
def test_a_perfect_sae_loses_nothing(model, layer, site):
    who, both = subject(model, layer, site), jnp.concatenate([jnp.eye(128), -jnp.eye(128)])
    perfect = {"W_enc": both.T, "b_enc": jnp.zeros(256), "W_dec": both, "b_dec": jnp.zeros(128)}
    who = replace(who, params=[perfect], cfg=sae.Config(d_in=128, features=256, k=256))
    found = score.score(model, who, score.dataset(model, PROMPTS, images()), levels=2, steps=2, tokens=500, batch=2)
    for row in (found["loss"], *found["per_timestep"]):
        assert row["spliced"] == pytest.approx(row["clean"], rel=1e-5) and row["change"]["spliced"] < 1e-9
        assert row["recovered_zero"] == pytest.approx(1, abs=1e-5) == row["recovered_mean"]
    assert found["image"]["spliced"]["rmse"] < 0.1 < 5 < found["image"]["zero"]["rmse"]
    assert found["sae"]["fvu"] < 1e-10 and found["sae"]["l0"] > 100
    assert found["decoder_norm"]["most"] == found["encoder_decoder_cosine"]["least"] == 1


@pytest.fixture(scope="module")
def scored(model):
    who = subject(model, 5, "img", timesteps=2, groups=2)
    tokens = score.dataset(model, PROMPTS, None, steps=1)
    return who, tokens, score.score(model, who, tokens, levels=4, steps=2, tokens=513, batch=2)


def test_the_whole_is_the_mean_of_its_noise_levels(scored):
    _, data, found = scored
    assert data.origin == "the model's own samples in 1 steps" and len(found["per_timestep"]) == 4
    assert [row["t"] for row in found["per_timestep"]] == pytest.approx([1, 0.9, 0.75, 0.5], abs=1e-6)
    for rows, whole in ((found["per_timestep"], found["loss"]),
                        ([row for row in found["per_timestep"] if row["trained"]], found["loss_where_trained"])):
        assert len(rows) in (2, 4)
        for name in score.VARIANTS:
            assert np.mean([row[name] for row in rows]) == pytest.approx(whole[name])
        for name in ("zero", "mean"):
            recovered = (whole[name] - whole["spliced"]) / (whole[name] - whole["clean"])
            assert whole[f"recovered_{name}"] == pytest.approx(recovered)


def test_statistics_are_those_of_evaluate_on_activations_from_noise(model, scored):
    who, _, found = scored
    noise = flux.draw_noise(0, data.SCORED + np.arange(6), (64, model.cfg.in_channels))  # 513 tokens: 3 batches of 2
    acts = flux.residuals(model, 2 * PROMPTS, layer=5, site="img", steps=2, noise=noise)
    assert found["sae"]["tokens"] == 6 * 64 * 2
    each = [apply.evaluate(p, who.cfg, x) for p, x in zip(who.params, acts)]
    for name in ("fvu", "fvu_standardized", "l0", "cosine"):
        assert found["sae"][name] == pytest.approx(np.mean([getattr(one, name) for one in each]), rel=1e-4)
    density = (each[0].density + each[1].density) / 2
    assert found["sae"]["dead"] == pytest.approx((density == 0).mean())
    assert found["sae"]["density"]["never"] + sum(found["sae"]["density"]["features"]) == 48
    norms = np.linalg.norm(np.concatenate([p["W_dec"] for p in who.params]), axis=1)
    assert found["decoder_norm"]["median"] == pytest.approx(np.median(norms), rel=1e-5)


def test_image_distances_are_those_of_generate(model, scored):
    who, _, found = scored
    noise = flux.draw_noise(0, data.SCORED + np.arange(3), (64, model.cfg.in_channels))
    run = lambda **more: flux.generate(model, PROMPTS, steps=2, size=128, noise=noise, **more).astype(np.float32)
    sigmas = flux.sigmas(model.scheduler, 2, 64)
    zeros = run(edits=lambda i: [flux.Edit(5, ("single.img",), lambda name, x, each, shared: 0 * x)])
    square = ((zeros - run()) ** 2).mean((1, 2, 3))
    assert found["image"]["zero"]["rmse"] == pytest.approx(np.sqrt(square).mean(), rel=1e-3)
    assert found["image"]["zero"]["psnr"] == pytest.approx(10 * np.log10(255 ** 2 / square.mean()), rel=1e-3)
    spliced = run(edits=lambda i: score.edits(who, "spliced", sigmas[i]))
    assert found["image"]["spliced"]["rmse"] == pytest.approx(
        np.sqrt(((spliced - run()) ** 2).mean((1, 2, 3))).mean(), rel=1e-3)


def test_what_cannot_harm_has_nothing_to_recover(model):
    found = score.score(model, subject(model, 11, "txt"), score.dataset(model, PROMPTS[:1], images(1)), levels=1,
                        steps=1, tokens=1, batch=1)              # nothing reads the last block's text
    assert found["loss"]["recovered_zero"] is None and found["image"]["spliced"] == {"rmse": 0.0, "psnr": None}
    json.dumps(found, allow_nan=False)
    assert "–" in score.table(found | {"model": "nano"})


def test_other_prompts_compile_nothing(model, scored):
    who = scored[0]
    before = blocks._scan._cache_size()
    score.score(model, who, score.dataset(model, ["a cone", "a ball", "an image of a white box"], None, steps=1),
                levels=4, steps=2, tokens=1, batch=2)
    assert blocks._scan._cache_size() == before


# ---- attribution


def test_attribution_is_the_slope_of_the_target(model):
    source, target = subject(model, 1, "both", groups=2), subject(model, 5, "both", groups=2)
    feature = liveliest(model, target)
    found = attribution.attribute(model, target, feature, PROMPTS[0], source)
    assert len(found.features) > 3 and (np.diff(np.abs(found.values)) <= 0).all() and found.where.any()
    h = 1e-2
    for f, value in list(zip(found.features, found.values))[:4]:
        v = {name: -np.where(indices == f, values, 0).sum(-1) for name, (values, indices) in found.codes.items()}
        ends = [found.run.read({name: s * h * -jnp.asarray(v[name])[None, :, None] * source.at(1.0)[name]["W_dec"][f]
                                for name in v})[0] for s in (1, -1)]
        assert float(ends[0] - ends[1]) / (2 * h) == pytest.approx(value, rel=0.02, abs=2e-3 * abs(found.values[0]))
    text = found.run.start.condition[0]
    empty = flux.encode_text(model, [""])[0]
    for t in np.argsort(-np.abs(found.tokens))[:2]:
        ends = [found.run.read({}, text.at[:, t].add(s * h * (text - empty)[:, t]))[0] for s in (1, -1)]
        assert float(ends[0] - ends[1]) / (2 * h) == pytest.approx(found.tokens[t], rel=0.05, abs=1e-3)


def liveliest(model, who, prompt=PROMPTS[0]):
    """The feature that fires on most tokens of the pass that `attribute` makes."""
    start = data.beginning(model, [prompt], [0], np.array([1, 0], np.float32), (8, 8), 0)
    x = flux.capture(model, start, layer=who.layer, site=who.site)
    codes = [sae.encode(who.at(1.0)[name], who.cfg, part) for _, name, part in session.streams(who, x, start)]
    fired = [np.asarray(indices)[np.asarray(values) > 0] for values, indices in codes]
    return int(np.bincount(np.concatenate(fired)).argmax())


def test_ablation_is_that_of_change(model):
    source, target = subject(model, 2, "img"), subject(model, 4, "img")
    found = attribution.attribute(model, target, liveliest(model, target), PROMPTS[0], source)
    zero = jnp.zeros(1)
    function = lambda name, x, each, shared: apply.change(shared[0], source.cfg, x, shared[1], zero, zero)
    effects = attribution.ablate(found, found.features[:5])
    for f, effect in zip(found.features[:5, None], effects):
        start, shared = found.run.start, (source.params[0], jnp.asarray(f))
        x = flux.residual(model.params, model.cfg, start.latents, *flux.at(start, 0), grid=start.grid, layer=4,
                          site="img", edits=[flux.Edit(2, ("double.img",), function, shared=shared)])
        pre = np.asarray(x @ target.params[0]["W_enc"] + target.params[0]["b_enc"])[0, :, found.run.feature]
        assert effect == pytest.approx(found.target - pre[found.where].sum(), rel=1e-3, abs=1e-4)


def test_attribution_of_a_linear_model_is_exact(model):
    """Without modulation every gate is shut: blocks hand on what they get, and the target is linear in it."""
    off = lambda path, w: 0 * w if "'mod'" in jax.tree_util.keystr(path) else w
    linear = replace(model, params=jax.tree_util.tree_map_with_path(off, model.params))
    source, target = subject(linear, 1, "img"), subject(linear, 6, "img")
    found = attribution.attribute(linear, target, liveliest(linear, target), PROMPTS[0], source)
    effects = attribution.ablate(found, found.features)
    np.testing.assert_allclose(effects, found.values, rtol=1e-3, atol=1e-4 * np.abs(found.values).max())
    assert not found.tokens.any() and found.pooled == 0         # image tokens never hear of the text


def test_attribution_compiles_nothing_for_another_feature_or_prompt(model):
    source, target = subject(model, 2, "img"), subject(model, 4, "img")
    attribution.attribute(model, target, liveliest(model, target), PROMPTS[0], source)
    before = attribution._read._cache_size(), attribution._gradient._cache_size(), blocks._scan._cache_size()
    attribution.attribute(model, target, liveliest(model, target, "a big cone"), "a big cone", source)
    assert before == (attribution._read._cache_size(), attribution._gradient._cache_size(), blocks._scan._cache_size())


def test_a_feature_that_does_not_fire_says_so(model):
    who = subject(model, 4, "img")
    who.params[0]["b_enc"] = who.params[0]["b_enc"].at[7].set(-1e6)
    with pytest.raises(ValueError, match="feature 7 does not fire for this prompt"):
        attribution.attribute(model, who, 7, "a cube")


# ---- files, flags and pages


def save(folder, layer=3, site="img", width=128, **about):
    params, cfg = random_sae(width=width)
    metadata = {"model": "nano", "layer": layer, "site": site, "run": {"prompts": "scenes", "size": 128}} | about
    checkpoint.save(folder, params, cfg, metadata={k: v for k, v in metadata.items() if v is not None})
    return folder


def test_the_command_line(model, tmp_path, capsys):
    folder = save(tmp_path / "ckpt")
    score.main(folder, n=2, levels=1, steps=1, tokens=4096)
    found = json.loads((folder / "eval.json").read_text())
    out = capsys.readouterr().out
    assert "2 images, renders of held-out scenes" in out and f"scores: {folder / 'eval.json'}" in out
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "eval.json", "sae_weights.safetensors"]
    assert found["kind"] == "fae score" and found["model"] == "nano" and found["images"] == 2
    assert found["sae"]["tokens"] == 4096
    params, _ = checkpoint.load_groups(folder)
    assert found["weights"] == checkpoint.fingerprint(params)
    assert dash.read_scores(folder / "eval.json", checkpoint.fingerprint(params)) == found
    assert dash.read_scores(folder / "eval.json", "other weights") is None
    (folder / checkpoint.STATE).touch()
    train.check_out(folder, False, True)                         # --overwrite knows the file
    feature = liveliest(model, session.subject(model, folder), "a red cube")
    score.main(folder, attribute=feature, prompt="a red cube", **{"from": save(tmp_path / "a", 1)})
    out = capsys.readouterr().out
    assert "feature of layer 1" in out and "\ncube " in out and "CLIP (pooled)" in out


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "eval.json"
    score.write(file, {"kind": score.KIND, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        score.write(file, {"kind": score.KIND, "a": float("nan")})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        score.write(file, {"kind": score.KIND, "a": 2})
    assert json.loads(file.read_text())["a"] == 1 and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("about, flags, message", [
    ({}, {"strength": 3}, "unknown flag --strength"),
    ({}, {"n": 0}, "--n 0: it must be a whole number from 1"),
    ({}, {"layer": 5}, "--layer 5: CKPT was trained at layer 3"),
    ({"layer": None, "site": None}, {}, "(it was not written by train.py): give --layer and --site"),
    ({"layer": 12}, {}, "unknown layer 12"),
    ({"site": "image"}, {}, "unknown site 'image'"),
    ({"width": 96}, {}, "is for width 96, but nano has width 128"),
    ({}, {"out": "nowhere/eval.json"}, "there is no folder nowhere"),
    ({}, {"out": "README.md"}, "README.md exists and was not written by score.py"),
    ({}, {"images": "nowhere"}, "--images nowhere: there is no folder"),
    ({}, {"prompts": "nowhere.txt"}, "no prompt file 'nowhere.txt'"),
    ({}, {"attribute": 3}, "--attribute needs a prompt"),
    ({}, {"attribute": 48, "prompt": "a cube"}, "feature 48: ckpt has features 0 to 47"),
    ({}, {"attribute": -1, "prompt": "a cube"}, "feature -1: ckpt has"),
    ({}, {"attribute": "x", "prompt": "a cube"}, "feature x: ckpt has"),
    ({}, {"attribute": 1, "prompt": "a cube", "from": "CKPT"}, "needs one before layer 3"),
    ({}, {"from": "CKPT"}, "--attribute needs a prompt"),
    ({"run": {"timesteps": 2}, "site": "both"}, {"features": "1"}, "unknown flag --features"),
])
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, nano, about, flags, message):
    monkeypatch.chdir(nano.parent)
    folder = save(tmp_path / "ckpt", **about)
    put = lambda text: str(folder) if text == "CKPT" else text
    with pytest.raises(ValueError) as error:
        score.main(folder, **{name: put(value) for name, value in flags.items()})
    assert message.replace("CKPT", str(folder)) in str(error.value) and "\n" not in str(error.value)


def test_transcoders_and_foreign_groups_are_refused(model, tmp_path):
    params, cfg = random_sae()
    cfg = replace(cfg, d_out=128, activation="jumprelu")
    checkpoint.save(tmp_path / "t", params | {"threshold": jnp.ones(48)}, cfg, metadata={"model": "nano", "layer": 3,
                                                                                  "site": "img"})
    with pytest.raises(ValueError, match="is a transcoder"):
        score.main(tmp_path / "t")


def test_images_of_a_folder_with_captions(tmp_path):
    from PIL import Image
    for i, image in enumerate(images(2)):
        Image.fromarray(image[:96]).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f" caption {i}\n")
    texts, read = score.folder_of_images(tmp_path, 10, 64)
    assert texts == ["caption 0", "caption 1"] and read.shape == (2, 64, 64, 3)
    (tmp_path / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"1\.png has no caption 1\.txt"):
        score.folder_of_images(tmp_path, 10, 64)


def test_the_run_page_shows_the_scores_and_survives_what_is_none(scored):
    found = scored[2] | {"data": "<script>alert(1)</script>"}
    info = {"layer": 3, "site": "img", "layout": {"grid": [8, 8]}, "size": 128, "steps": 1, "images": 0, "seed": 0,
            "first_noise": 0, "checkpoint": {"metadata": None}}
    page = lambda scores: pages.renderer(SimpleNamespace(info=info))("run", **pages.run_page(
        SimpleNamespace(info=info | {"scores": scores}, features=48)))
    shown = page(found)
    assert "What the SAE leaves out" in shown and "<script>alert" not in shown and "&lt;script&gt;alert" in shown
    assert f"{found['loss']['spliced']:.3g}" in shown
    hostile = {"per_timestep": [found["per_timestep"][0] | {"t": "<b>x"}]}
    assert "<b>x" not in page(found | hostile)
    for broken in (None, {}, [], "x", found | {"per_timestep": 3}, found | {"sae": {}}, found | {"loss": None}):
        assert "What the SAE leaves out" not in page(broken)


def test_statistics_of_a_stream_are_those_of_the_whole(model):
    """Memory must not grow with the tokens: what was added is sums, whose shapes say nothing of how many."""
    params, cfg = random_sae()
    x = np.random.default_rng(3).standard_normal((9000, 128)).astype(np.float32)
    total = {}
    for part in np.array_split(x, 7):
        before = {name: np.shape(value) for name, value in total.items()}
        total = apply.added(total, params, cfg, part)
        assert not before or before == {name: np.shape(value) for name, value in total.items()}
    whole, streamed = apply.evaluate(params, cfg, x), apply.evaluation(total)
    for name in whole._fields:
        np.testing.assert_allclose(getattr(streamed, name), getattr(whole, name), rtol=1e-5, err_msg=name)


def test_padding_is_left_out_where_training_left_it_out(model):
    """Of text tokens only the words count: as many as the tokenizer makes of the captions."""
    counted = {}
    for padding in (True, False):
        of = replace(subject(model, 3, "both", groups=2), run={"padding": padding})
        counted[padding] = score.statistics(model, of, PROMPTS, (8, 8), 1, 0, 3, 32, lambda share: None)["tokens"]
    words = sum(len(words) for words in model.words(PROMPTS, 32))
    assert counted == {True: 3 * (64 + 32), False: 3 * 64 + words}


def test_height_and_width(model, tmp_path):
    """Of a run; in its file they are a list."""
    folder = save(tmp_path / "ckpt", run={"prompts": "scenes", "size": [64, 128]})
    score.main(folder, n=1, levels=1, steps=1, tokens=65)
    assert json.loads((folder / "eval.json").read_text())["sae"]["tokens"] == 3 * 32             # whole images
