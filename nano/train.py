"""Make the nano model from nothing: tokenizers, autoencoder, then the flow transformer with both text encoders.

    python nano/train.py --minutes 120            # stops and resumes at any time; what is done is not done again

1. Tokenizers learned from captions: byte-level BPE for CLIP, unigram for T5.
2. The autoencoder, by `train_vae.py`.
3. Latents of rendered scenes, computed once.
4. Rectified flow (arXiv 2209.03003) on them, with fae's own `flux.py` and `text.py`: three quarters of the times in
   0.75…1, the others logit-normal as in SD3 (arXiv 2403.03206), 10 % of the captions dropped, Muon with a rate that
   falls to zero over the second half of the time, and a moving average of the weights, which is what ships. Words that
   describe a few pixels weigh little in the error of the velocity, and so are learned late. Two things hasten them: the
   error counts more where solids are, and until shortly before the end a linear head in the middle names shape and
   colour at every token, from the noisy latents and the caption (the idea of REPA, arXiv 2410.06940, with the truth for
   a teacher). Like FLUX.1, the flow is guidance-distilled, here while it learns (model guidance, arXiv 2502.12154):
   what it says beyond its own answer to no caption is added to the target, times 1 - 1 / GUIDANCE, of which the fixed
   point is classifier-free guidance with the scale GUIDANCE. It took shapes from 67 to 88 % as captioned.

The step is data-parallel over two CPU devices, one core each: XLA runs more of it in parallel so than in one device.
oneDNN may round the inputs of float32 products to bfloat16, which a core with AMX multiplies five times as fast (but
see FLAGS). Page faults cost a sixth of a step, unless the environment says MALLOC_MMAP_MAX_=0 MALLOC_ARENA_MAX=1
MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_TOP_PAD_=500000000.
"""
import json
import math
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import NormalDist

CORES = os.cpu_count() or 1
FLAGS, CPU = f"--xla_force_host_platform_device_count={CORES}", Path("/proc/cpuinfo")
if CPU.exists() and "amx_bf16" in CPU.read_text():               # elsewhere oneDNN is no faster, and Muon crashes in it
    FLAGS += (" --xla_cpu_use_onednn=true "
              "--xla_cpu_experimental_onednn_fusion_type=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")
if __name__ == "__main__":                                       # before jax is imported
    os.environ.update(JAX_PLATFORMS="cpu", ONEDNN_DEFAULT_FPMATH_MODE="BF16",
                      XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}")

NANO = Path(__file__).resolve().parent
sys.path[:0] = [str(NANO.parent), str(NANO)]

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scenes
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import flux
import mmdit
import session
import text
import vae
import weights

FIRST_SEED = 1_000_000                                           # scenes below are for evaluation
TEXT_TOKENS = 32
HINT_LAYER, HINT_WEIGHT, SOLID_WEIGHT, BACKGROUND = 6, 0.1, 5, len(scenes.SHAPES) * len(scenes.COLORS)
GUIDANCE = 2                                                     # a scale; 1 leaves it out
FLUX = flux.Config(in_channels=64, num_layers=4, num_single_layers=8, attention_head_dim=32, num_attention_heads=4,
                   joint_attention_dim=128, pooled_projection_dim=96, axes_dims_rope=(8, 12, 12))
T5 = partial(text.T5Config, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
CLIP = partial(text.CLIPConfig, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)


# ---------------------------------------------------------------- 1. tokenizers


def make_tokenizers(out, captions):
    """Write `tokenizer/` (CLIP: vocab.json, merges.txt) and `tokenizer_2/` (T5: tokenizer.json) as FLUX.1 has them."""
    make_clip_tokenizer(out / "tokenizer", captions)
    make_t5_tokenizer(out / "tokenizer_2", captions)


def make_clip_tokenizer(folder, captions):
    folder.mkdir(parents=True, exist_ok=True)
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=4096, min_frequency=50, initial_alphabet=bytes_, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, then the two special tokens; the last has the highest id.
    words = dict.fromkeys([*bytes_, *(b + "</w>" for b in bytes_), *("".join(pair) for pair in merges),
                           "<|startoftext|>", "<|endoftext|>"])
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": "<|startoftext|>", **{f"{name}_token": "<|endoftext|>" for name in ("eos", "unk", "pad")}}
    write_json(folder / "tokenizer_config.json",
               {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True})
    write_json(folder / "special_tokens_map.json", special)


def make_t5_tokenizer(folder, captions):
    folder.mkdir(parents=True, exist_ok=True)
    extra = [f"<extra_id_{i}>" for i in range(100)]
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    # Unigram pieces: each word of the captions by its log frequency, and characters, so rare that no word is split.
    words = Counter(word for caption in captions for word in caption.replace(",", " ,").replace(":", " :").split())
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word if word.isalnum() else word, math.log(n / total)) for word, n in words.most_common()]
    known = {piece for piece, _ in pieces}
    pieces += [(c, -20.0) for c in ["▁", *map(chr, range(33, 127))] if c not in known]
    pieces += [(name, 0.0) for name in reversed(extra)]          # T5 puts its sentinels last, backwards
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)
                                  for name in ["<pad>", "</s>", "<unk>", *extra]])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {
        **special, "model_max_length": TEXT_TOKENS, "extra_ids": 100, "tokenizer_class": "T5Tokenizer"})
    write_json(folder / "special_tokens_map.json", special)


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


# ---------------------------------------------------------------- 3. latents


def latents_of(work, vae_folder, shards):
    """Packed latents [N, 64, 64] float16 of rendered scenes FIRST_SEED …; each shard of images is encoded once."""
    cfg, params = vae.load(vae_folder, dtype=jnp.float32)
    encode = jax.jit(lambda x: flux.pack(vae.encode(params, cfg, x.astype(jnp.float32) / 127.5 - 1)))
    for file in shards:
        target = work / "latents" / file.name
        if not target.exists() or target.stat().st_mtime < file.stat().st_mtime:   # of other images by now
            images = np.load(file, mmap_mode="r")
            latents = [np.asarray(encode(images[i:i + 50]), np.float16) for i in range(0, len(images), 50)]
            target.parent.mkdir(exist_ok=True)
            np.save(target, np.concatenate(latents))
            print(f"latents: {target.name}, std {np.std(np.concatenate(latents), dtype=np.float64):.3f}", flush=True)
    return np.concatenate([np.load(work / "latents" / file.name) for file in shards])


def seeds_of(shards):
    return [int(shard.stem.split("_")[1]) + i for shard in shards for i in range(len(np.load(shard, mmap_mode="r")))]


def captions_of(work, tokenize, shards, variants=4):
    """Token ids of `variants` captions per scene: T5 [N, variants, 32] and CLIP [N, variants, 32] int16.

    CLIP's 77 tokens are cut to 32: its attention is causal, so what follows the end of text changes nothing.
    """
    file = work / "captions.safetensors"
    seeds = seeds_of(shards)
    if file.exists() and (ids := load_arrays(file))["t5"].shape[0] == len(seeds):
        return ids["t5"], ids["clip"]
    prompts = [scenes.caption(scene, v) for scene in map(scenes.sample, seeds) for v in range(variants)]
    t5, clip = tokenize(prompts)
    ids = {"t5": t5, "clip": clip[:, :TEXT_TOKENS]}
    ids = {k: v.reshape(len(seeds), variants, TEXT_TOKENS).astype(np.int16) for k, v in ids.items()}
    save_file(ids, file)
    return ids["t5"], ids["clip"]


def hints_of(work, shards):
    """uint8 [N, 64, 33]: of a token's 16 sampled pixels, how many show each shape and colour (last: none)."""
    file, seeds = work / "hints.safetensors", seeds_of(shards)
    if not file.exists() or (hints := load_arrays(file)["hints"]).shape[0] != len(seeds):
        with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as pool:
            hints = np.stack(list(pool.map(hint, seeds, chunksize=100)))
        save_file({"hints": hints}, file)
    return hints


def hint(seed):
    scene = scenes.sample(seed)
    kinds = [list(scenes.SHAPES).index(s.shape) * len(scenes.COLORS) + list(scenes.COLORS).index(s.color)
             for s in scene.solids]
    seen = np.array([*kinds, BACKGROUND, BACKGROUND])[scenes.render(scene, 32).object]  # the ground is -1, the wall -2
    tokens = seen.reshape(8, 4, 8, 4).transpose(0, 2, 1, 3).reshape(64, 16)
    return (tokens[:, :, None] == np.arange(BACKGROUND + 1)).sum(1, dtype=np.uint8)


# ---------------------------------------------------------------- 4. the flow


def unrolled(block, x, stack, layers, rope, *, states):
    """The blocks one after the other. On a CPU a training step in a loop would copy every activation into a stack.

    A barrier behind each block keeps XLA from computing the sum of all later gradients anew in every layer.
    """
    for i in layers:
        x = jax.tree.map(barrier, block(x, jax.tree.map(lambda w: w[i], stack), rope)[0])
        states.append(x[0])
    return x, {}


@jax.custom_vjp
def barrier(x):
    return x


barrier.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def loss_fn(params, cfgs, empty, batch, hint_weight):
    """What is minimized; (mean squared error of the guided velocity, cross entropy of the hints)."""
    t, after = batch["time"][:, None, None], []
    x = (1 - t) * batch["latents"] + t * batch["noise"]
    states, pooled = encode(params, cfgs, batch["t5"], batch["clip"])
    v = velocity(params, x, states, pooled, batch["time"], after)
    fixed = jax.lax.stop_gradient(params)
    nothing = [jnp.repeat(one, len(x), 0) for one in encode(fixed, cfgs, *(ids[None] for ids in empty))]
    guidance = jax.lax.stop_gradient(v) - velocity(fixed, x, *nothing, batch["time"], [])
    errors = jnp.mean((v - (batch["noise"] - batch["latents"]) - (1 - 1 / GUIDANCE) * guidance) ** 2, -1)
    img = jax.nn.standardize(after[HINT_LAYER][:, TEXT_TOKENS:])
    hint = optax.softmax_cross_entropy(img @ params["hint"]["w"], batch["hints"] / 16).mean()
    solid = 1 - batch["hints"][..., BACKGROUND] / 16
    # Only at times at which the noise shows where the solids are: else the weights would call for more of them.
    weight = 1 + SOLID_WEIGHT * solid * jnp.clip((0.8 - batch["time"]) / 0.3, 0, 1)[:, None]
    return jnp.mean(weight * errors) + hint_weight * hint, (jnp.mean(errors), hint)


def encode(params, cfgs, t5, clip):
    """Token ids [B, 32] of both tokenizers → T5's states [B, 32, 128] and CLIP's vector [B, 96]."""
    return text.t5(params["t5"], cfgs[0], t5), text.clip(params["clip"], cfgs[1], clip)


def velocity(params, x, states, pooled, time, after):
    return flux.velocity(params["flux"], FLUX, x, states, pooled, time, grid=(8, 8),
                         walk=partial(unrolled, states=after))


def make_step(mesh, cfgs, empty, optimizer):
    """(state, batch, rate, hint weight, EMA decay) → (state, losses), each device on its part of the batch."""
    every, split = PartitionSpec(), PartitionSpec("data")

    def gradients(params, batch, hint_weight):
        grads, losses = jax.grad(loss_fn, has_aux=True)(params, cfgs, empty, batch, hint_weight)
        return jax.lax.pmean((grads, losses), "data")

    gradients = jax.shard_map(gradients, mesh=mesh, in_specs=(every, split, every), out_specs=every, check_vma=False)

    def step(state, batch, rate, hint_weight, decay):
        grads, losses = gradients(state["params"], batch, hint_weight)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = jax.tree.map(lambda p, u: p + rate * u, state["params"], updates)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], params)
        return {"params": params, "ema": ema, "opt": opt, "step": state["step"] + 1}, losses

    return jax.jit(step, donate_argnums=0, out_shardings=NamedSharding(mesh, every))


def draw_batch(rng, size, latents, t5, clip, hints, empty):
    """A batch: scenes with one of their captions (or none, one in ten), noise, and times spread evenly in quantiles."""
    rows, variant = rng.integers(0, len(latents), size), rng.integers(0, t5.shape[1], size)
    drop = rng.random(size) < 0.1
    u = (rng.permutation(size) + rng.random(size)) / size        # stratified: less noise in the loss
    # Most times are near 1, where a scene takes shape: logit-normal ones hardly ever are, and a model trained on these
    # alone draws its solids well only if the noise already shows them.
    time = [1 / (1 + math.exp(-NormalDist().inv_cdf(4 * p))) if p < 0.25 else (2 + p) / 3 for p in u.clip(1e-4)]
    return {"latents": latents[rows].astype(np.float32), "hints": hints[rows],
            "noise": rng.standard_normal((size, *latents.shape[1:]), dtype=np.float32),
            "time": np.array(time, np.float32),
            "t5": np.where(drop[:, None], empty[0], t5[rows, variant]).astype(np.int32),
            "clip": np.where(drop[:, None], empty[1], clip[rows, variant]).astype(np.int32)}


def train_flow(work, out, data, empty, cfgs, *, minutes, batch, rate, seed=0):
    """Train until `minutes` of training time are used up (all runs together); export the EMA at every checkpoint."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    every, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(
        1.0, adam_b2=0.99, weight_decay=0.01, consistent_rms=0.2, muon_weight_dimension_numbers=matrices))
    keys = jax.random.split(jax.random.key(seed), 3)
    tables = {"flux": mmdit.table(FLUX), "t5": text.t5_table(cfgs[0]), "clip": text.clip_table(cfgs[1])}
    params = {name: weights.init_tensors(table, key) for (name, table), key in zip(tables.items(), keys)}
    if (out / "transformer").exists() and not (work / "flow.safetensors").exists():
        params = exported(out)                                   # the work folder is gone: go on from what shipped
    params["hint"] = {"w": jnp.zeros((FLUX.width, BACKGROUND + 1))}
    state = {"params": params, "ema": jax.tree.map(jnp.copy, params), "opt": optimizer.init(params),
             "step": jnp.zeros((), jnp.int32)}
    used, file = 0.0, work / "flow.safetensors"
    if file.exists():
        state, used = restore(file, state)
        print(f"resumed at step {state['step']}, {used / 60:.1f} minutes", flush=True)
    state, step = jax.device_put(state, every), make_step(mesh, cfgs, empty, optimizer)
    start, saved, losses, total = time.monotonic() - used, used, [], 60 * minutes
    while used < total:
        i = int(state["step"])
        rng = np.random.default_rng((seed, i))
        examples = jax.device_put(draw_batch(rng, batch, *data, empty), split)
        now = rate * min(1, (i + 1) / 100, 2 * (1 - used / total))
        state, loss = step(state, examples, now, HINT_WEIGHT * (used < 0.9 * total), min(0.999, (1 + i) / (20 + i)))
        losses.append(np.array(loss))
        used = time.monotonic() - start
        if (i + 1) % 100 == 0:
            error, hint = np.mean(losses[-100:], 0)
            print(f"step {i + 1}  {used / 60:6.1f} min  loss {error:.4f}  hint {hint:.4f}  rate {now:.1e}", flush=True)
        if used - saved > 240 or used >= total:
            saved = used
            save(file, state, used)
            export(out, state["ema"], cfgs)


def matrices(params):
    """Muon orthogonalizes what maps one stream to another, layer by layer; Adam takes embeddings, ends and vectors."""
    return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, params)


def save(file, state, used):
    arrays = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    save_file(arrays, file.with_suffix(".new"), metadata={"seconds": str(used)})
    os.replace(file.with_suffix(".new"), file)


def restore(file, like):
    leaves, structure = jax.tree.flatten(like)
    with safe_open(file, "np") as reader:
        saved = [reader.get_tensor(str(i)) for i in range(len(leaves))]
        return structure.unflatten(saved), float(reader.metadata()["seconds"])


def load_arrays(file):
    with safe_open(file, "np") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118


# ---------------------------------------------------------------- the folder that diffusers loads


def exported(out):
    """Parameters as `export` wrote them, in float32."""
    return {"flux": mmdit.load_transformer(out / "transformer", dtype=jnp.float32)[1],
            "t5": text.load_t5(out / "text_encoder_2", dtype=jnp.float32)[1],
            "clip": text.load_clip(out / "text_encoder", dtype=jnp.float32)[1]}


def export(out, params, cfgs):
    """Write transformer/, text_encoder/, text_encoder_2/, scheduler/ and model_index.json, weights in bfloat16."""
    t5, clip = cfgs
    weights.save_tensors(mmdit.table(FLUX), params["flux"], out / "transformer" / "diffusion_pytorch_model.safetensors")
    weights.save_tensors(text.clip_table(clip, "text_model."), params["clip"],
                         out / "text_encoder" / "model.safetensors")
    weights.save_tensors(text.t5_table(t5), params["t5"], out / "text_encoder_2" / "model.safetensors")
    fields = {k: v for k, v in vars(FLUX).items() if k != "out_channels"}
    write_json(out / "transformer" / "config.json", {"_class_name": "FluxTransformer2DModel", **fields})
    write_json(out / "text_encoder" / "config.json", {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **vars(clip), "projection_dim": 96,
        "bos_token_id": clip.vocab_size - 2, "pad_token_id": clip.vocab_size - 1, "dtype": "bfloat16"})
    write_json(out / "text_encoder_2" / "config.json", {
        "architectures": ["T5EncoderModel"], "model_type": "t5", **vars(t5), "num_decoder_layers": 0,
        "is_encoder_decoder": False, "use_cache": False, "dropout_rate": 0.0, "tie_word_embeddings": False,
        "pad_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16"})
    # Shifted by 3, as SD3's: 4 steps then draw as well as 20 do. With schnell's 1 they lost a fifth of the colours.
    write_json(out / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
        "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096})
    write_json(out / "model_index.json", {
        "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"]})


def main(work=NANO / "work", out=NANO, minutes=120, vae_minutes=20, batch=64, rate=1e-3, **unknown):
    """Run all stages that are not done yet; the flow trains until `minutes` of training are used up."""
    session.no_unknown_flags(unknown)
    work, out = Path(work), Path(out)
    work.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer_2" / "tokenizer.json").exists():
        captions = scenes.captions(FIRST_SEED)
        make_tokenizers(out, [next(captions) for _ in range(20_000)])
    if not (out / "vae" / "config.json").exists():
        import train_vae
        train_vae.main(work=work, minutes=vae_minutes, out=out / "vae")
    shards = sorted((work / "scenes").glob("images_*.npy"))
    latents = latents_of(work, out / "vae", shards)
    t5 = text.t5_tokenizer(out / "tokenizer_2", TEXT_TOKENS)
    clip = text.clip_tokenizer(out / "tokenizer", 77)
    ids = captions_of(work, lambda prompts: (t5(prompts), clip(prompts)), shards)
    hints = hints_of(work, shards)
    vocab = json.loads((out / "tokenizer" / "vocab.json").read_text())
    pieces = Tokenizer.from_file(str(out / "tokenizer_2" / "tokenizer.json")).get_vocab_size()
    cfgs = (T5(vocab_size=pieces), CLIP(vocab_size=len(vocab), eos_token_id=vocab["<|endoftext|>"]))
    train_flow(work, out, (latents, *ids, hints), (t5([""])[0], clip([""])[0, :TEXT_TOKENS]), cfgs,
               minutes=minutes, batch=batch, rate=rate)


if __name__ == "__main__":
    session.command(main)
