"""The autoencoder against diffusers, its files, and its errors."""
import json
from dataclasses import fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import optional
from safetensors.numpy import load_file, save_file

import vae

torch = optional("torch")
AutoencoderKL, = optional("diffusers", "AutoencoderKL")

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {"block_out_channels": (4, 6), "norm_num_groups": 2, "latent_channels": 3}


def theirs(seed=0, **changes):
    """A random diffusers model, norms and biases too: their defaults hide mistakes."""
    levels = len(changes["block_out_channels"])
    torch.manual_seed(seed)
    model = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * levels,
                          up_block_types=("UpDecoderBlock2D",) * levels, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def to_torch(x):
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def error(ours, torch_result):
    """Largest difference relative to the largest value; theirs is [B, C, H, W]."""
    b = torch_result.detach().float().numpy().transpose(0, 2, 3, 1)
    assert ours.shape == b.shape and ours.dtype == jnp.float32
    return np.abs(np.asarray(ours) - b).max() / np.abs(b).max()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


encode, decode, moments = (jax.jit(f, static_argnums=1) for f in (vae.encode, vae.decode, vae.moments))

# block_out_channels, layers, groups, latent channels, quant conv, post quant conv, attention, scale, shift, B, H, W
CASES = [
    ((16, 32, 64, 64), 2, 16, 16, False, False, True, 0.3611, 0.1159, 1, 32, 48),      # FLUX.1 in miniature
    ((8, 8, 16, 24), 1, 8, 4, True, True, False, 0.18215, None, 2, 40, 16),            # Stable Diffusion's options
    ((12,), 3, 3, 5, True, False, True, 1.5, -0.3, 3, 7, 5),
    ((5, 15, 10), 2, 5, 2, False, True, True, 0.7, 0.0, 2, 12, 20),
    ((6, 3), 4, 1, 1, True, True, True, 0.9, 2.0, 1, 22, 6),
]


@pytest.mark.parametrize("case", CASES)
def test_encode_and_decode_match_diffusers(case, tmp_path):
    channels, layers, groups, C, quant, post_quant, attention, scale, shift, B, H, W = case
    model = theirs(block_out_channels=channels, layers_per_block=layers, norm_num_groups=groups, latent_channels=C,
                   use_quant_conv=quant, use_post_quant_conv=post_quant, mid_block_add_attention=attention,
                   scaling_factor=scale, shift_factor=shift)
    model.save_pretrained(tmp_path)
    cfg, params = vae.load(tmp_path, dtype=jnp.float32)
    images, latents = noise(B, H, W, 3), noise(B, H // cfg.downsampling, W // cfg.downsampling, C, seed=1)
    with torch.no_grad():
        posterior = model.encode(to_torch(images)).latent_dist
        their_images = model.decode(to_torch(latents) / scale + (shift or 0)).sample
    assert error(encode(params, cfg, images), (posterior.mode() - (shift or 0)) * scale) < 1e-4
    assert error(decode(params, cfg, latents), their_images) < 1e-4
    mean, log_variance = moments(params, cfg, images)
    assert error(mean, posterior.mean) < 1e-4 and error(log_variance, posterior.logvar) < 1e-4


def test_bundled_model_matches_diffusers(nano):
    """On the trained weights, whose activations are not those of random ones."""
    if not (nano / "vae" / WEIGHTS).exists():
        pytest.skip("nano/vae is not built yet")
    cfg, params = vae.load(nano / "vae", dtype=jnp.float32)
    model = AutoencoderKL.from_pretrained(nano / "vae", torch_dtype=torch.float32)
    images = noise(1, 64, 48, 3)
    latents = encode(params, cfg, images)
    with torch.no_grad():
        expected = (model.encode(to_torch(images)).latent_dist.mode() - cfg.shift_factor) * cfg.scaling_factor
        their_images = model.decode(to_torch(latents) / cfg.scaling_factor + cfg.shift_factor).sample
    assert error(latents, expected) < 1e-4
    assert error(decode(params, cfg, latents), their_images) < 1e-4


def test_encode_samples_the_posterior():
    cfg = vae.config({**TINY, "block_out_channels": (2,), "scaling_factor": 0.5, "shift_factor": 0.25})
    params = vae.init(jax.random.key(0), cfg)
    images = jnp.broadcast_to(noise(1, 2, 3, 3), (2000, 2, 3, 3))
    mean, log_variance = moments(params, cfg, images[:1])
    z = np.asarray(encode(params, cfg, images, jax.random.key(1)))
    assert np.abs(z.mean(0) - (mean[0] - 0.25) * 0.5).max() < 0.1
    np.testing.assert_allclose(z.std(0), 0.5 * jnp.exp(0.5 * log_variance[0]), rtol=0.1)
    assert not np.array_equal(z, encode(params, cfg, images, jax.random.key(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", ["one file", "sharded"])
def test_load_reads_every_dtype_and_sharding(dtype, shards, tmp_path):
    model = theirs(**TINY).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="8KB" if shards == "sharded" else "1GB")
    assert (tmp_path / f"{WEIGHTS}.index.json").exists() == (shards == "sharded")
    cfg, params = vae.load(tmp_path, dtype=jnp.float32)
    state = model.state_dict()
    assert len(jax.tree.leaves(params)) == len(state)
    kernel = state["encoder.down_blocks.1.resnets.0.conv1.weight"].float().numpy()
    ours = params["encoder"]["down"]["1"]["resnets"]["0"]["conv1"]["w"]
    np.testing.assert_array_equal(ours, kernel.transpose(2, 3, 1, 0))
    query = state["decoder.mid_block.attentions.0.to_q.weight"].float().numpy()
    np.testing.assert_array_equal(params["decoder"]["mid"]["attention"]["q"]["w"], query.T)
    with torch.no_grad():
        expected = model.float().decode(to_torch(latents := noise(1, 3, 2, 3)) / cfg.scaling_factor).sample
    assert error(decode(params, cfg, latents), expected) < 1e-4


def test_load_reads_old_attention_names(tmp_path):
    theirs(**TINY).save_pretrained(tmp_path)
    _, expected = vae.load(tmp_path)
    old = {theirs: ours for ours, theirs in vae.OLD_NAMES.items()}
    tensors = {}
    for name, value in load_file(tmp_path / WEIGHTS).items():
        for new in old:
            if f".attentions.0.{new}." in name:
                name = name.replace(f".{new}.", f".{old[new]}.")
                value = value[..., None, None] if value.ndim == 2 else value
        tensors[name] = value
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, tmp_path / WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, vae.load(tmp_path)[1], expected)


def test_load_streams_through_put(tmp_path):
    theirs(**TINY).save_pretrained(tmp_path)
    seen = {}

    def put(name, array):
        seen[name] = array
        return jnp.asarray(array) * 2

    cfg, params = vae.load(tmp_path, put=put)
    assert seen["encoder.conv_in.w"].shape == (3, 3, 3, 4) and seen["decoder.mid.attention.q.w"].shape == (6, 6)
    assert {array.dtype for array in seen.values()} == {jnp.dtype(jnp.bfloat16)}
    assert len(seen) == len(jax.tree.leaves(vae.table(cfg)))
    np.testing.assert_array_equal(params["decoder"]["conv_out"]["b"], seen["decoder.conv_out.b"] * 2)


def test_save_is_read_by_diffusers_and_by_us(tmp_path):
    cfg = vae.config({**TINY, "shift_factor": 0.2, "use_quant_conv": False, "sample_size": 16})
    params = vae.init(jax.random.key(0), cfg)
    vae.save(tmp_path, params, cfg, jnp.float32)
    again, loaded = vae.load(tmp_path, dtype=jnp.float32)
    assert again == cfg and sorted(p.name for p in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    model, info = AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.shift_factor == 0.2 and model.config.sample_size == 16
    with torch.no_grad():
        expected = model.decode(to_torch(latents := noise(1, 2, 3, 3)) / cfg.scaling_factor + 0.2).sample
    assert error(decode(params, cfg, latents), expected) < 1e-4
    vae.save(tmp_path, params, cfg)                                                # bfloat16, over the other
    assert load_file(tmp_path / WEIGHTS)["encoder.conv_in.weight"].dtype == jnp.bfloat16


def test_saved_parameters_may_come_out_of_jax_in_another_order(tmp_path):
    """Eleven resnet blocks: tree_map sorts "10" before "2", and neither the file nor the order of work may."""
    cfg = vae.config({"block_out_channels": (2,), "norm_num_groups": 1, "layers_per_block": 11, "latent_channels": 1})
    params = vae.init(jax.random.key(0), cfg)
    vae.save(tmp_path, jax.tree.map(lambda x: x, params), cfg, jnp.float32)
    model = AutoencoderKL.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.encode(to_torch(images := noise(1, 4, 4, 3))).latent_dist.mode() * cfg.scaling_factor
    assert error(vae.encode(params, cfg, images), expected) < 1e-4                 # eager: equal blocks compile once


def test_gradients_reach_every_parameter():
    cfg = vae.config(TINY)
    params = vae.init(jax.random.key(0), cfg)
    images = noise(2, 4, 6, 3)

    @jax.jit
    @jax.grad
    def gradients(params):
        return jnp.mean((vae.decode(params, cfg, vae.encode(params, cfg, images, jax.random.key(1))) - images) ** 2)

    leaves = jax.tree_util.tree_leaves_with_path(gradients(params))
    assert all(jnp.isfinite(leaf).all() for _, leaf in leaves)
    still = [jax.tree_util.keystr(path) for path, leaf in leaves if not jnp.abs(leaf).max() > 1e-7]
    # A bias of the keys shifts all of a query's logits alike, which a softmax does not see.
    assert all("['attention']['k']['b']" in path for path in still), still


def test_bfloat16_stays_close_and_returns_float32():
    cfg = vae.config({**TINY, "scaling_factor": 1.0, "shift_factor": 0.1})
    params = vae.init(jax.random.key(0), cfg)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    images = noise(1, 16, 8, 3)
    for function, x in ((encode, images), (decode, noise(1, 8, 4, 3))):
        a, b = function(half, cfg, x), function(params, cfg, x)
        assert a.dtype == jnp.float32
        assert jnp.abs(a - b).max() < 0.05 * jnp.abs(b).max()


def test_group_norm_holds_its_statistics_in_float32():
    """A plane of 4096 values around 100 has no variance left when summed in bfloat16."""
    x = (100 + noise(1, 64, 64, 4)).astype(jnp.bfloat16)
    p = {"w": jnp.ones(4, jnp.bfloat16), "b": jnp.zeros(4, jnp.bfloat16)}
    y = vae.group_norm(p, x, 2)
    assert y.dtype == jnp.bfloat16
    expected = torch.nn.functional.group_norm(to_torch(x.astype(np.float32)), 2, eps=vae.EPSILON)
    assert error(y.astype(jnp.float32), expected) < 0.01


BAD_CONFIGS = [
    ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
    ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
    ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "AttnUpDecoderBlock2D"),
    ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "3 entries for 2"),
    ({"act_fn": "gelu"}, "'gelu'"),
    ({"latents_mean": [0.5]}, r"latents_mean is \[0.5\]"),
    ({"norm_num_groups": 4}, "has 6; each must be a multiple of norm_num_groups, 4"),
]


@pytest.mark.parametrize("change, message", BAD_CONFIGS)
def test_config_names_what_it_does_not_support(change, message):
    with pytest.raises(ValueError, match=message):
        vae.config({**TINY, **change})


def test_config_of_a_folder_has_diffusers_defaults(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "force_upcast": True}))
    cfg, defaults = vae.config(tmp_path), AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)).config
    for field in fields(vae.Config):
        if field.name not in ("norm_num_groups", "block_out_channels"):
            assert getattr(cfg, field.name) == defaults[field.name], field.name


def test_load_names_the_tensor_that_is_wrong(tmp_path):
    theirs(**TINY).save_pretrained(tmp_path)
    good = load_file(tmp_path / WEIGHTS)
    name = "decoder.conv_out.weight"
    for change, message in [
        ({name: None}, f"missing.*{name}"),
        ({"decoder.extra.bias": good["decoder.conv_out.bias"]}, "unexpected.*decoder.extra.bias"),
        ({name: good[name][:, :3].copy()}, rf"misshapen.*{name} is \[3, 3, 3, 3\], should be \[3, 4, 3, 3\]"),
    ]:
        save_file({key: value for key, value in (good | change).items() if value is not None}, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            vae.load(tmp_path)


def test_load_names_the_file_that_is_missing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        vae.load(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"part-2.safetensors is named by the index"):
        vae.load(tmp_path)


def test_shapes_that_do_not_fit_are_named():
    cfg = vae.config({**TINY, "block_out_channels": (4, 4, 4, 4)})
    params = jax.eval_shape(partial(vae.init, cfg=cfg), jax.random.key(0))
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    run = lambda function, x: jax.eval_shape(lambda p, x: function(p, cfg, x), params, x)
    assert run(vae.encode, shaped(2, 24, 16, 3)).shape == (2, 3, 2, 3)
    assert run(vae.decode, shaped(2, 3, 2, 3)).shape == (2, 24, 16, 3)
    for function, shape, message in [(vae.encode, (2, 24, 20, 3), r"\[2, 24, 20, 3\].*multiples of 8"),
                                     (vae.encode, (2, 24, 16, 4), r"\[2, 24, 16, 4\]"),
                                     (vae.encode, (24, 16, 3), r"\[24, 16, 3\], should be \[B, H, W, 3\]"),
                                     (vae.decode, (2, 3, 2, 4), r"\[2, 3, 2, 4\], should be \[B, h, w, 3\]")]:
        with pytest.raises(ValueError, match=message):
            run(function, shaped(*shape))
