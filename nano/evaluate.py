"""Measure the nano family on captions it was never trained on; write README.md and sheet.jpg into nano/.

    python nano/evaluate.py --n 300

`inverse.py` reads the images: which solids are there, in which colours and shapes. Before it judges anything, it is
checked on true renders that it has not seen.
"""
import sys
import textwrap
from functools import partial
from pathlib import Path

NANO = Path(__file__).resolve().parent
sys.path[:0] = [str(NANO.parent), str(NANO)]

import cpu

if __name__ == "__main__":
    cpu.fast()                                                   # before jax is imported

import inverse
import jax.numpy as jnp
import numpy as np
import scenes
from safetensors import safe_open

import flux
import session

SHAPES, COLORS, SIZE = inverse.SHAPES, inverse.COLORS, inverse.SIZE
# Each model of the family with the numbers of steps to measure, and the scale of guidance (None: it takes none).
FAMILY = {"nano": ((1, 2, 4), None), "nano-dev": ((8, 20), 3.0), "nano-base": ((20,), 3.0)}


# ---------------------------------------------------------------- images


def generate(model, prompts, steps, guidance=None, batch=50):
    """One image per prompt, uint8 [B, 128, 128, 3]; every batch has a seed of its own. A model without a guidance input
    that gets a guidance is run with classifier-free guidance (arXiv 2207.12598): twice a step."""
    parts = []
    for i in range(0, len(prompts), batch):
        some = [*prompts[i:i + batch], *prompts[-1:] * batch][:batch]    # one shape, one compile
        if guidance is None or model.cfg.guidance_embeds:
            images = flux.generate(model, some, steps=steps, size=SIZE, seed=i, guidance=guidance)
        else:
            images = _twice(model, some, steps, i, guidance)
        parts.append(np.asarray(images)[:len(prompts) - i])
    return np.concatenate(parts)


def _twice(model, prompts, steps, seed, scale):
    start = flux.prepare(model, prompts, steps=steps, size=SIZE, seed=seed)
    nothing, latents = flux.condition(model, [""] * len(prompts)), start.latents
    for i in range(steps):
        text, pooled, time, _ = flux.at(start, i)
        v, without = (flux.velocity(model.params, model.cfg, latents, *said, time, grid=start.grid)
                      for said in ((text, pooled), nothing[:2]))
        latents = latents + (start.sigmas[i + 1] - start.sigmas[i]) * (without + scale * (v - without))
    return flux.decode(model, latents, start.grid)


def psnr(a, b):
    """Mean over uint8 images of the peak signal-to-noise ratio in dB."""
    return np.mean(10 * np.log10(255 ** 2 / ((a.astype(np.float32) - b) ** 2).mean((1, 2, 3))))


# ---------------------------------------------------------------- as captioned


def judged(network, draw, n):
    """Shares of held-out captions that come true: {"shape", "cube", "colour": of n with one object; "two", "three": of
    all objects in n / 3 with two and three}. Only objects with a stated colour or shape count.

    draw: (captions) → images."""
    worlds = [scenes.sample(seed, objects=1) for seed in range(n)]
    prompts = [scenes.caption(scene) for scene in worlds]
    said = np.array([stated(prompt, scene.solids[0]) for prompt, scene in zip(prompts, worlds)])
    found = verdicts(inverse.read(network, draw(prompts)))
    right = np.array([labels_of(scene) for scene in worlds]) == found
    cube = np.array([scene.solids[0].shape == "cube" for scene in worlds]) & said[:, 0]
    shares = {"shape": right[said[:, 0], 0], "cube": right[cube, 0], "colour": right[said[:, 1], 1]}
    for name, objects in (("two", 2), ("three", 3)):
        worlds = [scenes.sample(seed, objects=objects) for seed in range(n // 3)]
        prompts = [scenes.caption(scene) for scene in worlds]
        there = inverse.objects(inverse.read(network, draw(prompts)))
        shares[name] = [(solid.color, solid.shape) in seen for scene, prompt, seen in zip(worlds, prompts, there)
                        for solid in scene.solids if named(prompt, solid)]
    return {name: float(np.mean(values)) for name, values in shares.items()}


def stated(caption, solid):
    """Whether a caption names the solid's shape, and its colour: some say "object" or leave the colour out."""
    words = caption.replace(",", "").split()
    return solid.shape in words or scenes.SYNONYMS.get(solid.shape) in words, solid.color in words


def named(caption, solid):
    """Whether a caption names the solid by colour and shape."""
    words = (solid.shape, scenes.SYNONYMS.get(solid.shape))
    return any(f"{solid.color} {word}" in caption for word in words)


def labels_of(scene):
    return SHAPES.index(scene.solids[0].shape), COLORS.index(scene.solids[0].color)


def verdicts(seen, least=6):
    """Indices [B, 2] into SHAPES and COLORS of what most cells of solids show; -1 where fewer than `least` show one."""
    found = np.full((len(seen.shape), 2), -1)
    for row, shapes, colors in zip(found, seen.shape, seen.color):
        on = (shapes < len(SHAPES)) & (colors < len(COLORS))
        if on.sum() >= least:
            row[:] = np.bincount(shapes[on]).argmax(), np.bincount(colors[on]).argmax()
    return found


def measured(network, models, n):
    """The rows of the table: (model, steps, `judged`)."""
    rows = []
    for name, model in models.items():
        counts, guidance = FAMILY[name]
        for steps in counts:
            shares = judged(network, partial(generate, model, steps=steps, guidance=guidance), n)
            rows.append((name, steps, shares))
            print(f"{name}, {steps} steps: {', '.join(f'{what} {share:.1%}' for what, share in shares.items())}",
                  flush=True)
    return rows


def sheet(models, file, rows=3, step=SIZE + 6, left=190, top=22):
    """Captions of the first held-out scenes of one, two and three objects: what each model draws, and true renders."""
    from PIL import Image, ImageDraw, ImageFont
    worlds = [scenes.sample(seed, objects=objects) for objects in (1, 2, 3) for seed in range(rows)]
    prompts = [scenes.caption(scene) for scene in worlds]
    columns = {}
    for name, model in models.items():
        counts, guidance = FAMILY[name]
        for steps in counts:
            columns[f"{name}, {steps}"] = generate(model, prompts, steps, guidance, len(prompts))
    columns["a true render"] = [scenes.render(scene, SIZE).image for scene in worlds]
    out = Image.new("RGB", (left + len(columns) * step, top + len(worlds) * step), "white")
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

The nano family are real FLUX pipelines, small enough for a laptop. They draw a world in which everything is known. So
you can score features, probes and steering against the truth, which no real model allows. The scripts in this folder
made them from nothing; `evaluate.py` wrote this page, text and figures.

![captions, what each model draws, and a true render](sheet.jpg)

*The first held-out scenes with one, two and three objects; we selected nothing. A caption leaves much open: the right
column shows one of the many scenes that it describes.*

    python flux.py "a small red cube to the left of a blue sphere, lit from the left" --model nano --steps 4

| folder | like | steps | guidance |
|---|---|---|---|
| `nano` | FLUX.1-schnell | 1 to 4 | none |
| `nano-dev` | FLUX.1-dev | 8 and more | an input, 1 to 4 |
| `nano-base` | the flow before distillation | 20 and more | classifier-free, two passes per step |

They share one autoencoder, text encoders and tokenizers. The folders have the layout of diffusers, and diffusers draws
the same images from the same noise:

    pipe = diffusers.FluxPipeline.from_pretrained("nano", torch_dtype=torch.float32)
    pipe("a large yellow cone", height=128, width=128, num_inference_steps=4, max_sequence_length=32).images[0]

They draw images of 128×128 pixels, know only the words of their captions, and take up to 32 text tokens.

## Figures

{table}
Shares of held-out captions that come true, of {n} with one object and of {third} each with two and three; `nano-dev`
and `nano-base` draw with guidance {guidance:g}. Only objects with a stated colour and shape count. `inverse.py` reads
the images: a small network, trained on true renders, says what every 4×4 pixels show. On {checked} renders that it was
not trained on:

{reading}
The autoencoder's mean PSNR over {renders} held-out renders is {ratio:.1f} dB.

{parts}
Layers are numbered from 0: {cfg.num_layers} double blocks, then {cfg.num_single_layers} single blocks, with
{cfg.num_attention_heads} heads of width {cfg.attention_head_dim}.

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

`inverse.py` says the same of images that a model drew:

    import inverse
    seen = inverse.read(inverse.load(), images)      # uint8 [B, 128, 128, 3]
    inverse.tokens(seen)["color: red"]               # the red share of every image token [B, 8, 8]

## How they were made

    python nano/train.py                          # tokenizers, autoencoder, base, dev, schnell: hours of two CPU cores
    python nano/inverse.py                        # the network that reads images
    python nano/evaluate.py --n {n}               # this page

Seeds from 1,000,000 on are for training, and seeds from 2,000,000 on for `inverse.py`; all seeds below 1,000,000 are
held out. No stage sees more than captions and images. The docstring of `train.py` describes the stages. The weights are
moving averages, in bfloat16.

{training}

License: MIT, for weights and scripts. All images and captions come from `scenes.py`; no other data was used.
"""
TRAINING = """The weights took three and a half hours of two CPU cores: base 152 minutes, dev 12, straight 24 with
its pairs, schnell 30. That is little; the loss of base was still falling. Many cubes have round corners, and in scenes
of several objects colours and shapes get swapped. `dev` and `nano` draw what base taught them, mistakes included."""
PARTS = {"transformer": "MMDiT", "text_encoder": "CLIP's text encoder", "text_encoder_2": "T5's encoder",
         "vae": "autoencoder, 8 times smaller latents of 4 channels"}


def parts(folder):
    """A table of the pipeline's weights."""
    rows = "| folder | what | parameters | file |\n|---|---|--:|--:|\n"
    for name, what in PARTS.items():
        file, = (folder / name).glob("*.safetensors")
        with safe_open(file, "np") as reader:
            count = sum(np.prod(reader.get_slice(key).get_shape()) for key in reader.keys())  # noqa: SIM118
        rows += f"| `{name}` | {what} | {count / 1e6:.2f} M | {file.stat().st_size / 1e6:.1f} MB |\n"
    return rows


def table(rows):
    titles = {"shape": "shape", "cube": "cubes", "colour": "colour", "two": "of two objects", "three": "of three"}
    text = f"| model | steps | {' | '.join(titles.values())} |\n|---|{'--:|' * (len(titles) + 1)}\n"
    for name, steps, shares in rows:
        text += f"| `{name}` | {steps} | {' | '.join(f'{shares[what]:.1%}' for what in titles)} |\n"
    return text


def reading(found):
    rows = "| read correctly | |\n|---|--:|\n"
    for what, value in found.items():
        rows += f"| {what} | {f'{value:.2f}' if 'error' in what else f'{value:.1%}'} |\n"
    return rows


def main(models="nano,nano-dev,nano-base", n=300, checked=1000, out=NANO, **unknown):
    """Judge --n captions with each of --models; write README.md and sheet.jpg to --out."""
    session.no_unknown_flags(unknown)
    names = list(models) if isinstance(models, (tuple, list)) else str(models).split(",")
    if min(n, checked) < 3:
        raise session.Mistake(f"--n {n} --checked {checked}: both are at least 3")
    if wrong := [name for name in names if Path(name).name not in FAMILY]:
        raise session.Mistake(f"--models {wrong[0]}: should be some of {', '.join(FAMILY)}, or folders of these names")
    folders = {Path(name).name: flux.resolve(name) for name in names}
    loaded = {name: flux.load(folder, dtype=jnp.float32) for name, folder in folders.items()}
    (out := Path(out)).mkdir(parents=True, exist_ok=True)
    first, network = next(iter(loaded)), inverse.load()
    found = inverse.check(network, checked)
    print(reading(found), flush=True)
    renders = scenes.batch(range(200)).images
    ratio = psnr(inverse.reconstruct(loaded[first], renders), renders)
    print(f"autoencoder: {ratio:.2f} dB on {len(renders)} held-out renders", flush=True)
    sheet(loaded, out / "sheet.jpg")
    rows = measured(network, loaded, n)
    (out / "README.md").write_text(README.format(
        n=n, third=n // 3, table=table(rows), checked=checked, reading=reading(found), renders=len(renders),
        ratio=ratio, parts=parts(folders[first]), cfg=loaded[first].cfg, guidance=FAMILY["nano-dev"][1],
        shapes=", ".join(SHAPES), colors=", ".join(COLORS), sizes=", ".join(scenes.SIZES),
        sides=", ".join(scenes.SIDES), training=TRAINING))


if __name__ == "__main__":
    session.command(main)
