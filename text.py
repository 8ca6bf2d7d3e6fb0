"""Run FLUX.1's text encoders, T5 (one vector per token) and CLIP (one pooled vector), and their tokenizers.

Copy `blocks.py` and `weights.py` with this file.

    cfg, params = text.load_t5("FLUX.1-schnell/text_encoder_2")
    ids = text.t5_tokenizer("FLUX.1-schnell/tokenizer_2", 256)(["a red cube"])      # [B, T] int32
    states = text.t5(params, cfg, ids)                                              # [B, T, D]

Letters: B batch, T tokens, D model width, H heads, K head width, L layers. Weights are [in, out]; blocks are stacked
on axis 0. Sources: T5 v1.1 (arXiv 2002.05202, 1910.10683) and CLIP (arXiv 2103.00020), as `transformers` runs them.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

import blocks
from weights import Mistake, Tensor, linear, load_tensors, open_weights, read_config, read_json

# ---------------------------------------------------------------- T5


@dataclass(frozen=True)
class T5Config:
    """Hold the fields of `text_encoder_2/config.json` under their own names. The defaults are those of T5 v1.1 XXL."""
    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self):
        if self.feed_forward_proj != "gated-gelu":
            raise Mistake(f"T5 feed_forward_proj is {self.feed_forward_proj!r}; FLUX uses 'gated-gelu'")


def t5_table(cfg: T5Config) -> dict:
    """Return the `Tensor` declarations of the T5 encoder."""
    D, inner, L = cfg.d_model, cfg.num_heads * cfg.d_kv, cfg.num_layers
    attn, ff = "encoder.block.{}.layer.0.", "encoder.block.{}.layer.1."

    def weight(n_in, names, n_out, std):
        return linear(n_in, {name: n_out for name in names}, layers=L, bias=False, std=std)["w"]

    def norm(name, layers=None):
        return Tensor((D,), {f"{name}layer_norm.weight": D}, layers, mean=1.0)

    # T5's own initialization: T5 does not scale attention scores by 1/sqrt(K), so the query weights carry that factor.
    return {
        "embed": Tensor((cfg.vocab_size, D), {"shared.weight": D}, std=1.0),
        "bias": Tensor((cfg.relative_attention_num_buckets, cfg.num_heads),
                       {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": cfg.num_heads},
                       std=D ** -0.5),
        "block": {
            "norm1": norm(attn, L),
            "q": weight(D, [attn + "SelfAttention.q"], inner, (D * cfg.d_kv) ** -0.5),
            "kv": weight(D, [attn + "SelfAttention.k", attn + "SelfAttention.v"], inner, D ** -0.5),
            "o": weight(inner, [attn + "SelfAttention.o"], D, inner ** -0.5),
            "norm2": norm(ff, L),
            "wi": weight(D, [ff + "DenseReluDense.wi_0", ff + "DenseReluDense.wi_1"], cfg.d_ff, D ** -0.5),
            "wo": weight(cfg.d_ff, [ff + "DenseReluDense.wo"], D, cfg.d_ff ** -0.5),
        },
        "norm": norm("encoder.final_"),
    }


def load_t5(folder: Path | str, *, put: Callable | None = None, dtype=jnp.bfloat16, unpack: Callable | None = None,
            variant: str | None = None) -> tuple[T5Config, dict]:
    """Load (T5Config, params) from a transformers folder (config.json and safetensors); see `weights.open_weights`."""
    cfg, weights = t5_config(folder), open_weights(folder, unpack, variant=variant)
    ignore = ("encoder.embed_tokens.weight",)                    # a second name for shared.weight
    return cfg, load_tensors(t5_table(cfg), weights, put=put, dtype=dtype, ignore=ignore)


def t5_config(folder: Path | str) -> T5Config:
    """Read the `T5Config` of a folder. Raise ValueError if the folder holds another kind of model."""
    return _config(folder, T5Config, "t5")


def t5(params: dict, cfg: T5Config, ids: Array, *, walk: Callable | None = None) -> Array:
    """Return the encoder states [B, T, D] of token ids [B, T]. There is no attention mask: FLUX attends to padding.

    walk: runs the stacked blocks (see `blocks.scan`).
    """
    x, bias = _t5_begin(params["embed"], params["bias"], cfg, ids)
    x, _ = (walk or blocks.scan)(_t5_block(cfg), x, params["block"], range(cfg.num_layers), bias)
    return _t5_end(params["norm"], cfg, x)


@partial(jax.jit, static_argnums=2)
def _t5_begin(embed, bias, cfg, ids):
    """Return the embeddings [B, T, D] and the position bias [H, T, T], which all blocks share."""
    return embed[ids], bias.astype(jnp.float32)[_buckets(cfg, ids.shape[1])].transpose(2, 0, 1)


@partial(jax.jit, static_argnums=1)
def _t5_end(norm, cfg, x):
    return _rms_norm(x, norm, cfg.layer_norm_epsilon)


@lru_cache
def _t5_block(cfg):
    """Return the block (x, parameters of one layer, bias) → (x, {}). Cached per cfg, so that JAX compiles it once."""
    def block(x, p, bias):
        h = _rms_norm(x, p["norm1"], cfg.layer_norm_epsilon)
        q, k, v = (_heads(y, cfg.num_heads) for y in (h @ p["q"], *jnp.split(h @ p["kv"], 2, axis=-1)))
        x = x + _joined(_attend(q, k, v, bias)) @ p["o"]         # T5 does not scale the scores by 1/sqrt(K)
        h = _rms_norm(x, p["norm2"], cfg.layer_norm_epsilon)
        gate, up = jnp.split(h @ p["wi"], 2, axis=-1)
        return x + (jax.nn.gelu(gate, approximate=True) * up) @ p["wo"], {}

    return block


def _buckets(cfg, length):
    """Return relative position buckets [T, T] (Raffel et al., section 2.1): half per direction, exact near, log far."""
    distance = np.arange(length)[None] - np.arange(length)[:, None]          # key minus query
    half = cfg.relative_attention_num_buckets // 2
    exact, n = half // 2, np.abs(distance)
    ratio = np.log(np.maximum(n, 1).astype(np.float32) / exact) / np.log(cfg.relative_attention_max_distance / exact)
    far = np.minimum(exact + (ratio.astype(np.float32) * (half - exact)).astype(np.int32), half - 1)
    return np.where(distance > 0, half, 0) + np.where(n < exact, n, far)


# ---------------------------------------------------------------- CLIP


@dataclass(frozen=True)
class CLIPConfig:
    """Hold the fields of `text_encoder/config.json` under their own names. The defaults are those of CLIP ViT-L/14."""
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise Mistake(f"CLIP hidden_act is {self.hidden_act!r}; it must be one of {', '.join(ACTIVATIONS)}")


ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def clip_table(cfg: CLIPConfig, prefix: str = "") -> dict:
    """Return the `Tensor` declarations of the CLIP text encoder. transformers 4 uses the prefix "text_model."."""
    D, L = cfg.hidden_size, cfg.num_hidden_layers
    block = prefix + "encoder.layers.{}."

    def norm(name, layers=None):
        return {"w": Tensor((D,), {f"{name}.weight": D}, layers, mean=1.0),
                "b": Tensor((D,), {f"{name}.bias": D}, layers)}

    embed = prefix + "embeddings."
    return {
        "embed": Tensor((cfg.vocab_size, D), {embed + "token_embedding.weight": D}, std=0.02),
        "position": Tensor((cfg.max_position_embeddings, D), {embed + "position_embedding.weight": D}, std=0.01),
        "block": {
            "norm1": norm(block + "layer_norm1", L),
            "qkv": linear(D, {block + f"self_attn.{n}_proj": D for n in "qkv"}, layers=L),
            "o": linear(D, {block + "self_attn.out_proj": D}, layers=L),
            "norm2": norm(block + "layer_norm2", L),
            "fc1": linear(D, {block + "mlp.fc1": cfg.intermediate_size}, layers=L),
            "fc2": linear(cfg.intermediate_size, {block + "mlp.fc2": D}, layers=L),
        },
        "norm": norm(prefix + "final_layer_norm"),
    }


def load_clip(folder: Path | str, *, put: Callable | None = None, dtype=jnp.bfloat16, unpack: Callable | None = None,
              variant: str | None = None) -> tuple[CLIPConfig, dict]:
    """Load (CLIPConfig, params) from a transformers folder; see `weights.open_weights`."""
    cfg, weights = clip_config(folder), open_weights(folder, unpack, variant=variant, prefixes=("text_model.",))
    ignore = ("embeddings.position_ids",)                        # a buffer in old files
    return cfg, load_tensors(clip_table(cfg), weights, put=put, dtype=dtype, ignore=ignore)


def clip_config(folder: Path | str) -> CLIPConfig:
    """Read the `CLIPConfig` of a folder. Raise ValueError if the folder holds another kind of model."""
    return _config(folder, CLIPConfig, "clip_text_model")


def _config(folder, cls, kind):
    file = Path(folder) / "config.json"
    given = read_json(file)
    if given.get("model_type", kind) != kind:
        raise Mistake(f"{file} says model_type {given['model_type']!r}; FLUX.1 needs {kind!r}")
    return read_config(cls, given)


def clip(params: dict, cfg: CLIPConfig, ids: Array) -> Array:
    """Return the pooled text vector [B, D] of token ids [B, T ≤ max_position_embeddings]: the end-of-text state."""
    length = ids.shape[1]
    if length > cfg.max_position_embeddings:
        raise Mistake(f"got {length} CLIP tokens; the model has only {cfg.max_position_embeddings} positions")
    x = params["embed"][ids] + params["position"][:length]
    causal = jnp.where(np.tril(np.ones((length, length), bool)), 0.0, -jnp.inf)
    K = cfg.hidden_size // cfg.num_attention_heads

    def block(x, p):
        h = _layer_norm(x, p["norm1"], cfg.layer_norm_eps)
        q, k, v = (_heads(y, cfg.num_attention_heads) for y in jnp.split(h @ p["qkv"]["w"] + p["qkv"]["b"], 3, axis=-1))
        x = x + _joined(_softmax_attention(q * K ** -0.5, k, v, causal)) @ p["o"]["w"] + p["o"]["b"]
        h = _layer_norm(x, p["norm2"], cfg.layer_norm_eps)
        h = ACTIVATIONS[cfg.hidden_act](h @ p["fc1"]["w"] + p["fc1"]["b"])
        return x + h @ p["fc2"]["w"] + p["fc2"]["b"], None

    x, _ = jax.lax.scan(block, x, params["block"])
    # Configs older than transformers 4.31 say eos_token_id 2 but mean the highest id, which is the end-of-text token.
    end = jnp.argmax(ids if cfg.eos_token_id == 2 else ids == cfg.eos_token_id, axis=1)
    return _layer_norm(x[jnp.arange(len(ids)), end], params["norm"], cfg.layer_norm_eps)


# ---------------------------------------------------------------- shared by T5 and CLIP


def _heads(x, heads):
    return x.reshape(*x.shape[:-1], heads, -1)                                   # [B, T, H, K]


def _joined(heads):
    return heads.reshape(*heads.shape[:2], -1)                                   # [B, T, H K]


def _attend(q, k, v, bias):
    """Return softmax(q kᵀ + bias) v, [B, T, H, K], for a bias [H, T, T]. A GPU runs cuDNN's attention if it fits."""
    forms = blocks.cudnn(q, k, v, bias, scale=1.0)
    return jax.lax.platform_dependent(q, k, v, bias, **forms, default=_softmax_attention)


def _softmax_attention(q, k, v, bias):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) + bias
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)    # softmax in float32


def _rms_norm(x, weight, eps):
    y = x.astype(jnp.float32)                                    # in half precision, squares overflow or underflow
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)).astype(x.dtype) * weight


def _layer_norm(x, p, eps):
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)).astype(x.dtype) * p["w"] + p["b"]


# ---------------------------------------------------------------- tokenizers


def t5_tokenizer(folder: Path | str, length: int, vocab_size: int | None = None) -> Callable:
    """Return a function from prompts to ids [B, length] int32, from `tokenizer.json`.

    Prompts are truncated to `length` and padded with <pad>. Raise ValueError if the tokenizer has more tokens than
    `vocab_size`, the model's number."""
    return _encoder(*_opened("t5", folder, length, "<pad>", vocab_size))


def t5_words(folder: Path | str, prompts: Sequence[str], length: int) -> list[list[str]]:
    """Return each prompt's tokens as pieces of its text: at most `length`, without padding (FLUX.1 attends to it)."""
    tokenizer, _ = _opened("t5", folder, length, None)
    return [[prompt[a:b] if b > a else token for token, (a, b) in zip(code.tokens, code.offsets)]
            for prompt, code in zip(prompts, tokenizer.encode_batch(prompts))]


def clip_tokenizer(folder: Path | str, length: int = 77, vocab_size: int | None = None) -> Callable:
    """Do the same as `t5_tokenizer` for CLIP, from `vocab.json` and `merges.txt` (BPE) or else `tokenizer.json`."""
    return _encoder(*_opened("clip", folder, length, "<|endoftext|>", vocab_size))


def tokenizer_config(folder: Path | str) -> dict:
    """Return `special_tokens_map.json` and `tokenizer_config.json` as one dict; {} if the folder has neither."""
    files = [Path(folder) / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    return {key: value for file in files if file.exists() for key, value in read_json(file).items()}


def _opened(kind, folder, length, pad, vocab_size=None):
    """Return (tokenizer that truncates to `length`, length). pad: the padding token if the folder names none; None: do
    not pad. Cached until the files change: opening 32,128 tokens takes as long as encoding a thousand prompts."""
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)):
        raise Mistake(f"the length in tokens is {length!r}; it must be a whole number")
    folder = Path(folder).absolute()
    stamp = tuple((file.name, file.stat().st_mtime_ns) for file in sorted(folder.glob("*")) if file.name in FILES)
    return _open(kind, folder, int(length), pad, vocab_size, stamp), int(length)


FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@lru_cache(maxsize=16)
def _open(kind, folder, length, pad, vocab_size, stamp):
    """Open a tokenizer. The cache holds one per length, because length and padding are part of its state."""
    settings, split = tokenizer_config(folder), kind == "clip" and (folder / "vocab.json").exists()
    tokenizer = _open_clip(folder, settings) if split else _open_json(folder, kind)
    if vocab_size is not None and tokenizer.get_vocab_size() > vocab_size:
        raise Mistake(f"the tokenizer in {folder} knows {tokenizer.get_vocab_size()} tokens, but its model only "
                      f"{vocab_size}; both must come from the same pipeline")
    fewest = max(tokenizer.num_special_tokens_to_add(False), 1)
    if length < fewest:
        raise Mistake(f"the length in tokens is {length}; it must be a whole number of at least {fewest}")
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    if pad:
        pad = _content(settings.get("pad_token", pad))
        tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer


def _encoder(tokenizer, length):
    ids = lambda prompts: [code.ids for code in tokenizer.encode_batch(list(prompts))]
    return lambda prompts: np.array(ids(prompts), np.int32).reshape(-1, length)


def _content(token):
    return token["content"] if isinstance(token, dict) else token


def _open_json(folder, kind):
    file = folder / "tokenizer.json"
    if not file.exists() and (folder / "spiece.model").exists():
        raise Mistake(f"{folder} has spiece.model but no tokenizer.json; transformers (with sentencepiece) makes it: "
                      f"T5TokenizerFast.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})")
    if not file.exists() and kind == "clip":
        raise FileNotFoundError(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json")
    return _open_tokenizer(lambda: Tokenizer.from_file(str(file)), file)


def _open_clip(folder, settings):
    """Open CLIP's byte-level BPE from `vocab.json` and `merges.txt`."""
    start, end, unknown, pad = (_content(settings.get(f"{name}_token", default)) for name, default in (
        ("bos", "<|startoftext|>"), ("eos", "<|endoftext|>"), ("unk", "<|endoftext|>"), ("pad", "<|endoftext|>")))
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    options = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "unk_token": unknown}
    make = lambda: Tokenizer(models.BPE.from_file(str(vocab), str(merges), **options))
    tokenizer = _open_tokenizer(make, vocab, merges)
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(clean)
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    # Special tokens stay single tokens inside a prompt, with the options of the file or else CLIP's.
    given = {t["content"]: t for t in settings.get("added_tokens_decoder", {}).values()}
    options = {name: {k: given.get(name, {}).get(k, False) for k in ("lstrip", "rstrip", "normalized", "single_word")}
               for name in dict.fromkeys((start, end, unknown, pad))}
    tokenizer.add_special_tokens([AddedToken(name, special=True, **option) for name, option in options.items()])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, tokenizer.token_to_id(end)), (start, tokenizer.token_to_id(start)), False, False)
    return tokenizer


def _open_tokenizer(make, *files):
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing")
    try:
        return make()
    except Exception as error:                                   # `tokenizers` raises bare Exceptions
        raise Mistake(f"{' and '.join(map(str, files))}: not a tokenizer that can be read: {error}") from None
