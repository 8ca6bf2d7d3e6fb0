"""Quantized weights against the real bitsandbytes, as arrays under JAX, and kernels against their plain forms."""
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import devices, optional
from test_flux import CASES as MODELS
from test_flux import WEIGHTS, quick, random_inputs, random_transformer, run

import flux
import mmdit
import quant
import session
import text

torch, bnb = optional("torch"), optional("bitsandbytes.functional")
load_file, save_file = optional("safetensors.torch", "load_file", "save_file")

torch._dynamo.config.disable = True                              # bitsandbytes compiles, which takes far longer

SHAPES = [(64, 1), (128, 8), (192, 7), (320, 33), (1024, 16)]


def adversarial(rng, shape):
    """Normal weights whose first columns are hard: zeros, one outlier, values on the bounds, denormals, huge ones."""
    w = rng.standard_normal(shape).astype(np.float32)
    hard = [np.zeros(64), np.eye(64)[5] * 1e6 + 1e-3, np.append(rng.choice(quant.BOUNDS, 63), 1),
            rng.standard_normal(64) * 1e-41, rng.standard_normal(64) * 1e37, -np.abs(rng.standard_normal(64))]
    for column, values in zip(range(shape[1]), hard):
        w[-64:, column] = values
    return w


def by_bitsandbytes(w):
    """(codes [in, out], dequantized [in, out]) of w [in, out], whose transpose is what bitsandbytes packs."""
    packed, state = bnb.quantize_4bit(torch.from_numpy(np.ascontiguousarray(w.T)), blocksize=64,
                                      compress_statistics=False, quant_type="nf4")
    flat = packed.numpy().reshape(-1)
    codes = np.stack([flat >> 4, flat & 15], 1).reshape(w.shape[::-1]).T
    return codes, decoded_by_bitsandbytes(packed, state).T


def decoded_by_bitsandbytes(packed, state):
    """As one row: of several that are not whole blocks, bitsandbytes 0.50's AVX-512 code takes some scales wrongly."""
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    flat = bnb.dequantize_4bit(packed, state).numpy()
    state.shape = shape
    return flat.reshape(shape)


def codes_of(q):
    *stack, n, out = q.codes.shape
    packed = np.asarray(q.codes).reshape(*stack, -1, q.span // 2, out)
    return np.stack([packed & 15, packed >> 4], -3).reshape(*stack, 2 * n, out)[..., :q.rows, :]


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_bitsandbytes(shape):
    w = adversarial(np.random.default_rng(sum(shape)), shape)
    q = quant.nf4(w)
    codes, values = by_bitsandbytes(w)
    np.testing.assert_array_equal(codes_of(q), codes)
    ours = np.asarray(quant.dequantize(q))
    assert ours.dtype == np.float32 and q.shape == shape
    np.testing.assert_array_max_ulp(ours, values, 1)


@pytest.mark.parametrize("rows", [1, 63, 65, 100, 130])
def test_rows_that_do_not_fill_a_block(rows):
    """Every column by itself is what bitsandbytes makes of a vector of that length."""
    w = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
    q = quant.nf4(w)
    for column in range(3):
        codes, values = by_bitsandbytes(w[:, [column]]) if rows % 2 == 0 else (None, None)
        if codes is not None:
            np.testing.assert_array_equal(codes_of(q)[:, [column]], codes)
            np.testing.assert_array_max_ulp(np.asarray(quant.dequantize(q))[:, [column]], values, 1)
    assert np.abs(np.asarray(quant.dequantize(q)) - w).max() < 0.17 * np.abs(w).max()
    x = np.ones((2, rows), np.float32)
    np.testing.assert_allclose(x @ q, x @ np.asarray(quant.dequantize(q)), rtol=1e-5, atol=1e-5)


def test_int8_rounds_to_the_nearest_of_255_steps():
    w = np.random.default_rng(0).standard_normal((100, 7)).astype(np.float32)
    w[:, 2] = 0
    q = quant.int8(w)
    step = np.abs(w).max(0) / 127
    assert (np.abs(np.asarray(quant.dequantize(q)) - w) <= 0.5001 * step).all()
    assert (np.abs(np.asarray(q.values)).max(0) == np.where(step > 0, 127, 0)).all()


def test_int8_product_is_the_integers_product():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((5, 96)).astype(np.float32), rng.standard_normal((96, 8)).astype(np.float32)
    x[3] = 0
    q = quant.int8(w)
    rows = np.maximum(np.abs(x).max(1, keepdims=True) / np.float32(127), 1e-38)
    whole = np.rint(x / rows).astype(np.int64) @ np.asarray(q.values, np.int64)
    np.testing.assert_allclose(x @ q, whole * rows * np.asarray(q.scales), rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(x @ q - x @ w) < 0.02 * np.linalg.norm(x @ w)


@pytest.mark.parametrize("chip", quant.DECODED)
def test_int8_of_some_chips_is_decoded_before_the_product(chip):
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((5, 96)).astype(np.float32), rng.standard_normal((96, 8)).astype(np.float32)
    q = quant.int8(w, chip=chip)
    np.testing.assert_allclose(x @ q, x @ np.asarray(quant.dequantize(q)), rtol=1e-5, atol=1e-5)
    assert "xi32>" not in jax.jit(quant.matmul).lower(x, q).as_text()        # no product of whole numbers
    assert "xi32>" in jax.jit(quant.matmul).lower(x, replace(q, chip="cpu")).as_text()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("quantize", [quant.nf4, quant.int8])
def test_what_is_not_finite_is_named(quantize, bad):
    w = np.zeros((3, 128, 4), np.float32)
    w[1, 70, 2] = bad
    with pytest.raises(ValueError, match=rf"{bad} at \[1, 70, 2\]"):
        quantize(w)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="block is 63"):
        quant.nf4(np.zeros((64, 2)), block=63)
    with pytest.raises(ValueError, match="shape \\[5\\]"):
        quant.nf4(np.zeros(5))
    with pytest.raises(ValueError, match="unknown quantization 'int4'"):
        quant.put("int4")
    q = quant.nf4(np.ones((64, 2)))
    with pytest.raises(TypeError, match=r"\[3, 65\]"):
        jnp.ones((3, 65)) @ q
    with pytest.raises(IndexError, match="not stacked"):
        q[0]


# ---------------------------------------------------------------- like an array


FORMATS = {"nf4": quant.nf4, "int8": quant.int8,
           "block 32": lambda w, **kw: quant.nf4(w, 32, **kw)}


@pytest.fixture(params=FORMATS)
def stack(request):
    """Four stacked weights [4, 192, 192], quantized."""
    w = np.random.default_rng(7).standard_normal((4, 192, 192)).astype(np.float32) / 14
    return FORMATS[request.param](w)


def test_a_stack_is_its_layers(stack):
    assert stack.shape == (4, 192, 192) and stack.ndim == 3 and len(stack) == 4 and stack.dtype == jnp.float32
    whole = np.asarray(quant.dequantize(stack))
    for i in range(4):
        np.testing.assert_array_equal(quant.dequantize(stack[i]), whole[i])
    np.testing.assert_array_equal(quant.dequantize(stack[1:3]), whole[1:3])
    again = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[stack[i] for i in range(4)])
    np.testing.assert_array_equal(quant.dequantize(again), whole)


def test_scan_over_layers(stack):
    x = np.random.default_rng(8).standard_normal((3, 192)).astype(np.float32)
    out = jax.jit(lambda x, s: jax.lax.scan(lambda h, w: (h @ w, None), x, s)[0])(x, stack)
    for i in range(4):
        x = x @ stack[i]
    np.testing.assert_allclose(out, x, rtol=1e-4, atol=1e-5)


def test_gradients_flow_to_x_alone(stack):
    x = jnp.asarray(np.random.default_rng(9).standard_normal((2, 3, 192)), jnp.float32)
    q = stack[2]
    dx, dq = jax.jit(jax.grad(lambda x, q: jnp.sum(jnp.sin(x @ q)), argnums=(0, 1), allow_int=True))(x, q)
    w = quant.dequantize(q)
    np.testing.assert_allclose(dx, jnp.cos(x @ q) @ w.T, rtol=1e-4, atol=1e-5)
    assert all(not np.any(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(dq)
               if leaf.dtype != jax.dtypes.float0)


def test_vmap_and_eval_shape(stack):
    x = jnp.ones((4, 2, 192))
    together = jax.vmap(lambda x, q: x @ q)(x, stack)
    np.testing.assert_allclose(together[3], x[3] @ stack[3], rtol=1e-5, atol=1e-5)
    shapes = jax.eval_shape(lambda q: q[1], stack)
    assert shapes.shape == (192, 192) and type(shapes) is type(stack)
    assert jax.eval_shape(lambda x, q: x @ q[0], x[0], stack).shape == (2, 192)


def test_half_precision(stack):
    """x decides the product's type; values decode to float32 products, rounded once."""
    x = jnp.ones((2, 192), jnp.bfloat16)
    assert (x @ stack[0]).dtype == jnp.bfloat16
    half = quant.dequantize(stack.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, quant.dequantize(stack).astype(jnp.bfloat16))


def test_device_put_keeps_values_and_shards():
    """In a process of its own: it needs four devices."""
    environment = devices(4)
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=environment, cwd=Path(quant.__file__).parent)


SHARDED = """
import jax, numpy as np, jax.numpy as jnp, quant
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("fsdp",))
w = np.random.default_rng(0).standard_normal((3, 192, 64)).astype(np.float32)
x = np.random.default_rng(1).standard_normal((8, 192)).astype(np.float32)
for q in (quant.nf4(w), quant.int8(w)):
    placed = jax.device_put(q, NamedSharding(mesh, P(None, None, "fsdp")))
    assert {s.data.shape for s in jax.tree.leaves(placed)[0].addressable_shards} == {
        (*jax.tree.leaves(q)[0].shape[:2], 16)}
    np.testing.assert_array_equal(quant.dequantize(placed), quant.dequantize(q))
    y = jax.jit(lambda x, q: x @ q[1])(x, placed)
    np.testing.assert_allclose(y, x @ q[1], rtol=1e-5, atol=1e-5)
"""


# ---------------------------------------------------------------- kernels, by Pallas' interpreter


def weight(rows, out, **options):
    return quant.nf4(np.random.default_rng(rows + out).standard_normal((rows, out)).astype(np.float32), **options)


KERNELS = [("v4", 256, 256, 32, quant.Tiles(32, 128, 256)), ("v4", 200, 130, 33, quant.Tiles(64, 128, 256)),
           ("v5e", 320, 200, 7, quant.Tiles(32, 256, 384)), ("v5e", 1024, 130, 33, quant.Tiles(64, 128, 1024)),
           ("v6e", 1024, 200, 72, quant.Tiles(96, 256, 1024, 128))]                     # piece by piece, half by half


def interpreted(kernel, tiles):
    return quick(partial(kernel, tiles=tiles, interpret=True))


@pytest.mark.parametrize(("chip", "rows", "out", "M", "tiles"), KERNELS)
def test_nf4_kernels(chip, rows, out, M, tiles):
    q = weight(rows, out, chip=chip)
    rng = np.random.default_rng(M)
    x, g = (jnp.asarray(rng.standard_normal((M, n)), jnp.float32) for n in (rows, out))
    w = quant.dequantize(q)
    y = interpreted(quant.nf4_kernel, tiles)(x, q)
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4 * float(jnp.abs(x @ w).max()))
    dx = interpreted(quant.nf4_transposed_kernel, tiles)(g, q)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-4, atol=1e-4 * float(jnp.abs(g @ w.T).max()))


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_decoding_in_a_kernel_is_exact(axis, part):
    codes = np.arange(16 * 128, dtype=np.uint32).reshape(16, 128) * 7 % 256
    scales = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    signed = codes.astype(np.uint8).view(np.uint8 if axis else np.int8)
    ours = jax.jit(lambda codes, scales: quant.decode_rows(
        codes, scales, 16, 8, quant.gather_tables(axis), part, axis))(signed, scales)
    np.testing.assert_array_equal(ours, quant.TABLE[codes >> 4 if part else codes & 15] * np.repeat(scales[2:], 8, 0))


@pytest.mark.parametrize(("rows", "out", "M", "tiles"), [(256, 256, 32, quant.Tiles(32, 128, 128)),
                                                        (384, 130, 37, quant.Tiles(32, 256, 384))])
def test_int8_kernel(rows, out, M, tiles):
    rng = np.random.default_rng(M)
    q = quant.int8(rng.standard_normal((rows, out)).astype(np.float32), chip="v5e")
    x = jnp.asarray(rng.standard_normal((M, rows)), jnp.float32)
    np.testing.assert_allclose(interpreted(quant.int8_kernel, tiles)(x, q), quant.int8_plain(x, q), rtol=1e-6)


def test_plan_is_a_rule_of_chip_and_sizes():
    for chip in ("cpu", "gpu", "v2"):
        assert quant.plan(weight(256, 256, chip=chip), 1024) is None
    assert quant.plan(weight(64, 256, chip="v5e"), 1024) is None
    tiles = quant.plan(weight(3072, 640, chip="v5e"), 1000)
    assert tiles == quant.Tiles(1024, 128, 1024, 128)
    assert quant.plan(quant.int8(np.ones((256, 256), np.float32), chip="v4"), 1024) is None
    with pytest.warns(UserWarning, match="v4 multiplies no int8"):
        quant.put("int8", chip="v4")
    q = quant.int8(np.eye(256, dtype=np.float32), chip="v4")
    np.testing.assert_allclose(jnp.ones((2, 256)) @ q, 1, rtol=1e-6)


def test_select_tree_is_the_table():
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(quant._values(codes), quant.TABLE)


def test_the_table_that_gpus_look_up_gives_the_same_weights():
    w = np.random.default_rng(0).standard_normal((2, 130, 3)).astype(np.float32)
    for dtype in ("float32", "bfloat16"):
        one, two = (np.asarray(quant.dequantize(quant.nf4(w, dtype=dtype, chip=chip))) for chip in ("cpu", "gpu"))
        np.testing.assert_array_equal(one, two)


# ---------------------------------------------------------------- FLUX


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float32) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


@pytest.mark.parametrize("case", [MODELS[0], MODELS[1]], ids=str)
def test_velocity_of_random_models(case, tmp_path):
    random_transformer(case).save_pretrained(tmp_path)
    inputs, grid = random_inputs(case), case[6]
    velocities = {}
    for name in quant.FORMATS:
        # Quantized under the names that flux.load gives: those without a prefix stay as they are.
        put = quant.put(name)
        cfg, params = mmdit.load_transformer(tmp_path, dtype=jnp.float32,
                                            put=lambda path, array, put=put: put(f"transformer.{path}", array))
        assert (type(params["single"]["in"]["w"]) in (quant.NF4, quant.Int8)) == (name != "none")
        assert isinstance(params["img_in"]["w"], jax.Array)
        velocities[name] = run(params, cfg, **inputs, grid=grid)
    assert 0 < relative(velocities["nf4"], velocities["none"]) < 0.25
    assert 0 < relative(velocities["int8"], velocities["none"]) < 0.05


def test_velocity_of_nano(nano):
    model = flux.load(nano, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    inputs = {"latents": rng.standard_normal((8, 64, model.cfg.in_channels), dtype=np.float32),
              "timestep": np.linspace(1, 0.2, 8)}
    inputs["text"], inputs["pooled"] = flux.encode_text(model, ["a red cube", "two cones"] * 4)
    exact = run(model.params, model.cfg, **inputs, grid=(8, 8))
    errors = {}
    for name in ("nf4", "int8"):
        params = flux.load(nano, dtype=jnp.float32, **session.quantized(name)).params
        errors[name] = relative(run(params, model.cfg, **inputs, grid=(8, 8)), exact)
    print(errors)
    assert 0 < errors["nf4"] < 0.2 and 0 < errors["int8"] < 0.05


def bitsandbytes_files(folder, nested):
    """Every linear layer of the model in `folder`, as bitsandbytes stores it through diffusers and transformers.
    Returns {name of a weight: what bitsandbytes decodes it to}."""
    file, = folder.glob("*.safetensors")
    stored, decoded = {}, {}
    for name, w in load_file(file).items():
        if w.ndim == 2 and not name.endswith(("shared.weight", "relative_attention_bias.weight")):
            packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type="nf4")
            stored |= {name: packed} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
            decoded[name] = decoded_by_bitsandbytes(packed, state)
        else:
            stored[name] = w
    save_file(stored, file)
    return decoded


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_of_bitsandbytes(tmp_path, nested):
    """Also inputs that blocks do not divide: width 48, and 20 channels of text."""
    case = MODELS[0]
    random_transformer(case).save_pretrained(tmp_path)
    decoded = bitsandbytes_files(tmp_path, nested)
    assert (tmp_path / WEIGHTS).exists()
    loaded = {}
    for name in ("nf4", "none"):
        put = quant.put(name)
        cfg, loaded[name] = mmdit.load_transformer(
            tmp_path, dtype=jnp.float32, unpack=quant.unpack,
            put=lambda path, array, put=put: put(f"transformer.{path}", array))
    single = loaded["nf4"]["single"]
    assert type(single["in"]["w"]) is quant.NF4
    for i in range(cfg.num_single_layers):
        theirs = np.concatenate([decoded[f"single_transformer_blocks.{i}.{part}.weight"]
                                 for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]).T
        np.testing.assert_array_max_ulp(np.asarray(quant.dequantize(single["in"]["w"][i])), theirs, 1)
    np.testing.assert_array_max_ulp(np.asarray(loaded["none"]["txt_in"]["w"]), decoded["context_embedder.weight"].T, 1)
    inputs = random_inputs(case)
    a, b = (run(params, cfg, **inputs, grid=case[6]) for params in loaded.values())
    assert relative(a, b) < 1e-5
    with pytest.raises(ValueError, match=r"unexpected tensors .*absmax"):
        mmdit.load_transformer(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_t5_of_bitsandbytes(tmp_path, nested, t5_folder):
    decoded = bitsandbytes_files(t5_folder, nested)
    put = quant.put("nf4")
    cfg, params = text.load_t5(t5_folder, dtype=jnp.float32, unpack=quant.unpack,
                               put=lambda path, array: put(f"t5.{path}", array))
    wo = params["block"]["wo"]
    assert type(wo) is quant.NF4 and wo.scales.dtype == jnp.float32
    for i in range(cfg.num_layers):
        theirs = decoded[f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight"].T
        np.testing.assert_array_max_ulp(np.asarray(quant.dequantize(wo[i])), theirs, 1)
    assert np.isfinite(text.t5(params, cfg, np.arange(10)[None])).all()


@pytest.fixture
def t5_folder(tmp_path):
    """A random T5 encoder whose inputs are whole blocks."""
    from transformers import T5Config, T5EncoderModel
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=128, d_kv=16, d_ff=192, num_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu")
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def test_other_files_of_bitsandbytes(tmp_path, t5_folder):
    file, = t5_folder.glob("*.safetensors")
    w = torch.randn(64, 64)
    for kind, match in (("fp4", "as bitsandbytes__fp4; only nf4"), ("nf4", "its own quantization table")):
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind)
        tensors = state.as_dict(packed=True)
        tensors["quant_map"] = tensors["quant_map"] * 1.01
        save_file({"x.weight": packed} | {f"x.weight.{k}": v for k, v in tensors.items()}, file)
        with pytest.raises(ValueError, match=match):
            text.load_t5(t5_folder, unpack=quant.unpack)
