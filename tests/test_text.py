"""Text encoders and tokenizers against transformers, and the loader's errors."""
import json
import os
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import optional
from safetensors.numpy import load_file, save_file

import blocks
import text
import weights

torch = optional("torch")
CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast = optional(
    "transformers", "CLIPTextConfig", "CLIPTextModel", "CLIPTokenizer", "T5Config", "T5EncoderModel", "T5TokenizerFast")


def error(a, b):
    return np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()


def shake(model, seed=0):
    """Random norms and biases too: their defaults hide mistakes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


# d_model, d_kv, d_ff, layers, heads, buckets, max distance, T, B
T5_CASES = [
    (24, 8, 40, 1, 3, 32, 128, 7, 2),
    (32, 16, 24, 3, 1, 8, 20, 61, 1),
    (16, 4, 64, 2, 5, 32, 128, 300, 2),
    (40, 8, 16, 2, 5, 16, 64, 1, 3),
]


@pytest.mark.parametrize("case", T5_CASES)
def test_t5_matches_transformers(case, tmp_path):
    d, kv, ff, layers, heads, buckets, far, T, B = case
    model = shake(T5EncoderModel(T5Config(
        vocab_size=50, d_model=d, d_kv=kv, d_ff=ff, num_layers=layers, num_heads=heads, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=buckets, relative_attention_max_distance=far)))
    model.save_pretrained(tmp_path)
    cfg, params = text.load_t5(tmp_path, dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(0, 50, (B, T), dtype=np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long())[0].numpy()
    assert error(jax.jit(text.t5, static_argnums=1)(params, cfg, ids), theirs) <= 1e-4


# hidden, mlp, layers, heads, activation, eos id in the config, T, prefixed names
CLIP_CASES = [
    (24, 40, 1, 3, "quick_gelu", 2, 7, False),
    (32, 24, 3, 1, "gelu", 2, 16, True),
    (40, 64, 2, 5, "quick_gelu", 48, 11, False),
    (16, 16, 2, 2, "gelu", 48, 3, True),
]


@pytest.mark.parametrize("case", CLIP_CASES)
def test_clip_matches_transformers(case, tmp_path):
    d, ff, layers, heads, act, eos, T, prefixed = case
    model = shake(CLIPTextModel(CLIPTextConfig(
        vocab_size=50, hidden_size=d, intermediate_size=ff, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=16, hidden_act=act, bos_token_id=0, eos_token_id=eos, pad_token_id=1)))
    model.save_pretrained(tmp_path)
    if prefixed:
        file = tmp_path / "model.safetensors"
        save_file({f"text_model.{k}": v for k, v in load_file(file).items()}, file)
    cfg, params = text.load_clip(tmp_path, dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(0, 48, (4, T), dtype=np.int32)
    for row, end in zip(ids, (0, T // 2, T - 1, T - 1)):         # end of text anywhere, also twice
        row[end:] = 49 if eos == 2 else 48
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).pooler_output.numpy()
    assert error(jax.jit(text.clip, static_argnums=1)(params, cfg, ids), theirs) <= 1e-4


def test_gradients_reach_every_weight():
    t5_cfg = text.T5Config(50, 24, 8, 40, 2, 3)
    clip_cfg = text.CLIPConfig(50, 24, 40, 2, 3, 16)
    ids = np.array([[3, 4, 5, 49], [6, 7, 49, 49]], np.int32)
    for forward, cfg, table in ((text.t5, t5_cfg, text.t5_table), (text.clip, clip_cfg, text.clip_table)):
        params = weights.init_tensors(table(cfg), jax.random.key(0))
        factors = np.random.default_rng(0).standard_normal(forward(params, cfg, ids).shape)
        grads = jax.grad(lambda p: (factors * forward(p, cfg, ids)).sum())(params)
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            assert np.isfinite(g).all() and np.abs(g).max() > 0, path


def cudnn_calls(function, *args):
    """The calls of cuDNN in a program for an NVIDIA GPU, which need not be here."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return set(re.findall(r"__cudnn\$(\w+)", text))


def test_cudnn_attention_with_the_position_bias(monkeypatch):
    """Of T5 in half precision, for an even number of tokens; its gradient and a mapped one call cuDNN too."""
    from jax._src.cudnn import fused_attention_stablehlo as module
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
    jax.clear_caches()
    cfg = text.T5Config(50, 24, 8, 40, 2, 3)
    params = weights.init_tensors(text.t5_table(cfg), jax.random.key(0))
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    ids = np.random.default_rng(0).integers(0, 50, (2, 3, 8), dtype=np.int32)
    encode = lambda p, ids: text.t5(p, cfg, ids)
    grad = jax.grad(lambda p, ids: encode(p, ids).astype(jnp.float32).sum())
    forward = {"fmhaScaleBiasSoftmax"}
    assert cudnn_calls(encode, half, ids[0]) == cudnn_calls(jax.vmap(encode, (None, 0)), half, ids) == forward
    assert cudnn_calls(grad, half, ids[0]) == {*forward, "fmhaScaleBiasSoftmaxBackward"}
    assert not cudnn_calls(encode, half, ids[0, :, :7]) and not cudnn_calls(encode, params, ids[0])
    expected = [np.asarray(x, np.float32) for x in (encode(half, ids[0]), grad(half, ids[0])["bias"])]
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args))
    plainly = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, implementation, **options:
                        plainly(*args, implementation="xla", **options))
    monkeypatch.setattr(blocks, "_fits", lambda *_: True)
    jax.clear_caches()
    assert error(encode(half, ids[0]), expected[0]) <= 0.05      # the same scale and bias
    assert error(grad(half, ids[0])["bias"], expected[1]) <= 0.05
    jax.clear_caches()


# ---------------------------------------------------------------- tokenizers

STRANGE = ["", " ", "a", "\n\t \x00\x01\x7f", "<|endoftext|>", "a <|ENDOFTEXT|> b<|startoftext|>", "</s>",
           "<pad> a <unk>", "<extra_id_0> x<extra_id_99>", "I'm you're they'll we'd 've'",
           "naïve café Ünïcode ﬁ ½ Ⅷ", "漢字とカナ 한국어",
           "👩‍👩‍👧‍👦 🇨🇭 ❤️", "e\u0301 \u200d\u200b\u202e\ufeff", "ａｂｃ１２３", "\u2028\u3000x\u00a0y", "a" * 2000,
           "red cube " * 500, "<<<>>>|||", "12345 6.7e-8", "İstanbul ǅ ß ẞ"]


def strings(n=2000, seed=0):
    rng = random.Random(seed)
    words = ["red", "Blue", "cube", "sphere", "left", "of", "the", "don't", "<|endoftext|>", "</s>", "é", "猫",
             "🟥", "\t", "\x02", "_", "--", "3.14", ",", "CAPS", "\u202e", "ﷺ", "lit from the right"]
    ranges = [(32, 127), (0, 32), (160, 1000), (0x4E00, 0x4F00), (0x1F300, 0x1F700), (0x600, 0x700), (0x2000, 0x2070)]

    def one():
        if rng.random() < 0.5:
            return rng.choice(["", " ", "  "]).join(rng.choice(words) for _ in range(rng.randrange(0, 60)))
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.choice([1, 3, 20, 400])))

    return STRANGE + [one() for _ in range(n - len(STRANGE))]


@pytest.mark.parametrize("length", [16, 77])
def test_clip_tokenizer_equals_transformers(nano, length):
    theirs = CLIPTokenizer.from_pretrained(nano / "tokenizer")
    prompts = strings()
    ours = text.clip_tokenizer(nano / "tokenizer", length)(prompts)
    expected = theirs(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids
    assert len(prompts) == 2000
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("length", [5, 32, 256])
def test_t5_tokenizer_equals_transformers(nano, length):
    theirs = T5TokenizerFast.from_pretrained(nano / "tokenizer_2")
    prompts = strings()
    ours = text.t5_tokenizer(nano / "tokenizer_2", length)(prompts)
    expected = theirs(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ours, expected)


def test_clip_tokenizer_needs_no_config(nano, tmp_path):
    """The official repo has a config beside vocab.json and merges.txt; the two files alone must do."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((nano / "tokenizer" / name).read_bytes())
    prompts = strings(200)
    alone, beside = text.clip_tokenizer(tmp_path), text.clip_tokenizer(nano / "tokenizer")
    np.testing.assert_array_equal(alone(prompts), beside(prompts))


def test_tokenizer_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        text.t5_tokenizer(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        text.t5_tokenizer(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match=r"neither vocab\.json and merges\.txt nor tokenizer\.json"):
        text.clip_tokenizer(tmp_path / "clip")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"merges\.txt is missing"):
        text.clip_tokenizer(tmp_path)


@pytest.mark.parametrize("kind, name", [("clip", "tokenizer"), ("t5", "tokenizer_2")])
def test_tokenizers_as_transformers_5_saves_them(nano, tmp_path, kind, name):
    """tokenizer.json and tokenizer_config.json, for both."""
    cls, ours = {"clip": (CLIPTokenizer, text.clip_tokenizer), "t5": (T5TokenizerFast, text.t5_tokenizer)}[kind]
    cls.from_pretrained(nano / name).save_pretrained(tmp_path)
    for extra in ("vocab.json", "merges.txt"):                   # transformers before 5 writes them too
        (tmp_path / extra).unlink(missing_ok=True)
    prompts, theirs = strings(500), cls.from_pretrained(tmp_path)
    expected = theirs(prompts, padding="max_length", max_length=19, truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ours(tmp_path, 19)(prompts), expected)
    np.testing.assert_array_equal(ours(nano / name, 19)(prompts), expected)


def test_spiece_alone_says_how_to_convert_it(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(f"a red cube {i} left of {j}" for i in range(9) for j in range(9)))
    spm.SentencePieceTrainer.train(input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"),
                                   vocab_size=40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
                                   minloglevel=2)
    with pytest.raises(weights.Mistake, match=r"spiece\.model but no tokenizer\.json") as caught:
        text.t5_tokenizer(tmp_path, 8)
    line, = str(caught.value).splitlines()
    exec("from transformers import T5TokenizerFast; " + line.partition("makes it: ")[2])
    theirs = T5TokenizerFast.from_pretrained(tmp_path)
    options = {"padding": "max_length", "max_length": 8, "truncation": True, "return_tensors": "np"}
    expected = theirs(["a red cube"], **options).input_ids
    np.testing.assert_array_equal(text.t5_tokenizer(tmp_path, 8)(["a red cube"]), expected)


def test_tokenizers_are_opened_once(nano, tmp_path, monkeypatch):
    """One for each length, which do not disturb each other; again where a file has changed."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(nano / name, tmp_path / name)
    opened, original = [], text._open_tokenizer
    monkeypatch.setattr(text, "_open_tokenizer", lambda make, *of: opened.append(of[0].name) or original(make, *of))

    def ids():
        t5 = [text.t5_tokenizer(tmp_path / "tokenizer_2", n)(["a red cube on a blue one"]) for n in (4, 32)]
        words = text.t5_words(tmp_path / "tokenizer_2", ["a red cube on a blue one"], 32)
        return *t5, words, text.clip_tokenizer(tmp_path / "tokenizer", 16)(["a red cube", "b"])

    first, again = ids(), ids()
    assert sorted(opened) == ["tokenizer.json"] * 3 + ["vocab.json"]
    assert [np.shape(first[i]) for i in (0, 1, 3)] == [(1, 4), (1, 32), (2, 16)] and 0 < len(first[2][0]) < 32
    jax.tree.map(np.testing.assert_array_equal, first, again)
    file = tmp_path / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"<pad>"', '"</s>"'))
    os.utime(file, ns=(1, 1))
    assert text.t5_tokenizer(tmp_path / "tokenizer_2", 32)(["a"])[0, -1] == 1 != first[1][0, -1]


def test_a_tokenizer_of_another_model_is_refused(nano):
    n = len(T5TokenizerFast.from_pretrained(nano / "tokenizer_2"))
    assert text.t5_tokenizer(nano / "tokenizer_2", 8, n)(["a"]).shape == (1, 8)
    with pytest.raises(weights.Mistake, match=f"knows {n} tokens, but its model only {n - 1}"):
        text.t5_tokenizer(nano / "tokenizer_2", 8, n - 1)
    for length in (True, 2.0, "8", None):
        with pytest.raises(weights.Mistake, match="whole number"):
            text.t5_tokenizer(nano / "tokenizer_2", length)


# ---------------------------------------------------------------- the loader

TABLE = {"a": weights.linear(3, {"a.q": 4, "a.k": 2}), "n": {"w": weights.Tensor((5,), {"l.{}.norm": 5}, 2, mean=1.0)},
         "s": weights.linear(5, {"l.{}.fc": 3}, layers=2)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_save_and_load_are_inverse(tmp_path, dtype, sharded):
    params = jax.tree.map(lambda x: x.astype(dtype), weights.init_tensors(TABLE, jax.random.key(0)))
    weights.save_tensors(TABLE, params, tmp_path / "model.safetensors", dtype)
    if sharded:
        everything = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        shards = {f"model-{i}.safetensors": dict(list(everything.items())[i::3]) for i in range(3)}
        for name, part in shards.items():
            save_file(part, tmp_path / name)
        index = {"weight_map": {k: name for name, part in shards.items() for k in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    seen = []
    loaded = weights.load_tensors(TABLE, weights.open_weights(tmp_path), dtype=jnp.dtype(dtype),
                               put=lambda name, w: seen.append((name, w.shape)) or jnp.asarray(w))
    assert seen == [("a.b", (6,)), ("a.w", (3, 6)), ("n.w", (5,)), ("n.w", (5,)), ("s.b", (3,)), ("s.b", (3,)),
                    ("s.w", (5, 3)), ("s.w", (5, 3))]
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert all(x.dtype == dtype for x in jax.tree.leaves(loaded))


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("a.k.weight"), r"missing tensor .*a\.k\.weight"),
    (lambda t: t.update(extra=np.zeros(3, np.float32)), r"unexpected tensor .*extra"),
    (lambda t: t.update({"l.1.fc.weight": np.zeros((3, 4), np.float32)}),
     r"l\.1\.fc\.weight is \[3, 4\], should be \[3, 5\]"),
    (lambda t: [t.pop(k) for k in list(t)], r"missing tensors .* and \d more"),
])
def test_wrong_tensors_are_named(tmp_path, change, message):
    file = tmp_path / "model.safetensors"
    weights.save_tensors(TABLE, weights.init_tensors(TABLE, jax.random.key(0)), file, "float32")
    everything = load_file(file)
    change(everything)
    save_file(everything, file)
    with pytest.raises(ValueError, match=message):
        weights.load_tensors(TABLE, weights.open_weights(tmp_path))


def test_unreadable_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        weights.open_weights(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds neither"):
        weights.open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        weights.open_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is named by the index"):
        weights.open_weights(tmp_path)
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), "a/b.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(weights.Mistake, match="is not an index of safetensors files"):   # they lie beside it
            weights.open_weights(tmp_path)


def test_config_values_that_are_not_supported():
    with pytest.raises(ValueError, match="'relu'"):
        text.T5Config(feed_forward_proj="relu")
    with pytest.raises(ValueError, match="'swish'"):
        text.CLIPConfig(hidden_act="swish")
