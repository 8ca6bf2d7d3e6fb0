"""Show what every feature of an SAE means: a checkpoint → statistics, examples, and static HTML pages.

    python dash.py ckpt/                                   # → dash/index.html: open it in a browser, no server needed
    python dash.py ckpt/ --n 5000 --prompts captions.txt --out pages
    python dash.py ckpt/ --pages_only                      # the pages once more, from what was collected before
    python dash.py ckpt/ --steer 20                        # and what images become with a feature ablated, doubled, …

Copy it with `stats.py`, `pages.py`, `templates/`, `session.py` and what these import. From Python,
without pages:

    found = dash.collect(model, params, cfg, prompts, folder, layer=3, site="img")       # a `stats.Collected`
    found = dash.load("dash/collect")                      # the same, from `stats.safetensors` and `collect.json`

One streaming pass. Each prompt is drawn once, from noise of its own; its activations are those of that very noise, on
the path on which `train.py` trained. Memory holds features × kept examples, not tokens.
"""
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

import checkpoint as saved
import data
import flux
import pages
import sae
import session
from session import Mistake
from stats import DAMAGED, EDGES, Counts, Layout, load, save

# ---------------------------------------------------------------- collecting


def collect(model, params, cfg, prompts, folder, *, layer, site, timesteps=1, steps=4, size=None, text_tokens=None,
            padding=True, seed=0, batch=16, attributes=(), labels=None, info=None, progress=None, stop=lambda: False):
    """Draw `prompts`, encode the activations of one layer, and keep statistics: a `Collected`, also saved in
    `folder`/collect, with the images in `folder`/images.

    model: of `flux.load`. params, cfg: of `checkpoint.load`, or `load_groups`. timesteps: at which activations are
    taken, as `train.py` does. padding: whether T5's padding counts as tokens. stop(): whether to save the state and
    end, with None. steps: in which the images are drawn. labels [N, A] bool: what is true of each prompt's scene, named
    by `attributes`. info: more for the JSON. progress: called with the number of prompts done. A stopped run goes on
    where its last state was saved, if all arguments are the same. Raises ValueError where activations are not finite.
    """
    folder, prompts, seed = Path(folder), list(prompts), int(seed)
    flux.residual_names(model.cfg, layer, site)
    size, text_tokens = size or min(256, model.size), text_tokens or model.text_tokens
    grid = flux.token_grid(model, size)
    params = [params] if isinstance(params, dict) else params
    layout = Layout(timesteps, text_tokens if site != "img" else 0, tuple(grid) if site != "txt" else (0, 0))
    labels = np.zeros((len(prompts), 0), bool) if labels is None else np.asarray(labels, bool)
    info = {**(info or {}), "kind": "fae dashboard", "layer": layer, "site": site, "layout": asdict(layout),
            "size": size, "steps": steps, "seed": seed, "first_noise": data.DRAWN, "images": len(prompts),
            "text_tokens": text_tokens, "padding": padding,
            "attributes": list(attributes), "prompts": prompts, "features": cfg.features, "edges": EDGES.tolist(),
            "words": model.words(prompts, text_tokens) if layout.text_tokens else []}
    counts = Counts(cfg.features, layout)
    counts.a["maxima"] = np.zeros((len(prompts) if labels.shape[1] else 0, cfg.features), np.float32)
    unfinished = Partial(folder, {**info, "weights": saved.fingerprint(params), "batch": batch})
    if (ended := unfinished.ended()) is not None:
        return ended
    done = unfinished.restore(counts.a)
    counts.end = len(counts.a["value"])
    for part in () if done else ("images", "steer"):             # of other prompts
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    shape = (grid[0] * grid[1], model.cfg.in_channels)
    while done < len(prompts):
        part = prompts[done:done + batch]
        full = part + part[-1:] * (batch - len(part))            # one shape, one compile
        noise = flux.draw_noise(seed, data.DRAWN + done + np.arange(batch), shape)
        options = {"size": size, "noise": noise, "text_tokens": text_tokens}
        acts = flux.capture(model, flux.prepare(model, full, steps=timesteps, **options), layer=layer, site=site)
        if not bool(jnp.isfinite(acts).all()):
            raise Mistake(f"activations of prompts {done} to {done + len(part) - 1} hold NaN or Inf")
        codes = (np.moveaxis(x, 1, 0).reshape(batch, layout.positions, -1)
                 for x in encode(params, cfg, acts.astype(jnp.float32), site, text_tokens))
        drawn = flux.generate(model, full, steps=steps, **options)
        real = [None] * len(part)
        if layout.text_tokens and not padding:
            real = np.tile(data.real_tokens(model, part, site, text_tokens, layout.image_tokens), (1, timesteps))
        for i, (values, indices, image, mask) in enumerate(zip(*codes, drawn, real), done):
            alive, peak = counts.add(i, values, indices, seed, mask)
            if labels.shape[1]:
                counts.a["maxima"][i, alive] = peak
            save_image(folder / "images" / f"{i}.webp", image)
        done += len(part)
        if (stopped := stop()) or unfinished.due():
            unfinished.save(counts.settled(), done)
        if progress:
            progress(done)
        if stopped:
            return None
    found = counts.finish(params[0]["W_dec"], labels, counts.a["maxima"], info | {"arguments": unfinished.arguments})
    save(folder / "collect", found)
    unfinished.remove()
    return found


def encode(params, cfg, acts, site, text_tokens):
    """acts [timesteps, B, N, D] → values, indices [timesteps, B, N, most features of a token], by each group's SAE."""
    groups = flux.token_groups(site, len(acts), text_tokens) if len(params) > 1 else [("", slice(None), slice(None))]
    if len(groups) != len(params):
        raise Mistake(f"the checkpoint has SAEs for {len(params)} groups of tokens; site {site} with {len(acts)} "
                         f"timestep(s) has {len(groups)}")
    found = [sae.encode(p, cfg, acts[t, ..., part, :]) for p, (_, t, part) in zip(params, groups)]
    shape = (*acts.shape[:3], max(values.shape[-1] for values, _ in found))
    both = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for (_, t, part), codes in zip(groups, found):
        for whole, some in zip(both, codes):
            whole[t, ..., part, :some.shape[-1]] = some
    return both


class Partial:
    """The state of an unfinished pass, in `folder`/partial.safetensors; it counts only for the same arguments."""

    def __init__(self, folder, arguments, seconds=60):
        self.folder, self.arrays = folder, folder / "partial.safetensors"
        self.seconds, self.saved = seconds, time.monotonic()
        self.arguments = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()

    def ended(self):
        """What a run with the same arguments collected, which was stopped only behind that, or None."""
        try:
            found = load(self.folder / "collect")
        except ValueError:
            return None
        return found if found.info.get("arguments") == self.arguments else None

    def restore(self, state):
        """Fill `state` with what was saved; returns the number of prompts done, 0 where nothing fits."""
        try:
            with safe_open(self.arrays, "np") as file:
                if file.metadata()["arguments"] != self.arguments:
                    return 0
                done = int(file.metadata()["done"])
                state.update({name: file.get_tensor(name) for name in state})
                return done
        except DAMAGED:                                          # none yet, or torn: begin anew
            return 0

    def due(self):
        return time.monotonic() - self.saved >= self.seconds

    def save(self, state, done):
        new = self.arrays.with_suffix(".new")
        # safetensors writes an array's memory as it lies there: a view would come back scrambled
        state = {name: np.ascontiguousarray(array) for name, array in state.items()}
        save_file(state, new, {"done": str(done), "arguments": self.arguments})
        os.replace(new, self.arrays)
        self.saved = time.monotonic()

    def remove(self):
        self.arrays.unlink(missing_ok=True)


def save_image(path, image):
    from PIL import Image
    Image.fromarray(image).save(path, quality=88, method=4)


def scene_attributes(scenes, drawn):
    """What is true of scenes of the nano world: names and a table [N, A]."""
    def of(scene):
        solids = scene.solids
        places = [scenes.project(scene.camera, solid.center) for solid in solids]
        row = {f"{kind}: {word}": any(getattr(solid, kind) == word for solid in solids)
               for kind, words in (("shape", scenes.SHAPES), ("color", scenes.COLORS), ("size", scenes.SIZES))
               for word in words}
        row |= {"position: left": any(x < 0.4 for x, _, _ in places),
                "position: right": any(x > 0.6 for x, _, _ in places),
                "depth: near": any(solid.position[1] < -0.4 for solid in solids),
                "depth: far": any(solid.position[1] > 0.4 for solid in solids)}
        row |= {f"light: {side}": scene.side == side for side in scenes.SIDES}
        return row | {f"objects: {n}": len(solids) == n for n in (1, 2, 3)}

    rows = [of(scene) for scene in drawn]
    return list(rows[0]), np.array([list(row.values()) for row in rows])


# ---------------------------------------------------------------- strips


def draw_strips(model, subject, found, folder, n, progress=lambda: None):
    """For each of the n liveliest features, those that fire on the most images, its best example once more, from the
    same noise, with its values multiplied by all of `pages.SCALES` but 1, as `folder`/7-2.webp. What is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    scales = [scale for scale in pages.SCALES if scale != 1]
    for f in liveliest(found, n):
        if not (folder / f"{f}-{scales[-1]}.webp").is_file():    # the last one says that all are there
            for scale, image in zip(scales, strip(model, subject, found, f, scales)):
                new = folder / ".new.webp"
                save_image(new, image)
                os.replace(new, folder / f"{f}-{scale}.webp")
        progress()


def liveliest(found, n):
    """The n features that fire on the most images; of these on the most tokens."""
    order = np.lexsort((-found.fired, -found.images))[:n]
    return [int(f) for f in order if found.fired[f]]


def strip(model, subject, found, f, scales):
    """The images uint8 [scales, H, W, 3] of a feature's best example with its values multiplied, in every step."""
    info, image, n = found.info, int(found.top_image[f, 0]), len(scales)
    grid = flux.token_grid(model, info["size"])
    noise = flux.draw_noise(info["seed"], np.full(n, info["first_noise"] + image),
                            (grid[0] * grid[1], model.cfg.in_channels))
    start = flux.prepare(model, [info["prompts"][image]] * n, steps=info["steps"], size=info["size"], noise=noise,
                         text_tokens=info.get("text_tokens"))
    scale, feature = jnp.asarray(scales, jnp.float32)[:, None, None], jnp.array([f])

    def edits(step):
        shared = {name: (p, feature) for name, p in subject.at(start.sigmas[step]).items()}
        return [flux.Edit(subject.layer, subject.names, scaling(subject.cfg), scale, shared)]

    return flux.decode(model, flux.sample(model, start, edits=edits), start.grid)


@lru_cache
def scaling(cfg):
    """A `flux.Edit`'s function that multiplies a feature's values; one object for an SAE, so that it compiles once."""
    def scaled(name, x, scale, shared):
        params, feature = shared[name]
        return sae.change(params, cfg, x, feature, scale, jnp.zeros(1))

    return scaled


# ---------------------------------------------------------------- the command line


def main(checkpoint="ckpt", out="dash", prompts="", prompt_field="", n=1000, steps=None, features="", model="",
         layer=None, site="", seed=0, batch=None, dtype="", quant="", transformer="", pages_only=False, overwrite=False,
         steer=None, **unknown):
    """Write a dashboard of the SAE in the folder `checkpoint` into the folder --out.

    --n: prompts. --steps: in which images are drawn. --features 0:200,512: pages of these only. --pages_only: pages
    from what an earlier run collected. --steer 20: for the 20 features that fire on the most images, their best example
    with the feature ablated, as it is, and times 2, 4 and 8; with --pages_only for a dashboard that is there.
    --model, --layer, --site: where the checkpoint does not say. --overwrite: also replace another checkpoint's
    dashboard.
    """
    session.no_unknown_flags(unknown)
    out = Path(out)
    given = {"n": n, "seed": seed, "steps": steps, "batch": batch, "steer": steer, "layer": layer}
    session.check_whole({name: value for name, value in given.items() if value is not None})
    subject = session.opened(checkpoint, model=model, layer=layer, site=site, writes=bool(steer))
    wanted = feature_range(features, subject.cfg.features)
    if steer or not pages_only:
        subject = session.placed(subject, *flux.read_config(subject.model))
    load_model = lru_cache(partial(session.load_model, subject.model, subject.run, dtype=dtype, quant=quant,
                                   transformer=transformer))
    with session.claim(out):
        check_out(out, checkpoint, pages_only, overwrite)
        building = workplace(out, "pages" if pages_only else "building")
        if pages_only:
            found = load(out / "collect")
            strips_for(checkpoint, load_model, subject, found, out, steer)
            shutil.rmtree(building, ignore_errors=True)          # of a stopped run; a stopped pass has another name
            for part in ("collect", "images", "steer"):
                if (out / part).exists() or part != "steer":
                    shutil.copytree(out / part, building / part)
        else:
            with session.stopping() as stop:                     # elsewhere a signal ends at once: all is saved
                found = collect_from(checkpoint, load_model, subject, building, prompts, prompt_field, n, steps, seed,
                                     batch, stop)
                if found is None:
                    print("stopped; the same command goes on")
                    raise SystemExit(128 + stop())
            strips_for(checkpoint, load_model, subject, found, building, steer)
        if is_of(found, checkpoint):                             # scores may be newer than what was collected
            found.info["scores"] = read_scores(Path(checkpoint) / "eval.json", saved.fingerprint(subject.params))
        pages.write(found, building, wanted)
        replace(building, out)
        print(f"dashboard: {out / 'index.html'}")


def strips_for(checkpoint, load_model, subject, found, folder, n):
    """`draw_strips` of n features, where any are asked for. Raises Mistake for another checkpoint's dashboard."""
    if not n:
        return
    if not is_of(found, checkpoint):
        raise Mistake(f"--steer: the dashboard in {folder} is of another checkpoint than {checkpoint}")
    model = load_model()
    with tqdm(total=min(n, found.features), unit="feature", desc="steering", dynamic_ncols=True) as bar:
        draw_strips(model, subject, found, folder / "steer", n, progress=bar.update)


def is_of(found, checkpoint):
    """Whether what was collected is of the checkpoint that lies in this folder now."""
    return found.info.get("checkpoint") == read_cfg(checkpoint)


def read_cfg(checkpoint):
    """cfg.json as it stands."""
    return json.loads((Path(checkpoint) / saved.CONFIG).read_text(encoding="utf-8"))


def collect_from(checkpoint, load_model, subject, folder, source, field, n, steps, seed, batch, stop):
    """What the checkpoint says of itself, and the flags → `collect`."""
    source, field, held_out = session.prompts_of(subject, source, field)
    texts, drawn = data.examples(source, field, held_out, n)
    labels = dict(zip(("attributes", "labels"), scene_attributes(data.scenes(), drawn))) if drawn else {}
    model = load_model()
    info = {"model": subject.model, "source": source, "checkpoint": read_cfg(checkpoint),
            "metrics": read_metrics(Path(checkpoint) / "metrics.jsonl"), "versions": {"jax": jax.__version__}}
    with tqdm(total=len(texts), unit="prompt", desc="collecting", dynamic_ncols=True) as bar:
        return collect(model, subject.params, subject.cfg, texts, folder, layer=subject.layer, site=subject.site,
                       steps=steps or session.default_steps(model.cfg), timesteps=subject.timesteps,
                       size=subject.size, text_tokens=subject.text_tokens, padding=subject.padding, seed=seed,
                       batch=batch or session.default_batch(model.cfg), info=info, **labels,
                       progress=lambda done: bar.update(done - bar.n), stop=stop)


OURS = re.compile(r"index\.html|run\.html|data\.js|dash\.(css|js)|feature(/\d+\.html)?|maps(/\d+\.js)?"
                  r"|images(/\d+\.webp)?|steer(/\d+-[\d.]+\.webp)?|collect(/(collect\.json|stats\.safetensors))?")


def check_out(out, checkpoint, pages_only, overwrite):
    """Refuse, before any work, a folder that is no dashboard, or another checkpoint's. All of it will be replaced, so
    nothing else may lie in it, hidden or deep."""
    about = out / "collect" / "collect.json"
    if pages_only and not about.is_file():
        raise Mistake(f"--pages_only: there is no dashboard in {out} yet")
    if not out.exists():
        return
    if out.is_dir() and not os.access(out, os.W_OK):
        raise Mistake(f"--out {out}: it cannot be written")
    foreign = sorted(foreign_in(out)) if out.is_dir() else [out.name]
    if foreign and not about.is_file():
        raise Mistake(f"{out} exists and is not a dashboard; choose another --out")
    if foreign:
        raise Mistake(f"{out} holds something that is no part of a dashboard: {', '.join(foreign[:5])}")
    if about.is_file() and not overwrite and not pages_only and not same_run(read_info(about), checkpoint):
        raise Mistake(f"{out} holds the dashboard of another checkpoint than {checkpoint}: choose another --out, or "
                      "--overwrite it")


def read_info(file):
    """A collect.json, whatever version wrote the statistics beside it; {} of a damaged one."""
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        return info if isinstance(info, dict) else {}
    except ValueError:
        return {}


def foreign_in(out):
    """Paths in the folder that dash.py did not make. The lock and the workplace may be inside, and what Macs leave."""
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        own = OURS.fullmatch(name) and not path.is_symlink()
        if not own and not re.fullmatch(r"\.lock|\.(building|pages)(/.*)?|(.*/)?\.DS_Store", name):
            yield name


def same_run(info, checkpoint):
    """Whether a dashboard is of a checkpoint's run, at whatever step; of a foreign SAE, of this very cfg.json."""
    def of(cfg):
        run = (cfg.get("metadata") or {}).get("run")
        shape = {name: value for name, value in cfg.items() if name != "metadata" or not run}
        return shape, {name: value for name, value in (run or {}).items() if name != "steps"}

    return of(info.get("checkpoint") or {}) == of(read_cfg(checkpoint))


def workplace(out, name):
    """Where the new dashboard is made: beside `out`, or inside it where it cannot be renamed."""
    whole = out.resolve()
    return whole.with_name(f".{whole.name}.{name}") if renamable(out) else whole / f".{name}"


def renamable(out):
    """Whether the folder can be renamed: no mount, not where the user stands, its parent writable."""
    whole = out.resolve()
    parent = next(path for path in whole.parents if path.is_dir())
    return not os.path.ismount(whole) and not Path.cwd().is_relative_to(whole) and os.access(parent, os.W_OK)


def feature_range(text, F):
    """"0:200,512" → the numbers, sorted; all F where it is empty. Raises ValueError for what is not a feature."""
    try:
        wanted = set()
        for part in str(text).strip("()").replace(" ", "").split(",") if text != "" else ["0:"]:
            low, colon, high = part.partition(":")
            low, high = int(low or 0), int(high or F) if colon else int(low) + 1
            if not 0 <= low < high <= F:
                raise ValueError
            wanted.update(range(low, high))
        return sorted(wanted)
    except ValueError:
        raise Mistake(f"--features {text}: give numbers or ranges from 0 to {F - 1}, as in 0:200,512") from None


def replace(new, out):
    """Put the finished folder `new` where `out` is or will be; an old one stays until that moment. Where it cannot be
    renamed, its parts are replaced one by one."""
    out, whole = out.resolve(), renamable(out)
    old = out.with_name(f".{out.name}.old")
    if whole:
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        return
    for path in [path for path in out.iterdir() if OURS.fullmatch(path.name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in list(new.iterdir()):
        os.replace(path, out / path.name)
    shutil.rmtree(new)


def read_metrics(path):
    """The lines of metrics.jsonl; [] without the file, and without what is torn or damaged."""
    lines = map(saved.logged, path.read_bytes().splitlines() if path.is_file() else ())
    return [line for line in lines if line and all(isinstance(value, (int, float)) for value in line.values())]


def read_scores(path, weights):
    """What score.py wrote of the SAE with these weights (their `saved.fingerprint`), or None."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["kind"] == "fae score" and found["weights"] == weights else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None                                              # none there, damaged, or another tool's


if __name__ == "__main__":
    session.command(main)
