"""Whole pipelines against diffusers' FluxPipeline, the scheduler, sampling and the command line."""
import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import optional
from huggingface_hub import errors
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_flux import error, float8, poisoned, quick, random_transformer, to_bfl

import flux
import session
import text
import weights

torch = optional("torch")
save_torch, = optional("safetensors.torch", "save_file")
AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline = optional(
    "diffusers", "AutoencoderKL", "FlowMatchEulerDiscreteScheduler", "FluxPipeline")
calculate_shift, = optional("diffusers.pipelines.flux.pipeline_flux", "calculate_shift")
CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast = optional(
    "transformers", "CLIPTextConfig", "CLIPTextModel", "CLIPTokenizer", "T5Config", "T5EncoderModel", "T5TokenizerFast")

ROOT = Path(flux.__file__).parent
# double, single, heads, head width, rope axes, guidance
SCHNELL = (1, 2, 2, 16, (4, 6, 6), False)
DEV = (2, 1, 3, 16, (4, 6, 6), True)
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
PROMPTS = ["a red cube left of a blue sphere", "Ünïcode and a prompt that is too long: " + "green cone behind it " * 40]


def shake(model):
    with torch.no_grad():                                        # random norms and biases too: defaults hide mistakes
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def save_pipeline(nano, folder, case, scheduler):
    """A random pipeline of FLUX.1's classes, with the tokenizers of nano, as diffusers saves it."""
    clip, t5 = CLIPTokenizer.from_pretrained(nano / "tokenizer"), T5TokenizerFast.from_pretrained(nano / "tokenizer_2")
    transformer = random_transformer(case, joint=24, pooled=20, channels=64)
    torch.manual_seed(1)
    FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**scheduler), tokenizer=clip, tokenizer_2=t5,
        text_encoder=shake(CLIPTextModel(CLIPTextConfig(
            vocab_size=len(clip), hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id))),
        text_encoder_2=shake(T5EncoderModel(T5Config(
            vocab_size=len(t5), d_model=24, d_kv=8, d_ff=20, num_layers=2, num_heads=3,
            feed_forward_proj="gated-gelu"))),
        vae=shake(AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 12, 12), layers_per_block=1, norm_num_groups=4, latent_channels=16,
            sample_size=32, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False)),
    ).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):                    # in the files that the official repos have
        shutil.rmtree(folder / name)
        shutil.copytree(nano / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def schnell(nano, tmp_path_factory):
    """(folder, our model, diffusers' pipeline), without guidance."""
    return both(save_pipeline(nano, tmp_path_factory.mktemp("schnell"), SCHNELL, {}))


@pytest.fixture(scope="session")
def dev(nano, tmp_path_factory):
    """The same with guidance, and noise levels that depend on the size."""
    return both(save_pipeline(nano, tmp_path_factory.mktemp("dev"), DEV, DYNAMIC))


@pytest.fixture(scope="session", params=[name for name in flux.BUNDLED if (ROOT / name).is_dir()])
def bundled(request):
    return both(ROOT / request.param)


def both(folder):
    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return folder, flux.load(folder, dtype=jnp.float32), pipeline


def noise_for(size, seed=0, channels=64):
    height, width = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(seed).standard_normal((2, height * width // 256, channels), dtype=np.float32)


def theirs(pipeline, noise, size, steps, text_tokens, **more):
    height, width = (size, size) if isinstance(size, int) else size
    return 255 * pipeline(
        PROMPTS, height=height, width=width, num_inference_steps=steps, latents=torch.from_numpy(noise),
        max_sequence_length=text_tokens, output_type="np", **more).images


def compare(pair, size, steps, text_tokens, guidance=None):
    _, model, pipeline = pair
    noise = noise_for(size, channels=model.cfg.in_channels)
    more = {} if guidance is None else {"guidance_scale": guidance}
    ours = flux.generate(model, PROMPTS, steps=steps, size=size, noise=noise, guidance=guidance,
                         text_tokens=text_tokens)
    their = theirs(pipeline, noise, size, steps, text_tokens, **more)
    assert ours.dtype == np.uint8 and ours.shape == their.shape
    assert their.std() > 5                                       # a flat or saturated image would match anything
    assert np.abs(ours - their).max() <= 2


@pytest.mark.parametrize("size, steps, text_tokens", [(32, 1, 32), (32, 4, 32), ((32, 64), 3, 11)])
def test_schnell_like_images_match_diffusers(schnell, size, steps, text_tokens):
    compare(schnell, size, steps, text_tokens)


@pytest.mark.parametrize("size, steps, text_tokens, guidance", [
    (32, 5, 32, None), (32, 2, 32, 1.5), ((48, 16), 3, 32, 7.0)])
def test_dev_like_images_match_diffusers(dev, size, steps, text_tokens, guidance):
    compare(dev, size, steps, text_tokens, guidance)


def test_bundled_images_match_diffusers(bundled):
    compare(bundled, 128, 4, bundled[1].text_tokens)


def test_bundled_model_in_bfloat16(bundled):
    folder, model, _ = bundled
    noise = noise_for(128, channels=model.cfg.in_channels)
    draw = lambda model: flux.generate(model, PROMPTS, steps=4, size=128, noise=noise).astype(np.float32)
    assert np.abs(draw(flux.load(folder)) - draw(model)).mean() <= 4


def test_float16(schnell):
    folder, model, _ = schnell
    draw = lambda model: flux.generate(model, PROMPTS, steps=4, size=32, noise=noise_for(32)).astype(np.float32)
    assert np.abs(draw(flux.load(folder, dtype=jnp.float16)) - draw(model)).mean() <= 4


# ---------------------------------------------------------------- the scheduler


@pytest.mark.parametrize("config", [
    {}, {"shift": 3.0}, DYNAMIC, {**DYNAMIC, "time_shift_type": "linear"}, {"shift_terminal": 0.1, "shift": 1.7},
    {**DYNAMIC, "shift_terminal": 0.02, "base_image_seq_len": 100, "max_image_seq_len": 900, "max_shift": 2.5}])
def test_sigmas_match_diffusers(config, tmp_path):
    FlowMatchEulerDiscreteScheduler(**config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    seen = [scheduler.config.get(key, default) for key, default in (
        ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))]
    for steps in (1, 2, 4, 7, 28, 50)[bool(config.get("shift_terminal")):]:        # with one step it is 0 / 0
        for tokens in (1, 37, 256, 1024, 4096, 5000):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, *seen))
            for given in (saved, config):                        # old files lack the newer fields
                ours = flux.sigmas(given, steps, tokens)
                assert ours.shape == (steps + 1,) and ours.dtype == np.float32
                np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_beta_sigmas", "use_exponential_sigmas", "invert_sigmas",
                                  "stochastic_sampling"])
def test_other_schedules_are_refused(name):
    with pytest.raises(ValueError, match=name):
        flux.sigmas({name: True}, 4, 256)


# ---------------------------------------------------------------- sampling


def test_pack_equals_diffusers():
    latents = np.random.default_rng(0).standard_normal((2, 6, 10, 16), dtype=np.float32)
    packed = flux.pack(latents)
    torch_latents = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    np.testing.assert_array_equal(packed, FluxPipeline._pack_latents(torch_latents, 2, 16, 6, 10).numpy())
    unpacked = FluxPipeline._unpack_latents(torch.from_numpy(packed.copy()), 48, 80, 8).numpy()
    np.testing.assert_array_equal(flux.unpack(packed, (3, 5)), unpacked.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(flux.unpack(packed, (3, 5)), latents)


def test_a_seed_fixes_the_image(schnell):
    _, model, _ = schnell
    draw = lambda prompts, seed: flux.generate(model, prompts, steps=2, size=32, seed=seed)
    first, again, other = draw(PROMPTS, 0), draw(PROMPTS, 0), draw(PROMPTS, 1)
    np.testing.assert_array_equal(first, again)
    assert all((a != b).mean() > 0.5 for a, b in zip(first, other))
    changed = draw(["another neighbour", PROMPTS[1]], 0)         # a neighbour changes nothing
    assert np.abs(first[1].astype(int) - changed[1]).max() <= 1 and (first[0] != changed[0]).any()

    noise = flux.prepare(model, PROMPTS, steps=1, size=32, seed=0).latents
    np.testing.assert_array_equal(flux.prepare(model, PROMPTS[0], steps=1, size=32, seed=0).latents, noise[:1])
    assert not np.array_equal(noise[0], noise[1])
    assert abs(float(noise.mean())) < 0.15 and abs(float(noise.std()) - 1) < 0.15


def test_progress(schnell):
    seen = []
    flux.generate(schnell[1], PROMPTS, steps=3, size=32, progress=seen.append)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("layer, site", [(0, "both"), (2, "img")])
def test_residuals_over_the_steps(schnell, layer, site):
    """Each equals `residual` at the latents of its step, which are walked here by hand."""
    _, model, _ = schnell
    cfg, n = model.cfg, {"img": 4, "txt": 32, "both": 36}[site]
    caught = flux.residuals(model, PROMPTS, layer=layer, site=site, steps=3, seed=5)
    assert caught.shape == (3, 2, n, cfg.width)
    start = flux.prepare(model, PROMPTS, steps=3, size=32, seed=5)
    text, pooled, guidance = start.condition

    @quick
    def step(latents, sigma, following):
        args = (model.params, cfg, latents, text, pooled, jnp.full(2, sigma), guidance)
        acts = flux.residual(*args, grid=start.grid, layer=layer, site=site)
        return latents + (following - sigma) * flux.velocity(*args, grid=start.grid), acts

    latents = start.latents
    for i in range(3):
        latents, acts = step(latents, *start.sigmas[i:i + 2])
        assert error(caught[i], np.asarray(acts)) <= 1e-4

    spoiled = replace(model, params=poisoned(model.params, cfg, layer))            # pure noise is the first step
    one = flux.residuals(spoiled, PROMPTS, layer=layer, site=site, seed=5)
    assert error(one, np.asarray(caught[0])) <= 1e-4


@pytest.mark.parametrize("change, message", [
    ({"prompts": []}, "no prompt"), ({"steps": 0}, "steps is 0"), ({"steps": 1.5}, r"steps is 1\.5"),
    ({"size": 40}, r"size.*40.*16"), ({"size": (32, 0)}, "size.*0"),
    ({"noise": np.zeros((1, 4, 64))}, r"noise is \[1, 4, 64\]; 2 prompt\(s\) at this size need \[2, 4, 64\]"),
    ({"guidance": 3.5}, "no guidance embedding")])
def test_wrong_arguments(schnell, change, message):
    with pytest.raises(ValueError, match=message):
        flux.generate(schnell[1], **{"prompts": PROMPTS, "steps": 1, "size": 32, **change})


@pytest.mark.parametrize("layer, site, message", [(3, "img", "unknown layer 3: the model has layers 0 to 2"),
                                                  (0, "image", "unknown site 'image'")])
def test_wrong_layer_or_site(schnell, layer, site, message):
    with pytest.raises(ValueError, match=message):
        flux.residuals(schnell[1], PROMPTS, layer=layer, site=site)


# ---------------------------------------------------------------- loading


def test_load_puts_every_part(dev):
    folder, model, _ = dev
    parts = []
    flux.load(folder, put=lambda name, array: parts.append(name.split(".")[0]) or jnp.asarray(array), dtype=jnp.float32)
    assert list(dict.fromkeys(parts)) == ["transformer", "t5", "clip", "vae"]
    assert model.text_tokens == 32 and model.size == 32          # what nano's tokenizer and this VAE's config say


@pytest.mark.parametrize("last", [0, 1, 2])
def test_load_up_to_a_layer(schnell, last):
    """The same residuals; nothing else is read, and what was not loaded is not run."""
    folder, model, _ = schnell
    parts = set()
    put = lambda name, array: parts.add(name) or jnp.asarray(array)
    part = flux.load(folder, last=last, dtype=jnp.float32, put=put)
    assert not [name for name in parts if name.startswith(("vae.", "transformer.out"))]
    assert (any("single" in name for name in parts)) == (last >= model.cfg.num_layers)
    for layer in range(last + 1):
        where = {"layer": layer, "site": "both", "size": 32}
        np.testing.assert_array_equal(flux.residuals(part, PROMPTS, **where), flux.residuals(model, PROMPTS, **where))
    with pytest.raises(ValueError, match=f"loaded only up to layer {last}"):
        flux.generate(part, PROMPTS, steps=1, size=32)


def test_load_takes_the_transformer_from_bfl_file(dev, tmp_path):
    folder, model, _ = dev
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(to_bfl(weights, DEV), tmp_path / "flux1-dev.safetensors")
    other = flux.load(folder, transformer=tmp_path / "flux1-dev.safetensors", dtype=jnp.float32)
    assert replace(other.cfg, out_channels=None) == model.cfg
    jax.tree.map(np.testing.assert_array_equal, other.params, model.params)


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
@pytest.mark.parametrize("last", [None, 1])
def test_load_takes_the_transformer_from_float8_files(dev, tmp_path, layout, last):
    """In one file with everything, or in a folder; also quantized, and up to a layer."""
    folder, model, _ = dev
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    path, prefix = tmp_path / "pipeline", ""
    if layout == "bfl":
        tensors, path, prefix = to_bfl(tensors, DEV), tmp_path / "everything.safetensors", "model.diffusion_model."
    file, values = float8(tensors, torch.float8_e4m3fn, "scale_weight")
    files = {path: {prefix + name: w for name, w in file.items()} | {"vae.x": torch.ones(2)},
             tmp_path / "values.safetensors": values}
    if layout == "diffusers":
        (path / "transformer").mkdir(parents=True)
        shutil.copy(folder / "transformer" / "config.json", path / "transformer")
        files = {path / "transformer" / "diffusion_pytorch_model.safetensors": file,
                 tmp_path / "values.safetensors": values}
    for name, content in files.items():
        save_torch({key: w.contiguous() for key, w in content.items()}, name)
    for options in ({}, session.quantized("int8"), session.quantized("nf4")):
        ours, expected = (flux.load(folder, transformer=place, dtype=jnp.float32, last=last, **options).params
                          for place in (path, tmp_path / "values.safetensors"))
        jax.tree.map(np.testing.assert_array_equal, ours, expected)
        assert ("out" in ours) == (last is None)
    assert flux.read_config(folder, path)[1].layers == model.cfg.layers


def test_float8_of_all_parts(schnell, tmp_path):
    """With T5 as ComfyUI's files scale it, CLIP and VAE as torch casts them."""
    folder, _, _ = schnell
    shutil.copytree(folder, tmp_path / "a")
    expected = {}
    for part, scale in (("text_encoder", None), ("text_encoder_2", "scale_weight"), ("vae", None)):
        place, = (tmp_path / "a" / part).glob("*.safetensors")
        file, values = float8(load_file(place), torch.float8_e5m2, scale)
        save_torch({name: w.contiguous() for name, w in file.items()}, place)
        expected |= {f"{part}.{name}": w.numpy() for name, w in values.items()}
    model = flux.load(tmp_path / "a", dtype=jnp.float32)
    block = "text_encoder_2.encoder.block.1.layer.0.SelfAttention"
    np.testing.assert_array_equal(model.t5[1]["embed"], expected["text_encoder_2.shared.weight"])
    np.testing.assert_array_equal(model.t5[1]["block"]["q"][1], expected[f"{block}.q.weight"].T)
    clip = [name for name in expected if name.endswith("encoder.layers.1.mlp.fc1.weight")]
    np.testing.assert_array_equal(model.clip[1]["block"]["fc1"]["w"][1], expected[clip[0]].T)
    np.testing.assert_array_equal(model.vae[1]["decoder"]["mid"]["attention"]["q"]["w"],
                                  expected["vae.decoder.mid_block.attentions.0.to_q.weight"].T)


@pytest.mark.parametrize("file, change, message", [
    ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "holds a StableDiffusion3Pipeline"),
    ("model_index.json", {"_class_name": "FluxKontextPipeline"}, "holds a FluxKontextPipeline"),
    ("model_index.json", {"_class_name": "Flux2Pipeline"}, "holds a Flux2Pipeline"),
    ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}, "describes a SD3Transformer2DModel"),
    ("transformer/config.json", {"num_single_layers": None}, "does not say num_single_layers"),
    ("transformer/config.json", {"num_layers": None}, "does not say num_layers"),
    ("transformer/config.json", {"in_channels": 384, "out_channels": 64}, "in_channels is 384, and .* is 64"),   # Fill
    ("transformer/config.json", {"in_channels": 64, "out_channels": 32}, "out_channels is 32, and .* is 64"),
    ("transformer/config.json", {"patch_size": 2}, "patch_size is 2"),
    ("transformer/config.json", {"joint_attention_dim": 40}, "joint_attention_dim is 40, and the T5's d_model is 24"),
    ("transformer/config.json", {"pooled_projection_dim": 8}, "pooled_projection_dim is 8, and .* hidden_size is 20"),
    ("text_encoder_2/config.json", {"model_type": "qwen3"}, "says model_type 'qwen3'"),
    ("text_encoder/config.json", {"model_type": "t5"}, "says model_type 't5'"),
    ("vae/config.json", {"_class_name": "AutoencoderKLFlux2"}, "AutoencoderKLFlux2"),
    ("vae/config.json", {"latent_channels": 4}, "in_channels is 64, and .* is 16"),
    ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas"),
])
def test_models_of_another_kind_end_before_loading(schnell, tmp_path, monkeypatch, file, change, message):
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae", "scheduler", "tokenizer", "tokenizer_2"):
        (tmp_path / part).mkdir()
        for name in schnell[0].glob(f"{part}/*"):
            (tmp_path / part / name.name).symlink_to(name)
    given = json.loads((schnell[0] / file).read_text()) | change
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).write_text(json.dumps({key: value for key, value in given.items() if value is not None}))
    monkeypatch.setattr(weights, "load_tensors", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(text, "load_tensors", lambda *_, **__: pytest.fail("weights were read"))
    for function in (flux.load, flux.read_config):
        with pytest.raises(weights.Mistake, match=message) as caught:
            function(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_fit_ends_before_loading(schnell, tmp_path, monkeypatch):
    shutil.copytree(schnell[0], tmp_path / "a")
    file = tmp_path / "a" / "text_encoder_2" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 100}))
    monkeypatch.setattr(weights, "load_tensors", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(weights.Mistake, match=r"knows \d+ tokens, but its model only 100"):
        flux.load(tmp_path / "a")


def failing_hub(monkeypatch, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize("model, error, message", [
    ("dev", errors.GatedRepoError("403\nlong", response=RESPONSE), r"black-forest-labs/FLUX\.1-dev is gated"),
    ("a/b", errors.RepositoryNotFoundError("404\nlong", response=RESPONSE), "no repo a/b on the hub"),
    ("a/b", errors.HfHubHTTPError("500\nlong", response=RESPONSE), "cannot fetch a/b: 500"),
    ("a/b", errors.LocalEntryNotFoundError("offline\nlong"), "cannot fetch a/b: offline"),
    ("a/b", OSError("no network\nlong"), "cannot fetch a/b: no network"),
    ("a/b", OSError(), "cannot fetch a/b"),
    ("a/b", ConnectionError("no network"), "cannot fetch a/b: no network")])
def test_hub_errors_are_one_line(monkeypatch, model, error, message):
    failing_hub(monkeypatch, error)
    with pytest.raises(ValueError, match=message) as caught:
        flux.load(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["nanoo", "FLUX.1", "./absent", "/absent/folder", "~/models", "a/b/c"])
def test_unknown_models(monkeypatch, model):
    failing_hub(monkeypatch, AssertionError("asked the hub"))
    with pytest.raises(ValueError, match=f"unknown model '{model}': give nano, schnell, dev"):
        flux.load(model)


def test_names_of_models(monkeypatch, nano, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda repo, **more: asked.append((repo, more)) or tmp_path)
    assert flux.resolve("schnell") == flux.resolve("owner/name") == Path(tmp_path)
    assert [repo for repo, _ in asked] == ["black-forest-labs/FLUX.1-schnell", "owner/name"]
    assert "transformer/*" in asked[0][1]["allow_patterns"]      # the repo also holds 24 GB that nobody needs
    assert not any(pattern.startswith("*") for pattern in asked[0][1]["allow_patterns"])
    monkeypatch.chdir(tmp_path)                                  # nano is found from anywhere
    assert flux.resolve("nano") == nano
    assert session.default_model() == ("nano", "JAX sees only a CPU")


# ---------------------------------------------------------------- the command line


def test_command_line_draws_what_generate_draws(schnell, tmp_path):
    folder, model, _ = schnell
    noise = noise_for((32, 64))
    np.save(tmp_path / "noise.npy", noise)
    done = shell(tmp_path, *PROMPTS, "--model", folder, "--steps", 3, "--seed", 0, "--out", "new/out.png",
                 "--noise", "noise.npy", "--size", "32,64", "--dtype", "float32", "--text-tokens", 11)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"model: {folder} (as asked)", "new/out_0.png", "new/out_1.png"]
    assert "3/3" in done.stderr and "step" in done.stderr        # the progress bar
    images = np.stack([np.asarray(Image.open(tmp_path / f"new/out_{i}.png")) for i in range(2)])
    ours = flux.generate(model, PROMPTS, steps=3, size=(32, 64), noise=noise, text_tokens=11)
    assert np.abs(images.astype(int) - ours).max() <= 1


def test_command_line_error_is_one_line(tmp_path):
    done = shell(tmp_path, "a red cube", "--model", "nano", "--stpes", 3)
    assert done.returncode in (1, 2) and not done.stdout
    assert done.stderr.splitlines() == ["error: unknown flag --stpes (see --help)"]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_flag(tmp_path, flag):
    done = shell(tmp_path, flag)
    assert done.returncode == 0, done.stderr
    named = [p for p in inspect.signature(flux.main).parameters.values() if p.kind == p.KEYWORD_ONLY]
    assert named and all(f"--{p.name}=" in done.stdout + done.stderr for p in named)
    assert "Additional flags" not in done.stdout + done.stderr and not list(tmp_path.iterdir())


def shell(cwd, *argv):
    script = Path(flux.__file__).resolve()
    return subprocess.run([sys.executable, script, *map(str, argv)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300)


def mistake(monkeypatch, capsys, *argv):
    """What the command, run in this process, writes to stderr when it fails."""
    monkeypatch.setattr(sys, "argv", ["flux.py", *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        session.command(flux.main)
    code, said = end.value.code, capsys.readouterr().err
    assert code in (1, 2) or isinstance(code, str)               # the interpreter prints a string, and exits with 1
    return said + code if isinstance(code, str) else said


@pytest.mark.parametrize("argv, message", [
    (["--model", "MODEL"], "no prompt given"),
    (["a", "--model", "absent"], "unknown model 'absent'"),
    (["a", "--model", "MODEL", "--quant", "int4"], "unknown quantization 'int4': use one of nf4, int8, none"),
    (["a", "--model", "MODEL", "--dtype", "int8"], "--dtype int8: it must be bfloat16, float16 or float32"),
    (["a", "--model", "MODEL", "--layer", "3", "--site", "img"], "unknown flags --layer, --site"),
    (["a", "--model", "MODEL", "--size", "33"], "size"),
    (["a", "--model", "MODEL", "--size", "32x64"], "size"),
    (["a", "--model", "MODEL", "--size", "big"], "size"),
    (["a", "--model", "MODEL", "--size", "1.5"], "size"),
    (["a", "--model", "MODEL", "--size", "1,2,3"], "size"),
    (["a", "--model", "MODEL", "--steps", "0"], "steps is 0"),
    (["a", "--model", "MODEL", "--steps", "-3"], "steps is -3"),
    (["a", "--model", "MODEL", "--steps", "many"], "steps is 'many'"),
    (["a", "--model", "MODEL", "--steps"], "steps"),
    (["a", "--model", "MODEL", "--seed", "x"], "seed"),
    (["a", "--model", "MODEL", "--seed", "1.5"], "seed"),
    (["a", "--model", "MODEL", "--seed", "99999999999999999999"], "seed"),
    (["a", "--model", "MODEL", "--guidance", "3"], "no guidance embedding"),
    (["a", "--model", "MODEL", "--guidance", "much"], "guidance"),
    (["a", "--model", "MODEL", "--text_tokens", "-1"], "tokens"),
    (["a", "--model", "MODEL", "--text_tokens", "few"], "tokens"),
    (["a", "--model", "MODEL", "--text_tokens", "0"], "tokens"),
    (["a", "--model", "MODEL", "--text_tokens"], "tokens"),
    (["a", "--model", "MODEL", "--noise", "absent.npy"], "absent.npy"),
    (["a", "--model", "MODEL", "--noise", "empty.npy"], "empty.npy"),
    (["a", "--model", "MODEL", "--noise", "wrong.npy"], r"noise is [2, 2]"),
    (["a", "--model", "MODEL", "--out", "out.xyz"], "xyz"),
    (["a", "--model", "MODEL", "--transformer", "absent.safetensors"], "no weights at absent.safetensors"),
])
def test_mistakes_end_in_one_line(schnell, monkeypatch, capsys, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.npy").touch()
    np.save("wrong.npy", np.zeros((2, 2)))
    more = ["--dtype=float32"] if "--dtype" not in argv else []
    said = mistake(monkeypatch, capsys, *(schnell[0] if word == "MODEL" else word for word in argv), *more)
    assert len(said.splitlines()) == 1 and said.startswith("error: ") and message in said
    assert not list(tmp_path.glob("*.png"))


def test_gated_repo_without_a_token_is_one_line(monkeypatch, capsys):
    failing_hub(monkeypatch, errors.GatedRepoError("403\nlong", response=RESPONSE))
    said = mistake(monkeypatch, capsys, "a", "--model", "dev")
    assert said.startswith("error: black-forest-labs/FLUX.1-dev is gated: accept its license") and said.count("\n") <= 1


def test_prompts_stay_words(schnell, monkeypatch, tmp_path):
    """Not numbers, tuples or None, as fire would read them; one prompt gives one file of just that name."""
    seen = []
    monkeypatch.setattr(flux, "generate", lambda model, prompts, **more: seen.append((prompts, more)) or np.zeros(
        (len(prompts), 16, 16, 3), np.uint8))
    for prompts in (["1, 2"], ["None"], ["3", "{a: b}", "[x]", "a=b", "'quoted'", "0x10", "1e5"]):
        argv = [*prompts, "--model", schnell[0], "--out", tmp_path / "1.png", "--seed", 7]
        monkeypatch.setattr(sys, "argv", ["flux.py", *map(str, argv)])
        session.command(flux.main)
        assert list(seen[-1][0]) == prompts and seen[-1][1]["seed"] == 7 and seen[-1][1]["size"] == 32
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["1.png", *(f"1_{i}.png" for i in range(7))]
