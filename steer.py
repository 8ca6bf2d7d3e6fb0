"""Change an SAE's features while FLUX.1 draws: a checkpoint, a prompt, and what each feature shall be.

    python steer.py ckpt/ "a red cube" --set "123+8, 77*0" --steps 8      # → steer/steer.png
    python steer.py ckpt/ "a red cube" "a cone" --set "123*4" --grid 0,1,2,4 --during 0:5 --box 2,2,6,6
    python steer.py layer3/ layer8/ "a red cube" --set "layer3:123+8, layer8:9*0"

    model = flux.load("nano")
    ours = steer.load("ckpt", model)                                      # the SAE, and its features' typical values
    images = steer.draw(model, "a red cube", [steer.Change(ours, 123, add=8)], steps=8)     # uint8 [1, 128, 128, 3]

`123*4` multiplies what feature 123 is at each token, `123*0` ablates it, `123+8` (or `123*+8`) adds eight times its
typical activation, `123-2` takes two away, and `123*0+8` does both: its value v becomes scale * v + add * typical.
Typical is the mean of the feature's values above zero, on prompts like those that the SAE was trained on. Only decoder
rows times what the values change by are added to the residual stream, so what the SAE leaves out of it stays.

Copy it with `session.py` and what it imports.

Letters: B images, I image tokens, T text tokens, N tokens of a stream, D width, F features, n changes.
"""
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import data
import flux
import sae
import session
import shard
from session import Mistake

# ---------------------------------------------------------------- changes, and what features typically are


@dataclass(frozen=True, eq=False)
class Change:
    """A feature's value v becomes scale * v + add * its typical activation, at every token that is meant."""
    of: session.Subject
    feature: int
    scale: float = 1.0
    add: float = 0.0

    def __post_init__(self):
        self.of.check_feature(self.feature)
        if not math.isfinite(self.scale) or not math.isfinite(self.add):
            raise Mistake(f"feature {self.feature}: scale {self.scale} and add {self.add} must be finite")


def load(folder, model, *, layer=None, site="", prompts=64, seed=0):
    """The `session.Subject` of a checkpoint, with typical activations in `model` (of `flux.load`).

    layer, site: of a foreign SAE, which does not say. prompts: to measure typical activations on, a list, or how many
    of the checkpoint's own source. Raises ValueError where the SAE does not fit the model.
    """
    found = session.subject(model, folder, layer=layer, site=site)
    texts = data.examples(*session.prompts_of(found), prompts)[0] if isinstance(prompts, int) else list(prompts)
    return calibrated(model, found, texts, seed=seed)


def calibrated(model, dictionary, prompts, *, seed=0, batch=16, progress=None):
    """The dictionary with `typical`: the mean of each feature's values above zero on `prompts`, over all groups of
    tokens; of a feature that never fires there, the median of the others. Raises ValueError where none fires."""
    cfg, timesteps, site = dictionary.cfg, dictionary.timesteps, dictionary.site
    size, tokens = dictionary.size or min(256, model.size), dictionary.text_tokens or model.text_tokens
    grid = flux.token_grid(model, size)
    total, count, batch = np.zeros(cfg.features), np.zeros(cfg.features), min(batch, len(prompts))
    for first in range(0, len(prompts), batch):
        some = prompts[first:first + batch]
        full = some + some[-1:] * (batch - len(some))            # one shape, one program
        numbers, shape = data.DRAWN + first + np.arange(batch), (grid[0] * grid[1], model.cfg.in_channels)
        start = flux.prepare(model, full, steps=timesteps, size=size, noise=flux.draw_noise(seed, numbers, shape),
                             text_tokens=tokens)
        acts = flux.capture(model, start, layer=dictionary.layer, site=site).astype(jnp.float32)
        groups = flux.token_groups(site, timesteps, tokens)
        real = data.real_tokens(model, some, site, tokens, grid[0] * grid[1]) | dictionary.padding
        for p, (_, t, part) in zip(itertools.cycle(dictionary.params), groups):
            values, indices = (np.asarray(a)[:len(some)][real[:, part]].ravel()
                               for a in sae.encode(p, cfg, acts[t, :, part]))
            total += np.bincount(indices, values, cfg.features)
            count += np.bincount(indices[values > 0], minlength=cfg.features)
        if progress:
            progress(len(some))
    fired = count > 0
    if not fired.any() or not np.isfinite(total).all():
        raise Mistake(f"{dictionary.name}: no feature fires, or some are not finite, at layer {dictionary.layer} "
                      f"({site}) on {len(prompts)} prompts: is it an SAE of this model?")
    typical = total / np.maximum(count, 1)
    typical = np.where(fired, typical, np.median(typical[fired]))
    return replace(dictionary, typical=typical, fired=fired)


# ---------------------------------------------------------------- steering


def draw(model, prompts, changes, *, steps, size=None, seed=0, strength=1.0, during=None, boxes=(), guidance=None,
         text_tokens=None, progress=None):
    """Draw one image per prompt with features changed: uint8 [B, H, W, 3]. Noise, and the images of no changes, are
    those of `flux.generate`. changes, strength, during, boxes: as for `edits`; other arguments as for `generate`."""
    start = flux.prepare(model, prompts, steps=steps, size=model.size if size is None else size, seed=seed,
                         guidance=guidance, text_tokens=text_tokens)
    edited = edits(model, start, changes, strength=strength, during=during, boxes=boxes)
    return flux.decode(model, flux.sample(model, start, progress=progress, edits=edited), start.grid)


def edits(model, start, changes, *, strength=1.0, during=None, boxes=()):
    """`changes` as the argument `edits` of `flux.generate` and `sample`: sampling step → its `flux.Edit`s.

    strength: times what the changes add to the residual: 0 is none of it, 1 as asked. during: (first, end) of sampling
    steps, half open; None is all. boxes: (row, column, row_end, column_end) in image tokens, half open; the changes are
    made inside of any of them, and at no text token. Without boxes, at all tokens of the SAE's site.
    An SAE trained at several timesteps changes with the group of the one whose noise level is nearest.
    Changes to nothing (scale 1, add 0, strength 0) are no edits. Raises ValueError for what does not fit.
    """
    steps = len(start.sigmas) - 1
    first, end = check_during(during, steps)
    where = {"txt": np.full(start.condition[0].shape[1], not boxes), "img": region(boxes, start.grid)}
    edit_of = []
    for dictionary in {id(c.of): c.of for c in changes}.values():
        if boxes and dictionary.site == "txt":
            raise Mistake(f"{dictionary.name} is of text tokens, which lie in no box of the image")
        if dictionary.typical is None:
            raise Mistake(f"{dictionary.name} has no typical activations yet (see `calibrated`)")
        if rows := amounts([c for c in changes if c.of is dictionary], strength):
            edit_of.append((dictionary, lru_cache(lambda t, d=dictionary, rows=rows: _edit(model, d, t, rows, where))))
    return lambda i: [edit(d.nearest(start.sigmas[i])) for d, edit in edit_of] if first <= i < end else []


def amounts(changes, strength):
    """[(feature, scale, what to add)] of one SAE's changes, without those that change nothing."""
    check_once(changes)
    rows = [(c.feature, 1 + strength * (c.scale - 1), strength * c.add * float(c.of.typical[c.feature]))
            for c in changes]
    return [row for row in rows if row[1:] != (1, 0)]


def region(boxes, grid):
    """Whether an image token lies in any of the boxes, [I]; all do where there are none."""
    inside = np.full(grid, not boxes)
    for box in boxes:
        row, column, row_end, column_end = check_box(box, grid)
        inside[row:row_end, column:column_end] = True
    return inside.reshape(-1)


def _edit(model, dictionary, t, rows, where):
    """The `flux.Edit` of one SAE with the parameters of its timestep t."""
    encoded, shared = any(scale != 1 for _, scale, _ in rows), {}
    for name, p in dictionary.of(t).items():
        here = where[name.split(".")[1]]                         # of double.img, say
        if here.any():
            what = _padded(p, rows) if encoded else {"by": _sum_of(p, rows)}
            shared[name] = _put(model, {**what, "where": here})
    return flux.Edit(dictionary.layer, tuple(shared), _changing(dictionary.cfg) if encoded else _adding, shared=shared)


def _padded(params, rows):
    """The arrays of `sae.change`, filled up to a power of two with changes to nothing: fewer programs."""
    rows = rows + [(0, 1.0, 0.0)] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
    features, scale, add = (np.array(column, kind) for column, kind in zip(zip(*rows), "iff"))
    return {"params": params, "features": features, "scale": scale, "add": add}


def _sum_of(params, rows):
    """What additions alone add to every token, [D]: no value of the SAE is needed."""
    features, add = [row[0] for row in rows], np.array([row[2] for row in rows])
    return (add @ np.asarray(params["W_dec"][np.array(features)], np.float64)).astype(np.float32)


def _put(model, tree):
    """The tree's arrays where the model's are: on every chip of its mesh, so that no step has to send them."""
    mesh = shard.mesh_of(model.params)
    return jax.device_put(tree, shard.everywhere(mesh) if mesh else None)


def _adding(name, x, _, shared):
    what = shared[name]
    return jnp.where(what["where"][:, None], x + what["by"].astype(x.dtype), x)


@lru_cache
def _changing(cfg):
    """The function of an Edit whose features are encoded; the same object for the same SAE, so that it is compiled
    once."""
    def change(name, x, _, shared):
        what = shared[name]
        where = what["where"][:, None]                           # [N, 1]
        scale, add = jnp.where(where, what["scale"], 1), jnp.where(where, what["add"], 0)
        return sae.change(what["params"], cfg, x, what["features"], scale, add)

    return change


def check_once(changes):
    named = [c.feature for c in changes]
    if twice := [f for f in named if named.count(f) > 1]:
        raise Mistake(f"feature {twice[0]} is changed twice; say it once, as in {twice[0]}*0+8")


def check_during(during, steps):
    """(first, end) of sampling steps; all where during is None. Raises ValueError outside of them."""
    first, end = (0, steps) if during is None else during
    if not 0 <= first < end <= steps:
        raise Mistake(f"during {first}:{end}: of {steps} sampling steps the first is 0 and the end at most {steps}, "
                         f"as in 0:{max(1, steps // 2)}")
    return first, end


def check_box(box, grid):
    row, column, row_end, column_end = box
    if not (0 <= row < row_end <= grid[0] and 0 <= column < column_end <= grid[1]):
        raise Mistake(f"box {','.join(map(str, box))}: the image has {grid[0]} rows and {grid[1]} columns of "
                         f"tokens; give row,column,row_end,column_end, half open (all of it: 0,0,{grid[0]},{grid[1]})")
    return box


# ---------------------------------------------------------------- the command line

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
CHANGE = re.compile(rf"(?:(?P<name>.+):)?(?P<feature>\d+)(?:\*(?P<scale>{NUMBER}))?(?:\*?(?P<add>[+-]{NUMBER}))?")


def parsed(text, dictionaries):
    """"123*4, 77*0, 5+8" → `Change`s; of several dictionaries each says its own: "layer3:123*4", or "0:123*4" by its
    place in the list. Raises ValueError that shows what is wrong."""
    changes = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = CHANGE.fullmatch(part.replace(" ", ""))
        if not found or not (found["scale"] or found["add"]):
            raise Mistake(f"--set {part}: write 123*4 to multiply what feature 123 is, 123*0 to ablate it, 123+8 or "
                             "123-8 to add 8 typical activations or take them away")
        try:
            changes.append(Change(_named(found["name"], dictionaries), int(found["feature"]),
                                  float(found["scale"] or 1), float(found["add"] or 0)))
        except ValueError as error:
            raise Mistake(f"--set {part}: {error}") from None
    for dictionary in dictionaries:
        check_once([c for c in changes if c.of is dictionary])
    if not changes:
        raise Mistake('--set says no feature to change; as in --set "123+8, 77*0"')
    return changes


def _named(name, dictionaries):
    names = [d.name for d in dictionaries]
    known = ", ".join(f"{name} (or {place})" for place, name in enumerate(names))
    if name is None and len(names) == 1:
        return dictionaries[0]
    if name is None:
        raise Mistake(f"of which checkpoint? write {names[0]}:{'…'}, or 0:… for the first; there are {known}")
    places = {place for place, known in enumerate(names) if name in (known, str(place))}
    if len(places) != 1:
        raise Mistake(f"{'more than one' if places else 'no'} checkpoint is meant by {name!r}; there are {known}")
    return dictionaries[places.pop()]


def main(*words, set="", steps=None, during="", box="", grid="0,0.5,1,2", seed=0, size=None, guidance=None, model="",
         layer=None, site="", prompts="", prompt_field="", calibrate=None, dtype="", quant="", transformer="",
         out="steer", **unknown):
    """Draw prompts with an SAE's features changed: first checkpoint folders, then prompts; a row of images for each.

    --set "123*4, 77*0, 5+8": multiply, ablate, add so many typical activations. Of several checkpoints say which:
    layer3:123*4 by the folder's name, 0:123*4 by its place. --during 0:5: in sampling steps 0 to 4. --box 2,2,6,6:
    only image tokens of rows 2 to 5 and columns 2 to 5 (row,column,row_end,column_end; several: "2,2,6,6; 0,0,1,8").
    --grid 0,1,2,4: strengths, each times all that --set changes; 0, the image without steering, is always there.
    --calibrate: prompts on which typical activations are measured, of --prompts (default: what the SAE was trained on).
    --model, --layer, --site: for an SAE that does not say where it belongs.
    """
    session.no_unknown_flags(unknown)
    given = {"seed": seed, "steps": steps, "calibrate": calibrate, "layer": layer}
    session.check_whole({name: value for name, value in given.items() if value is not None})
    folders, texts = told_apart(words)
    name, folder, cfg, found = same_model([session.opened(folder, model=model, layer=layer, site=site)
                                           for folder in folders])
    changes = parsed(set, found)
    steps = steps or session.default_steps(cfg)
    options = {"during": check_during(read_during(during), steps), "boxes": read_boxes(box)}
    strengths, size = read_grid(grid), size or flux.default_size(folder)
    tokens = flux.check_size(folder, size)
    for part in options["boxes"]:
        check_box(part, tokens)
    if options["boxes"] and (textual := [d.name for d in found if d.site == "txt"]):
        raise Mistake(f"--box: {textual[0]} is of text tokens, which lie in no image")
    files = [f"{row}-x{strength:g}.png" for row in range(len(texts)) for strength in strengths]
    check_out(Path(out), files)
    settings = {"steps": steps, "seed": seed, "size": size, "guidance": guidance}
    count = calibrate or (64 if cfg.width <= 512 else 16)
    used = {id(c.of): c.of for c in changes}                     # a bad source of prompts fails here
    known = {key: data.examples(*session.prompts_of(d, prompts, prompt_field), count)[0] for key, d in used.items()}
    print(f"model: {name}; " + ", ".join(f"{d.name}: layer {d.layer} ({d.site})" for d in found))
    loaded = session.load_model(name, found[0].run, dtype=dtype, quant=quant, transformer=transformer)
    changes = measured(loaded, changes, known)
    images = drawn(loaded, texts, changes, strengths, settings, options)
    about = {"kind": "fae steering", "model": name, "prompts": texts, "set": set, "strengths": strengths, **settings,
             **options, "checkpoints": [{"name": d.name, "model": d.model, "layer": d.layer, "site": d.site,
                                         "timesteps": d.timesteps} for d in found],
             "typical": [float(c.of.typical[c.feature]) for c in changes], "versions": {"jax": jax.__version__}}
    write(Path(out), images, files, about)
    print(f"images: {Path(out) / 'steer.png'}")


def told_apart(words):
    """(checkpoint folders, prompts): the folders come first."""
    folders = []
    for word in words:
        if not Path(word).is_dir():
            break
        folders.append(word)
    texts = list(words[len(folders):])
    if not folders:
        raise Mistake(f"{words[0] if words else 'no argument'} is not a checkpoint's folder: python steer.py ckpt/ "
                         '"a red cube" --set "123+8"')
    if not texts:
        raise Mistake(f'no prompt given: python steer.py {" ".join(folders)} "a red cube" --set "123+8"')
    if missing := [text for text in texts if text.endswith("/")]:
        raise Mistake(f"there is no folder {missing[0]}")
    return folders, texts


def same_model(dictionaries):
    """(name, folder, Config) of the one model of all, and the dictionaries placed in it. Raises Mistake where there are
    two, or one does not fit."""
    named = {flux.REPOS.get(d.model, d.model): d for d in dictionaries}
    if len(named) > 1:
        said = " and ".join(f"{d.name} of {model}" for model, d in named.items())
        raise Mistake(f"the checkpoints belong to different models, {said}; --model says which one is meant")
    name = dictionaries[0].model
    folder, cfg = flux.read_config(name)
    return name, folder, cfg, [session.placed(dictionary, folder, cfg) for dictionary in dictionaries]


def measured(model, changes, known):
    """The changes with their dictionaries calibrated. known: the prompts of each, by the dictionary's id. Prints what
    the changes are."""
    done = {}
    for dictionary in {id(c.of): c.of for c in changes}.values():
        texts = known[id(dictionary)]
        with tqdm(total=len(texts), unit="prompt", desc=f"calibrating {dictionary.name}", leave=False) as bar:
            done[id(dictionary)] = calibrated(model, dictionary, texts, progress=bar.update)
    counts = [len(known[id(c.of)]) for c in changes]
    changes = [Change(done[id(c.of)], c.feature, c.scale, c.add) for c in changes]
    for c, count in zip(changes, counts):
        typical = f"{c.of.typical[c.feature]:.4g}"
        print(f"{c.of.name}, feature {c.feature}: {c.scale:g} times its value, plus {c.add:g} × {typical}"
              + ("" if c.of.fired[c.feature] else f" (it never fired on {count} prompts: {typical} is the "
                                                  "median of the features that did)"))
    return changes


def drawn(model, prompts, changes, strengths, run, options):
    """Images uint8 [strengths, B, H, W, 3]; prompts and noise are made once."""
    start = flux.prepare(model, prompts, **run)
    images = []
    with tqdm(total=len(strengths) * run["steps"], unit="step", delay=1e-3) as bar:
        for strength in strengths:
            edited = edits(model, start, changes, strength=strength, **options)
            latents = flux.sample(model, start, edits=edited, progress=lambda i: bar.update())
            images.append(flux.decode(model, latents, start.grid))
    return np.stack(images)


def read_during(text):
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text.replace(" ", ""))
    if not found:
        raise Mistake(f"--during {text}: give the first sampling step, from 0, and the end, as in 0:5")
    return int(found[1]), int(found[2])


def read_boxes(text):
    boxes = [part.strip("() ") for part in text.split(";") if part.strip("() ")]
    if bad := [box for box in boxes if not re.fullmatch(r"\d+(\s*,\s*\d+){3}", box)]:
        raise Mistake(f"--box {bad[0]}: give row,column,row_end,column_end in image tokens, as in 2,2,6,6")
    return [tuple(map(int, box.split(","))) for box in boxes]


def read_grid(text):
    """Strengths, with 0 first where it is not said."""
    try:
        strengths = [float(part) for part in text.strip("()[] ").split(",")]
    except ValueError:
        strengths = []
    if not strengths or not np.isfinite(strengths).all():
        raise Mistake(f"--grid {text}: give strengths, as in 0,1,2,4")
    return list(dict.fromkeys(strengths if 0 in strengths else [0.0, *strengths]))


OURS = re.compile(r"\d+-x[-+.\de]+\.png|steer\.(png|json)")       # names of what `write` writes


def check_out(out, files):
    """Refuse, before any work, to replace what steer.py did not write; returns the names of what it did. Names in
    steer.json count only where steer.py would give them: the file may come from anywhere."""
    if out.exists() and not out.is_dir():
        raise Mistake(f"{out} is not a folder; choose another --out")
    if out.is_dir() and not os.access(out, os.W_OK):
        raise Mistake(f"--out {out}: it cannot be written")
    ours = []
    if (out / "steer.json").is_file():
        try:
            about = json.loads((out / "steer.json").read_text(encoding="utf-8"))
            ours = [name for name in about["files"] if about["kind"] == "fae steering" and OURS.fullmatch(name)]
        except (ValueError, KeyError, TypeError):
            pass
    for name in ("steer.json", "steer.png", *files):
        if os.path.lexists(out / name) and name not in ours:     # also a link to nothing: it would be followed
            raise Mistake(f"{out / name} is there and not of steer.py; choose another --out")
    return ours


def write(out, images, files, about):
    """The images [strengths, B, ...], each by itself and all as steer.png, and steer.json; an older run's are gone. All
    is made in a folder of its own first, so that nothing half-written is left where writing is stopped."""
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
        for name in names:                                       # steer.json first: it claims the others
            os.replace(new / name, out / name)


def sheet(images: np.ndarray, titles: Sequence[str], prompts: Sequence[str], title: str):
    """One picture: a row of images [columns, rows, H, W, 3] for each prompt, a column for each title."""
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
