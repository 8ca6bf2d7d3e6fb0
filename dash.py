"""Show what every feature of an SAE means: a checkpoint → statistics, examples, and static HTML pages.

    python dash.py ckpt/                                   # → dash/index.html: open it in a browser, no server needed
    python dash.py ckpt/ --n 5000 --prompts captions.txt --out pages
    python dash.py ckpt/ --pages_only                      # the pages once more, from what was collected before
    python dash.py ckpt/ --steer 20                        # and what images become with a feature ablated, doubled, …

Copy it with `stats.py`, `pages.py`, `templates/`, `session.py` and what these import. From Python, without pages:

    found = dash.collect(model, params, cfg, prompts, folder, layer=3, site="img")       # a `stats.Collected`
    found = dash.load("dash/collect")                      # the same, from `stats.safetensors` and `collect.json`

It makes one streaming pass. It draws each prompt once, from its own noise, and takes the activations from the same
noise, as `train.py` does. Memory grows with features × kept examples, not with tokens.
"""
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

import apply
import checkpoint as saved
import data
import flux
import pages
import sae
import session
from session import Mistake
from stats import DAMAGED, EDGES, Collected, Counts, Layout, load, save

# ---------------------------------------------------------------- collecting


def collect(model: flux.Model, params: sae.Params | list[sae.Params], cfg: sae.Config, prompts: Sequence[str],
            folder: str | Path, *, layer: int, site: str, timesteps: int = 1, steps: int = 4,
            size: int | tuple[int, int] | None = None, text_tokens: int | None = None, padding: bool = True,
            seed: int = 0, batch: int = 16, attributes: Sequence[str] = (), labels: np.ndarray | None = None,
            info: dict | None = None, progress: Callable = lambda done: None, stop: Callable = lambda: False
            ) -> Collected | None:
    """Draw `prompts`, encode the activations of one layer, and collect statistics of every feature.

    The result is also saved in `folder`/collect, the images in `folder`/images. A stopped pass continues from its last
    saved state if all arguments are the same. Raises Mistake if activations are not finite.

    model: of `flux.load`. params, cfg: of `checkpoint.load` or `load_groups`. timesteps: noise levels at which to take
    activations, as in `train.py`. steps: sampling steps of the images. padding: whether T5's padding counts as tokens.
    labels [N, A] bool: what is true of each prompt's scene; `attributes` names the columns. info: more entries for
    collect.json. progress: called with the number of finished prompts. stop(): whether to save the state and return
    None.
    """
    folder, prompts, params = Path(folder), list(prompts), [params] if isinstance(params, dict) else params
    labels = np.zeros((len(prompts), 0), bool) if labels is None else np.asarray(labels, bool)
    settings = {"layer": layer, "site": site, "steps": steps, "seed": int(seed), "size": size or min(256, model.size),
                "text_tokens": text_tokens or model.text_tokens, "padding": padding, "attributes": list(attributes)}
    layout, info = described(model, cfg, prompts, timesteps, {**(info or {}), **settings})
    counts = Counts(cfg.features, layout)
    counts.a["maxima"] = np.zeros((len(prompts) if labels.shape[1] else 0, cfg.features), np.float32)
    unfinished = Partial(folder, {**info, "weights": saved.fingerprint(params), "batch": batch})
    if (ended := unfinished.ended()) is not None:
        return ended
    done = unfinished.restore(counts)
    while done < len(prompts):
        _add_batch(counts, model, params, cfg, info, folder / "images", done, batch)
        done = min(done + batch, len(prompts))
        if (stopped := stop()) or unfinished.due():
            unfinished.save(counts.settled(), done)
        progress(done)
        if stopped:
            return None
    found = counts.finish(params[0]["W_dec"], labels, counts.a["maxima"], explained(
        model, params, cfg, info, timesteps, batch), info | {"arguments": unfinished.arguments})
    unfinished.replace_by(found)
    return found


def described(model: flux.Model, cfg: sae.Config, prompts: list[str], timesteps: int, info: dict
              ) -> tuple[Layout, dict]:
    """Return the `Layout` of examples at info's layer and site, and info with all that collect.json holds. Raises
    Mistake for a layer or site that the model lacks."""
    flux.residual_names(model.cfg, info["layer"], info["site"])
    streams = flux.SITES[info["site"]]
    tokens = info["text_tokens"] if "txt" in streams else 0
    layout = Layout(timesteps, tokens, flux.token_grid(model, info["size"]) if "img" in streams else (0, 0))
    return layout, info | {
        "kind": "fae dashboard", "first_noise": data.DRAWN, "images": len(prompts), "prompts": prompts,
        "features": cfg.features, "edges": EDGES.tolist(), "layout": dataclasses.asdict(layout),
        "words": model.words(prompts, info["text_tokens"]) if tokens else []}


def _add_batch(counts, model, params, cfg, info, folder, first, batch):
    """Draw the prompts from number `first` on, add their activations to `counts`, and save their images."""
    prompts, layout, seed = info["prompts"][first:first + batch], counts.layout, info["seed"]
    full = prompts + prompts[-1:] * (batch - len(prompts))       # one shape, one compile
    start = flux.prepare(model, full, steps=layout.timesteps, size=info["size"], seed=seed,
                         text_tokens=info["text_tokens"], numbers=data.DRAWN + first + np.arange(batch))
    acts = flux.capture(model, start, layer=info["layer"], site=info["site"])
    if not bool(jnp.isfinite(acts).all()):
        raise Mistake(f"activations of prompts {first} to {first + len(prompts) - 1} hold NaN or Inf")
    codes = (np.moveaxis(x, 1, 0).reshape(batch, layout.positions, -1)
             for x in session.encode(params, cfg, acts.astype(jnp.float32), info["site"], info["text_tokens"]))
    start = dataclasses.replace(start, sigmas=flux.sigmas(model.scheduler, info["steps"], start.latents.shape[1]))
    images = flux.decode(model, flux.sample(model, start), start.grid)
    real = [None] * len(prompts)
    if layout.text_tokens and not info["padding"]:
        real = data.real_tokens(model, prompts, info["site"], info["text_tokens"], layout.image_tokens)
        real = np.tile(real, (1, layout.timesteps))
    for i, (values, indices, image, mask) in enumerate(zip(*codes, images, real), first):
        alive, peak = counts.add(i, values, indices, seed, mask)
        if len(counts.a["maxima"]):
            counts.a["maxima"][i, alive] = peak
        save_image(folder / f"{i}.webp", image)


def explained(model: flux.Model, params: list[sae.Params], cfg: sae.Config, info: dict, timesteps: int, batch: int,
              most: int = 32) -> np.ndarray:
    """Return what explains the variance of each feature, [F, 4] (see `variance.py`). NaN for a single prompt."""
    run = {"timesteps": timesteps} | {name: info[name] for name in ("size", "text_tokens", "padding")}
    subject = session.Subject("", params, cfg, str(model.source), info["layer"], info["site"], run)
    subject = session.placed(subject, model.source, model.cfg)
    found = session.explained(model, subject, info["prompts"], most, seed=info["seed"], batch=batch)
    return (np.full((cfg.features, 4), np.nan) if found is None else found.table).astype(np.float32)


class Partial:
    """The state of an unfinished pass, in `folder`/partial.safetensors. It is valid only for the same arguments."""

    def __init__(self, folder, arguments, seconds=60):
        self.folder, self.arrays = folder, folder / "partial.safetensors"
        self.seconds, self.saved = seconds, time.monotonic()
        self.arguments = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()

    def ended(self) -> Collected | None:
        """Return what a run with the same arguments collected before it was stopped, or None."""
        try:
            found = load(self.folder / "collect")
        except ValueError:
            return None
        return found if found.info.get("arguments") == self.arguments else None

    def restore(self, counts: Counts) -> int:
        """Fill `counts` with the saved state and return the number of finished prompts. Without a state that fits,
        return 0 and clear the folder of other prompts' images."""
        done = self._read(counts.a)
        counts.end = len(counts.a["value"])
        for part in () if done else ("images", "steer"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        return done

    def _read(self, arrays):
        try:
            with safe_open(self.arrays, "np") as file:
                if file.metadata()["arguments"] != self.arguments:
                    return 0
                done = int(file.metadata()["done"])
                arrays.update({name: file.get_tensor(name) for name in arrays})
                return done
        except DAMAGED:                                          # missing or torn: begin anew
            return 0

    def due(self) -> bool:
        """Return whether it is time to save the state again."""
        return time.monotonic() - self.saved >= self.seconds

    def save(self, state: dict[str, np.ndarray], done: int) -> None:
        """Save the state after `done` prompts."""
        new = self.arrays.with_suffix(".new")
        # safetensors writes an array's memory in its order: a view would come back scrambled
        state = {name: np.ascontiguousarray(array) for name, array in state.items()}
        save_file(state, new, {"done": str(done), "arguments": self.arguments})
        os.replace(new, self.arrays)
        self.saved = time.monotonic()

    def replace_by(self, found: Collected) -> None:
        """Save the statistics of the finished pass, and delete the state."""
        save(self.folder / "collect", found)
        self.arrays.unlink(missing_ok=True)


def save_image(path: Path, image: np.ndarray) -> None:
    """Save an image uint8 [H, W, 3]."""
    from PIL import Image
    Image.fromarray(image).save(path, quality=88, method=4)


def scene_attributes(scenes: ModuleType, drawn: list) -> tuple[list[str], np.ndarray]:
    """Return the names of attributes, and a table [N, A] of what is true of each scene of the nano world."""
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


def draw_strips(model: flux.Model, subject: session.Subject, found: Collected, folder: Path, n: int,
                progress: Callable = lambda: None) -> None:
    """Draw the best example of each of the n features that fire on the most images, with the feature multiplied.

    The noise is that of the example. The images for `pages.SCALES` (without 1) are saved as `folder`/7-2.webp and so
    on; those that exist are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scales = [scale for scale in pages.SCALES if scale != 1]
    for f in most_frequent(found, n):
        if not (folder / f"{f}-{scales[-1]}.webp").is_file():    # if the last one is there, all are
            for scale, image in zip(scales, strip(model, subject, found, f, scales)):
                new = folder / ".new.webp"
                save_image(new, image)
                os.replace(new, folder / f"{f}-{scale}.webp")
        progress()


def most_frequent(found: Collected, n: int) -> list[int]:
    """Return the n features that fire on the most images. Ties go to the feature that fires on more tokens."""
    order = np.lexsort((-found.fired, -found.images))[:n]
    return [int(f) for f in order if found.fired[f]]


def strip(model: flux.Model, subject: session.Subject, found: Collected, f: int, scales: Sequence[float]) -> np.ndarray:
    """Draw the best example of feature f with its values multiplied in every step: uint8 [scales, H, W, 3]."""
    info, image, n = found.info, int(found.top_image[f, 0]), len(scales)
    start = flux.prepare(model, [info["prompts"][image]] * n, steps=info["steps"], size=info["size"], seed=info["seed"],
                         text_tokens=info.get("text_tokens"), numbers=np.full(n, info["first_noise"] + image))
    scale, feature = jnp.asarray(scales, jnp.float32)[:, None, None], jnp.array([f])

    def edits(step):
        shared = {name: (p, feature) for name, p in subject.at(start.sigmas[step]).items()}
        return [flux.Edit(subject.layer, subject.names, scaling(subject.cfg), scale, shared)]

    return flux.decode(model, flux.sample(model, start, edits=edits), start.grid)


@lru_cache
def scaling(cfg: sae.Config) -> Callable:
    """Return a `flux.Edit`'s function that multiplies a feature. One object per SAE, so that it compiles once."""
    def scaled(name, x, scale, shared):
        params, feature = shared[name]
        return apply.change(params, cfg, x, feature, scale, jnp.zeros(1))

    return scaled


# ---------------------------------------------------------------- the command line


def main(checkpoint="ckpt", out="dash", prompts="", prompt_field="", n=1000, steps=None, features="", model="",
         layer=None, site="", seed=0, batch=None, dtype="", quant="", transformer="", pages_only=False, overwrite=False,
         steer=None, **unknown):
    """Write a dashboard of the SAE in the folder `checkpoint` into the folder --out.

    --n: number of prompts. --steps: sampling steps of the images. --features 0:200,512: pages of these features only.
    --pages_only: write pages again from what an earlier run collected. --steer 20: for the 20 features that fire on the
    most images, draw the best example with the feature ablated, unchanged, and times 2, 4 and 8 (with --pages_only, add
    them to a finished dashboard). --model, --layer, --site: for a checkpoint that does not say. --overwrite: replace
    another checkpoint's dashboard too.
    """
    session.no_unknown_flags(unknown)
    out = Path(out)
    session.check_whole({"n": n, "seed": seed, "steps": steps, "batch": batch, "steer": steer, "layer": layer})
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
            copy_parts(out, building)
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


def copy_parts(out: Path, building: Path) -> None:
    """Copy what was collected and drawn in `out` into a new folder `building`."""
    shutil.rmtree(building, ignore_errors=True)                  # left by a stopped run that only wrote pages
    for part in ("collect", "images", "steer"):
        if (out / part).exists() or part != "steer":
            shutil.copytree(out / part, building / part)


def strips_for(checkpoint: str | Path, load_model: Callable, subject: session.Subject, found: Collected, folder: Path,
               n: int | None) -> None:
    """Call `draw_strips` for n features, if any. Raises Mistake for another checkpoint's dashboard."""
    if not n:
        return
    if not is_of(found, checkpoint):
        raise Mistake(f"--steer: the dashboard in {folder} is of another checkpoint than {checkpoint}")
    model = load_model()
    with tqdm(total=min(n, found.features), unit="feature", desc="steering", dynamic_ncols=True) as bar:
        draw_strips(model, subject, found, folder / "steer", n, progress=bar.update)


def is_of(found: Collected, checkpoint: str | Path) -> bool:
    """Return whether the statistics belong to the checkpoint that is in this folder now."""
    return found.info.get("checkpoint") == read_cfg(checkpoint)


def read_cfg(checkpoint: str | Path) -> dict:
    """Return cfg.json unchanged."""
    return json.loads((Path(checkpoint) / saved.CONFIG).read_text(encoding="utf-8"))


def collect_from(checkpoint: str | Path, load_model: Callable, subject: session.Subject, folder: Path, source: str,
                 field: str, n: int, steps: int | None, seed: int, batch: int | None, stop: Callable
                 ) -> Collected | None:
    """Call `collect` with the flags and with what the checkpoint says."""
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


def check_out(out: Path, checkpoint: str | Path, pages_only: bool, overwrite: bool) -> None:
    """Raise Mistake, before any work, for a folder that is no dashboard, or another checkpoint's.

    dash.py replaces all of the folder, so nothing else may be in it, not even hidden files or files in subfolders.
    """
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


def read_info(file: Path) -> dict:
    """Return the contents of a collect.json of any version; {} if it is damaged."""
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        return info if isinstance(info, dict) else {}
    except ValueError:
        return {}


def foreign_in(out: Path) -> Iterator[str]:
    """Yield paths in the folder that dash.py did not make, except its lock, its workplace and .DS_Store of Macs."""
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        own = OURS.fullmatch(name) and not path.is_symlink()
        if not own and not re.fullmatch(r"\.lock|\.(building|pages)(/.*)?|(.*/)?\.DS_Store", name):
            yield name


def same_run(info: dict, checkpoint: str | Path) -> bool:
    """Return whether a dashboard is of the checkpoint's run, at any step. A foreign SAE must have the same cfg.json."""
    def of(cfg):
        run = (cfg.get("metadata") or {}).get("run")
        shape = {name: value for name, value in cfg.items() if name != "metadata" or not run}
        return shape, {name: value for name, value in (run or {}).items() if name != "steps"}

    return of(info.get("checkpoint") or {}) == of(read_cfg(checkpoint))


def workplace(out: Path, name: str) -> Path:
    """Return where to make the new dashboard: beside `out`, or inside it if `out` cannot be renamed."""
    whole = out.resolve()
    return whole.with_name(f".{whole.name}.{name}") if renamable(out) else whole / f".{name}"


def renamable(out: Path) -> bool:
    """Return whether the folder can be renamed: no mount, not the current folder, and its parent is writable."""
    whole = out.resolve()
    parent = next(path for path in whole.parents if path.is_dir())
    return not os.path.ismount(whole) and not Path.cwd().is_relative_to(whole) and os.access(parent, os.W_OK)


def feature_range(text: str, F: int) -> list[int]:
    """Return the features of a text such as "0:200,512", sorted; all F if it is empty. Raises Mistake for others."""
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


def replace(new: Path, out: Path) -> None:
    """Move the finished folder `new` to `out`. An old `out` stays until that moment. If `out` cannot be renamed,
    replace its parts one by one."""
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


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of metrics.jsonl that are not damaged; [] without the file."""
    lines = map(saved.logged, path.read_bytes().splitlines() if path.is_file() else ())
    return [line for line in lines if line and all(isinstance(value, (int, float)) for value in line.values())]


def read_scores(path: Path, weights: str) -> dict | None:
    """Return what score.py wrote about the SAE with this `fingerprint` of its weights, or None."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["kind"] == "fae score" and found["weights"] == weights else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None                                              # missing, damaged, or another tool's


if __name__ == "__main__":
    session.command(main)
