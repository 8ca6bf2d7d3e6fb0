"""The scripts that make and measure the nano family: every stage trains and leaves a pipeline; images are read back."""
import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flux
import session

ROOT = Path(__file__).resolve().parents[1]


def script(name):
    """A script of nano/ as a module of its own: `train` is also a tool's name."""
    if f"nano_{name}" not in sys.modules:
        spec = importlib.util.spec_from_file_location(f"nano_{name}", ROOT / "nano" / f"{name}.py")
        sys.modules[f"nano_{name}"] = module = importlib.util.module_from_spec(spec)
        path = list(sys.path)
        spec.loader.exec_module(module)
        sys.path[:] = path
    return sys.modules[f"nano_{name}"]


@pytest.fixture(scope="module")
def trainer(nano):
    """nano/train.py with a model of two blocks, for the autoencoder that is bundled."""
    module = script("train")
    channels = 4 * json.loads((nano / "vae" / "config.json").read_text())["latent_channels"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FLUX", replace(
            module.FLUX, in_channels=channels, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 6, 6)))
        patch.setattr(module, "T5", partial(module.T5, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
        patch.setattr(module, "CLIP", partial(module.CLIP, hidden_size=20, intermediate_size=16, num_hidden_layers=1,
                                              num_attention_heads=2))
        patch.setattr(module, "HEADS", (0, 1))
        yield module


@pytest.fixture(scope="module")
def family(trainer, nano, tmp_path_factory):
    """The folder in which each stage has trained for one step on random latents, and its work folder."""
    out = tmp_path_factory.mktemp("family")
    work = out / "work"
    for part in ("tokenizer", "tokenizer_2", "vae"):
        shutil.copytree(nano / part, work / "shared" / part)
    (work / "latents").mkdir()
    rng = np.random.default_rng(0)
    np.save(work / "latents" / "images_1000000.npy",
            rng.standard_normal((40, 64, trainer.FLUX.in_channels)).astype(np.float16))
    for name in trainer.STAGES:
        trainer.main(work=work, out=out, stages=name, minutes=1e-4, batch=4, count=40, pairs=6)
    return out, work


def test_every_stage_leaves_a_pipeline(family, trainer):
    """Base, dev with a guidance input, and schnell; the text encoders are base's, bit for bit."""
    out, _ = family
    models = {name: flux.load(out / folder, dtype=jnp.float32) for name, folder in trainer.FOLDERS.items()}
    assert [model.cfg.guidance_embeds for model in models.values()] == [False, True, False]
    for name in ("dev", "schnell"):
        for part in ("t5", "clip"):
            for a, b in zip(jax.tree.leaves(getattr(models[name], part)[1]), jax.tree.leaves(
                    getattr(models["base"], part)[1]), strict=True):
                np.testing.assert_array_equal(a, b)
    base, schnell = (jax.tree.leaves(models[name].params["single"]) for name in ("base", "schnell"))
    assert any((np.asarray(a) != b).any() for a, b in zip(base, schnell, strict=True))
    for name, model in models.items():
        images = flux.generate(model, ["a red cube"], steps=1, size=64, guidance=2.0 if name == "dev" else None)
        assert images.shape == (1, 64, 64, 3)


def test_diffusers_loads_them(family, trainer):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    out, _ = family
    for folder in trainer.FOLDERS.values():
        pipe = diffusers.FluxPipeline.from_pretrained(out / folder)
        assert pipe.transformer.config.in_channels == trainer.FLUX.in_channels


def test_a_stage_resumes_from_its_state(family, trainer, capsys):
    out, work = family
    trainer.main(work=work, out=out, stages="dev", minutes=1e-4, batch=4, count=40)
    assert "dev: resumed at step 1" in capsys.readouterr().out
    (work / "dev.safetensors").unlink()


def test_mistakes(trainer, tmp_path):
    with pytest.raises(session.Mistake, match="--stages medium"):
        trainer.main(work=tmp_path, out=tmp_path, stages="base,medium")
    with pytest.raises(session.Mistake, match="for a single stage"):
        trainer.main(work=tmp_path, out=tmp_path, stages="base,dev", minutes=3)
    with pytest.raises(session.Mistake, match="unknown flag --hours"):
        trainer.main(work=tmp_path, hours=3)


@pytest.fixture(scope="module")
def untrained(trainer):
    """(cfgs, parameters, what a loss needs besides, data of random latents). The last projection of an untrained model
    is zero, so its velocity is zero everywhere."""
    cfgs = (trainer.T5(vocab_size=40), trainer.CLIP(vocab_size=40, eos_token_id=39))
    params, _ = trainer.beginning("base", ROOT / "nowhere", None, cfgs)
    rng, ids = np.random.default_rng(1), {name: np.ones((8, 4, 32), np.int16) for name in ("t5", "clip")}
    data = {"latents": rng.standard_normal((8, 64, trainer.FLUX.in_channels)).astype(np.float32), **ids}
    return cfgs, params, params | {"empty": {name: np.ones(32, int) for name in ids}}, data


def test_losses_of_a_model_that_does_nothing(trainer, untrained):
    """The error of base is the mean square of noise minus image; that of a student is zero where image is noise."""
    cfgs, params, fixed, data = untrained
    key = jax.random.key(0)
    latents, noise, u, _ = trainer.draw(jax.random.split(key)[1], data, 4)
    assert sorted((4 * u).astype(int).tolist()) == [0, 1, 2, 3]  # spread evenly
    loss = trainer.base_loss(params, fixed, cfgs, key, data, 4)
    assert float(loss) == pytest.approx(float(jnp.mean((noise - latents) ** 2)), rel=1e-5)
    pairs = {**data, "noise": data["latents"]}
    assert float(trainer.straight_loss(params, fixed, cfgs, key, {"pairs": pairs}, 4)) == 0
    pairs["noise"] = data["latents"] + 2
    assert float(trainer.straight_loss(params, fixed, cfgs, key, {"pairs": pairs}, 4)) == pytest.approx(4, rel=1e-5)


def test_pairs_are_what_dev_draws(trainer, family, tmp_path):
    """`flux.sample` of a random dev with the pair's caption, noise, steps and guidance arrives at the pair's image."""
    out, work = family
    dev, rng = tmp_path / "dev", np.random.default_rng(2)
    shutil.copytree(out / "nano-dev", dev)
    params = trainer.pipeline(dev)
    params["flux"] = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), params["flux"])
    old = flux.load(dev)
    trainer.export(dev, params, (old.t5[0], old.clip[0]), guidance=True)
    ids, _ = trainer.captions_of(work / "shared", 5)
    data = {"latents": rng.standard_normal((5, 64, trainer.FLUX.in_channels)), **ids}
    pairs = trainer.pairs_of(tmp_path, dev, data, 7, size=4)
    assert len(pairs["latents"]) == 7 and pairs["t5"].shape == (7, 1, 32)
    noise, model = pairs["noise"].astype(np.float32), flux.load(dev, dtype=jnp.float32)
    captions = [trainer.scenes.caption(trainer.scenes.sample(trainer.FIRST_SEED + i % 5), i % 4) for i in range(7)]
    start = flux.prepare(model, captions, steps=trainer.STEPS, size=128, noise=noise, guidance=trainer.GUIDANCE)
    drawn = np.asarray(flux.sample(model, start))
    assert np.abs(drawn - noise).mean() > 0.3
    np.testing.assert_allclose(pairs["latents"], drawn, atol=0.02 * np.abs(drawn).max())
    again = trainer.pairs_of(tmp_path, tmp_path / "gone", data, 7, size=4)
    np.testing.assert_array_equal(again["latents"], pairs["latents"])


def test_time_levels(trainer):
    """Half of a student's times are 1; half of base's are above 0.5 and even, the others lie around 0.5."""
    u = (jnp.arange(1200) + 0.5) / 1200
    time = np.asarray(trainer.few_times(u))
    assert (time == 1).mean() == 0.5 and set(time) == set(np.asarray(trainer.LEVELS[:4]))
    times = np.asarray(trainer.times(u))
    np.testing.assert_allclose(np.histogram(times[600:], 5, (0.5, 1))[0], 120, atol=1)
    assert np.median(times[:600]) == pytest.approx(0.5, abs=0.01) and times.min() > 0 and times.max() <= 1


# ---------------------------------------------------------------- reading images


@pytest.fixture(scope="module")
def inverse():
    return script("inverse")


def test_truth_is_that_of_the_scene(inverse):
    """Each solid's cells have its colour and shape, and `objects` finds them all."""
    seen, images = inverse.drawn(range(30))
    assert images.shape == (30, 128, 128, 3) and seen.shape.shape == (30, 32, 32)
    for i, there in enumerate(inverse.objects(seen, least=1)):
        solids = inverse.scenes.sample(i).solids
        if len({solid.color for solid in solids}) == len(solids):
            assert there == {(solid.color, solid.shape) for solid in solids}
    none = seen.surface != 0
    assert (seen.color[none] == 8).all() and (seen.shape[none] == 4).all() and (seen.color[~none] < 8).all()
    np.testing.assert_allclose(np.linalg.norm(seen.normal, axis=-1), 1, atol=1e-3)
    shares = inverse.tokens(seen)
    assert sum(shares[f"color: {name}"] for name in inverse.COLORS).max() <= 1
    np.testing.assert_allclose(sum(shares[name] for name in inverse.SURFACES), 1)
    np.testing.assert_allclose(sum(shares[f"shape: {name}"] for name in inverse.SHAPES), shares["solid"])
    np.testing.assert_allclose(sum(shares[f"red {name}"] for name in inverse.SHAPES), shares["color: red"])
    np.testing.assert_allclose(sum(shares[f"ground: {where}"] for where in ("near", "middle", "far")), shares["ground"])
    for part in ("shadow", "side: top", "side: front", "side: left", "side: right", "side: dark"):
        whole = shares["ground" if part == "shadow" else "solid"]
        assert (shares[part] <= whole).all() and 0.02 < shares[part].mean() / whole.mean() < 0.7, part


def test_edges_are_the_cells_on_both_sides(inverse):
    """A solid of 2 x 2 cells on the ground, under a wall that begins in the row above it."""
    surface = np.ones((1, 8, 8), int)
    surface[:, :3], surface[:, 3:5, 2:4] = 2, 0
    edges = {pair: inverse._edge(surface == a, surface == b)[0] for pair, a, b in
             (("solid, ground", 0, 1), ("solid, wall", 0, 2), ("ground, wall", 1, 2))}
    assert edges["solid, wall"].sum() == 4 and edges["solid, wall"][2:4, 2:4].all()
    assert edges["ground, wall"].sum() == 12 and not edges["ground, wall"][2:4, 2:4].any()
    assert edges["solid, ground"].sum() == 4 + 4 + 2


def test_the_network_learns_to_read(inverse, monkeypatch):
    """On few renders: it knows ground from solids after some steps; its outputs have the shapes of the truth."""
    monkeypatch.setattr(inverse, "WIDTHS", (8, 8, 8))
    params = inverse.train(count=64, epochs=40, batch=16)
    seen, images = inverse.drawn(range(inverse.TRAIN_SEED, inverse.TRAIN_SEED + 20))
    read = inverse.read(params, images, batch=8)
    for a, b in zip(seen, read):
        assert a.shape == b.shape
    assert (seen.surface == read.surface).mean() > 0.75
    with pytest.raises(session.Mistake, match="should be uint8"):
        inverse.read(params, images[:, :64])


# ---------------------------------------------------------------- measuring the family


@pytest.fixture(scope="module")
def evaluate():
    return script("evaluate")


@pytest.mark.parametrize("wrong", [False, True])
def test_true_renders_are_as_captioned(evaluate, monkeypatch, wrong):
    """Renders come true, also where a solid hides behind another; those of other scenes do not."""
    inverse, counts, truth = evaluate.inverse, iter((1, 2, 3)), []

    def draw(prompts):
        worlds = [inverse.scenes.sample(seed, objects=objects) for objects in [next(counts)]
                  for seed in range(len(prompts))]
        found, images = zip(*map(inverse.truth_of, worlds[1:] + worlds[:1] if wrong else worlds))
        truth.append(inverse.Seen(*(np.stack(part) for part in zip(*found))))
        return np.stack(images)

    monkeypatch.setattr(inverse, "read", lambda network, images: truth[-1])
    shares = evaluate.judged(None, draw, 60)
    assert list(shares) == ["shape", "cube", "colour", "two", "three"]
    if wrong:
        assert max(shares.values()) < 0.6
    else:
        assert shares["shape"] == shares["cube"] == shares["colour"] == 1
        assert shares["two"] > 0.9 and shares["three"] > 0.85


def test_base_draws_with_classifier_free_guidance(evaluate, family):
    """At scale 1 that is the model itself; at another scale it is not. A short batch is filled up and cut again."""
    out, _ = family
    base, prompts = flux.load(out / "nano-base", dtype=jnp.float32), ["a red cube", "a blue ball", "a cone"]
    base.params["out"] = jax.tree.map(lambda x: x + 0.1, base.params["out"])
    plain = evaluate.generate(base, prompts, 2, batch=2)
    assert plain.shape == (3, 128, 128, 3)
    same = evaluate.generate(base, prompts, 2, guidance=1.0, batch=2)
    assert np.abs(plain.astype(int) - same).max() <= 1
    assert (evaluate.generate(base, prompts, 2, guidance=4.0, batch=2) != plain).any()


def test_evaluate_says_what_it_can_measure(evaluate, tmp_path):
    with pytest.raises(session.Mistake, match="--models flux: should be some of nano, nano-dev, nano-base"):
        evaluate.main(models="nano,flux", out=tmp_path)
    with pytest.raises(session.Mistake, match="--n 2"):
        evaluate.main(n=2, out=tmp_path)
