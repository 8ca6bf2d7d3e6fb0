"""Measure the nano model on captions it was never trained on; writes README.md and sheet.jpg into the model's folder.

    python nano/evaluate.py --n 300               # --retrain trains the judge anew, two minutes on two idle cores

A small classifier, the judge, names shape and colour of the object in one-object images. It is trained on true renders
of seeds that nothing else uses and, to forgive blur, on some of them as the autoencoder reconstructs them; before it
judges anything, it is checked on true renders that it has not seen. Other scripts may reuse it:

    shapes, colors = evaluate.judge(evaluate.load_judge(), images)       # uint8 [B, 128, 128, 3] → logits
"""
import multiprocessing
import os
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

FLAGS = ("--xla_cpu_use_onednn=true "
         "--xla_cpu_experimental_onednn_fusion_type=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")
CPU = Path("/proc/cpuinfo")
if __name__ == "__main__":                                       # before jax is imported; why: see train.py
    os.environ["JAX_PLATFORMS"] = "cpu"
    if CPU.exists() and "amx_bf16" in CPU.read_text():
        os.environ.update(ONEDNN_DEFAULT_FPMATH_MODE="BF16", XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}")

NANO = Path(__file__).resolve().parent
sys.path[:0] = [str(NANO.parent), str(NANO)]

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scenes
from safetensors import safe_open
from safetensors.numpy import save_file

import flux
import session
import vae

SHAPES, COLORS, SIZE = list(scenes.SHAPES), list(scenes.COLORS), 128
# Training uses seeds from 1,000,000 on; of those below, the first ones are for captions, these for the judge's check.
JUDGE_SEED, CHECK_SEED, CHECKS = 2_000_000, 10_000, 1_000
WIDTHS, STRIDES = (3, 24, 48, 64, 96), (2, 2, 2, 1)              # of the judge's convolutions
TRUSTED, COLOR, SHAPE, PSNR = 0.98, 0.90, 0.80, 30.0             # what is asked of the judge and of the model


# ---------------------------------------------------------------- the judge


def judge(params, images):
    """Logits of SHAPES [B, 4] and of COLORS [B, 8] for one-object images uint8 [B, 128, 128, 3]."""
    return _logits(params, _halve(images))


def load_judge(path=NANO / "judge.safetensors"):
    """The judge's parameters, float32."""
    with safe_open(path, "np") as reader:
        return {name: jnp.asarray(reader.get_tensor(name), jnp.float32) for name in reader.keys()}  # noqa: SIM118


def train_judge(model, count=14_000, reconstructed=1_000, epochs=5, batch=100, seed=0):
    """Parameters of a judge trained on `count` true renders, and on some of them as the autoencoder shows them."""
    images, labels = draw(range(JUDGE_SEED, JUDGE_SEED + count))
    passed = reconstruct(model, images[:reconstructed], noise=0.2)
    # Each reconstruction is shown twice as often as a render: they are few, and what is judged is closer to them.
    small = np.concatenate([_halve(part).astype(np.float16) for part in (images, passed, passed)])
    labels = np.concatenate([labels, *[labels[:reconstructed]] * 2])
    steps, rng, key = len(small) * epochs // batch, np.random.default_rng(seed), jax.random.key(seed)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3, 0.1), weight_decay=1e-2)
    params = _init_judge(key)
    state, step = optimizer.init(params), jax.jit(partial(_judge_step, optimizer))
    for i in range(steps):
        rows = rng.integers(0, len(small), batch)
        params, state, loss = step(params, state, small[rows], labels[rows], jax.random.fold_in(key, i))
        if (i + 1) % 100 == 0:
            print(f"judge: step {i + 1} of {steps}, loss {loss:.4f}", flush=True)
    return params


def _judge_step(optimizer, params, state, x, labels, key):
    def loss(params):
        pairs = zip(_logits(params, _augment(x.astype(jnp.float32), key)), labels.T)
        return sum(optax.softmax_cross_entropy_with_integer_labels(*pair).mean() for pair in pairs)

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def _init_judge(key):
    sizes = {f"conv_{i}": (9 * n, m) for i, (n, m) in enumerate(pairwise(WIDTHS))}
    sizes |= {"shape": (2 * WIDTHS[-1], len(SHAPES)), "color": (2 * WIDTHS[-1], len(COLORS))}
    params = {}
    for (name, size), k in zip(sizes.items(), jax.random.split(key, len(sizes))):
        params[f"{name}.w"] = jax.random.normal(k, size) * np.sqrt(2 / size[0])
        params[f"{name}.b"] = jnp.zeros(size[1])
    return params


def _logits(params, x):
    """From images [B, 64, 64, 3] in -1…1. The object may be anywhere: features are pooled over all places."""
    for i, stride in enumerate(STRIDES):
        x = jax.nn.relu(_patches(x, stride) @ params[f"conv_{i}.w"] + params[f"conv_{i}.b"])
    x = jnp.concatenate([x.max((1, 2)), x.mean((1, 2))], -1)
    return tuple(x @ params[f"{head}.w"] + params[f"{head}.b"] for head in ("shape", "color"))


def _patches(x, stride):
    """3x3 neighbourhoods as channels: on a CPU, XLA multiplies matrices far faster than it convolves."""
    n = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, i:i + n:stride, j:j + n:stride] for i in range(3) for j in range(3)], -1)


def _halve(images):
    """uint8 [B, 128, 128, 3] → float32 [B, 64, 64, 3] in -1…1."""
    if images.shape[1:] != (SIZE, SIZE, 3) or images.dtype != np.uint8:
        raise session.Mistake(f"images are {images.dtype} {list(images.shape)}, should be uint8 [B, {SIZE}, {SIZE}, 3]")
    return images.reshape(-1, SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4), jnp.float32) / 127.5 - 1


def _augment(x, key):
    """Mirrored, blurred, brightened and noisy, each by chance: generated images are not as clean as renders."""
    mirror, blur, gain, level, noise = jax.random.split(key, 5)
    some = lambda key, low, high: jax.random.uniform(key, (len(x), 1, 1, 1), minval=low, maxval=high)
    x = jnp.where(some(mirror, 0, 1) < 0.5, x[:, :, ::-1], x)
    smooth = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") / 9
    x = x + some(blur, -0.3, 1).clip(0) * (smooth - x)
    x = (x + 1) * some(gain, 0.92, 1.08) - 1
    return x + some(level, 0, 0.06) * jax.random.normal(noise, x.shape)


def verdicts(params, images):
    """Indices [B, 2] into SHAPES and COLORS."""
    logits = [judge(params, images[i:i + 100]) for i in range(0, len(images), 100)]
    return np.concatenate([np.stack([np.argmax(head, -1) for head in pair], -1) for pair in logits])


# ---------------------------------------------------------------- true renders


def draw(seeds):
    """Images uint8 [B, 128, 128, 3] of one-object scenes, and their (shape, colour) indices [B, 2]."""
    drawn = [scenes.sample(seed, objects=1) for seed in seeds]
    if len(drawn) < 500:                                         # starting processes takes as long
        images = [render(scene) for scene in drawn]
    else:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            images = list(pool.map(render, drawn, chunksize=50))
    return np.stack(images), np.array([labels_of(scene) for scene in drawn])


def render(scene):
    return scenes.render(scene, SIZE).image


def labels_of(scene):
    return SHAPES.index(scene.solids[0].shape), COLORS.index(scene.solids[0].color)


def reconstruct(model, images, noise=0.0):
    """What the autoencoder makes of images, uint8; `noise` is an error of its latents, such as a flow model makes."""
    cfg, params = model.vae

    @jax.jit
    def run(params, images, key):
        latents = vae.encode(params, cfg, images.astype(jnp.float32) / 127.5 - 1)
        latents += noise * jax.random.normal(key, latents.shape)
        return jnp.round((vae.decode(params, cfg, latents).clip(-1, 1) + 1) * 127.5).astype(jnp.uint8)

    keys = jax.random.split(jax.random.key(0), len(images))
    return np.concatenate([np.asarray(run(params, images[i:i + 20], keys[i])) for i in range(0, len(images), 20)])


def psnr(a, b):
    """Mean over uint8 images of the peak signal-to-noise ratio in dB."""
    return np.mean(10 * np.log10(255 ** 2 / ((a.astype(np.float32) - b) ** 2).mean((1, 2, 3))))


# ---------------------------------------------------------------- the model's images


def check_judge(params, model):
    """Shares of right shapes and colours [2] on new true renders, and on a fifth of them from the autoencoder."""
    images, labels = draw(range(CHECK_SEED, CHECK_SEED + CHECKS))
    right = (verdicts(params, images) == labels).mean(0)
    few = CHECKS // 5
    passed = (verdicts(params, reconstruct(model, images[:few])) == labels[:few]).mean(0)
    print(f"judge: shape {right[0]:.1%}, colour {right[1]:.1%} right on {CHECKS} true renders; "
          f"{passed[0]:.1%}, {passed[1]:.1%} on {few} through the autoencoder", flush=True)
    if right.min() < TRUSTED:
        raise session.Mistake(f"the judge is right on {right.min():.1%} of true renders, not {TRUSTED:.0%}: try "
                              "--retrain")
    return right, passed


def generate(model, prompts, steps, batch=50):
    """One image per prompt, uint8 [B, 128, 128, 3]; every batch has a seed of its own."""
    return np.concatenate([np.asarray(flux.generate(model, prompts[i:i + batch], steps=steps, size=SIZE, seed=i))
                           for i in range(0, len(prompts), batch)])


def score(params, model, n, counts):
    """({steps: shares [2] of images with the stated shape, colour}, captions [2] that state it), seeds 0…n - 1."""
    drawn = [scenes.sample(seed, objects=1) for seed in range(n)]
    prompts = [scenes.caption(scene) for scene in drawn]
    labels = np.array([labels_of(scene) for scene in drawn])
    said = np.array([stated(prompt, scene.solids[0]) for prompt, scene in zip(prompts, drawn)])
    shares = {}
    for steps in counts:
        right = verdicts(params, generate(model, prompts, steps)) == labels
        shares[steps] = (right & said).sum(0) / said.sum(0)
        print(f"{steps} steps: shape {shares[steps][0]:.1%}, colour {shares[steps][1]:.1%} as captioned", flush=True)
    return shares, said.sum(0)


def stated(caption, solid):
    """Whether a caption names the solid's shape, and its colour: some say "object" or leave the colour out."""
    words = caption.replace(",", "").split()
    return solid.shape in words or scenes.SYNONYMS.get(solid.shape) in words, solid.color in words


def sheet(model, file, rows=3, step=SIZE + 6, left=190, top=22):
    """Captions of the first held-out scenes of one, two and three objects: drawn by the model, and the true render."""
    from PIL import Image, ImageDraw, ImageFont
    drawn = [scenes.sample(seed, objects=objects) for objects in (1, 2, 3) for seed in range(rows)]
    prompts = [scenes.caption(scene) for scene in drawn]
    columns = {f"nano, {steps} steps": generate(model, prompts, steps) for steps in (4, 20)}
    columns["a true render"] = [render(scene) for scene in drawn]
    out = Image.new("RGB", (left + 3 * step, top + len(drawn) * step), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(13)
    for column, (title, images) in enumerate(columns.items()):
        pen.text((left + column * step, 3), title, "black", font)
        for row, image in enumerate(images):
            out.paste(Image.fromarray(image), (left + column * step, top + row * step))
    for row, prompt in enumerate(prompts):
        pen.text((6, top + row * step + 4), textwrap.fill(prompt, 27), "black", font)
    out.save(file, quality=88, subsampling=0)


# ---------------------------------------------------------------- README.md

README = """# nano: FLUX.1 in miniature

nano is a real FLUX pipeline, small enough for a laptop. It draws a world in which everything is known. So you can score
features, probes and steering against the truth, which no real model allows. The scripts in this folder made it from
nothing; `evaluate.py` wrote this page, text and figures.

![captions, the model's images in 4 and in 20 steps, and a true render](sheet.jpg)

*The first held-out scenes with one, two and three objects; we selected nothing. A caption leaves much open: the right
column shows one of the many scenes that it describes.*

    python flux.py "a small red cube to the left of a blue sphere, lit from the left" --model nano --steps {steps}

The folder has the layout of diffusers, and diffusers draws the same images from the same noise:

    pipe = diffusers.FluxPipeline.from_pretrained("nano", torch_dtype=torch.float32)
    pipe("a large yellow cone", height=128, width=128, num_inference_steps={steps}, max_sequence_length=32).images[0]

nano draws images of 128×128 pixels. It knows only the words of its captions, and takes up to 32 text tokens.

## Figures

{table}
The column "asked" is the goal that we set before. Of {n} held-out captions of one object, {said[0]} state a shape and
{said[1]} a colour; only these count. A small classifier judges the images. On {checks} true renders that it was not
trained on, it names {right[0]:.1%} of the shapes and {right[1]:.1%} of the colours correctly ({trusted:.0%} asked).
On reconstructions of {few} of them by the autoencoder it names {passed[0]:.1%} and {passed[1]:.1%}. The autoencoder's
mean PSNR over {renders} held-out renders is {ratio:.1f} dB ({psnr:.0f} dB asked).

{parts}
Layers are numbered from 0: {cfg.num_layers} double blocks, then {cfg.num_single_layers} single blocks, with
{cfg.num_attention_heads} heads of width {cfg.attention_head_dim}. `judge.safetensors` is the classifier, not a part of
the pipeline.

## The world

One to three solids stand on a ground plane in front of a backdrop. One light casts shadows. The camera looks down at an
angle of 13 to 37 degrees. A caption states some of these facts, in varying words:

- shapes: {shapes}
- colours: {colors}
- sizes: {sizes}
- the light's side: {sides}

For each seed, `scenes.py` gives a scene, its captions and its image, and for every pixel the object, the depth, the
surface normal, and whether the light reaches it:

    python nano/scenes.py --n 16 --out scenes.png

## How it was made

    python nano/train.py                          # tokenizers, autoencoder (train_vae.py), then flow and text encoders
    python nano/evaluate.py --n {n}               # this page; --retrain trains the classifier anew

{training}.
Seeds from 1,000,000 on are for training, and seeds from 2,000,000 on for the classifier; all seeds below 1,000,000 are
held out. Like FLUX.1, the flow is guidance-distilled: it draws as if with a classifier-free guidance of 2, with one
forward pass per step. It is not distilled to fewer steps. The released weights are a moving average, in bfloat16.

Training used more of the truth than the captions. Solids weigh more than the ground in the error. For most of the time
a linear head on the residual stream of layer 6 had to name shape and colour at every image token; the head is not
released. Without it, the model learns words that describe a few pixels much later. So expect these two attributes to be
more linear in the middle of `nano` than in a model that was trained on captions alone. Sizes, positions, depth and
light had no such help.

License: MIT, for weights and scripts. All images and captions come from `scenes.py`; no other data was used.
"""
TRAINING = ("Training took 20 minutes for the autoencoder and 45 for a first flow (20,000 scenes, 2,630 steps of "
            "AdamW, on two CPU\ncores with AMX), then 146 minutes from its weights "
            "(`--minutes 146 --batch 48 --rate 2e-3`, without AMX;\nguided from minute 104 on)")
PARTS = {"transformer": "MMDiT", "text_encoder": "CLIP's text encoder", "text_encoder_2": "T5's encoder",
         "vae": "autoencoder, 8 times smaller latents of 16 channels"}


def parts(folder):
    """A table of the pipeline's weights."""
    rows = "| folder | what | parameters | file |\n|---|---|--:|--:|\n"
    for name, what in PARTS.items():
        file, = (folder / name).glob("*.safetensors")
        with safe_open(file, "np") as reader:
            count = sum(np.prod(reader.get_slice(key).get_shape()) for key in reader.keys())  # noqa: SIM118
        rows += f"| `{name}` | {what} | {count / 1e6:.2f} M | {file.stat().st_size / 1e6:.1f} MB |\n"
    return rows


def table(shares):
    steps = " | ".join(f"{steps} steps" for steps in shares)
    rows = f"| as captioned | {steps} | asked |\n|---|{'--:|' * (len(shares) + 1)}\n"
    for i, (what, asked) in enumerate((("shape", SHAPE), ("colour", COLOR))):
        rows += f"| {what} | {' | '.join(f'{pair[i]:.1%}' for pair in shares.values())} | {asked:.0%} |\n"
    return rows


def main(model="nano", n=300, steps=8, out=None, retrain=False, **unknown):
    """Judge --n captions in 4, --steps and 20 steps; write README.md and sheet.jpg to --out (the model's folder)."""
    session.no_unknown_flags(unknown)
    if min(n, steps) < 1:
        raise session.Mistake(f"--n {n} --steps {steps}: both are at least 1")
    folder = flux.resolve(model)
    out, model = Path(out or folder), flux.load(folder, dtype=jnp.float32)      # on a CPU faster than bfloat16
    out.mkdir(parents=True, exist_ok=True)
    if retrain or not (NANO / "judge.safetensors").exists():
        trained = {name: np.asarray(value, jnp.bfloat16) for name, value in train_judge(model).items()}
        save_file(trained, NANO / "judge.safetensors")
    params = load_judge()
    right, passed = check_judge(params, model)
    shares, said = score(params, model, n, sorted({4, steps, 20}))
    renders = scenes.batch(range(200)).images
    ratio = psnr(reconstruct(model, renders), renders)
    print(f"autoencoder: {ratio:.2f} dB on {len(renders)} held-out renders", flush=True)
    sheet(model, out / "sheet.jpg")
    (out / "README.md").write_text(README.format(
        steps=steps, n=n, table=table(shares), said=said, checks=CHECKS, few=CHECKS // 5, right=right, passed=passed,
        trusted=TRUSTED, renders=len(renders), ratio=ratio, psnr=PSNR, parts=parts(folder), cfg=model.cfg,
        shapes=", ".join(SHAPES), colors=", ".join(COLORS), sizes=", ".join(scenes.SIZES),
        sides=", ".join(scenes.SIDES), training=TRAINING))


if __name__ == "__main__":
    session.command(main)
