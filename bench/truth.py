"""Test nano's SAE features against the true attributes of scenes, as Markdown and a plot over layers.

    python bench/truth.py results.json --plot docs/truth.svg --ckpts DIR       # only print if the file exists

The true attributes belong to a rendered scene, so the model gets renders: the VAE encodes a scene's render, noise is
added to --level 0.5, and the model runs with the scene's caption. (train.py's recipe, one step from pure noise, has no
true image.) The SAEs train for --steps steps on such activations of scenes that are not held out; PCA uses the same
activations. All is repeated on a nano with an untrained transformer: Gaussian weights with the mean and spread of the
trained ones, per tensor and layer, and the same text encoders. The SAEs in --ckpts DIR (layer0 …, as train.py writes
them), which were trained on pure noise only, are rivals too.

Over tokens: only tokens (16x16 pixels) that a solid covers by half or more, labelled with its shape, colour, size,
depth (behind or in front of the middle), relation to another solid (in scenes with two or more), and the side of the
light. With other tokens, a feature that fires on any solid would score high on every attribute. Over images: the
maximum over tokens, with the scene's labels (`dash.scene_attributes`). For each attribute, choose the best single
direction and its sign by AUROC on scenes with even numbers, and report its AUROC on scenes with odd numbers. Rivals,
with either sign: the layer's MLP neurons, the principal axes, and as many random directions as the SAE has features. A
linear probe (discriminant analysis with all 128 dimensions) shows what supervision would find.
"""
import html
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "JAX_PLATFORMS": "cpu"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "nano")]

import jax
import jax.numpy as jnp
import numpy as np
import scenes
import sweep

import checkpoint
import dash
import data
import flux
import sae
import score
import session
import stats
from harvest import reap
from recipe import READABLE

BATCH, GRID, FIRST = 2048, (8, 8), 20_000                        # tokens per step; number of the first training scene
RIVALS = ("SAE of renders", "train.py's SAE", "neurons", "PCA", "random directions", "SAE, untrained model",
          "linear probe")
STEP = jax.jit(sae.step, static_argnums=1, donate_argnums=0)


# ---------------------------------------------------------------- true attributes


def token_truth(scene: scenes.Scene, objects: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return (names, labels [64, A], mask of tokens on a solid [64]) of a scene, from its pixels' ids [128, 128]."""
    patches = objects.reshape(GRID[0], 16, GRID[1], 16).swapaxes(1, 2).reshape(64, 256)
    shares = np.stack([(patches == i).mean(1) for i in range(len(scene.solids))], 1)
    which, on = shares.argmax(1), shares.max(1) >= 0.5
    said = {(i, word) for i, word, _ in scenes.relations(scene)}

    def of(i):
        solid = scene.solids[i]
        row = {f"{kind}: {word}": getattr(solid, kind) == word
               for kind, words in (("shape", scenes.SHAPES), ("color", scenes.COLORS), ("size", scenes.SIZES))
               for word in words}
        row |= {"depth: near": solid.position[1] < -0.4, "depth: far": solid.position[1] > 0.4}
        row |= {f"relation: {word}": (i, word) in said for word in ("left", "right", "front", "behind")}
        return row | {f"light: {side}": scene.side == side for side in scenes.SIDES}

    rows = [of(i) for i in range(len(scene.solids))]
    return list(rows[0]), np.array([list(row.values()) for row in rows])[which], on


class World:
    """Scenes with their latents, captions and true attributes."""

    def __init__(self, model: flux.Model, numbers: Sequence[int]):
        self.scenes = [scenes.sample(i) for i in numbers]
        renders = [scenes.render(scene, 128) for scene in self.scenes]
        captions = [scenes.caption(scene) for scene in self.scenes]
        self.data = score.dataset(model, captions, [r.image for r in renders])
        truths = [token_truth(s, r.object) for s, r in zip(self.scenes, renders)]
        self.token_names, self.tokens = truths[0][0], np.stack([t for _, t, _ in truths])
        self.on = np.stack([on for *_, on in truths])            # [N, 64]
        self.image_names, self.images = dash.scene_attributes(scenes, self.scenes)
        self.several = np.array([len(s.solids) > 1 for s in self.scenes])


# ---------------------------------------------------------------- activations


def activations(model: flux.Model, world: World, layers: Sequence[int], level: float, draw: int, neurons: bool = False,
                batch: int = 32) -> dict[str, np.ndarray]:
    """Return {"img": [layers, tokens, D], "neurons": [layers, tokens, 4D]} in float16, with noise seed `draw`."""
    parts, n = [], len(world.scenes)
    for first in range(0, n, batch):
        rows = np.minimum(np.arange(first, first + batch), n - 1)
        texts = [world.data.prompts[i] for i in rows]
        start = data.beginning(model, texts, rows, np.float32([level, 0]), GRID, draw)
        z = (1 - level) * world.data.latents[rows] + level * np.asarray(start.latents)
        found = _all_layers(model.params, model.cfg, z, *flux.at(start, 0), tuple(layers), neurons)
        parts.append({k: np.asarray(v)[:, :min(batch, n - first)].reshape(len(layers), -1, v.shape[-1])
                      for k, v in found.items()})
    return {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}


@partial(jax.jit, static_argnums=(1, 7, 8))
def _all_layers(params, cfg, z, text, pooled, time, guidance, layers, neurons):
    names = ("double.img", "single.img") + (("double.img.neurons", "single.neurons") if neurons else ())
    found = reap(partial(flux.velocity, grid=GRID), names)(params, cfg, z, text, pooled, time, guidance)[1]
    out = {"img": [*found["double.img"], *found["single.img"]]}
    if neurons:
        out["neurons"] = [*found["double.img.neurons"], *found["single.neurons"][:, :, text.shape[1]:]]
    return {name: jnp.stack([x[i] for i in layers]).astype(jnp.float16) for name, x in out.items()}


def untrained(model: flux.Model, seed: int = 0) -> flux.Model:
    """Return the model with Gaussian transformer weights that have the mean and spread of each trained tensor."""
    rng = np.random.default_rng(seed)

    def redraw(path, w):
        axes = tuple(range(1 if path[0].key in ("double", "single") else 0, w.ndim))
        noise = rng.standard_normal(w.shape, dtype=np.float32)
        return jnp.asarray(np.mean(w, axes, keepdims=True) + np.std(w, axes, keepdims=True) * noise)

    return replace(model, params=jax.tree_util.tree_map_with_path(redraw, model.params))


def trained_sae(tokens: np.ndarray, steps: int, seed: int = 0) -> tuple[sae.Params, sae.Config]:
    """Train an SAE on raw tokens [N, D] with train.py's defaults for nano, but with everything that they hold."""
    options = {name: READABLE[name] for name in ("features", "k", "activation")}
    cfg = sweep.config(tokens.shape[1], steps, **options)
    order = np.random.default_rng(seed).permutation(len(tokens))
    state = sae.init(jax.random.key(seed), cfg, np.asarray(tokens[order[:32768]], np.float32))
    for i in range(steps):
        at = order[np.arange(i * BATCH, (i + 1) * BATCH) % len(order)]
        state, _ = STEP(state, cfg, np.asarray(tokens[at], np.float32))
    return sae.fold(state, cfg), cfg


# ---------------------------------------------------------------- rivals: tokens [N, D] → scores [N, directions]


def codes(params: sae.Params, cfg: sae.Config) -> Callable:
    """Return a function from tokens to the SAE's dense codes."""
    def of(x):
        values, indices = (np.asarray(a) for a in sae.encode(params, cfg, x))
        out = np.zeros((len(x), cfg.features), np.float32)
        np.put_along_axis(out, indices, values, 1)
        return out
    return of


def along(directions: np.ndarray, mean: np.ndarray) -> Callable:
    """Return a function from tokens to their coordinates along directions [D, n]."""
    return lambda x: (x - mean) @ directions


def chunks(function: Callable, x: np.ndarray, size: int = 4096) -> Iterator[np.ndarray]:
    """Yield the function's result for each `size` rows of x."""
    return (function(np.asarray(x[i:i + size], np.float32)) for i in range(0, len(x), size))


# ---------------------------------------------------------------- AUROCs


def best(scores: np.ndarray, labels: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Choose each attribute's best column and its sign on the rows in `half`. Return the AUROC on the others [A]."""
    chosen = stats.auroc(scores[half], labels[half])
    at = np.nan_to_num(np.abs(chosen - 0.5), nan=-1).argmax(0)
    sign = np.sign(chosen[at, np.arange(len(at))] - 0.5)
    held = np.array([stats.auroc(scores[~half][:, [c]], labels[~half][:, [a]])[0, 0] for a, c in enumerate(at)])
    return 0.5 + sign * (held - 0.5)


def probe(x: np.ndarray, labels: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Fit a linear discriminant with pooled covariance on the rows in `half`. Return its AUROC on the others [A]."""
    out = []
    for y in labels.T:
        a, b = x[half & y], x[half & ~y]
        within = (np.cov(a, rowvar=False) * len(a) + np.cov(b, rowvar=False) * len(b)) / (len(a) + len(b))
        w = np.linalg.solve(within + 1e-3 * np.trace(within) / len(within) * np.eye(len(within)), a.mean(0) - b.mean(0))
        out.append(stats.auroc((x[~half] @ w)[:, None], y[~half, None])[0, 0])
    return np.array(out)


def scored(world: World, rival: Callable, tokens: np.ndarray) -> dict[str, dict[str, float]]:
    """Return {attribute: AUROC} over tokens and over images, for one rival on residuals or neurons [N * 64, C]."""
    on, several, n = world.on.reshape(-1), np.repeat(world.several, 64), len(world.scenes)
    parts, tops = [], []
    for i, s in enumerate(chunks(rival, tokens)):                # 4096 tokens are 64 whole images
        parts.append(s[on[i * 4096:(i + 1) * 4096]])
        by_image = s.reshape(-1, 64, s.shape[1])
        tops.append(np.concatenate([by_image.max(1), -by_image.min(1)], 1))
    scores, labels = np.concatenate(parts), world.tokens.reshape(n * 64, -1)[on]
    return {"tokens": by_token(world, labels, several[on], np.repeat(np.arange(n) % 2 == 0, 64)[on],
                               lambda rows, y, half: best(scores[rows], y, half)),
            "images": dict(zip(world.image_names, best(np.concatenate(tops), world.images,
                                                       np.arange(n) % 2 == 0).tolist()))}


def by_token(world: World, labels: np.ndarray, several: np.ndarray, half: np.ndarray,
             measure: Callable) -> dict[str, float]:
    """Measure relations on tokens of scenes with several solids, and other attributes on all tokens."""
    related = np.array([name.startswith("relation") for name in world.token_names])
    out = np.zeros(len(related))
    for some, rows in ((related, several), (~related, np.ones(len(several), bool))):
        out[some] = measure(rows, labels[rows][:, some], half[rows])
    return dict(zip(world.token_names, out.tolist()))


def probed(world: World, tokens: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the AUROC of linear probes over tokens."""
    on, n = world.on.reshape(-1), len(world.scenes)
    x, labels = np.asarray(tokens[on], np.float64), world.tokens.reshape(n * 64, -1)[on]
    several, half = np.repeat(world.several, 64)[on], np.repeat(np.arange(n) % 2 == 0, 64)[on]
    return {"tokens": by_token(world, labels, several, half, lambda rows, y, h: probe(x[rows], y, h))}


# ---------------------------------------------------------------- all layers and rivals


def measure(layers: Sequence[int], n: int, images: int, steps: int, level: float, ckpts: str, save: Callable) -> dict:
    """Return {layer: {rival: {"tokens", "images": {attribute: AUROC}}}}. Call save(found) after each layer."""
    model = flux.load("nano", dtype=jnp.float32)
    seen, held = World(model, range(FIRST, FIRST + images)), World(model, range(n))
    found = {layer: {} for layer in layers}
    say = lambda *what: print(*what, file=sys.stderr, flush=True)
    say(f"{held.on.sum()} tokens on solids, {len(held.scenes)} scenes")
    for name, who in (("SAE of renders", model), ("SAE, untrained model", untrained(model))):
        fit = np.concatenate([activations(who, seen, layers, level, 1 + draw)["img"] for draw in range(2)], 1)
        test = activations(who, held, layers, level, 0, neurons=who is model)
        for i, layer in enumerate(layers):
            rivals = {name: codes(*trained_sae(fit[i], steps))}
            if who is model:
                rivals |= others(fit[i], ckpts, layer)
            for rival, function in rivals.items():
                found[layer][rival] = scored(held, function, test["img"][i])
            if who is model:
                found[layer]["neurons"] = scored(held, lambda x: x, test["neurons"][i])
                found[layer]["linear probe"] = probed(held, test["img"][i])
            say(layer, {r: round(float(np.mean(list(f["tokens"].values()))), 3) for r, f in found[layer].items()})
            save(found)
    return found


def others(fit: np.ndarray, ckpts: str, layer: int) -> dict[str, Callable]:
    """Return the rivals on residuals: PCA, random directions, and train.py's SAE if there is one."""
    x = np.asarray(fit[:65536], np.float64)
    mean, axes = x.mean(0), np.linalg.eigh(np.cov(x, rowvar=False))[1]
    drawn = np.random.default_rng(0).standard_normal((len(mean), READABLE["features"]))
    rivals = {"PCA": along(axes, mean), "random directions": along(drawn, mean)}
    if ckpts and (Path(ckpts) / f"layer{layer}").is_dir():
        rivals["train.py's SAE"] = codes(*checkpoint.load(Path(ckpts) / f"layer{layer}"))
    return rivals


def each(one: dict, where: str) -> dict[str, dict[str, float]]:
    """Return {rival: {attribute: AUROC}} with the mean as attribute "all"."""
    return {rival: one[rival][where] | {"all": float(np.mean(list(one[rival][where].values())))}
            for rival in RIVALS if where in one.get(rival, {})}


def table(one: dict, title: str) -> str:
    """Return a Markdown table with a row for each attribute: AUROC over tokens / over images."""
    tokens, images = each(one, "tokens"), each(one, "images")
    names = dict.fromkeys(name for rows in (tokens, images) for row in rows.values() for name in row)
    lines = [f"| {title} | {' | '.join(tokens)} |", "|---|" + "--:|" * len(tokens)]
    for name in sorted(names, key=lambda name: name == "all"):
        cells = [" / ".join(f"{row[name]:.3f}" if name in row else "–" for row in (tokens[r], images.get(r, {})))
                 for r in tokens]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_layers(found: dict) -> dict:
    """Return {"tokens", "images": {rival: {layer: mean AUROC}}}."""
    out = {"tokens": {}, "images": {}}
    for layer, one in sorted(found.items()):
        for where, rivals in out.items():
            for rival, row in each(one, where).items():
                rivals.setdefault(rival, {})[layer] = row["all"]
    return out


COLORS = ("#c02942", "#e08a9a", "#2a7ab0", "#3a9a5c", "#999999", "#d99a00", "#222222")


def truth_plot(layers: dict) -> str:
    """Draw {"tokens", "images": {rival: {layer: mean AUROC}}} as an SVG with two panels."""
    names = list(dict.fromkeys(name for rows in layers.values() for name in rows))
    numbers = sorted({int(layer) for rows in layers.values() for row in rows.values() for layer in row})
    first, last = numbers[0], numbers[-1]
    place = lambda layer: (int(layer) - first) / max(last - first, 1)
    out = []
    for p, where in enumerate(("tokens", "images")):
        x, y = lambda layer: 60 + 400 * p + 320 * place(layer), lambda value: 520 - 480 * float(value)
        out += [f'<line x1="{60 + 400 * p}" x2="{380 + 400 * p}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ddd"/>'
                f'<text x="{52 + 400 * p}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.1f}</text>'
                for v in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
        out += [f'<text x="{x(n):.1f}" y="298" text-anchor="middle">{n}</text>' for n in numbers]
        out.append(f'<text x="{220 + 400 * p}" y="24" text-anchor="middle" font-weight="bold">best single direction, '
                   f"AUROC over {where}</text>")
        for name, row in layers[where].items():
            points = [(x(n), y(row[n])) for n in sorted(row, key=int)]
            line, color = " ".join(f"{a:.1f},{b:.1f}" for a, b in points), COLORS[names.index(name) % len(COLORS)]
            out.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2.5"/>')
            out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in points]
    for i, name in enumerate(names):
        left, top = 60 + 190 * (i % 4), 326 + 20 * (i // 4)
        out.append(f'<line x1="{left}" x2="{left + 24}" y1="{top}" y2="{top}" stroke="{COLORS[i % len(COLORS)]}" '
                   f'stroke-width="3"/><text x="{left + 30}" y="{top + 4}">{html.escape(name)}</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 360" font-family="sans-serif" font-size="12" '
            'role="img" aria-label="AUROC of the best direction over layers"><rect width="840" height="360" '
            f'fill="white"/>{"".join(out)}</svg>')


def main(results: str, plot: str = "", layers: Sequence[int] = range(12), n: int = 600, images: int = 2000,
         steps: int = 400, level: float = 0.5, ckpts: str = "", shown: int = 10, **unknown) -> None:
    """Print the table of layer `shown`, and save the plot. Measure first if the file `results` does not exist."""
    session.no_unknown_flags(unknown)
    file = Path(results)
    if not file.exists():
        layers = np.atleast_1d(layers).tolist()
        measure(layers, n, images, steps, level, ckpts, lambda found: file.write_text(json.dumps(found)))
    found = {int(layer): one for layer, one in json.loads(file.read_text()).items()}
    shown = shown if shown in found else sorted(found)[len(found) // 2]
    print(table(found[shown], f"layer {shown}, tokens / images"))
    if plot:
        Path(plot).write_text(truth_plot(over_layers(found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    session.command(main)
