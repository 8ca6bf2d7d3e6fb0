"""The transformer against diffusers' FluxTransformer2DModel, in float32, on random models of awkward shapes."""
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import optional
from safetensors.numpy import load_file, save_file

import blocks
import flux
import mmdit
import quant
import shard
import weights
from harvest import reap

torch = optional("torch")
save_torch, = optional("safetensors.torch", "save_file")
FluxTransformer2DModel, = optional("diffusers", "FluxTransformer2DModel")

WEIGHTS = "diffusion_pytorch_model.safetensors"
# double, single, heads, head width, rope axes, guidance, (rows, columns), text tokens, batch
CASES = [
    (1, 2, 3, 16, (4, 6, 6), False, (4, 4), 7, 2),
    (3, 1, 1, 24, (8, 8, 8), True, (3, 5), 1, 1),
    (2, 3, 5, 8, (2, 2, 4), True, (6, 2), 19, 3),
    (1, 1, 2, 32, (4, 14, 14), False, (1, 7), 32, 1),
    (2, 0, 3, 16, (4, 6, 6), False, (2, 2), 5, 2),
]
GUIDED = (2, 1, 3, 16, (4, 6, 6), True, (2, 3), 5, 2)            # with the RoPE split that BFL's files leave unsaid
# Compiling takes far longer than running here, so XLA may leave out what makes a program fast.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0,
                                           "xla_llvm_disable_expensive_passes": True})
run = quick(flux.velocity, static_argnames=("cfg", "grid"))


def random_transformer(case, seed=0, joint=20, pooled=12, channels=8, **changes):
    double, single, heads, width, axes, guidance = case[:6]
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=channels, num_layers=double, num_single_layers=single, attention_head_dim=width,
        num_attention_heads=heads, joint_attention_dim=joint, pooled_projection_dim=pooled, guidance_embeds=guidance,
        axes_dims_rope=axes, **changes).eval()
    with torch.no_grad():                                        # random norms and biases too: defaults hide mistakes
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def random_inputs(case, seed=0, joint=20, pooled=12, channels=8):
    guidance, (rows, columns), T, B = case[5:]
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    return {"latents": draw(B, rows * columns, channels), "text": draw(B, T, joint), "pooled": draw(B, pooled),
            "timestep": rng.random(B, dtype=np.float32),
            "guidance": 1 + 4 * rng.random(B, dtype=np.float32) if guidance else None}


def random_params(case, seed=0):
    """(Config, params) much as our own initialization, but what starts at zero is random too."""
    double, single, heads, width, axes, guidance = case[:6]
    cfg = flux.Config(in_channels=8, num_layers=double, num_single_layers=single, attention_head_dim=width,
                      num_attention_heads=heads, joint_attention_dim=20, pooled_projection_dim=12,
                      guidance_embeds=guidance, axes_dims_rope=axes)
    rng = np.random.default_rng(seed)

    def draw(t):
        shape = t.shape if t.layers is None else (t.layers, *t.shape)
        return jnp.asarray(t.mean + max(t.std, 0.1) * rng.standard_normal(shape, dtype=np.float32))

    return cfg, jax.tree.map(draw, mmdit.table(cfg))


def theirs(model, inputs, grid):
    ids = torch.zeros(*grid, 3)
    ids[..., 1] += torch.arange(grid[0])[:, None]
    ids[..., 2] += torch.arange(grid[1])[None]
    x = {k: None if v is None else torch.from_numpy(v) for k, v in inputs.items()}
    with torch.no_grad():
        return model(hidden_states=x["latents"], encoder_hidden_states=x["text"], pooled_projections=x["pooled"],
                     timestep=x["timestep"], guidance=x["guidance"], img_ids=ids.reshape(-1, 3),
                     txt_ids=torch.zeros(x["text"].shape[1], 3)).sample.numpy()


def error(a, b):
    assert np.shape(a) == np.shape(b)
    return np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("case", CASES)
def test_velocity_matches_diffusers(case, tmp_path):
    model, inputs = random_transformer(case), random_inputs(case)
    model.save_pretrained(tmp_path)
    cfg, params = mmdit.load_transformer(tmp_path, dtype=jnp.float32)
    assert error(run(params, cfg, **inputs, grid=case[6]), theirs(model, inputs, case[6])) <= 1e-4


def test_velocity_starts_at_zero():
    cfg, _ = random_params(CASES[0])
    params = quick(lambda key: weights.init_tensors(mmdit.table(cfg), key))(jax.random.key(0))
    assert not run(params, cfg, **random_inputs(CASES[0]), grid=CASES[0][6]).any()


# ---------------------------------------------------------------- files


def to_bfl(state, case):
    """A diffusers state dict under the names of Black Forest Labs' own files (flux/model.py of their repo)."""
    double, single = case[:2]
    out = {}

    def move(new, *old, change=lambda array: array):
        for kind in ("weight", "bias"):
            out[f"{new}.{kind}"] = change(np.concatenate([state[f"{name}.{kind}"] for name in old]))

    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    for new, old in (embedders | ({"guidance_in": "guidance_embedder"} if case[5] else {})).items():
        move(f"{new}.in_layer", f"time_text_embed.{old}.linear_1")
        move(f"{new}.out_layer", f"time_text_embed.{old}.linear_2")
    for i in range(double):
        new, old = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for s, qkv, qk, proj, end in (("img", "to_{}", "", "to_out.0", ""),
                                      ("txt", "add_{}_proj", "added_", "to_add_out", "_context")):
            ff = f"ff{end}"
            move(f"{new}.{s}_mod.lin", f"{old}.norm1{end}.linear")
            move(f"{new}.{s}_attn.qkv", *(f"{old}.attn.{qkv.format(name)}" for name in "qkv"))
            move(f"{new}.{s}_attn.proj", f"{old}.attn.{proj}")
            move(f"{new}.{s}_mlp.0", f"{old}.{ff}.net.0.proj")
            move(f"{new}.{s}_mlp.2", f"{old}.{ff}.net.2")
            out[f"{new}.{s}_attn.norm.query_norm.scale"] = state[f"{old}.attn.norm_{qk}q.weight"]
            out[f"{new}.{s}_attn.norm.key_norm.scale"] = state[f"{old}.attn.norm_{qk}k.weight"]
    for i in range(single):
        new, old = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        move(f"{new}.modulation.lin", f"{old}.norm.linear")
        move(f"{new}.linear1", *(f"{old}.attn.to_{name}" for name in "qkv"), f"{old}.proj_mlp")
        move(f"{new}.linear2", f"{old}.proj_out")
        out[f"{new}.norm.query_norm.scale"] = state[f"{old}.attn.norm_q.weight"]
        out[f"{new}.norm.key_norm.scale"] = state[f"{old}.attn.norm_k.weight"]
    move("final_layer.linear", "proj_out")
    move("final_layer.adaLN_modulation.1", "norm_out.linear",      # (scale, shift) there, (shift, scale) here
         change=lambda array: np.concatenate(np.split(array, 2)[::-1]))
    return out


def state_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("case, prefix, out_channels", [
    (CASES[0], "", None), (CASES[3], "model.diffusion_model.", None), (GUIDED, "", 4),
    (CASES[4], "", None)])
def test_bfl_file_gives_diffusers_velocity(case, prefix, out_channels, tmp_path):
    model, inputs = random_transformer(case, seed=1, out_channels=out_channels), random_inputs(case, seed=1)
    weights = to_bfl(state_of(model), case)
    assert sum(w.size for w in weights.values()) == sum(p.numel() for p in model.parameters())
    save_file({prefix + name: w for name, w in weights.items()}, tmp_path / "flux1.safetensors")
    cfg, params = mmdit.load_transformer(tmp_path / "flux1.safetensors", dtype=jnp.float32)
    assert cfg.axes_dims_rope == case[4] and cfg.guidance_embeds == case[5]
    cfg = replace(cfg, out_channels=out_channels)                # None means the same as 8, and is compiled already
    assert error(run(params, cfg, **inputs, grid=case[6]), theirs(model, inputs, case[6])) <= 1e-4


def test_shards_and_half_precision_files(tmp_path):
    model = random_transformer(GUIDED)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    cfg, whole = mmdit.load_transformer(tmp_path / "whole", dtype=jnp.float32)
    same, sharded = mmdit.load_transformer(tmp_path / "sharded", dtype=jnp.float32)
    assert same == cfg
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    for name in ("bfloat16", "float16"):
        model.to(getattr(torch, name)).save_pretrained(tmp_path / name)
        for dtype in (jnp.dtype(name), jnp.dtype(jnp.float32)):
            _, half = mmdit.load_transformer(tmp_path / name, dtype=dtype)
            for ours, full in zip(jax.tree.leaves(half), jax.tree.leaves(whole)):
                assert ours.dtype == dtype
                rounded = np.asarray(full).astype(name).astype(np.float32)
                np.testing.assert_array_equal(np.asarray(ours, np.float32), rounded)
        model = random_transformer(GUIDED)


@jax.tree_util.register_dataclass
@dataclass
class Halved:
    """A stand-in for a quantized weight: a leaf of its own type that answers `x @ w`."""
    half: jax.Array

    def __rmatmul__(self, x):
        return 2 * (x @ self.half)


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_put_receives_each_weight_once_and_its_result_stays(layout, tmp_path):
    case, seen = GUIDED, []
    model, inputs = random_transformer(case), random_inputs(case)
    path = tmp_path / (WEIGHTS if layout == "bfl" else "")
    if layout == "bfl":
        save_file(to_bfl(state_of(model), case), path)
    else:
        model.save_pretrained(path)

    def put(name, array):
        assert type(array) is np.ndarray and array.dtype == np.float32 and array.flags.c_contiguous
        seen.append((name, array.shape))
        return Halved(jnp.asarray(array / 2)) if array.ndim == 2 else jnp.asarray(array)

    cfg, params = mmdit.load_transformer(path, put=put, dtype=jnp.float32)
    D, counts = cfg.width, Counter(seen)
    assert counts["double.img.qkv.w", (D, 3 * D)] == counts["double.txt.fc2.w", (4 * D, D)] == 2
    assert counts["single.in.w", (D, 7 * D)] == counts["out.proj.w", (D, 8)] == counts["guidance.fc1.b", (D,)] == 1
    assert counts == {(weights.path_name(path), t.shape): t.layers or 1
                      for path, t in jax.tree_util.tree_leaves_with_path(mmdit.table(cfg))}
    assert sum(np.prod(shape) for _, shape in seen) == sum(p.numel() for p in model.parameters())
    assert params["double"]["img"]["qkv"]["w"].half.shape == (2, D, 3 * D)
    assert error(run(params, cfg, **inputs, grid=case[6]), theirs(model, inputs, case[6])) <= 1e-4


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("transformer_blocks.1.attn.to_k.bias"), r"missing tensor .* transformer_blocks\.1\.attn\.to_k\.b"),
    (lambda t: t.update(lora=np.zeros(3, np.float32)), r"unexpected tensor .*: lora$"),
    (lambda t: t.update({"single_transformer_blocks.0.proj_mlp.weight": np.zeros((9, 48), np.float32)}),
     r"single_transformer_blocks\.0\.proj_mlp\.weight is \[9, 48\], should be \[192, 48\]"),
    (lambda t: [t.pop(k) for k in list(t) if "guidance" in k], r"missing tensors .*guidance_embedder\.linear_1\.bias"),
])
def test_wrong_tensors_are_named(change, message, tmp_path):
    random_transformer(GUIDED).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    read = []
    with pytest.raises(ValueError, match=message):
        mmdit.load_transformer(tmp_path, put=lambda name, array: read.append(name))
    assert not read


def test_files_that_are_no_transformer(tmp_path):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not .*FLUX\.1 transformer.*img_in\.weight"):
        mmdit.load_transformer(tmp_path / "other.safetensors")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / WEIGHTS)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        mmdit.load_transformer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        mmdit.load_transformer(tmp_path / "absent")
    weights = to_bfl(state_of(random_transformer(CASES[0])), CASES[0])
    weights.pop("single_blocks.1.linear1.weight")
    save_file(weights, tmp_path / "flux1.safetensors")
    with pytest.raises(ValueError, match=r"missing tensor .*: single_blocks\.1\.linear1\.weight"):
        mmdit.load_transformer(tmp_path / "flux1.safetensors")


def float8(state, dtype, scale=None):
    """What a float8 file holds of a state dict of arrays, and the float32 values that PyTorch makes of it. scale: the
    name of the scale tensors of matrices (None: no scales), of odd layers one for each output."""
    file, values = {}, {}
    for i, (name, w) in enumerate(state.items()):
        w = torch.tensor(w)
        by = torch.tensor(1.0)
        if scale and w.ndim == 2:
            by = (w.abs().amax(1) if i % 2 else w.abs().max()) / 200
            module = name.removesuffix(".weight")
            file |= {f"{module}.{scale}": by, f"{module}.{scale.replace('weight', 'input')}": torch.tensor(0.5)}
        file[name] = (w / by.reshape(-1, *[1] * (w.ndim - 1))).to(dtype) if w.ndim == 2 else w
        values[name] = file[name].float() * by.reshape(-1, *[1] * (w.ndim - 1))
    return file | ({"scaled_fp8": torch.zeros(2, dtype=dtype)} if scale else {}), values


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout, scale", [("diffusers", None), ("diffusers", "weight_scale"), ("bfl", None),
                                           ("bfl", "scale_weight")])
def test_float8_files_have_the_values_of_pytorch(layout, scale, dtype, tmp_path):
    model = random_transformer(GUIDED)
    model.save_pretrained(tmp_path)
    tensors = to_bfl(state_of(model), GUIDED) if layout == "bfl" else state_of(model)
    file, values = float8(tensors, dtype, scale)
    whole = tmp_path if layout == "diffusers" else tmp_path / "flux1.safetensors"
    save_torch({name: w.contiguous() for name, w in file.items()}, whole / WEIGHTS if layout == "diffusers" else whole)
    cfg, ours = mmdit.load_transformer(whole, dtype=jnp.float32)
    save_torch({name: w.contiguous() for name, w in values.items()}, tmp_path / "values.safetensors")
    same, expected = mmdit.load_transformer(tmp_path / "values.safetensors", dtype=jnp.float32)
    assert (cfg.layers, cfg.width, cfg.guidance_embeds) == (same.layers, same.width, same.guidance_embeds)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    half = mmdit.load_transformer(whole, last=0)[1]
    np.testing.assert_array_equal(half["txt_in"]["w"], expected["txt_in"]["w"].astype(jnp.bfloat16))
    assert jax.tree.leaves(half["single"])[0].shape[0] == 0


def test_every_float8_value(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        save_torch({"a": codes}, tmp_path / "a.safetensors")
        for ours in ("float32", "bfloat16", "float16"):
            values = weights.open_weights(tmp_path / "a.safetensors")["a"][:].astype(ours).astype(np.float32)
            np.testing.assert_array_equal(values, codes.to(getattr(torch, ours)).float().numpy())


@pytest.mark.parametrize("kind, quantized", [("SCB", "int8 weights of bitsandbytes"), ("I8", "whole numbers"),
                                             ("blocks", "only one scale, or one for each output")])
def test_quantizations_that_cannot_be_read(kind, quantized, tmp_path):
    tensors = {name: torch.tensor(w) for name, w in to_bfl(state_of(random_transformer(GUIDED)), GUIDED).items()}
    tensors["img_in.weight"] = tensors["img_in.weight"].to(torch.int8)
    tensors |= {"SCB": {"img_in.SCB": torch.ones(48)},
                "blocks": {"img_in.weight_scale": torch.ones(48, 2)}}.get(kind, {})
    save_torch(tensors, tmp_path / "a.safetensors")
    with pytest.raises(weights.Mistake, match=quantized) as caught:
        mmdit.load_transformer(tmp_path / "a.safetensors", put=lambda *_: pytest.fail("read"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_one_file_with_everything(layout, prefix, tmp_path):
    model = random_transformer(GUIDED)
    model.save_pretrained(tmp_path / "a")
    state = to_bfl(state_of(model), GUIDED) if layout == "bfl" else state_of(model)
    other = {"vae.decoder.conv_in.weight": np.ones((2, 2, 3, 3), np.float32), "vae.scaled_fp8": np.ones(1, np.float32),
             "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": np.ones(3, np.float32),
             "text_encoders.t5xxl.transformer.shared.SCB": np.ones((2, 2), np.float32)}
    save_file({prefix + name: w for name, w in state.items()} | other, tmp_path / "everything.safetensors")
    cfg, ours = mmdit.load_transformer(tmp_path / "everything.safetensors", dtype=jnp.float32)
    theirs = mmdit.load_transformer(tmp_path / "a", dtype=jnp.float32)
    assert replace(cfg, out_channels=None) == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, ours, theirs[1])


def test_variants(tmp_path):
    """As diffusers writes them: one file or several, beside the plain one or alone."""
    folder, numbers = tmp_path / "a", {"fp16": 1, "bf16": 2, "": 0}
    loaded = lambda path=folder, **options: mmdit.load_transformer(path, dtype=jnp.float32, **options)[1]["txt_in"]["b"]
    models = {variant: random_transformer(GUIDED, seed) for variant, seed in numbers.items()}
    bias = {variant: state_of(model)["context_embedder.bias"] for variant, model in models.items()}
    models["fp16"].save_pretrained(folder, variant="fp16", max_shard_size="60KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    assert index.exists()
    for options in ({}, {"variant": "fp16"}, {"path": index}):
        np.testing.assert_array_equal(loaded(**options), bias["fp16"])
    models["bf16"].save_pretrained(folder, variant="bf16")
    assert (folder / "diffusion_pytorch_model.bf16.safetensors").exists() and index.exists()
    with pytest.raises(weights.Mistake, match="variants bf16, fp16 and no plain weights") as caught:
        loaded()
    assert "\n" not in str(caught.value)
    models[""].save_pretrained(folder)
    for variant in ("bf16", None):
        np.testing.assert_array_equal(loaded(variant=variant), bias[variant or ""])
    with pytest.raises(weights.Mistake, match="not fp8"):
        loaded(variant="fp8")


def test_of_two_index_files_the_one_that_was_asked_for(tmp_path):
    for i, variant in enumerate(("", ".fp16")):
        save_file({"a": np.full(2, i, np.float32)}, tmp_path / f"model{variant}-00001-of-00001.safetensors")
        (tmp_path / f"model.safetensors.index{variant}.json").write_text(
            json.dumps({"weight_map": {"a": f"model{variant}-00001-of-00001.safetensors"}}))
    read = lambda **options: float(weights.open_weights(tmp_path, **options)["a"][0])
    assert (read(), read(variant="fp16")) == (0, 1)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert read() == 1
    (tmp_path / "model.safetensors.index.fp16.json").write_text("[]")
    with pytest.raises(weights.Mistake, match="is not an index"):
        read()


# ---------------------------------------------------------------- the residual stream


def hooked(model, inputs, grid):
    """[(txt, img)] that leave each of diffusers' blocks, and the velocity."""
    caught = []
    hooks = [block.register_forward_hook(lambda _, __, out: caught.append([x.numpy() for x in out]))
             for block in (*model.transformer_blocks, *model.single_transformer_blocks)]
    velocity = theirs(model, inputs, grid)
    for hook in hooks:
        hook.remove()
    return caught, velocity


def poisoned(params, cfg, layer):
    """`params` with NaN in all that lies behind block `layer`."""
    n = cfg.num_layers
    return {**params, "out": jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), params["out"]),
            "double": jax.tree.map(lambda w: w.at[layer + 1:].set(jnp.nan), params["double"]),
            "single": jax.tree.map(lambda w: w.at[max(layer + 1 - n, 0):].set(jnp.nan), params["single"])}


def scan_lengths(jaxpr):
    """Of all scans, also inside of jits."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["length"]
        elif eqn.primitive.name in ("jit", "pjit"):
            yield from scan_lengths(eqn.params["jaxpr"].jaxpr)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[4]])
def test_residual_matches_diffusers_and_needs_nothing_behind_it(case, tmp_path):
    model, inputs, grid = random_transformer(case), random_inputs(case), case[6]
    model.save_pretrained(tmp_path)
    cfg, params = mmdit.load_transformer(tmp_path, dtype=jnp.float32)
    expected, _ = hooked(model, inputs, grid)
    assert len(expected) == cfg.layers
    for layer, (txt, img) in enumerate(expected):
        def sites(p, layer=layer):
            return {site: flux.residual(p, cfg, **inputs, grid=grid, layer=layer, site=site) for site in mmdit.SITES}

        ours = quick(sites)(poisoned(params, cfg, layer))
        for site, value in {"img": img, "txt": txt, "both": np.concatenate([txt, img], 1)}.items():
            assert error(ours[site], value) <= 1e-4, (layer, site)
        one = jax.make_jaxpr(lambda p, layer=layer: flux.residual(p, cfg, **inputs, grid=grid, layer=layer, site="img"))
        assert sum(scan_lengths(one(params).jaxpr)) == layer + 1


@pytest.mark.parametrize("case", [CASES[0], CASES[1]])
def test_reap_catches_the_residuals_of_all_layers(case, tmp_path):
    model, inputs, grid = random_transformer(case), random_inputs(case), case[6]
    model.save_pretrained(tmp_path)
    cfg, params = mmdit.load_transformer(tmp_path, dtype=jnp.float32)
    expected, velocity = hooked(model, inputs, grid)
    out, caught = quick(reap(lambda p: flux.velocity(p, cfg, **inputs, grid=grid)))(params)
    assert error(out, velocity) <= 1e-4
    stacked = {f"{kind}.{s}": np.stack([pair[i] for pair in part])
               for kind, part in (("double", expected[:cfg.num_layers]), ("single", expected[cfg.num_layers:]))
               for i, s in enumerate(("txt", "img"))}
    for name, value in stacked.items():
        assert error(caught[name], value) <= 1e-4, name
    assert caught["double.img.neurons"].shape == (*stacked["double.img"].shape[:3], 4 * cfg.width)


def test_walk_is_passed_in():
    """A walk that calls each block by itself gives what the scan gives, and is told where to stop."""
    case, inputs, stops = CASES[0], random_inputs(CASES[0]), []
    cfg, params = random_params(case)

    def one_by_one(block, x, stack, layers, *context):
        stops.append(layers.stop)
        for i in layers:
            x, caught = block(x, jax.tree.map(lambda w, i=i: w[i], stack), *context)
        return x, jax.tree.map(lambda value: value[None], caught)

    walked = quick(lambda p: flux.velocity(p, cfg, **inputs, grid=case[6], walk=one_by_one))(params)
    assert error(walked, np.asarray(run(params, cfg, **inputs, grid=case[6]))) <= 1e-5
    residual = lambda p: flux.residual(p, cfg, **inputs, grid=case[6], layer=1, site="img", walk=one_by_one)
    jax.eval_shape(residual, params)
    assert stops == [1, 2, 1, 1]                                 # all of both kinds; then up to layer 1


def test_gradients_reach_every_weight():
    case = GUIDED
    cfg, params = random_params(case)
    inputs = {k: jnp.asarray(v) for k, v in random_inputs(case).items()}
    weights = np.random.default_rng(1).standard_normal(inputs["latents"].shape)
    loss = lambda params, inputs: (weights * flux.velocity(params, cfg, **inputs, grid=case[6])).sum()
    grads = quick(jax.grad(loss, argnums=(0, 1)))(params, inputs)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, path
    for name, g in jax.tree_util.tree_leaves_with_path((grads[0]["double"], grads[0]["single"])):
        assert np.abs(g).max(tuple(range(1, g.ndim))).all(), name                  # in every layer of the stack


# ---------------------------------------------------------------- edits


def plainly(params, cfg, inputs, grid, change, last=None):
    """The velocity, or {"img", "txt"} that leave block `last`: block after block, without a walk, a sow or a plant.
    change(layer, stream, x) → what stands in the place of what block `layer` puts out."""
    ends = {name: p for name, p in params.items() if name not in ("double", "single")}
    (img, txt), vec, mod, rope = mmdit._begin(ends, cfg, *inputs.values(), grid=grid)
    T = txt.shape[1]
    for layer in range(cfg.layers):
        n = layer - cfg.num_layers
        p = jax.tree.map(lambda w: w[layer if n < 0 else n], params["double" if n < 0 else "single"])
        if n < 0:
            img, txt = mmdit._double_block(p, cfg, img, txt, mod, rope)
        else:
            x = mmdit._single_block(p, cfg, jnp.concatenate([txt, img], 1), mod, rope, T)
            txt, img = x[:, :T], x[:, T:]
        txt, img = change(layer, "txt", txt), change(layer, "img", img)
        if layer == last:
            return {"img": img, "txt": txt}
    return mmdit._end(params["out"], img, vec)


def scaled(name, x, each, shared):
    """An edit that no other commutes with, and that knows which stream it is in, and which example."""
    return (each["factor"][:, None, None] * x + shared[name.split(".")[1]] * x[:, ::-1]).astype(x.dtype)


def negated(name, x, each, shared):
    return (shared - x).astype(x.dtype)


def some_edits(cfg, layers, B, seed=0):
    """At each of `layers` an edit of both streams, then one of the image's, whose order tells."""
    rng, edits = np.random.default_rng(seed), []
    for layer in layers:
        each = {"factor": jnp.asarray(rng.uniform(0.5, 1.5, B), jnp.float32)}
        shared = {s: jnp.asarray(rng.standard_normal(cfg.width), jnp.float32) for s in ("img", "txt")}
        kind = "double" if layer < cfg.num_layers else "single"
        edits += [flux.Edit(layer, (f"{kind}.img", f"{kind}.txt"), scaled, each, shared),
                  flux.Edit(layer, (f"{kind}.img",), negated, shared=jnp.float32(rng.standard_normal()))]
    return edits


def by_hand(edits):
    def change(layer, stream, x):
        for edit in edits:
            for name in edit.names:
                if edit.layer == layer and name.endswith(stream):
                    x = edit.function(name, x, edit.each, edit.shared)
        return x
    return change


@pytest.mark.parametrize("case, layers", [(CASES[0], [0, 2]), (CASES[1], [1, 2, 3]), (CASES[4], [1])])
def test_edits_replace_what_blocks_put_out(case, layers):
    """And what `velocity_and_values` and `residual` bring out of an edited block is what it puts out."""
    cfg, params = random_params(case)
    inputs, edits, layer = random_inputs(case), some_edits(cfg, layers, case[8]), layers[-1]
    where = {**inputs, "grid": case[6], "edits": edits}
    names = flux.residual_names(cfg, layer, "both")

    def all_of(params):
        caught, alone = (f(params, cfg, **where, layer=layer, **of) for f, of in (
            (flux.velocity_and_values, {"names": names}), (flux.residual, {"site": "both"})))
        expected, out = (plainly(params, cfg, inputs, case[6], by_hand(edits), last=last) for last in (None, layer))
        pairs = [(flux.velocity(params, cfg, **where), expected), (caught[0], expected)]
        pairs += [(caught[1][name], out[name.split(".")[1]]) for name in names]
        return [*pairs, (alone, jnp.concatenate([out["txt"], out["img"]], 1))]

    pairs = quick(all_of)(params)
    for ours, expected in pairs:
        assert error(ours, np.asarray(expected)) <= 1e-5
    assert error(run(params, cfg, **inputs, grid=case[6]), np.asarray(pairs[0][1])) > 1e-2     # they do change it


@pytest.mark.parametrize("walk", [blocks.scan, shard.sliced(), shard.scan()], ids=["flux", "sliced", "scan"])
def test_edits_with_every_walk_compile_nothing_when_only_arrays_change(walk):
    case = CASES[0]
    cfg, params = random_params(case)
    inputs = random_inputs(case)
    sizes = []
    for seed in range(2):
        edits = some_edits(cfg, [0, 2], case[8], seed)
        ours = flux.velocity(params, cfg, **inputs, grid=case[6], walk=walk, edits=edits)
        expected = quick(lambda p: plainly(p, cfg, inputs, case[6], by_hand(edits)))(params)
        assert error(ours, np.asarray(expected)) <= 1e-5
        sizes.append((blocks._scan._cache_size(), shard.sliced().run._cache_size(), mmdit._block.cache_info().misses))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("case", [CASES[0], CASES[4]])
@pytest.mark.parametrize("quantize", [None, partial(quant.nf4, block=16), quant.int8])
def test_layers_apart_give_what_a_stack_gives(case, quantize):
    """Called one by one, and in a traced program, where they are joined again. Layers of a kind share a program."""
    cfg, params = random_params(case)
    inputs, edits = random_inputs(case), some_edits(cfg, [1], case[8])
    if quantize:
        params |= {kind: jax.tree.map(lambda w: quantize(w) if w.ndim == 3 and len(w) else w, params[kind])
                   for kind in ("double", "single")}
    copy = jax.tree.map(jnp.array, params)
    layers = copy | {kind: blocks.apart(copy[kind]) for kind in ("double", "single")}
    assert [blocks.depth(layers[kind]) for kind in ("double", "single")] == list(case[:2])
    assert copy["double"]["img"]["o"]["b"].is_deleted() or not case[0]
    run = partial(flux.velocity, cfg=cfg, grid=case[6], edits=edits, **inputs)
    before = blocks._one._cache_size()
    np.testing.assert_allclose(run(layers), run(params), rtol=1e-5, atol=1e-6)
    assert blocks._one._cache_size() - before <= 4             # of each kind with the edit, and without
    np.testing.assert_allclose(quick(lambda p: run(p))(layers), quick(lambda p: run(p))(params), rtol=1e-5, atol=1e-6)
    for layer in range(cfg.layers):
        ours, theirs = (flux.residual(p, cfg, **inputs, grid=case[6], layer=layer, site="both")
                        for p in (layers, params))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="loaded only up to layer"):
        run(layers | {kind: jax.tree.map(lambda parts: parts[:1], layers[kind], is_leaf=blocks._is_leaf)
                      for kind in ("double", "single")})


def test_a_gpu_gets_layers_apart(monkeypatch, nano):
    """Also those of T5; without a walk of the user's own, which wants stacks."""
    expected = flux.residuals(flux.load(nano, last=5), ["a red cube"], layer=5, site="img")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: [SimpleNamespace(platform="gpu")])
        model, stacked = flux.load(nano, last=5), flux.load(nano, last=5, walk=blocks.scan)
    assert all(type(parts) is tuple for stack in (model.params["double"], model.params["single"], model.t5[1]["block"])
               for parts in jax.tree.leaves(stack, is_leaf=blocks._is_leaf))
    assert not any(type(leaf) is tuple for leaf in jax.tree.leaves(stacked.params["double"], is_leaf=blocks._is_leaf))
    np.testing.assert_allclose(flux.residuals(model, ["a red cube"], layer=5, site="img"), expected, atol=1e-4)


def test_edits_in_half_precision_keep_the_dtype():
    case = CASES[0]
    cfg, params = random_params(case)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    inputs, edits = random_inputs(case), some_edits(cfg, [0, 1], case[8])
    ours = flux.velocity(params, cfg, **inputs, grid=case[6], edits=edits)
    expected = plainly(params, cfg, inputs, case[6], by_hand(edits))
    assert ours.dtype == expected.dtype == jnp.bfloat16
    assert error(ours, np.asarray(expected, np.float32)) <= 0.05


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_edit_that_changes_nothing_changes_no_bit(dtype, layer):
    case = CASES[0]
    cfg, params = random_params(case)
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    inputs, kind = random_inputs(case), ("double", "single")[layer]
    edit = flux.Edit(layer, (f"{kind}.img",), lambda name, x, each, on: jnp.where(on, 2 * x, x), None, jnp.array(False))
    plain, edited = (flux.velocity(params, cfg, **inputs, grid=case[6], edits=edits) for edits in ((), [edit]))
    np.testing.assert_array_equal(np.asarray(edited), np.asarray(plain))


def test_sampling_asks_for_the_edits_of_each_step():
    case = CASES[0]
    cfg, params = random_params(case)
    model = SimpleNamespace(params=params, cfg=cfg, walk=None)
    x = {name: jnp.asarray(value) for name, value in random_inputs(case).items() if value is not None}
    start = flux.Start(x["latents"], (x["text"], x["pooled"], None), np.array([1, 0.7, 0.4, 0], np.float32), case[6])
    by_step, asked = {1: some_edits(cfg, [1], 2), 2: some_edits(cfg, [0], 2, seed=1)}, []
    ours = flux.sample(model, start, edits=lambda i: asked.append(i) or by_step.get(i, ()))
    latents = x["latents"]
    for i in range(3):
        inputs = dict(zip(("latents", "text", "pooled", "timestep", "guidance"), (latents, *flux.at(start, i))))
        v = plainly(params, cfg, inputs, case[6], by_hand(by_step.get(i, ())))
        latents = latents + (start.sigmas[i + 1] - start.sigmas[i]) * v
    assert asked == [0, 1, 2] and error(ours, np.asarray(latents)) <= 1e-5


@pytest.mark.parametrize("edit, message", [
    (flux.Edit(3, ("single.img",), negated), "unknown layer 3: the model has layers 0 to 2"),
    (flux.Edit(-1, ("single.img",), negated), "unknown layer -1"),
    (flux.Edit(0, ("single.img",), negated, shared=jnp.float32(0)), "single.img"),
    (flux.Edit(1, ("double.img",), negated, shared=jnp.float32(0)), "double.img"),
    (flux.Edit(1, ("single.img",), lambda name, x, each, shared: x[:, 1:]), "single.img"),
])
def test_edits_that_do_not_fit(edit, message):
    cfg, params = random_params(CASES[0])
    with pytest.raises(ValueError, match=message):
        flux.velocity(params, cfg, **random_inputs(CASES[0]), grid=CASES[0][6], edits=[edit])


# ---------------------------------------------------------------- attention


def test_attention_block_by_block():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 70, 3, 8), dtype=np.float32)) for _ in range(3))
    whole, blocks = mmdit._softmax_attention(q, k, v), mmdit._softmax_attention(q, k, v, block=16)
    np.testing.assert_allclose(blocks, whole, atol=1e-6)
    jaxpr = jax.make_jaxpr(partial(mmdit._softmax_attention, block=16))(q, k, v)
    assert max(np.prod(var.aval.shape) for eqn in jaxpr.eqns for var in eqn.outvars) < 2 * 3 * 70 * 70


def test_flash_attention_is_attention():
    """The kernel that a TPU runs, by Pallas' interpreter."""
    from jax.experimental.pallas import tpu
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 256, 2, 128), dtype=np.float32)) for _ in range(3))
    with tpu.force_tpu_interpret_mode():
        ours = mmdit._flash(q, k, v, tile=128)
    np.testing.assert_allclose(ours, mmdit._softmax_attention(q, k, v), atol=1e-5)


@pytest.fixture
def cudnn(monkeypatch):
    """A JAX that finds cuDNN, also on a machine without a GPU."""
    with_cudnn(monkeypatch, lambda: 91000)
    yield
    jax.clear_caches()                                           # of what was traced with it


def with_cudnn(monkeypatch, version):
    from jax._src.cudnn import fused_attention_stablehlo as module
    monkeypatch.setattr(module, "check_cudnn_version", version)
    jax.clear_caches()


def calls(function, *args, platform="cuda"):
    """The calls of cuDNN in a program for a platform, which need not be here."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return set(re.findall(r"__cudnn\$(\w+)", text))


@pytest.mark.parametrize("dtype, S, H, K, fits", [
    ("bfloat16", 512, 24, 128, True), ("float16", 6, 1, 8, True), ("bfloat16", 16, 3, 24, True),
    ("float32", 512, 24, 128, False), ("bfloat16", 511, 24, 128, False), ("bfloat16", 16, 3, 12, False),
    ("bfloat16", 16, 3, 264, False)])
def test_when_cudnn_runs_the_attention(cudnn, monkeypatch, dtype, S, H, K, fits):
    q = jax.ShapeDtypeStruct((2, S, H, K), dtype)
    rope = (jax.ShapeDtypeStruct((S, 1, K // 2), jnp.float32),) * 2
    assert calls(mmdit._attention, q, q, q, rope) == ({"fmhaSoftmax"} if fits else set())
    for platform in ("cpu", "rocm", "tpu"):
        assert not calls(mmdit._attention, q, q, q, rope, platform=platform)
    for capability in ("7.5", "8.0", "12.0"):
        monkeypatch.setattr(jax, "local_devices", lambda one=capability: [
            SimpleNamespace(platform="gpu", compute_capability=one)])
        jax.clear_caches()
        assert bool(calls(mmdit._attention, q, q, q, rope)) == (fits and capability != "7.5")


def test_without_cudnn_no_program_calls_it(monkeypatch):
    def absent():
        raise RuntimeError("cuDNN is not detected.")

    with_cudnn(monkeypatch, absent)
    q, rope = jnp.ones((2, 16, 3, 24), jnp.bfloat16), (jnp.ones((16, 1, 12)),) * 2
    assert not calls(mmdit._attention, q, q, q, rope)


def test_cudnn_is_asked_for_our_attention(cudnn, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 70, 3, 8)), jnp.bfloat16) for _ in range(3))
    angles = rng.standard_normal((70, 1, 4))
    attend = partial(mmdit._attention, q, k, v, (jnp.cos(angles), jnp.sin(angles)))
    expected = np.asarray(attend(), np.float32)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args))
    plainly, asked = jax.nn.dot_product_attention, []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, implementation, **options:
                        asked.append(implementation) or plainly(*args, implementation="xla", **options))
    monkeypatch.setattr(blocks, "_fits", lambda *_: True)
    assert error(attend(), expected) <= 0.02 and asked == ["cudnn"]


def test_transformations_of_cudnn_attention(cudnn, monkeypatch):
    """For a CPU they give what they give without cuDNN; for a GPU they call it, forward and backward."""
    case = CASES[1]
    cfg, params = random_params(case)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    inputs = {name: jnp.asarray(x) for name, x in random_inputs(case).items()}
    mesh, edits = shard.mesh(jax.devices()[:1]), some_edits(cfg, [1], case[8])

    def velocity(x, **options):
        return flux.velocity(params, cfg, **inputs | {"latents": x}, grid=case[6], **options).astype(jnp.float32)

    gradient = lambda function: jax.grad(lambda x: jnp.sum(jnp.sin(function(x))))
    programs = {
        "grad of vmap": gradient(lambda x: jax.vmap(velocity)(jnp.stack([x, 2 * x]))),
        "grad of remat": gradient(jax.checkpoint(velocity)), "reap": lambda x: reap(velocity)(x)[1]["single.img"],
        "grad of edits": gradient(partial(velocity, edits=edits)),
        "grad of shard_map": gradient(partial(velocity, walk=shard.scan(mesh)))}
    x, ours = inputs["latents"], {}
    for name, program in programs.items():
        backward = {"fmhaSoftmaxBackward"} if "grad" in name else set()
        assert calls(program, x) == {"fmhaSoftmax"} | backward, name
        ours[name] = quick(program)(x)
    monkeypatch.setattr(blocks, "_fits", lambda *_: False)
    jax.clear_caches()
    for name, program in programs.items():
        assert error(ours[name], np.asarray(quick(program)(x), np.float32)) <= 0.02, name


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("change, message", [
    ({"latents": np.zeros((2, 15, 8))}, r"latents are \[2, 15, 8\]; a grid of 4x4 tokens needs \[B, 16, 8\]"),
    ({"latents": np.zeros((2, 16, 9))}, r"latents are \[2, 16, 9\]"),
    ({"latents": np.zeros((16, 8))}, r"latents are \[16, 8\]"),
    ({"grid": (8, 4)}, r"a grid of 8x4 tokens needs \[B, 32, 8\]"),
    ({"text": np.zeros((2, 7, 21))}, r"text is \[2, 7, 21\].*20"),
    ({"text": np.zeros((7, 20))}, r"text is \[7, 20\]"),
    ({"text": np.zeros((1, 7, 20))}, r"text is \[1, 7, 20\]"),
    ({"pooled": np.zeros((2, 11))}, r"pooled is \[2, 11\].*12"),
    ({"timestep": np.ones(3)}, r"timestep is \[3\]"),
    ({"guidance": np.ones(2)}, "no guidance embedding"),
])
def test_wrong_inputs(change, message):
    cfg, params = random_params(CASES[0])
    with pytest.raises(ValueError, match=message):
        flux.velocity(params, cfg, **{**random_inputs(CASES[0]), "grid": CASES[0][6], **change})


def test_missing_guidance():
    cfg, params = random_params(GUIDED)
    with pytest.raises(ValueError, match="has a guidance embedding"):
        flux.velocity(params, cfg, **{**random_inputs(GUIDED), "guidance": None}, grid=GUIDED[6])


@pytest.mark.parametrize("layer, site, message", [
    (-1, "img", r"unknown layer -1: the model has layers 0 to 2 \(1 double, 2 single\)"), (3, "img", "unknown layer 3"),
    ("1", "img", "unknown layer '1'"), (1.0, "img", r"unknown layer 1\.0"), (None, "txt", "unknown layer None"),
    (0, "image", "unknown site 'image': it must be one of img, txt, both"), (0, None, "unknown site None")])
def test_wrong_layer_or_site(layer, site, message):
    cfg, params = random_params(CASES[0])
    with pytest.raises(ValueError, match=message) as caught:
        flux.residual(params, cfg, **random_inputs(CASES[0]), grid=CASES[0][6], layer=layer, site=site)
    assert "\n" not in str(caught.value)


def test_wrong_config():
    with pytest.raises(ValueError, match=r"axes_dims_rope \(16, 56, 50\) must add up to .*128"):
        flux.Config(axes_dims_rope=(16, 56, 50))
