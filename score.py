"""Measure what an SAE leaves out: splice its reconstruction into the forward pass, and see what that costs the model.

    python score.py ckpt/                                  # → ckpt/eval.json, which dash.py shows
    python score.py sae/ --model schnell --layer 18 --site img --out eval.json      # an SAE that does not say where
    python score.py --input --model schnell                # where each layer keeps the model's input: see `inputs.py`
    python score.py ckptB/ --attribute 123 --prompt "a red cube" --from ckptA/      # why feature 123 fires

Copy it with `attribution.py`, `inputs.py`, `variance.py`, `session.py` and what these import. From Python:

    subject = session.subject(model, "ckpt")
    found = score.score(model, subject, score.dataset(model, captions, images))     # the contents of eval.json

The loss is the flow-matching loss, |v - (noise - x0)|² per channel. At noise level t the model sees
(1 - t) x0 + t noise. There are four variants. "clean" is the unchanged model. "spliced" replaces the residual by the
SAE's reconstruction. "zero" and "mean" replace it by zeros, or by the mean residual of the stream at that noise level:
they show the loss without what the layer says. *Loss recovered* is (ablated - spliced) / (ablated - clean), as for SAEs
of language models: 1 means that nothing is lost, 0 that the SAE is as bad as the ablation. "Change" compares velocities
with those of the clean model, and needs no true images.

B batch, N images or tokens, L noise levels, D model width, F features.
"""
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

import apply
import checkpoint as saved
import data as sources
import flux
import inputs
import sae
import session
import vae
import variance
from session import Mistake

VARIANTS = ("clean", "spliced", "zero", "mean")
FILE, KIND = "eval.json", "fae score"
VARIED = 64                                                      # prompts for the analysis of variance
EVALUATED = 65536                                                # tokens for FVU, L0 and dead features


@dataclass(frozen=True, eq=False)
class Data:
    """Images to add noise to: packed latents x0 [N, I, C] with their captions. origin: says where they are from."""
    prompts: list[str]
    latents: np.ndarray
    grid: tuple[int, int]
    origin: str


# ---------------------------------------------------------------- replacing the residual


@lru_cache
def splicing(cfg: sae.Config) -> Callable:
    """Return a `flux.Edit`'s function that replaces the residual by its reconstruction, with the SAE shared[name]."""
    return lambda name, value, each, shared: apply.splice(shared[name], cfg, value)


def constant(name: str, value: Array, each: None, shared: dict[str, Array]) -> Array:
    """Replace every token's residual by shared[name] [D]: the function of a `flux.Edit`."""
    return jnp.broadcast_to(shared[name].astype(value.dtype), value.shape)


def edits(subject: session.Subject, variant: str, level: float, means: dict[str, Array] | None = None
          ) -> tuple[flux.Edit, ...]:
    """Return the `flux.Edit`s of a variant at a noise level. means: {name: [D]} at that level, for "mean"."""
    if variant == "clean":
        return ()
    if variant == "spliced":
        return flux.Edit(subject.layer, subject.names, splicing(subject.cfg), shared=subject.at(level)),
    if variant == "zero":
        means = dict.fromkeys(subject.names, jnp.zeros(subject.cfg.d_in))
    return flux.Edit(subject.layer, subject.names, constant, shared=means),


# ---------------------------------------------------------------- the measures


def score(model: flux.Model, subject: session.Subject, data: Data, *, captions: Sequence[str] | None = None,
          levels: int = 8, steps: int = 4, tokens: int = EVALUATED, seed: int = 0, batch: int = 16,
          text_tokens: int | None = None, progress: Callable[[str, float], object] | None = None) -> dict:
    """Return all measures of an SAE, ready for JSON (None: undefined). Raise ValueError if the loss is not finite.

    levels: number of noise levels of the loss, those of sampling in as many steps. steps: sampling steps of the images.
    captions (default: those of data), tokens: for the SAE's statistics. These need no images, but many tokens, to tell
    a rare feature from a dead one. progress: called with the name of the measure and the finished share of it.
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
                          partial(tell, "statistics")), **weights(subject.params),
        "variance": explained(model, subject, captions or data.prompts, seed, batch, partial(tell, "variance"))}


def prepared(model: flux.Model, data: Data, steps: int, seed: int, batch: int, text_tokens: int | None = None
             ) -> Iterator[tuple[np.ndarray, flux.Start]]:
    """Yield (rows of `data`, `flux.Start` from their noise). All batches have one size: the last repeats its last
    image."""
    levels = flux.sigmas(model.scheduler, steps, data.latents.shape[1])
    for first in range(0, len(data.prompts), batch):
        rows = np.arange(first, min(first + batch, len(data.prompts)))
        full = np.minimum(np.arange(first, first + batch), len(data.prompts) - 1)
        prompts = [data.prompts[i] for i in full]
        yield rows, sources.beginning(model, prompts, full, levels, data.grid, seed, text_tokens)


def losses(model: flux.Model, subject: session.Subject, data: Data, starts: Sequence[tuple[np.ndarray, flux.Start]],
           progress: Callable[[float], object]) -> tuple[np.ndarray, np.ndarray]:
    """Return the flow-matching loss and the squared change of the velocity, [variants, L, N] each."""
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
                    run = (partial(flux.velocity_and_values, names=subject.names, layer=subject.layer)
                           if variant == "clean" else
                           partial(flux.velocity, edits=edits(subject, variant, level, means[i])))
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
        raise Mistake(f"the loss of the variant {bad} is NaN or Inf at layer {subject.layer}; check the weights, or "
                      "try --dtype float32")
    return loss, change


@jax.jit
def _noised(x0, noise, level):
    return (1 - level) * x0 + level * noise


@jax.jit
def _errors(v, x0, noise, clean):
    """Return the mean squared errors [B] of v, over tokens and channels: to the target and to the clean velocity."""
    v = v.astype(jnp.float32)
    return jnp.mean((v - (noise - x0)) ** 2, (1, 2)), jnp.mean((v - clean) ** 2, (1, 2))


def summary(loss: np.ndarray, change: np.ndarray) -> dict:
    """Return the means of [variants, ...] as a dict, with the loss recovered from zero and mean ablation."""
    loss, change = (dict(zip(VARIANTS, a.reshape(len(VARIANTS), -1).mean(1).tolist())) for a in (loss, change))
    return loss | {f"recovered_{a}": recovered(loss["clean"], loss["spliced"], loss[a]) for a in VARIANTS[2:]} | {
        "change": {name: change[name] for name in VARIANTS[1:]}}


def recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """Return (ablated - spliced) / (ablated - clean), or None if the ablation does no harm."""
    return (ablated - spliced) / (ablated - clean) if ablated - clean > 1e-6 * abs(clean) else None


def distances(model: flux.Model, subject: session.Subject, starts: Sequence[tuple[np.ndarray, flux.Start]],
              progress: Callable[[float], object]) -> dict[str, dict[str, float | None]]:
    """Draw images with each variant in all steps, and compare them with clean images from the same noise.

    Return {variant: {"rmse": root mean square over an image's pixels, in levels of 255, mean over images; "psnr": in
    dB, from the mean square over all images}}.
    """
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


def decibels(square: float) -> float | None:
    """Return the PSNR for a mean squared error of uint8 pixels; None if the images are equal."""
    return float(10 * np.log10(255 ** 2 / square)) if square > 0 else None


def statistics(model: flux.Model, subject: session.Subject, captions: Sequence[str], grid: tuple[int, int], tokens: int,
               seed: int, batch: int, text_tokens: int | None, progress: Callable[[float], object]) -> dict:
    """Return `apply.evaluate` on at least `tokens` tokens of activations like those of training: from noise, at the
    SAE's own noise levels. If there are too few captions, they repeat with new noise.

    The means over groups are weighted by tokens. "density": histogram of the share of tokens on which a feature fires.
    """
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
            totals[t, name] = apply.added(totals.get((t, name), {}), p, subject.cfg, rows)
        done, numbers = done + math.prod(acts.shape[:3]), numbers + batch
        progress(min(done / tokens, 1))
    each = list(map(apply.evaluation, totals.values()))
    share = np.array([one.tokens for one in each]) / sum(one.tokens for one in each)
    density = sum(w * one.density for w, one in zip(share, each))
    names = ("fvu", "fvu_standardized", "l0", "cosine", "variance_explained")
    return {name: float(sum(w * getattr(one, name) for w, one in zip(share, each))) for name in names} | {
        "tokens": int(sum(one.tokens for one in each)), "dead": float((density == 0).mean()),
        "density": histogram(density)}


def explained(model: flux.Model, subject: session.Subject, captions: Sequence[str], seed: int, batch: int,
              progress: Callable[[float], object]) -> dict | None:
    """Return what explains the features' variance (see `variance.py`): a summary, and the shares of each feature. None
    for a single caption."""
    found = session.explained(model, subject, captions, VARIED, seed=seed, batch=batch, progress=progress)
    if found is None:
        return None
    shares = {name: [None if np.isnan(x) else round(float(x), 4) for x in getattr(found, name)]
              for name in variance.NAMES}
    return {"prompts": min(len(set(captions)), VARIED), **found.summary(), "features": shares}


def histogram(density: np.ndarray) -> dict:
    """Count features by the power of ten of their density, in half decades from 1e-6 on. "never": those at 0."""
    edges = np.arange(-6, 0.5, 0.5)
    counts, _ = np.histogram(np.log10(density[density > 0]).clip(-6, 0), edges)
    return {"never": int((density == 0).sum()), "log10_from": edges[:-1].tolist(), "features": counts.tolist()}


def weights(params: Sequence[dict[str, Array]]) -> dict[str, dict[str, float]]:
    """Return quantiles of the decoder rows' norms, and of the cosine between each feature's encoder column and decoder
    row, in the space of the file: raw residuals. (There, normalization scales the two in opposite ways.)"""
    enc, dec = (np.concatenate([np.asarray(part, np.float64) for part in parts])
                for parts in zip(*((p["W_enc"].T, p["W_dec"]) for p in params)))
    norms = np.linalg.norm(dec, axis=1)
    cosine = (enc * dec).sum(1) / np.maximum(np.linalg.norm(enc, axis=1) * norms, 1e-30)
    marks = {"least": 0, "p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "most": 100}
    return {name: {mark: float(np.percentile(x, p)) for mark, p in marks.items()}
            for name, x in (("decoder_norm", norms), ("encoder_decoder_cosine", cosine))}


# ---------------------------------------------------------------- true images


def dataset(model: flux.Model, prompts: Sequence[str], images: np.ndarray | Sequence[np.ndarray] | None = None, *,
            size: int | tuple[int, int] | None = None, steps: int = 4, seed: int = 0, batch: int = 16,
            text_tokens: int | None = None, origin: str = "images that were given") -> Data:
    """Return `Data` from images uint8 [N, H, W, 3], encoded by the VAE. Without images, use the model's own samples in
    `steps` steps; their noise differs from that of the loss."""
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


def folder_of_images(folder: str | Path, n: int, size: int | tuple[int, int]) -> tuple[list[str], np.ndarray]:
    """Return (captions, images uint8 [N, H, W, 3]) of a folder with a name.txt for each name.png (or .jpg, .webp). Crop
    the images to the middle, and scale them."""
    from PIL import Image, ImageOps
    files = sorted(f for f in Path(folder).glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))[:n]
    if not files:
        raise Mistake(f"--images {folder}: there is no folder with .png, .jpg or .webp files at this path")
    if missing := [f for f in files if not f.with_suffix(".txt").is_file()]:
        raise Mistake(f"--images {folder}: {missing[0].name} has no caption {missing[0].with_suffix('.txt').name}")
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    read = [np.asarray(ImageOps.fit(Image.open(f).convert("RGB"), (width, height))) for f in files]
    return [f.with_suffix(".txt").read_text(encoding="utf-8").strip() for f in files], np.stack(read)


# ---------------------------------------------------------------- the command line


def main(checkpoint: str = "ckpt", out: str = "", n: int = 64, levels: int = 8, steps: int | None = None,
         tokens: int = EVALUATED, prompts: str = "", prompt_field: str = "", images: str = "", model: str = "",
         layer: int | None = None, site: str = "", seed: int = 0, batch: int | None = None, dtype: str = "",
         quant: str = "", transformer: str = "", attribute: int | None = None, prompt: str = "",
         input: bool = False, **unknown) -> None:
    """Score the SAE in the folder `checkpoint`, print a table, and write eval.json into it, or to --out FILE.

    --n: number of images. --levels: noise levels of the loss. --steps: sampling steps of the images. --tokens: for FVU,
    L0 and dead features. --images FOLDER: true images, each with its caption in a name.txt beside it. The default is
    renders of nano's scenes, and for other models the model's own samples. --model, --layer, --site: needed if the
    checkpoint does not state them.
    --attribute 123 --prompt "a red cube" [--from ckptA/]: print why this feature fires: how much each of the prompt's
    tokens and each feature of an earlier layer's SAE adds to it.
    --input: print where --layer, or each layer, of --model or the checkpoint's model keeps its input (--out: as JSON).
    """
    upstream = str(unknown.pop("from", ""))                      # `from` is a keyword of Python
    session.no_unknown_flags(unknown)
    numbers = {"n": n, "levels": levels, "steps": steps, "tokens": tokens, "seed": seed, "batch": batch, "layer": layer}
    session.check_whole(numbers)
    asked = attribute is not None
    if asked != bool(prompt) or (upstream and not asked):
        raise Mistake('--attribute needs a prompt: --attribute 123 --prompt "a red cube" --from ckptA/')
    weights_as = {"dtype": dtype, "quant": quant, "transformer": transformer}
    if input:
        return of_input(checkpoint, model, layer, prompts, prompt_field, tokens, seed, batch, out, weights_as)
    target = session.opened(checkpoint, model=model, layer=layer, site=site)
    folder, cfg = flux.read_config(target.model)
    target = session.placed(target, folder, cfg)
    load = partial(session.load_model, target.model, target.run, **weights_as)
    if not asked:
        check_out(file := Path(out) if out else Path(checkpoint) / FILE)
        given = captions(target, folder, prompts, prompt_field, images, n)
        report(file, load(), target, n, given, levels, steps, tokens, seed, batch)
        return
    import attribution
    target.check_feature(attribute)
    source = session.placed(session.opened(upstream, model=target.model), folder, cfg) if upstream else None
    if source:
        attribution.check_order(source, target)
    attribution.explain(load(), target, attribute, prompt, source, seed)


def of_input(checkpoint: str, model: str, layer: int | None, prompts: str, field: str, tokens: int, seed: int,
             batch: int | None, out: str, weights_as: dict[str, str]) -> None:
    """Print the table of `inputs.py` for a model, or for a checkpoint's model if none is named."""
    about = saved.load_metadata(checkpoint) if not model else {"model": session.announce(model)}
    if not about.get("model"):
        raise Mistake(f"--input: {checkpoint} does not say its model: give --model")
    subject = session.Subject("", [], None, about["model"], 0, "img", about.get("run") or {})
    _, cfg = flux.read_config(subject.model, weights_as["transformer"] or None)
    layers = range(cfg.layers) if layer is None else [layer]
    flux.residual_names(cfg, layers[-1], "img")                  # raises if there is no such layer
    texts, _ = sources.examples(*session.prompts_of(subject, prompts, field), EVALUATED // 64)
    loaded = session.load_model(subject.model, subject.run, last=layers[-1], **weights_as)
    inputs.show(loaded, texts, layers, Path(out) if out else None, tokens=tokens, seed=seed,
                batch=batch or session.default_batch(cfg), size=subject.size, text_tokens=subject.text_tokens)


def captions(subject: session.Subject, folder: Path, prompts: str, field: str, images: str, n: int
             ) -> tuple[list[str], np.ndarray | list[np.ndarray] | None, str]:
    """Return (captions, images uint8 or None for the model's own, origin), from the flags and the checkpoint.

    There may be more than n captions, for the SAE's statistics: enough for images of 64 tokens, like nano's.
    folder: of the model.
    """
    size, many = subject.size or min(256, flux.default_size(folder)), max(n, EVALUATED // 64)
    if images:
        if prompts:
            raise Mistake("--images brings its own captions: leave --prompts out")
        return *folder_of_images(images, n, size), f"images of {images}"
    texts, drawn = sources.examples(*session.prompts_of(subject, prompts, field), many)
    if not drawn or not flux.draws_scenes(folder) or not isinstance(size, int):
        return texts, None, ""
    render = sources.scenes().render                             # the model was trained on square renders of scenes
    return texts, [render(scene, size).image for scene in drawn[:n]], "renders of held-out scenes"


def report(file: Path, model: flux.Model, target: session.Subject, n: int, given: tuple, levels: int, steps: int | None,
           tokens: int, seed: int, batch: int | None) -> None:
    """Score the SAE, write the result to `file`, and print it. given: the result of `captions`."""
    texts, images, origin = given
    steps = steps or session.default_steps(model.cfg)
    batch = batch or min(session.default_batch(model.cfg), n, len(texts))
    options = {"seed": seed, "batch": batch, "text_tokens": target.text_tokens}
    data = dataset(model, texts[:n], images, size=target.size, steps=steps, origin=origin, **options)
    print(f"data: {len(data.prompts)} images, {data.origin}")
    places = {"loss": 0, "images": 1, "statistics": 2, "variance": 3}
    with tqdm(total=4.0, desc="scoring", dynamic_ncols=True, bar_format="{desc}: {percentage:3.0f}%|{bar}|") as bar:
        def progress(name, share):
            bar.set_description(name)
            bar.update(places[name] + share - bar.n)

        found = score(model, target, data, captions=texts, levels=levels, steps=steps, tokens=tokens, progress=progress,
                      **options)
    found |= {"model": target.model, "prompts": target.run.get("prompts")}
    write(file, found)
    print(table(found))
    print(f"scores: {file}")


def check_out(file: Path) -> None:
    """Raise Mistake, before any work, if `file` cannot be made or exists and was not written by score.py."""
    if not file.parent.is_dir():
        raise Mistake(f"--out {file}: there is no folder {file.parent}")
    if file.exists():
        try:
            ours = file.is_file() and json.loads(file.read_text(encoding="utf-8"))["kind"] == KIND
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise Mistake(f"{file} exists and was not written by score.py; choose another --out")


def write(file: Path, found: dict) -> None:
    """Write JSON atomically: the file appears whole or not at all."""
    new = file.with_name(f".{file.name}.{os.getpid()}{saved.TMP}")
    try:
        with open(new, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def table(found: dict) -> str:
    """Return the scores as text."""
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
    if shares := found["variance"]:
        explain = ", ".join(f"{name} {shares[name]:.1%}" for name in variance.NAMES if name in shares)
        lines.append(f"explained by {explain} (mean over features)")
        lines.append(f"{shares['follow_prompt']:,} of {shares['varying']:,} features follow the prompt, "
                     f"{shares['follow_prompt_or_image']:,} the prompt or the image, more than the noise draw")
    return "\n".join(lines)


if __name__ == "__main__":
    session.command(main)
