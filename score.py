"""Measure what an SAE leaves out: splice its reconstruction into the forward pass, and see what that costs the model.

    python score.py ckpt/                                  # → ckpt/eval.json, which dash.py shows
    python score.py sae/ --model schnell --layer 18 --site img --out eval.json      # an SAE that does not say where
    python score.py ckptB/ --attribute 123 --prompt "a red cube" --from ckptA/      # what makes feature 123 fire

Copy it with `attribution.py`, `session.py` and what these import. From Python:

    subject = session.subject(model, "ckpt")
    found = score.score(model, subject, score.dataset(model, captions, images))     # the contents of eval.json

The loss is that of flow matching, |v - (noise - x0)|² per channel, where the model sees (1 - t) x0 + t noise at a noise
level t. "Zero" and "mean" put zeros, or the mean residual of the stream at that level, in the place of the residual:
what is lost if the layer said nothing. *Loss recovered* is (ablated - spliced) / (ablated - clean), as language models'
SAEs report it: 1 is no loss at all, 0 as bad as nothing. "Change" compares velocities with the clean model's own, and
needs no true image.

B batch, N images or tokens, L noise levels, D model width, F features. A "variant" is clean, spliced, zero or mean.
"""
import json
import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import checkpoint as saved
import data as sources
import flux
import sae
import session
import vae
from session import Mistake

VARIANTS = ("clean", "spliced", "zero", "mean")
FILE, KIND = "eval.json", "fae score"
EVALUATED = 65536                                                # tokens for FVU and what goes with it


@dataclass(frozen=True, eq=False)
class Data:
    """What is noised: packed latents x0 [N, I, C] with their captions. origin: in words, for the report."""
    prompts: list[str]
    latents: np.ndarray
    grid: tuple[int, int]
    origin: str


# ---------------------------------------------------------------- what takes the residual's place


@lru_cache
def splicing(cfg):
    """`flux.Edit`'s function that puts the reconstruction by the SAE shared[name] in the residual's place."""
    return lambda name, value, each, shared: sae.splice(shared[name], cfg, value)


def constant(name, value, each, shared):
    """`flux.Edit`'s function that puts shared[name] [D] in the place of every token."""
    return jnp.broadcast_to(shared[name].astype(value.dtype), value.shape)


def edits(subject, variant, level, means=None):
    """The `flux.Edit`s of a variant at a noise level. means: {name: [D]} at that level, for "mean"."""
    if variant == "clean":
        return ()
    if variant == "spliced":
        return flux.Edit(subject.layer, subject.names, splicing(subject.cfg), shared=subject.at(level)),
    if variant == "zero":
        means = dict.fromkeys(subject.names, jnp.zeros(subject.cfg.d_in))
    return flux.Edit(subject.layer, subject.names, constant, shared=means),


# ---------------------------------------------------------------- the measures


def score(model, subject, data, *, captions=None, levels=8, steps=4, tokens=EVALUATED, seed=0, batch=16,
          text_tokens=None, progress=None):
    """All measures of an SAE, as JSON can hold them (None: undefined). Raises ValueError for values not finite.

    levels: noise levels of the loss, those of sampling in as many steps. steps: in which images are drawn. captions
    (default: those of data), tokens: of the SAE's statistics, which need no images, and many tokens to tell a rare
    feature from a dead one. progress: called with the name of the measure and the share done.
    """
    tell = progress or (lambda name, share: None)
    starts = list(prepared(model, data, levels, seed, batch, text_tokens))
    sigmas = starts[0][1].sigmas[:-1]
    loss, change = losses(model, subject, data, starts, partial(tell, "loss"))
    trained = np.isin(np.arange(len(sigmas)), np.abs(subject.levels[:, None] - sigmas).argmin(1))
    rows = [{"t": float(t), "trained": bool(there)} | summary(loss[:, i], change[:, i])
            for i, (t, there) in enumerate(zip(sigmas, trained))]
    drawn = flux.sigmas(model.scheduler, steps, data.latents.shape[1])
    starts = [(rows, replace(start, sigmas=drawn)) for rows, start in starts]
    return {
        "kind": KIND, "layer": subject.layer, "site": subject.site, "images": len(data.prompts), "data": data.origin,
        "seed": seed, "first_noise": sources.SCORED, "weights": saved.fingerprint(subject.params),
        "versions": {"jax": jax.__version__},
        "loss": summary(loss, change), "loss_where_trained": summary(loss[:, trained], change[:, trained]),
        "per_timestep": rows, "image": {"steps": steps} | distances(model, subject, starts, partial(tell, "images")),
        "sae": statistics(model, subject, captions or data.prompts, data.grid, tokens, seed, batch, text_tokens,
                          partial(tell, "statistics")), **weights(subject.params)}


def prepared(model, data, steps, seed, batch, text_tokens=None):
    """(rows of `data`, `flux.Start` from their noise) by batches of one size: the last repeats its last image."""
    levels = flux.sigmas(model.scheduler, steps, data.latents.shape[1])
    for first in range(0, len(data.prompts), batch):
        rows = np.arange(first, min(first + batch, len(data.prompts)))
        full = np.minimum(np.arange(first, first + batch), len(data.prompts) - 1)
        prompts = [data.prompts[i] for i in full]
        yield rows, sources.beginning(model, prompts, full, levels, data.grid, seed, text_tokens)


def losses(model, subject, data, starts, progress):
    """Flow-matching loss, and squared change of the velocity, [variants, L, N] each."""
    sigmas, n = starts[0][1].sigmas[:-1], len(data.prompts)
    loss, change = np.zeros((2, len(VARIANTS), len(sigmas), n))
    sums, clean = [dict.fromkeys(subject.names, 0.0) for _ in sigmas], {}
    for variants in (("clean", "spliced", "zero"), ("mean",)):
        means = [{name: total / n for name, total in of.items()} for of in sums]
        for b, (rows, start) in enumerate(starts):
            x0 = jnp.asarray(data.latents[np.resize(rows, len(start.latents))])
            for i, level in enumerate(sigmas):
                z = _noised(x0, start.latents, level)
                for variant in variants:
                    run = partial(flux.catch, names=subject.names, layer=subject.layer) if variant == "clean" else \
                        partial(flux.velocity, edits=edits(subject, variant, level, means[i]))
                    v = run(model.params, model.cfg, z, *flux.at(start, i), grid=start.grid, walk=model.walk)
                    if variant == "clean":
                        v, found = v
                        clean[b, i] = np.asarray(v, np.float32)
                        for name, x in found.items():
                            sums[i][name] += jnp.sum(x[:len(rows)].astype(jnp.float32).mean(1), 0)
                    at = VARIANTS.index(variant), i, rows
                    loss[at], change[at] = (np.asarray(e)[:len(rows)]
                                            for e in _errors(v, x0, start.latents, clean[b, i]))
            progress((b + 1 + len(starts) * (variants == ("mean",))) / len(starts) / 2)
    if not np.isfinite(loss).all():
        bad = VARIANTS[int(np.argmin(np.isfinite(loss).all((1, 2))))]
        raise Mistake(f"the loss is NaN or Inf: {bad}, layer {subject.layer}")
    return loss, change


@jax.jit
def _noised(x0, noise, level):
    return (1 - level) * x0 + level * noise


@jax.jit
def _errors(v, x0, noise, clean):
    """Mean squares [B] over tokens and channels: of v against the flow's target, and against the clean model's."""
    v = v.astype(jnp.float32)
    return jnp.mean((v - (noise - x0)) ** 2, (1, 2)), jnp.mean((v - clean) ** 2, (1, 2))


def summary(loss, change):
    """Means of [variants, ...] as a dict, with what is recovered of zero- and mean-ablation."""
    loss = dict(zip(VARIANTS, loss.reshape(len(VARIANTS), -1).mean(1).tolist()))
    change = dict(zip(VARIANTS, change.reshape(len(VARIANTS), -1).mean(1).tolist()))
    return loss | {f"recovered_{a}": recovered(loss["clean"], loss["spliced"], loss[a]) for a in VARIANTS[2:]} | {
        "change": {name: change[name] for name in VARIANTS[1:]}}


def recovered(clean, spliced, ablated):
    """(ablated - spliced) / (ablated - clean); None where ablation does not harm."""
    return (ablated - spliced) / (ablated - clean) if ablated - clean > 1e-6 * abs(clean) else None


def distances(model, subject, starts, progress):
    """Of images drawn with a variant in all steps, against the clean ones of the same noise: {variant: {"rmse": root
    mean square over pixels in levels of 255, the mean over images; "psnr": dB, of the mean square over all images}}."""
    steps, n = len(starts[0][1].sigmas) - 1, sum(len(rows) for rows, _ in starts)
    sums, squares, clean = [dict.fromkeys(subject.names, 0.0) for _ in range(steps)], {}, []
    for rows, start in starts:
        acts = flux.capture(model, start, layer=subject.layer, site=subject.site)
        for i, name, x in session.streams(subject, acts[:, :len(rows)], start):
            sums[i][name] += jnp.sum(x.astype(jnp.float32).mean(1), 0)
        clean.append(flux.decode(model, flux.sample(model, start), start.grid)[:len(rows)])
    means = [{name: total / n for name, total in of.items()} for of in sums]
    for b, ((rows, start), images) in enumerate(zip(starts, clean)):
        for variant in VARIANTS[1:]:
            ends = flux.sample(model, start, edits=lambda i: edits(subject, variant, start.sigmas[i], means[i]))
            drawn = flux.decode(model, ends, start.grid)[:len(rows)].astype(np.float32)
            squares.setdefault(variant, []).append(((drawn - images) ** 2).mean((1, 2, 3)))
        progress((b + 1) / len(starts))
    squares = {variant: np.concatenate(parts) for variant, parts in squares.items()}
    return {variant: {"rmse": float(np.sqrt(square).mean()), "psnr": decibels(square.mean())}
            for variant, square in squares.items()}


def decibels(square):
    """PSNR of a mean square over uint8 pixels; None where images are the same."""
    return float(10 * np.log10(255 ** 2 / square)) if square > 0 else None


def statistics(model, subject, captions, grid, tokens, seed, batch, text_tokens, progress):
    """`sae.evaluate` on the activations of the kind that it was trained on: from noise, at its own noise levels, of at
    least so many tokens; the captions begin again with new noise where they are too few. Means over groups by their
    tokens; "density": share of tokens at which each feature fires, as a histogram."""
    totals, done, numbers = {}, 0, np.arange(batch)
    levels = np.append(subject.levels, 0).astype(np.float32)
    while done < tokens:
        texts = [captions[i % len(captions)] for i in numbers]
        start = sources.beginning(model, texts, numbers, levels, grid, seed, text_tokens)
        acts = flux.capture(model, start, layer=subject.layer, site=subject.site)
        real = sources.real_tokens(model, texts, "txt", start.condition[0].shape[1], 0)
        for t, name, x in session.streams(subject, acts, start):
            rows = np.asarray(x, np.float32)
            rows = rows[real] if name.endswith("txt") and not subject.padding else rows
            p = subject.at(subject.levels[t])[name]
            totals[t, name] = sae.added(totals.get((t, name), {}), p, subject.cfg, rows)
        done, numbers = done + math.prod(acts.shape[:3]), numbers + batch
        progress(min(done / tokens, 1))
    each = list(map(sae.evaluation, totals.values()))
    share = np.array([one.tokens for one in each]) / sum(one.tokens for one in each)
    density = sum(w * one.density for w, one in zip(share, each))
    names = ("fvu", "fvu_standardized", "l0", "cosine", "variance_explained")
    return {name: float(sum(w * getattr(one, name) for w, one in zip(share, each))) for name in names} | {
        "tokens": int(sum(one.tokens for one in each)), "dead": float((density == 0).mean()),
        "density": histogram(density)}


def histogram(density):
    """Features by the power of ten of their density, in half decades from 1e-6 on; "never": those without any."""
    edges = np.arange(-6, 0.5, 0.5)
    counts, _ = np.histogram(np.log10(density[density > 0]).clip(-6, 0), edges)
    return {"never": int((density == 0).sum()), "log10_from": edges[:-1].tolist(), "features": counts.tolist()}


def weights(params):
    """Quantiles of decoder rows' norms, and of the cosines between each feature's encoder column and decoder row, in
    the space of the file: raw residuals. (Normalization scales the two against each other there.)"""
    enc, dec = (np.concatenate([np.asarray(part, np.float64) for part in parts])
                for parts in zip(*((p["W_enc"].T, p["W_dec"]) for p in params)))
    norms = np.linalg.norm(dec, axis=1)
    cosine = (enc * dec).sum(1) / np.maximum(np.linalg.norm(enc, axis=1) * norms, 1e-30)
    marks = {"least": 0, "p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "most": 100}
    return {name: {mark: float(np.percentile(x, p)) for mark, p in marks.items()}
            for name, x in (("decoder_norm", norms), ("encoder_decoder_cosine", cosine))}


# ---------------------------------------------------------------- true images


def dataset(model, prompts, images=None, *, size=None, steps=4, seed=0, batch=16, text_tokens=None,
            origin="images that were given"):
    """`Data` from images uint8 [N, H, W, 3], encoded by the VAE. Without any, the model's own samples in `steps` steps
    of sampling stand in for true ones, from other noise than the loss's."""
    size = size or min(256, model.size)
    grid, out = flux.token_grid(model, size), []
    for first in range(0, len(prompts), batch):
        rows = np.minimum(np.arange(first, first + batch), len(prompts) - 1)
        if images is None:
            levels = flux.sigmas(model.scheduler, steps, grid[0] * grid[1])
            start = sources.beginning(model, [prompts[i] for i in rows], rows, levels, grid, seed, text_tokens,
                              sources.SCORED + len(prompts))
            part = flux.sample(model, start)
        else:
            part = _encoded(model.vae[1], model.vae[0], np.stack([images[i] for i in rows]))
        out.append(np.asarray(part, np.float32))
    origin = f"the model's own samples in {steps} steps" if images is None else origin
    return Data(list(prompts), np.concatenate(out)[:len(prompts)], grid, origin)


@partial(jax.jit, static_argnums=1)
def _encoded(params, cfg, images):
    return flux.pack(vae.encode(params, cfg, images.astype(jnp.float32) / 127.5 - 1))


def folder_of_images(folder, n, size):
    """(captions, images uint8 [N, H, W, 3]) of a folder: name.txt beside each name.png (or .jpg, .webp). Cut to the
    middle, and scaled."""
    from PIL import Image, ImageOps
    files = sorted(f for f in Path(folder).glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))[:n]
    if not files:
        raise Mistake(f"--images {folder}: there is no folder with .png, .jpg or .webp files")
    if missing := [f for f in files if not f.with_suffix(".txt").is_file()]:
        raise Mistake(f"--images {folder}: {missing[0].name} has no caption {missing[0].with_suffix('.txt').name}")
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    read = [np.asarray(ImageOps.fit(Image.open(f).convert("RGB"), (width, height))) for f in files]
    return [f.with_suffix(".txt").read_text(encoding="utf-8").strip() for f in files], np.stack(read)




# ---------------------------------------------------------------- the command line


def main(checkpoint="ckpt", out="", n=64, levels=8, steps=None, tokens=EVALUATED, prompts="", prompt_field="",
         images="", model="", layer=None, site="", seed=0, batch=None, dtype="", quant="", transformer="",
         attribute=None, prompt="", **unknown):
    """Score the SAE in the folder `checkpoint`, print a table, and write eval.json into it, or to --out FILE.

    --n: images. --levels: noise levels of the loss. --steps: in which images are drawn. --tokens: for FVU, L0 and dead
    features. --images FOLDER: true images, a name.txt with the caption beside each; otherwise nano's scenes are
    rendered, and other models' own samples stand in. --model, --layer, --site: where the checkpoint does not say.
    --attribute 123 --prompt "a red cube" [--from ckptA/]: what makes this feature fire, of the prompt's tokens and of
    the features of an earlier layer's SAE.
    """
    upstream = str(unknown.pop("from", ""))                      # a word of Python's own
    session.no_unknown_flags(unknown)
    numbers = {"n": n, "levels": levels, "steps": steps, "tokens": tokens, "seed": seed, "batch": batch, "layer": layer}
    session.check_whole({name: value for name, value in numbers.items() if value is not None})
    asked = attribute is not None
    if asked != bool(prompt) or (upstream and not asked):
        raise Mistake('--attribute needs a prompt: --attribute 123 --prompt "a red cube" --from ckptA/')
    target = session.opened(checkpoint, model=model, layer=layer, site=site)
    folder, cfg = flux.read_config(target.model)
    target = session.placed(target, folder, cfg)
    load = partial(session.load_model, target.model, target.run, dtype=dtype, quant=quant, transformer=transformer)
    if not asked:
        check_out(file := Path(out) if out else Path(checkpoint) / FILE)
        given = captions(target, folder, prompts, prompt_field, images, n)
        report(file, load(), target, n, given, levels, steps, tokens, seed, batch)
        return
    import attribution
    target.check_feature(attribute)
    source = None
    if upstream:
        source = session.placed(session.opened(upstream, model=target.model), folder, cfg)
        attribution.check_order(source, target)
    attribution.explain(load(), target, attribute, prompt, source, seed)


def captions(subject, folder, prompts, field, images, n):
    """(captions, images uint8 or None for the model's own, origin), from the flags and what the checkpoint says; more
    than n captions where there are, for the SAE's statistics: enough for images of 64 tokens, as nano's. folder: of the
    model."""
    size, many = subject.size or min(256, flux.default_size(folder)), max(n, EVALUATED // 64)
    if images:
        if prompts:
            raise Mistake("--images brings its own captions: leave --prompts out")
        return *folder_of_images(images, n, size), f"images of {images}"
    texts, drawn = sources.examples(*session.prompts_of(subject, prompts, field), many)
    if not drawn or not (folder / "scenes.py").is_file() or not isinstance(size, int):
        return texts, None, ""
    render = sources.scenes().render                             # this model draws them, as squares
    return texts, [render(scene, size).image for scene in drawn[:n]], "renders of held-out scenes"


def report(file, model, target, n, given, levels, steps, tokens, seed, batch):
    """Measure, write and print."""
    texts, images, origin = given
    steps = steps or session.default_steps(model.cfg)
    batch = batch or min(session.default_batch(model.cfg), n, len(texts))
    options = {"seed": seed, "batch": batch, "text_tokens": target.text_tokens}
    data = dataset(model, texts[:n], images, size=target.size, steps=steps, origin=origin, **options)
    print(f"data: {len(data.prompts)} images, {data.origin}")
    with tqdm(total=3.0, desc="scoring", dynamic_ncols=True, bar_format="{desc}: {percentage:3.0f}%|{bar}|") as bar:
        places = {"loss": 0, "images": 1, "statistics": 2}

        def progress(name, share):
            bar.set_description(name)
            bar.update(places[name] + share - bar.n)

        found = score(model, target, data, captions=texts, levels=levels, steps=steps, tokens=tokens, progress=progress,
                      **options)
    found |= {"model": target.model, "prompts": target.run.get("prompts")}
    write(file, found)
    print(table(found))
    print(f"scores: {file}")


def check_out(file):
    """Refuse, before any work, to write where something else is."""
    if not file.parent.is_dir():
        raise Mistake(f"--out {file}: there is no folder {file.parent}")
    if file.exists():
        try:
            ours = file.is_file() and json.loads(file.read_text(encoding="utf-8"))["kind"] == KIND
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise Mistake(f"{file} exists and was not written by score.py; choose another --out")


def write(file, found):
    """JSON that appears whole or not at all."""
    new = file.with_name(f".{file.name}.{os.getpid()}{saved.TMP}")
    try:
        with open(new, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def table(found):
    """The scores, as text."""
    show = lambda x, digits=4: "–" if x is None else f"{x:.{digits}f}"
    heads = [name.rjust(10) for name in VARIANTS] + [f"rec. {name}".rjust(12) for name in VARIANTS[2:]]
    lines = ["t".ljust(16) + "".join(heads)]
    rows = [(f"{row['t']:.3f}{' *' * row['trained']}", row) for row in found["per_timestep"]]
    for name, row in [*rows, ("all", found["loss"]), ("* as trained", found["loss_where_trained"])]:
        lines.append(name.ljust(16) + "".join(show(row[v]).rjust(10) for v in VARIANTS)
                     + "".join(show(row[f"recovered_{v}"], 3).rjust(12) for v in VARIANTS[2:]))
    image = found["image"]
    lines.append(f"images, {image['steps']} steps, RMSE of 255: " + ", ".join(
        f"{v} {image[v]['rmse']:.2f} ({show(image[v]['psnr'], 1)} dB)" for v in VARIANTS[1:]))
    stats, norm, cosine = found["sae"], found["decoder_norm"], found["encoder_decoder_cosine"]
    lines.append(f"FVU {stats['fvu_standardized']:.3f} (raw {stats['fvu']:.3f}), L0 {stats['l0']:.1f}, dead "
                 f"{stats['dead']:.1%} on {stats['tokens']:,} tokens; decoder norm {norm['median']:.3f}, "
                 f"encoder-decoder cosine {cosine['median']:.3f} (medians, raw space)")
    return "\n".join(lines)


if __name__ == "__main__":
    session.command(main)
