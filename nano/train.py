"""Make the nano family from nothing: tokenizers, autoencoder, then flow models, one from the other.

    python nano/train.py                                  # everything; a stopped run goes on where it was
    python nano/train.py --stages base --minutes 300      # one stage, with another time for it

1. Tokenizers learned from captions, by `vocabulary.py`.
2. The autoencoder, by `train_vae.py`.
3. `base`: rectified flow (arXiv 2209.03003) on the latents of rendered scenes, with fae's own `flux.py` and `text.py`.
   Half of the times are logit-normal as in SD3 (arXiv 2403.03206): there solids get their edges and corners. The
   other half is uniform in 0.5…1, where the scene is laid out. One caption in ten is dropped. Both text encoders learn
   here, and never again.
4. `dev`: base distilled to one pass per step with guidance (arXiv 2210.03142). Its target is base's velocity with
   classifier-free guidance, at a scale drawn from 1…4, which a new embedding tells it.
5. `straight`: the same without a guidance input, and for few steps. Its data are what dev draws at the scale GUIDANCE:
   pairs of noise and image. The line from one to the other is straight, so few steps follow it (reflow, the second
   rectification of arXiv 2209.03003). Half of the times are 1: one step must do.
6. `schnell`: what is still a blur becomes sharp. The same loss holds it near dev's images, and it must convince a
   discriminator (latent adversarial diffusion distillation, arXiv 2403.12015): small heads on the residual stream of
   base, which reads latents with new noise and the caption. The heads learn to tell the latents of renders from what
   schnell draws, and from renders with the caption of another scene.

No stage sees more than captions and images. Optimizer: Muon; the rate falls to zero over the second half of a stage; a
moving average of the weights is what a stage leaves, and what the next one begins with.

All data stay on the device, and batches are drawn there. On accelerators many steps run in one program, in bfloat16. On
a CPU each core is a device with its part of the batch, and oneDNN may round the inputs of float32 products to bfloat16,
which a core with AMX multiplies five times as fast. Two such cores train base on 98 scenes a second.
"""
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

NANO = Path(__file__).resolve().parent
sys.path[:0] = [str(NANO.parent), str(NANO)]

import cpu

if __name__ == "__main__":
    cpu.fast(os.cpu_count() or 1)                                # before jax is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scenes
import vocabulary
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

import flux
import mmdit
import session
import text
import weights

FIRST_SEED = 1_000_000                                           # scenes below are for evaluation
TEXT_TOKENS, VARIANTS, CACHED = 32, 4, 8                         # captions of a scene; scenes that fit a core's cache
SHIFT, GUIDANCE, STEPS = 3.0, 3.0, 10                            # of the noise levels; how dev draws the pairs
LEVELS = flux.sigmas({"shift": SHIFT}, 4, 64)                    # of sampling in four steps
ADVERSARIAL, HEADS, HIDDEN = 0.1, (7,), 64                       # its weight; layers that the discriminator reads
FLUX = flux.Config(in_channels=16, num_layers=4, num_single_layers=8, attention_head_dim=32, num_attention_heads=4,
                   joint_attention_dim=128, pooled_projection_dim=96, axes_dims_rope=(8, 12, 12))
T5 = partial(text.T5Config, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
CLIP = partial(text.CLIPConfig, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)


@dataclass(frozen=True)
class Stage:
    """One model of the family: where it comes from, and how long and fast it learns."""
    parent: str | None                                           # the stage whose model it begins with and learns from
    minutes: tuple[float, float]                                 # on two CPU cores, on an accelerator
    batch: tuple[int, int]
    rate: float                                                  # at the peak
    loss: Callable                                               # (params, fixed, cfgs, key, data, batch size) → scalar
    pairs: bool = False                                          # whether it learns from what dev draws


# ---------------------------------------------------------------- 1. data


def latents_of(work, shared, count):
    """Packed latents [count, 64, 16] float16 of the scenes FIRST_SEED …"""
    files = sorted((work / "latents").glob("images_*.npy"))
    if 5_000 * len(files) < count:
        import train_vae
        files = train_vae.latents(shared / "vae", work, count)
    return np.concatenate([np.load(file) for file in files[:-(-count // 5_000)]])[:count]


def captions_of(folder, count):
    """Token ids of VARIANTS captions of each scene: {"t5": [count, VARIANTS, 32], "clip": the same}, int16; and
    those of no caption [32] each. CLIP's 77 tokens are cut to 32: its attention is causal, so what follows the end of
    text changes nothing."""
    t5, clip = text.t5_tokenizer(folder / "tokenizer_2", TEXT_TOKENS), text.clip_tokenizer(folder / "tokenizer", 77)
    prompts = [scenes.caption(scene, v) for scene in map(scenes.sample, range(FIRST_SEED, FIRST_SEED + count))
               for v in range(VARIANTS)]
    ids = {name: np.asarray(tokenize(["", *prompts]))[:, :TEXT_TOKENS].astype(np.int16)
           for name, tokenize in (("t5", t5), ("clip", clip))}
    return ({name: rows[1:].reshape(count, VARIANTS, -1) for name, rows in ids.items()},
            {name: rows[0] for name, rows in ids.items()})


def pairs_of(work, dev, data, count, size=512, batch=64):
    """What `dev` (a folder) draws from `count` noises, as data for `draw`; kept in files of `size` in `work`."""
    known, files, model = len(data["latents"]), [], None
    for first in range(0, count, size):
        files.append(work / "pairs" / f"{first}.npy")
        if files[-1].exists():
            continue
        files[-1].parent.mkdir(exist_ok=True)
        model = model or flux.load(dev, dtype=session.default_dtype())
        noise = np.random.default_rng(first).standard_normal((size, *data["latents"].shape[1:]), np.float32)
        captions = [scenes.caption(scenes.sample(FIRST_SEED + i % known), i % VARIANTS)
                    for i in range(first, first + size)]
        images = [flux.sample(model, flux.prepare(model, captions[i:i + batch], steps=STEPS, size=128,
                                                  noise=noise[i:i + batch], guidance=GUIDANCE))
                  for i in range(0, size, batch)]
        np.save(work / "new.npy", np.stack([noise, np.concatenate(images)]).astype(np.float16))
        os.replace(work / "new.npy", files[-1])
        print(f"pairs: {first + size} of {count}", flush=True)
    noise, images = (np.concatenate(part)[:count] for part in zip(*map(np.load, files)))
    rows = np.arange(count)
    ids = {name: data[name][rows % known, rows % VARIANTS][:, None] for name in ("t5", "clip")}
    return {"latents": images, "noise": noise, **ids}


def draw(key, data, size):
    """A batch, drawn on the device: latents, noise, quantiles [B] of times, spread evenly, and the ids of a caption."""
    row, variant, order, place, noise = jax.random.split(key, 5)
    rows = jax.random.randint(row, (size,), 0, len(data["latents"]))
    variants = jax.random.randint(variant, (size,), 0, data["t5"].shape[1])
    u = (jax.random.permutation(order, size) + jax.random.uniform(place, (size,), minval=1e-4)) / size
    latents = data["latents"][rows].astype(jnp.float32)
    noise = data["noise"][rows].astype(jnp.float32) if "noise" in data else jax.random.normal(noise, latents.shape)
    ids = {name: data[name][rows, variants].astype(jnp.int32) for name in ("t5", "clip")}
    return latents, noise, u, ids


def times(u):
    """Times from quantiles: the lower half logit-normal, the upper half uniform in 0.5…1."""
    return jnp.where(u < 0.5, jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.minimum(2 * u, 0.9999))), u)


def few_times(u):
    """Noise levels of sampling in four steps, from quantiles: half of them 1, the others even."""
    return jnp.asarray(LEVELS)[jnp.maximum(6 * u - 2, 0).astype(int)]


# ---------------------------------------------------------------- 2. what each stage minimizes


def base_loss(params, fixed, cfgs, key, data, size):
    """Mean squared error of the velocity (arXiv 2209.03003)."""
    key, some = jax.random.split(key)
    latents, noise, u, ids = draw(some, data, size)
    time = times(u)
    drop = jax.random.uniform(key, (len(u), 1)) < 0.1
    ids = {name: jnp.where(drop, fixed["empty"][name], rows) for name, rows in ids.items()}
    v = velocity(params["flux"], between(latents, noise, time), encode(params, cfgs, ids), time)
    return jnp.mean((v - (noise - latents)) ** 2)


def dev_loss(params, fixed, cfgs, key, data, size):
    """Mean squared distance to base's velocity with classifier-free guidance, at a random scale (arXiv 2210.03142)."""
    key, some = jax.random.split(key)
    latents, noise, u, ids = draw(some, data, size)
    time, scale = times(u), jax.random.uniform(key, u.shape, minval=1, maxval=4)
    x, said = between(latents, noise, time), encode(fixed, cfgs, ids)
    nothing = encode(fixed, cfgs, {name: row[None] for name, row in fixed["empty"].items()})
    with_text = velocity(fixed["flux"], x, said, time)
    without = velocity(fixed["flux"], x, [jnp.repeat(a, len(u), 0) for a in nothing], time)
    target = without + scale[:, None, None] * (with_text - without)
    return jnp.mean((velocity(params["flux"], x, said, time, scale) - target) ** 2)


def straight_loss(params, fixed, cfgs, key, data, size):
    """Mean squared error of the velocity from dev's noise to dev's image, at the noise levels of sampling."""
    return straight(params, fixed, cfgs, draw(key, data["pairs"], size))[0]


def straight(params, fixed, cfgs, drawn):
    """(The mean squared error, the images to which the velocity points, the encoded captions)"""
    latents, noise, u, ids = drawn
    time = few_times(u)
    x, said = between(latents, noise, time), encode(fixed, cfgs, ids)
    v = velocity(params["flux"], x, said, time)
    return jnp.mean((v - (noise - latents)) ** 2), x - time[:, None, None] * v, said


def schnell_loss(params, fixed, cfgs, key, data, size):
    """The same, and the losses of schnell as the discriminator sees it and of the discriminator (hinge)."""
    keys = jax.random.split(key, 4)
    error, image, said = straight(params, fixed, cfgs, draw(keys[0], data["pairs"], size))
    latents, _, _, ids = draw(keys[1], data, size)
    true = encode(fixed, cfgs, ids)
    noise, time = jax.random.normal(keys[2], latents.shape), jax.random.uniform(keys[3], (size,), maxval=0.7)
    score = lambda heads, x, said: judged(heads, fixed["base"], between(x, noise, time), said, time)
    hinge = lambda sign, x, said: jax.nn.relu(1 + sign * score(params["heads"], x, said)).mean()
    wrong = (hinge(1, jax.lax.stop_gradient(image), said) + hinge(1, latents, [jnp.roll(a, 1, 0) for a in true])) / 2
    deceived = score(jax.lax.stop_gradient(params["heads"]), image, said).mean()
    return error + hinge(-1, latents, true) + wrong - ADVERSARIAL * deceived


def judged(heads, base, x, said, time):
    """The discriminator's score [B, 64] of every image token, above zero for data."""
    scores = 0
    for layer, head in heads.items():
        residual = _run(partial(flux.residual, layer=int(layer), site="img"), base, x, said, time)
        hidden = jax.nn.gelu(jax.nn.standardize(residual) @ head["in"]["w"] + head["in"]["b"])
        scores += (hidden @ head["out"]["w"])[..., 0]
    return scores


STAGES = {
    "base": Stage(None, (180, 8), (128, 512), 2e-3, base_loss),
    "dev": Stage("base", (20, 3), (64, 512), 1e-3, dev_loss),
    "straight": Stage("dev", (30, 5), (64, 512), 1e-3, straight_loss, pairs=True),
    "schnell": Stage("straight", (40, 7), (64, 512), 5e-4, schnell_loss, pairs=True),
}
FOLDERS = {"base": "nano-base", "dev": "nano-dev", "schnell": "nano"}        # the stages that ship, and where


def between(latents, noise, time):
    return latents + time[:, None, None] * (noise - latents)


def encode(params, cfgs, ids):
    """Token ids [B, 32] of both tokenizers → T5's states [B, 32, 128] and CLIP's vector [B, 96]."""
    return text.t5(params["t5"], cfgs[0], ids["t5"]), text.clip(params["clip"], cfgs[1], ids["clip"])


def velocity(params, x, said, time, guidance=None):
    return _run(flux.velocity, params, x, said, time, guidance)


def _run(function, params, x, said, time, guidance=None):
    """`flux.velocity` or the like in float32; on accelerators it computes in bfloat16."""
    cfg = replace(FLUX, guidance_embeds=guidance is not None)
    on_cpu = jax.devices()[0].platform == "cpu"
    kind = jnp.float32 if on_cpu else jnp.bfloat16
    params, x, said = jax.tree.map(lambda a: a.astype(kind), (params, x, list(said)))
    out = function(params, cfg, x, *said, time, guidance, grid=(8, 8), walk=unrolled if on_cpu else None)
    return out.astype(jnp.float32)


def unrolled(block, x, stack, layers, *context):
    """The blocks one after the other. On a CPU a training step in a loop would copy every activation into a stack.

    A barrier behind each block keeps XLA from computing the sum of all later gradients anew in every layer.
    """
    found = []
    for i in layers:
        x, values = block(x, jax.tree.map(lambda w: w[i], stack), *context)
        x = jax.tree.map(barrier, x)
        found.append(values)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *found)


@jax.custom_vjp
def barrier(x):
    return x


barrier.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


# ---------------------------------------------------------------- 3. the training loop


def train(name, stage, work, data, fixed, cfgs, params, *, minutes, batch, rate, report=50):
    """Train a stage until `minutes` of training time are used up (all runs together). Return the averaged weights.

    fixed: arrays that the loss needs and does not change. The state is saved in `work` every four minutes and at the
    end."""
    mesh, file = Mesh(np.array(jax.devices()), ("data",)), work / f"{name}.safetensors"
    every = NamedSharding(mesh, PartitionSpec())
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(
        1.0, adam_b2=0.99, weight_decay=0.01, consistent_rms=0.2, muon_weight_dimension_numbers=matrices))
    copied = partial(jax.tree.map, jnp.copy)                     # a step donates its state; `fixed` may hold the same
    state = {"params": copied(params), "ema": copied(params), "opt": optimizer.init(params),
             "step": jnp.zeros((), jnp.int32)}
    used, total = 0.0, 60 * minutes
    if file.exists():
        state, used = restore(file, state)
        print(f"{name}: resumed at step {state['step']}, {used / 60:.1f} minutes", flush=True)
    state, data, fixed = (jax.device_put(tree, every) for tree in (state, data, fixed))
    steps = 1 if mesh.devices[0].platform == "cpu" else report
    run = make_run(mesh, partial(stage.loss, cfgs=cfgs), optimizer, batch, steps)
    start, saved, losses, shown = time.monotonic() - used, used, [], used
    while used < total:
        i = int(state["step"])
        now = rate * min(1, (i + 1) / 100, 2 * (1 - used / total))
        state, loss = run(state, data, fixed, now)
        losses.append(float(loss))
        used = time.monotonic() - start
        if (i + steps) % report == 0:
            speed, shown = report * batch / (used - shown), used
            print(f"{name}: step {i + steps}  {used / 60:6.1f} min  loss {np.mean(losses):.4f}  rate {now:.1e}  "
                  f"{speed:.0f} scenes/s", flush=True)
            losses = []
        if used - saved > 240 or used >= total:
            saved = used
            save(file, state, used)
    return jax.device_get(state["ema"])


def make_run(mesh, loss, optimizer, batch, steps):
    """Return the program (state, data, fixed, rate) → (state, mean loss) of `steps` steps, each device on its part.

    On a CPU a device takes CACHED scenes at a time."""
    every, size = PartitionSpec(), batch // mesh.size
    count = size // CACHED if mesh.devices[0].platform == "cpu" and size % CACHED == 0 else 1

    def gradients(params, data, fixed, key):
        keys = jax.random.split(jax.random.fold_in(key, jax.lax.axis_index("data")), count)
        one = lambda key: jax.value_and_grad(loss)(params, fixed, key=key, data=data, size=size // count)
        return jax.lax.pmean(cpu.mean(one, keys), "data")

    gradients = jax.shard_map(gradients, mesh=mesh, in_specs=(every,) * 4, out_specs=every, check_vma=False)

    def step(state, data, fixed, rate):
        value, grads = gradients(state["params"], data, fixed, jax.random.fold_in(jax.random.key(1), state["step"]))
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = jax.tree.map(lambda p, u: p + rate * u, state["params"], updates)
        decay = jnp.minimum(0.999, (1 + state["step"]) / (20 + state["step"]))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], params)
        return {"params": params, "ema": ema, "opt": opt, "step": state["step"] + 1}, value

    def run(state, data, fixed, rate):
        if steps == 1:
            return step(state, data, fixed, rate)
        state, values = jax.lax.scan(lambda state, _: step(state, data, fixed, rate), state, length=steps)
        return state, values.mean()

    return jax.jit(run, donate_argnums=0, out_shardings=NamedSharding(mesh, every))


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


def beginning(name, folder, base, cfgs, seed=0):
    """The parameters with which a stage begins: {"flux", "t5", "clip"} for base, {"flux"} for the others; and what its
    loss needs besides: the parent's models. folder: the pipeline of the parent; for base its own, if it exists. base:
    the pipeline of base."""
    stage = STAGES[name]
    tables = {"flux": mmdit.table(replace(FLUX, guidance_embeds=name == "dev")), "t5": text.t5_table(cfgs[0]),
              "clip": text.clip_table(cfgs[1])}
    fresh = {part: weights.init_tensors(table, key) for (part, table), key in zip(
        tables.items(), jax.random.split(jax.random.key(seed), 3))}
    if not (folder / "transformer").exists():
        if stage.parent:
            raise session.Mistake(f"--stages {name}: train {stage.parent} first; {folder} does not exist")
        return fresh, {}
    teacher = pipeline(folder)
    if stage.parent is None:                                     # what shipped: its moving average, in bfloat16
        return teacher, {}
    own = {part: value for part, value in teacher["flux"].items() if part in fresh["flux"]}
    if name == "dev":                                            # at first the guidance says nothing
        own["guidance"] = jax.tree.map(jnp.array, fresh["flux"]["guidance"])
        own["guidance"]["fc2"] = jax.tree.map(jnp.zeros_like, own["guidance"]["fc2"])
    own = {"flux": own}
    if name == "schnell":
        shapes = {"in": (FLUX.width, HIDDEN), "out": (HIDDEN, 1)}
        own["heads"] = {str(layer): {part: {"w": jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)
                                            * shape[0] ** -0.5, "b": jnp.zeros(shape[1])}
                                     for i, (part, shape) in enumerate(shapes.items(), 2 * layer)} for layer in HEADS}
        teacher["base"] = mmdit.load_transformer(base / "transformer", dtype=jnp.float32)[1]
    return own, teacher


def pipeline(folder):
    """The models of a folder in float32: {"flux", "t5", "clip"}."""
    return {"flux": mmdit.load_transformer(folder / "transformer", dtype=jnp.float32)[1],
            "t5": text.load_t5(folder / "text_encoder_2", dtype=jnp.float32)[1],
            "clip": text.load_clip(folder / "text_encoder", dtype=jnp.float32)[1]}


# ---------------------------------------------------------------- the folders that diffusers loads


def export(out, params, cfgs, guidance):
    """Write transformer/, text_encoder/, text_encoder_2/, scheduler/ and model_index.json, weights in bfloat16."""
    (t5, clip), cfg = cfgs, replace(FLUX, guidance_embeds=guidance)
    weights.save_tensors(mmdit.table(cfg), params["flux"], out / "transformer" / "diffusion_pytorch_model.safetensors")
    weights.save_tensors(text.clip_table(clip, "text_model."), params["clip"],
                         out / "text_encoder" / "model.safetensors")
    weights.save_tensors(text.t5_table(t5), params["t5"], out / "text_encoder_2" / "model.safetensors")
    fields = {k: v for k, v in vars(cfg).items() if k != "out_channels"}
    vocabulary.write_json(out / "transformer" / "config.json", {"_class_name": "FluxTransformer2DModel", **fields})
    vocabulary.write_json(out / "text_encoder" / "config.json", {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **vars(clip), "projection_dim": 96,
        "bos_token_id": clip.vocab_size - 2, "pad_token_id": clip.vocab_size - 1, "dtype": "bfloat16"})
    vocabulary.write_json(out / "text_encoder_2" / "config.json", {
        "architectures": ["T5EncoderModel"], "model_type": "t5", **vars(t5), "num_decoder_layers": 0,
        "is_encoder_decoder": False, "use_cache": False, "dropout_rate": 0.0, "tie_word_embeddings": False,
        "pad_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16"})
    vocabulary.write_json(out / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": SHIFT,
        "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096})
    vocabulary.write_json(out / "model_index.json", {
        "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"]})


def complete(folder, source):
    """Copy to a folder the parts that the whole family shares: tokenizers and autoencoder."""
    for part in ("tokenizer", "tokenizer_2", "vae"):
        if folder.resolve() != source.resolve():
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)


def main(work=NANO / "work", out=NANO.parent, stages="base,dev,straight,schnell", count=60_000, pairs=20_000,
         minutes=None, batch=None, rate=None, vae_minutes=20, **unknown):
    """Run the given stages that are not done yet, and write their pipelines to the folders nano-base, nano-dev and nano
    in --out. --minutes, --batch, --rate: for a single stage."""
    session.no_unknown_flags(unknown)
    names = list(stages) if isinstance(stages, (tuple, list)) else str(stages).split(",")
    if wrong := [name for name in names if name not in STAGES]:
        raise session.Mistake(f"--stages {wrong[0]}: the stages are {', '.join(STAGES)}")
    if len(names) > 1 and (minutes or batch or rate):
        raise session.Mistake("--minutes, --batch and --rate are for a single stage: give --stages with one name")
    work, out = Path(work), Path(out)
    work.mkdir(parents=True, exist_ok=True)
    shared, where = work / "shared", lambda name: (out / FOLDERS[name] if name in FOLDERS else work / name)
    if (where("base") / "vae" / "config.json").exists():         # a family that shipped goes on with its own parts
        complete(shared, where("base"))
    if not (shared / "tokenizer_2" / "tokenizer.json").exists():
        captions = scenes.captions(FIRST_SEED)
        vocabulary.make(shared, [next(captions) for _ in range(20_000)], TEXT_TOKENS)
    if not (shared / "vae" / "config.json").exists():
        import train_vae  # PyTorch is needed only if autoencoder or latents are missing

        train_vae.main(work=work, minutes=vae_minutes, out=shared / "vae", count=count)
    ids, empty = captions_of(shared, count)
    data = {"latents": latents_of(work, shared, count), **ids}
    vocab = json.loads((shared / "tokenizer" / "vocab.json").read_text())
    pieces = Tokenizer.from_file(str(shared / "tokenizer_2" / "tokenizer.json")).get_vocab_size()
    cfgs = (T5(vocab_size=pieces), CLIP(vocab_size=len(vocab), eos_token_id=vocab["<|endoftext|>"]))
    accelerated = jax.devices()[0].platform != "cpu"
    for name in names:
        stage = STAGES[name]
        params, fixed = beginning(name, where(stage.parent or name), where("base"), cfgs)
        drawn = {"pairs": pairs_of(work, where("dev"), data, pairs)} if stage.pairs else {}
        found = train(name, stage, work, data | drawn, fixed | {"empty": empty}, cfgs, params,
                      minutes=minutes or stage.minutes[accelerated], batch=batch or stage.batch[accelerated],
                      rate=rate or stage.rate)
        export(where(name), {**fixed, **found}, cfgs, guidance=name == "dev")
        complete(where(name), shared)
        print(f"{name}: {where(name)}", flush=True)


if __name__ == "__main__":
    session.command(main)
