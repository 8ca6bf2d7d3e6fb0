"""Change an SAE's features while FLUX.1 draws: checkpoint + prompt + new feature values → images.

    python steer.py ckpt/ "a red cube" --set "123+8, 77*0" --steps 8      # → steer/steer.png
    python steer.py ckpt/ "a red cube" "a cone" --set "123*4" --grid 0,1,2,4 --during 0:5 --box 2,2,6,6
    python steer.py layer3/ layer8/ "a red cube" --set "layer3:123+8, layer8:9*0"

    model = flux.load("nano")
    subject = steer.load("ckpt", model)                                   # the SAE, and its features' typical values
    images = steer.draw(model, "a red cube", [steer.Change(subject, 123, add=8)], steps=8)  # uint8 [1, 128, 128, 3]

`123*4` multiplies the value of feature 123 at each token by 4, `123*0` ablates the feature, `123+8` (or `123*+8`) adds
eight times its typical activation, `123-2` subtracts two, and `123*0+8` does both: value v becomes
scale * v + add * typical. Typical is the mean of the feature's values above zero, on prompts like those of training.
Only decoder rows times the change of the values are added to the residual stream: what the SAE does not reconstruct
stays.

Copy it with `session.py` and what it imports.

B images, I image tokens, T text tokens, N tokens of a stream, D model width, F features, n changes.
"""
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import apply
import data
import flux
import sae
import session
import shard
from session import Mistake

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Box = tuple[int, int, int, int]                                  # (row, column, row_end, column_end) in image tokens

# ---------------------------------------------------------------- changes and typical activations


@dataclass(frozen=True, eq=False)
class Change:
    """Change the value v of a feature to scale * v + add * its typical activation, at every selected token."""
    of: session.Subject
    feature: int
    scale: float = 1.0
    add: float = 0.0

    def __post_init__(self):
        self.of.check_feature(self.feature)
        if not math.isfinite(self.scale) or not math.isfinite(self.add):
            raise Mistake(f"feature {self.feature}: scale {self.scale} and add {self.add} must be finite")


def load(folder: str | Path, model: flux.Model, *, layer: int | None = None, site: str = "",
         prompts: int | Sequence[str] = 64, seed: int = 0) -> session.Subject:
    """Return the `session.Subject` in a checkpoint folder, with typical activations in `model` (of `flux.load`).

    layer, site: needed if the checkpoint does not state them. prompts: measure typical activations on this list, or on
    this number of prompts from the checkpoint's own source. Raise ValueError if the SAE does not fit the model.
    """
    found = session.subject(model, folder, layer=layer, site=site)
    texts = data.examples(*session.prompts_of(found), prompts)[0] if isinstance(prompts, int) else list(prompts)
    return calibrated(model, found, texts, seed=seed)


def calibrated(model: flux.Model, subject: session.Subject, prompts: list[str], *, seed: int = 0, batch: int = 16,
               progress: Callable[[int], object] | None = None) -> session.Subject:
    """Return the subject with `typical` [F] and `fired` [F], measured on `prompts` over all groups of tokens.

    `typical` is the mean of a feature's values above zero. A feature that never fires gets the median of the others.
    progress: called with the number of prompts in each finished batch. Raise ValueError if no feature fires.
    """
    cfg, timesteps, site = subject.cfg, subject.timesteps, subject.site
    size, tokens = subject.size or min(256, model.size), subject.text_tokens or model.text_tokens
    grid, groups = flux.token_grid(model, size), flux.token_groups(site, timesteps, tokens)
    total, count, batch = np.zeros(cfg.features), np.zeros(cfg.features), min(batch, len(prompts))
    for first in range(0, len(prompts), batch):
        some = prompts[first:first + batch]
        full = some + some[-1:] * (batch - len(some))            # one shape, one compile
        start = flux.prepare(model, full, steps=timesteps, size=size, seed=seed, text_tokens=tokens,
                             numbers=data.DRAWN + first + np.arange(batch))
        acts = flux.capture(model, start, layer=subject.layer, site=site).astype(jnp.float32)
        real = data.real_tokens(model, some, site, tokens, grid[0] * grid[1]) | subject.padding
        for p, (_, t, part) in zip(itertools.cycle(subject.params), groups):
            values, indices = (np.asarray(a)[:len(some)][real[:, part]].ravel()
                               for a in sae.encode(p, cfg, acts[t, :, part]))
            total += np.bincount(indices, values, cfg.features)
            count += np.bincount(indices[values > 0], minlength=cfg.features)
        if progress:
            progress(len(some))
    fired = count > 0
    if not fired.any() or not np.isfinite(total).all():
        raise Mistake(f"{subject.name}: on {len(prompts)} prompts no feature fires at layer {subject.layer} ({site}), "
                      "or some values are not finite; check that it is an SAE of this model")
    typical = total / np.maximum(count, 1)
    return replace(subject, typical=np.where(fired, typical, np.median(typical[fired])), fired=fired)


# ---------------------------------------------------------------- steering


def draw(model: flux.Model, prompts: str | Sequence[str], changes: Sequence[Change], *, steps: int,
         size: int | tuple[int, int] | None = None, seed: int = 0, strength: float = 1.0,
         during: tuple[int, int] | None = None, boxes: Sequence[Box] = (), guidance: float | None = None,
         text_tokens: int | None = None, progress: Callable | None = None) -> np.ndarray:
    """Draw one image per prompt with features changed: uint8 [B, H, W, 3].

    The noise is that of `flux.generate`, and without changes the images are too. changes, strength, during, boxes: see
    `edits`. The other arguments are those of `generate`.
    """
    start = flux.prepare(model, prompts, steps=steps, size=model.size if size is None else size, seed=seed,
                         guidance=guidance, text_tokens=text_tokens)
    edited = edits(model, start, changes, strength=strength, during=during, boxes=boxes)
    return flux.decode(model, flux.sample(model, start, progress=progress, edits=edited), start.grid)


def edits(model: flux.Model, start: flux.Start, changes: Sequence[Change], *, strength: float = 1.0,
          during: tuple[int, int] | None = None, boxes: Sequence[Box] = ()) -> Callable[[int], list[flux.Edit]]:
    """Return `changes` as the argument `edits` of `flux.generate` and `sample`: sampling step → its `flux.Edit`s.

    strength: multiplies what the changes add to the residual: 0 adds nothing, 1 all of it. during: sampling steps
    (first, end), half open; None: all. boxes: (row, column, row_end, column_end) in image tokens, half open. Only
    image tokens inside a box change, and no text tokens; without boxes, all tokens of the SAE's site change. An SAE of
    several timesteps uses the group of tokens with the nearest noise level. Changes that change nothing (scale 1 and
    add 0, or strength 0) make no edits. Raise ValueError if an argument does not fit.
    """
    first, end = check_during(during, len(start.sigmas) - 1)
    subjects = {id(c.of): c.of for c in changes}.values()
    check_boxes(boxes, start.grid, subjects)
    where = {"txt": np.full(start.condition[0].shape[1], not boxes), "img": region(boxes, start.grid)}
    edit_of = []
    for subject in subjects:
        if subject.typical is None:
            raise Mistake(f"{subject.name} has no typical activations: pass it through `calibrated` first")
        if rows := amounts([c for c in changes if c.of is subject], strength):
            edit_of.append((subject, lru_cache(lambda t, s=subject, rows=rows: _edit(model, s, t, rows, where))))
    return lambda i: [edit(s.nearest(start.sigmas[i])) for s, edit in edit_of] if first <= i < end else []


def amounts(changes: Sequence[Change], strength: float) -> list[tuple[int, float, float]]:
    """Return [(feature, scale, amount to add)] for one SAE's changes, without those that change nothing."""
    check_once(changes)
    rows = [(c.feature, 1 + strength * (c.scale - 1), strength * c.add * float(c.of.typical[c.feature]))
            for c in changes]
    return [row for row in rows if row[1:] != (1, 0)]


def region(boxes: Sequence[Box], grid: tuple[int, int]) -> np.ndarray:
    """Return whether each image token is inside any of the boxes: bool [I], all True without boxes."""
    inside = np.full(grid, not boxes)
    for row, column, row_end, column_end in boxes:
        inside[row:row_end, column:column_end] = True
    return inside.reshape(-1)


def _edit(model, subject, t, rows, where):
    """Return the `flux.Edit` of one SAE, with its parameters for timestep t."""
    encoded, shared = any(scale != 1 for _, scale, _ in rows), {}
    for name, p in subject.of(t).items():
        here = where[name.split(".")[1]]                         # a name is, for example, double.img
        if here.any():
            what = _padded(p, rows) if encoded else {"by": _sum_of(p, rows)}
            shared[name] = _put(model, {**what, "where": here})
    return flux.Edit(subject.layer, tuple(shared), _changing(subject.cfg) if encoded else _adding, shared=shared)


def _padded(params, rows):
    """Return the arrays of `apply.change`, padded to a power of two with changes that change nothing, so that fewer
    programs are compiled."""
    rows = rows + [(0, 1.0, 0.0)] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
    features, scale, add = (np.array(column, kind) for column, kind in zip(zip(*rows), "iff"))
    return {"params": params, "features": features, "scale": scale, "add": add}


def _sum_of(params, rows):
    """Return the vector [D] that changes without scaling add to every token. It needs no values of the SAE."""
    features, add = [row[0] for row in rows], np.array([row[2] for row in rows])
    return (add @ np.asarray(params["W_dec"][np.array(features)], np.float64)).astype(np.float32)


def _put(model, tree):
    """Copy the tree's arrays to every chip of the model's mesh, so that no sampling step has to send them."""
    mesh = shard.mesh_of(model.params)
    return jax.device_put(tree, shard.everywhere(mesh) if mesh else None)


def _adding(name, x, _, shared):
    """Add a vector to the selected tokens: the function of a `flux.Edit`."""
    what = shared[name]
    return jnp.where(what["where"][:, None], x + what["by"].astype(x.dtype), x)


@lru_cache
def _changing(cfg):
    """Return a `flux.Edit`'s function that scales features. One object per SAE, so that it compiles once."""
    def change(name, x, _, shared):
        what = shared[name]
        where = what["where"][:, None]                           # [N, 1]
        scale, add = jnp.where(where, what["scale"], 1), jnp.where(where, what["add"], 0)
        return apply.change(what["params"], cfg, x, what["features"], scale, add)

    return change


def check_once(changes: Sequence[Change]) -> None:
    """Raise Mistake if a feature of one SAE is changed twice."""
    named = [c.feature for c in changes]
    if twice := [f for f in named if named.count(f) > 1]:
        raise Mistake(f"feature {twice[0]} is changed twice; write both changes as one, as in {twice[0]}*0+8")


def check_during(during: tuple[int, int] | None, steps: int) -> tuple[int, int]:
    """Return `during` (first, end), or all sampling steps for None. Raise Mistake if it is outside of them."""
    first, end = (0, steps) if during is None else during
    if not 0 <= first < end <= steps:
        raise Mistake(f"during {first}:{end}: need 0 <= first < end <= {steps} (the sampling steps), as in "
                      f"0:{max(1, steps // 2)}")
    return first, end


def check_boxes(boxes: Sequence[Box], grid: tuple[int, int], subjects: Sequence[session.Subject]) -> None:
    """Raise Mistake if a box is outside of the image, or if an SAE reads only text tokens, which no box contains."""
    for box in boxes:
        check_box(box, grid)
    if boxes and (textual := [subject.name for subject in subjects if subject.site == "txt"]):
        raise Mistake(f"a box selects image tokens, but {textual[0]} reads only text tokens; leave the box out")


def check_box(box: Box, grid: tuple[int, int]) -> Box:
    """Return the box. Raise Mistake if it is empty or outside of the image."""
    row, column, row_end, column_end = box
    if not (0 <= row < row_end <= grid[0] and 0 <= column < column_end <= grid[1]):
        raise Mistake(f"box {','.join(map(str, box))}: the image has {grid[0]} rows and {grid[1]} columns of tokens; "
                      f"give row,column,row_end,column_end, half open (the whole image: 0,0,{grid[0]},{grid[1]})")
    return box


# ---------------------------------------------------------------- the command line

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
CHANGE = re.compile(rf"(?:(?P<name>.+):)?(?P<feature>\d+)(?:\*(?P<scale>{NUMBER}))?(?:\*?(?P<add>[+-]{NUMBER}))?")


def parsed(text: str, subjects: Sequence[session.Subject]) -> list[Change]:
    """Parse "123*4, 77*0, 5+8" into `Change`s. With several subjects each change names its own: "layer3:123*4", or
    "0:123*4" by its place in the list. Raise Mistake with the part that is wrong."""
    changes = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = CHANGE.fullmatch(part.replace(" ", ""))
        if not found or not (found["scale"] or found["add"]):
            raise Mistake(f"--set {part}: write 123*4 to multiply the value of feature 123, 123*0 to ablate it, 123+8 "
                          "or 123-8 to add or subtract 8 typical activations")
        try:
            changes.append(Change(_named(found["name"], subjects), int(found["feature"]),
                                  float(found["scale"] or 1), float(found["add"] or 0)))
        except ValueError as error:
            raise Mistake(f"--set {part}: {error}") from None
    for subject in subjects:
        check_once([c for c in changes if c.of is subject])
    if not changes:
        raise Mistake('--set says no feature to change; write, for example, --set "123+8, 77*0"')
    return changes


def _named(name, subjects):
    """Return the subject with this name or place in the list; None is the only one."""
    names = [subject.name for subject in subjects]
    if name is None and len(names) == 1:
        return subjects[0]
    known = ", ".join(f"{name} (or {place})" for place, name in enumerate(names))
    if name is None:
        raise Mistake(f"which checkpoint? write {names[0]}:{'…'}, or 0:… for the first; there are {known}")
    places = {place for place, known in enumerate(names) if name in (known, str(place))}
    if len(places) != 1:
        raise Mistake(f"{name!r} names {'more than one' if places else 'no'} checkpoint; there are {known}")
    return subjects[places.pop()]


def main(*words: str, set: str = "", steps: int | None = None, during: str = "", box: str = "",
         grid: str = "0,0.5,1,2", seed: int = 0, size: int | tuple[int, int] | None = None,
         guidance: float | None = None, model: str = "", layer: int | None = None, site: str = "", prompts: str = "",
         prompt_field: str = "", calibrate: int | None = None, dtype: str = "", quant: str = "", transformer: str = "",
         out: str = "steer", **unknown) -> None:
    """Draw prompts with an SAE's features changed. Give checkpoint folders, then prompts; each gets a row of images.

    --set "123*4, 77*0, 5+8": multiply, ablate, add typical activations. With several checkpoints, say which one:
    layer3:123*4 by the folder's name, 0:123*4 by its place. --during 0:5: only in sampling steps 0 to 4. --box 2,2,6,6:
    only image tokens of rows 2 to 5 and columns 2 to 5 (row,column,row_end,column_end; several: "2,2,6,6; 0,0,1,8").
    --grid 0,1,2,4: strengths that multiply all changes; 0, the image without steering, is always included.
    --calibrate: number of prompts of --prompts (default: the SAE's own source) to measure typical activations on.
    --model, --layer, --site: needed if the SAE does not state where it belongs.
    """
    session.no_unknown_flags(unknown)
    session.check_whole({"seed": seed, "steps": steps, "calibrate": calibrate, "layer": layer})
    folders, texts = told_apart(words)
    name, folder, cfg, found = same_model([session.opened(folder, model=model, layer=layer, site=site)
                                           for folder in folders])
    changes = parsed(set, found)
    steps, size = steps or session.default_steps(cfg), size or flux.default_size(folder)
    options = {"during": check_during(read_during(during), steps), "boxes": read_boxes(box)}
    strengths = read_grid(grid)
    check_boxes(options["boxes"], flux.check_size(folder, size), found)
    files = [f"{row}-x{strength:g}.png" for row in range(len(texts)) for strength in strengths]
    check_out(Path(out), files)
    settings = {"steps": steps, "seed": seed, "size": size, "guidance": guidance}
    count = calibrate or (64 if cfg.width <= 512 else 16)
    used = {id(c.of): c.of for c in changes}                     # fail here if the source of prompts is bad
    known = {key: data.examples(*session.prompts_of(s, prompts, prompt_field), count)[0] for key, s in used.items()}
    print(f"model: {name}; " + ", ".join(f"{s.name}: layer {s.layer} ({s.site})" for s in found))
    loaded = session.load_model(name, found[0].run, dtype=dtype, quant=quant, transformer=transformer)
    changes = measured(loaded, changes, known)
    images = drawn(loaded, texts, changes, strengths, settings, options)
    about = {"model": name, "prompts": texts, "set": set, "strengths": strengths, **settings, **options}
    write(Path(out), images, files, described(about, found, changes))
    print(f"images: {Path(out) / 'steer.png'}")


def described(about: dict, subjects: Sequence[session.Subject], changes: Sequence[Change]) -> dict:
    """Return what steer.json holds: `about` with the checkpoints, the typical activations, and versions."""
    return {"kind": "fae steering", **about,
            "checkpoints": [{"name": s.name, "model": s.model, "layer": s.layer, "site": s.site,
                             "timesteps": s.timesteps} for s in subjects],
            "typical": [float(c.of.typical[c.feature]) for c in changes], "versions": {"jax": jax.__version__}}


def told_apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into (checkpoint folders, prompts). The folders come first."""
    folders = list(itertools.takewhile(lambda word: Path(word).is_dir(), words))
    texts = list(words[len(folders):])
    if not folders:
        raise Mistake(f"{words[0] if words else 'no argument'} is not a checkpoint's folder: python steer.py ckpt/ "
                      '"a red cube" --set "123+8"')
    if not texts:
        raise Mistake(f'no prompt given: python steer.py {" ".join(folders)} "a red cube" --set "123+8"')
    if missing := [text for text in texts if text.endswith("/")]:
        raise Mistake(f"there is no folder {missing[0]}")
    return folders, texts


def same_model(subjects: Sequence[session.Subject]) -> tuple[str, Path, flux.Config, list[session.Subject]]:
    """Return (name, folder, Config) of the one model of all subjects, and the subjects placed in it. Raise Mistake if
    there are several models, or if a subject does not fit."""
    named = {flux.REPOS.get(subject.model, subject.model): subject for subject in subjects}
    if len(named) > 1:
        said = " and ".join(f"{subject.name} to {model}" for model, subject in named.items())
        raise Mistake(f"the checkpoints belong to different models, {said}; choose one with --model")
    name = subjects[0].model
    folder, cfg = flux.read_config(name)
    return name, folder, cfg, [session.placed(subject, folder, cfg) for subject in subjects]


def measured(model: flux.Model, changes: Sequence[Change], known: dict[int, list[str]]) -> list[Change]:
    """Return the changes with calibrated subjects, and print them. known: the prompts of each subject, by its id."""
    done, out = {}, []
    for c in changes:
        key, texts = id(c.of), known[id(c.of)]
        if key not in done:
            with tqdm(total=len(texts), unit="prompt", desc=f"calibrating {c.of.name}", leave=False) as bar:
                done[key] = calibrated(model, c.of, texts, progress=bar.update)
        out.append(replace(c, of=done[key]))
        typical = f"{done[key].typical[c.feature]:.4g}"
        print(f"{c.of.name}, feature {c.feature}: {c.scale:g} times its value, plus {c.add:g} × {typical}"
              + ("" if done[key].fired[c.feature] else f" (it never fired on {len(texts)} prompts: {typical} is the "
                                                       "median of the features that did)"))
    return out


def drawn(model: flux.Model, prompts: Sequence[str], changes: Sequence[Change], strengths: Sequence[float], run: dict,
          options: dict) -> np.ndarray:
    """Draw images uint8 [strengths, B, H, W, 3]. All strengths share the encoded prompts and the noise. run: arguments
    of `flux.prepare`. options: of `edits`."""
    start = flux.prepare(model, prompts, **run)
    images = []
    with tqdm(total=len(strengths) * run["steps"], unit="step", delay=1e-3) as bar:
        for strength in strengths:
            edited = edits(model, start, changes, strength=strength, **options)
            latents = flux.sample(model, start, edits=edited, progress=lambda i: bar.update())
            images.append(flux.decode(model, latents, start.grid))
    return np.stack(images)


def read_during(text: str) -> tuple[int, int] | None:
    """Parse "0:5" into (0, 5); "" into None."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text.replace(" ", ""))
    if not found:
        raise Mistake(f"--during {text}: give the first sampling step, from 0, and the end, as in 0:5")
    return int(found[1]), int(found[2])


def read_boxes(text: str) -> list[Box]:
    """Parse "2,2,6,6; 0,0,1,8" into boxes."""
    boxes = [part.strip("() ") for part in text.split(";") if part.strip("() ")]
    if bad := [box for box in boxes if not re.fullmatch(r"\d+(\s*,\s*\d+){3}", box)]:
        raise Mistake(f"--box {bad[0]}: give row,column,row_end,column_end in image tokens, as in 2,2,6,6")
    return [tuple(map(int, box.split(","))) for box in boxes]


def read_grid(text: str) -> list[float]:
    """Parse "1,2,4" into strengths without duplicates. If 0 is missing, put it first."""
    try:
        strengths = [float(part) for part in text.strip("()[] ").split(",")]
    except ValueError:
        strengths = []
    if not strengths or not np.isfinite(strengths).all():
        raise Mistake(f"--grid {text}: give strengths, as in 0,1,2,4")
    return list(dict.fromkeys(strengths if 0 in strengths else [0.0, *strengths]))


OURS = re.compile(r"\d+-x[-+.\de]+\.png|steer\.(png|json)")       # names of the files that `write` makes


def check_out(out: Path, files: Sequence[str]) -> list[str]:
    """Return the names of the files in `out` that steer.py wrote. Raise Mistake, before any work, if another file would
    be replaced. A name in steer.json counts only if steer.py could have made it: steer.json may come from anywhere."""
    if out.exists() and not out.is_dir():
        raise Mistake(f"{out} is not a folder; choose another --out")
    if out.is_dir() and not os.access(out, os.W_OK):
        raise Mistake(f"--out {out} cannot be written; choose another --out")
    ours = []
    if (out / "steer.json").is_file():
        try:
            about = json.loads((out / "steer.json").read_text(encoding="utf-8"))
            ours = [name for name in about["files"] if about["kind"] == "fae steering" and OURS.fullmatch(name)]
        except (ValueError, KeyError, TypeError):
            pass
    for name in ("steer.json", "steer.png", *files):
        if os.path.lexists(out / name) and name not in ours:     # also a broken link: writing would follow it
            raise Mistake(f"{out / name} exists and was not written by steer.py; choose another --out")
    return ours


def write(out: Path, images: np.ndarray, files: Sequence[str], about: dict) -> None:
    """Write images [strengths, B, H, W, 3], one file each, all of them as steer.png, and steer.json. Delete the files
    of an older run. All files are made in a temporary folder first: an interruption leaves none half-written."""
    from PIL import Image
    out.mkdir(parents=True, exist_ok=True)
    old, names = check_out(out, files), ["steer.json", *files, "steer.png"]
    titles = ["unsteered" if strength == 0 else f"x {strength:g}" for strength in about["strengths"]]
    with tempfile.TemporaryDirectory(prefix=".steer-", dir=out) as new:
        new = Path(new)
        (new / "steer.json").write_text(json.dumps(about | {"files": names}, indent=1), encoding="utf-8")
        for name, image in zip(files, images.swapaxes(0, 1).reshape(-1, *images.shape[2:])):
            Image.fromarray(image).save(new / name)
        sheet(images, titles, about["prompts"], about["set"]).save(new / "steer.png")
        for name in {*old} - {*names}:
            (out / name).unlink(missing_ok=True)
        for name in names:                                       # steer.json first: it lists the others as ours
            os.replace(new / name, out / name)


def sheet(images: np.ndarray, titles: Sequence[str], prompts: Sequence[str], title: str) -> "Picture":
    """Return one picture of images [columns, rows, H, W, 3], with a row for each prompt and a column for each title."""
    from PIL import Image, ImageDraw, ImageFont
    columns, rows, height, width = images.shape[:4]
    font = ImageFont.load_default(max(12, width // 16))
    line = int(1.6 * font.size)
    out = Image.new("RGB", (columns * (width + 4) + 4, line + rows * (height + 2 * line)), "white")
    pen = ImageDraw.Draw(out)
    pen.text((4, 3), title, "black", font)
    for row, prompt in enumerate(prompts):
        top = line + row * (height + 2 * line)
        pen.text((4, top + 2), prompt, "black", font)
        for column, name in enumerate(titles):
            left = 4 + column * (width + 4)
            pen.text((left, top + line), name, "black", font)
            out.paste(Image.fromarray(images[column, row]), (left, top + 2 * line - 4))
    return out


if __name__ == "__main__":
    session.command(main)
