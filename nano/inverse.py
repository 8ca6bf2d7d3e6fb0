"""Read the truth from an image of nano's world: what every cell shows, also for images that a model drew.

    python nano/inverse.py                       # trains the network on true renders → nano/inverse.safetensors
    python nano/inverse.py --check_only             # how often it is right on held-out renders

    network = inverse.load()
    seen = inverse.read(network, images)         # uint8 [B, 128, 128, 3] → a `Seen`, arrays [B, 32, 32, ...]
    seen.color[0, 10, 12]                        # index into COLORS; len(COLORS) where no solid is
    inverse.tokens(seen)["color: red"]           # share [B, 8, 8] of each token's 16 cells

For a render the scene says all this. For a generated image nothing does, so a small U-net learns it from renders, and
from what the autoencoder makes of renders. A cell is 4x4 pixels; its truth is that of its centre. Letters: B images,
H = W = 32 cells, S shapes, C colours. It needs jax, optax, numpy, `scenes.py`, `cpu.py` and `session.py`; `vae.py` only
to see what the autoencoder makes of renders.
"""
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
from jax.sharding import Mesh, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

import session

SHAPES, COLORS, SIZE, CELLS = list(scenes.SHAPES), list(scenes.COLORS), 128, 32
SURFACES = ("solid", "ground", "wall")
TRAIN_SEED, CHECK_SEED = 2_000_000, 10_000                       # train.py trains from 1,000,000 on; these are others
WIDTHS = (48, 96, 128)                                           # at 32, 16 and 8 cells a side
OUTPUTS = {"shape": len(SHAPES) + 1, "color": len(COLORS) + 1, "surface": len(SURFACES), "lit": 2, "depth": 1,
           "normal": 3}
FILE = NANO / "inverse.safetensors"


class Seen(NamedTuple):
    """What each cell shows."""
    shape: np.ndarray                                            # [B, H, W] index into SHAPES; len(SHAPES): no solid
    color: np.ndarray                                            # [B, H, W] index into COLORS; len(COLORS): no solid
    surface: np.ndarray                                          # [B, H, W] index into SURFACES
    lit: np.ndarray                                              # [B, H, W] 1 where the light arrives
    depth: np.ndarray                                            # [B, H, W] world units along the viewing axis
    normal: np.ndarray                                           # [B, H, W, 3] unit, world frame


# ---------------------------------------------------------------- reading images


def load(path=FILE):
    """The network's parameters, float32."""
    with safe_open(path, "np") as reader:
        return {name: jnp.asarray(reader.get_tensor(name), jnp.float32) for name in reader.keys()}  # noqa: SIM118


def read(network, images, batch=100):
    """Return what the network sees in images uint8 [B, 128, 128, 3]."""
    if images.shape[1:] != (SIZE, SIZE, 3) or images.dtype != np.uint8:
        raise session.Mistake(f"images are {images.dtype} {list(images.shape)}, should be uint8 [B, {SIZE}, {SIZE}, 3]")
    parts = []
    for i in range(0, len(images), batch):
        some = np.resize(images[i:i + batch], (batch, SIZE, SIZE, 3))            # one shape, one compile
        out = {name: np.asarray(value)[:len(images) - i] for name, value in _run(network, some).items()}
        normal = out["normal"] / np.maximum(np.linalg.norm(out["normal"], axis=-1, keepdims=True), 1e-6)
        labels = [out[name].argmax(-1) for name in ("shape", "color", "surface", "lit")]
        parts.append((*labels, out["depth"][..., 0], normal))
    return Seen(*map(np.concatenate, zip(*parts)))


@jax.jit
def _run(network, images):
    return outputs(network, images.astype(jnp.float32) / 127.5 - 1)


def tokens(seen: Seen, grid: int = 8) -> dict[str, np.ndarray]:
    """Return {what: share [B, grid, grid] of each token's cells}: for shapes, colours, both together ("red cube"),
    surfaces, shadow on the ground, the edges between surfaces, sides of solids, and how far the ground is away."""
    solid, ground, wall = (seen.surface == i for i in range(len(SURFACES)))
    right, away, up = np.moveaxis(seen.normal, -1, 0)            # of the world frame in `scenes`
    maps = {f"shape: {name}": seen.shape == i for i, name in enumerate(SHAPES)}
    maps |= {f"color: {name}": seen.color == i for i, name in enumerate(COLORS)}
    maps |= {f"{color} {shape}": maps[f"color: {color}"] & maps[f"shape: {shape}"]
             for color in COLORS for shape in SHAPES}
    maps |= {"solid": solid, "ground": ground, "wall": wall, "shadow": ground & (seen.lit == 0)}
    maps |= {"edge: solid, ground": _edge(solid, ground), "edge: solid, wall": _edge(solid, wall),
             "edge: ground, wall": _edge(ground, wall)}
    maps |= {"side: top": solid & (up > 0.8), "side: front": solid & (away < -0.8),
             "side: left": solid & (right < -0.5), "side: right": solid & (right > 0.5),
             "side: dark": solid & (seen.lit == 0)}
    near, far = seen.depth < 8, seen.depth > 11                  # a third of the ground each, about
    maps |= {"ground: near": ground & near, "ground: middle": ground & ~near & ~far, "ground: far": ground & far}
    return {name: _pooled(where, grid) for name, where in maps.items()}


def _edge(a, b):
    """The cells [B, H, W] of two surfaces where they meet."""
    return (a & _beside(b)) | (b & _beside(a))


def _beside(where):
    """The cells above, below, left and right of cells [B, H, W]."""
    padded = np.pad(where, ((0, 0), (1, 1), (1, 1)))
    return padded[:, 2:, 1:-1] | padded[:, :-2, 1:-1] | padded[:, 1:-1, 2:] | padded[:, 1:-1, :-2]


def _pooled(where, grid):
    n = CELLS // grid
    return where.reshape(-1, grid, n, grid, n).mean((2, 4))


def objects(seen: Seen, least: int = 6) -> list[set[tuple[str, str]]]:
    """Return the (colour, shape) of every solid in each image: a colour on `least` cells or more, with its most
    frequent shape. Two solids of one colour count as one."""
    found = []
    for shapes, colors in zip(seen.shape, seen.color):
        here = set()
        for i, color in enumerate(COLORS):
            kinds = shapes[(colors == i) & (shapes < len(SHAPES))]
            if len(kinds) >= least:
                here.add((color, SHAPES[np.bincount(kinds).argmax()]))
        found.append(here)
    return found


# ---------------------------------------------------------------- the network


def outputs(p, x):
    """Images [B, 128, 128, 3] in -1…1 → {name: [B, 32, 32, n]} for OUTPUTS: a U-net on 4x4 patches."""
    x = _fold(x, 4) @ p["in.w"] + p["in.b"]
    skips = []
    for level in range(len(WIDTHS)):
        x = _block(p, f"down_{level}", x)
        if level + 1 < len(WIDTHS):
            skips.append(x)
            x = _fold(x, 2) @ p[f"fold_{level}.w"]
    for level in reversed(range(len(WIDTHS) - 1)):
        x = jnp.repeat(jnp.repeat(x @ p[f"lift_{level}.w"], 2, 1), 2, 2) + skips[level]
        x = _block(p, f"up_{level}", x)
    return {name: x @ p[f"{name}.w"] + p[f"{name}.b"] for name in OUTPUTS}


def _block(p, name, x):
    """Two 3x3 convolutions beside an identity."""
    y = jax.nn.gelu(_norm(_neighbours(x) @ p[f"{name}_a.w"] + p[f"{name}_a.b"]))
    return x + _neighbours(y) @ p[f"{name}_b.w"]


def _norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _neighbours(x):
    """3x3 neighbourhoods as channels: on a CPU, XLA multiplies matrices far faster than it convolves."""
    n = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, i:i + n, j:j + n] for i in range(3) for j in range(3)], -1)


def _fold(x, n):
    """Blocks of n x n pixels as channels."""
    B, H, W, C = x.shape
    return x.reshape(B, H // n, n, W // n, n, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, H // n, W // n, n * n * C)


def init(key):
    """Random parameters."""
    sizes = {"in": (48, WIDTHS[0])}
    for level, width in enumerate(WIDTHS):
        blocks = [f"down_{level}"] + ([f"up_{level}"] if level + 1 < len(WIDTHS) else [])
        sizes |= {f"{block}_{part}": (9 * width, width) for block in blocks for part in "ab"}
        if level + 1 < len(WIDTHS):
            sizes |= {f"fold_{level}": (4 * width, WIDTHS[level + 1]), f"lift_{level}": (WIDTHS[level + 1], width)}
    sizes |= {name: (WIDTHS[0], n) for name, n in OUTPUTS.items()}
    params = {}
    for (name, (rows, columns)), k in zip(sizes.items(), jax.random.split(key, len(sizes))):
        params[f"{name}.w"] = jax.random.normal(k, (rows, columns)) * np.sqrt(1 / rows)
        if not name.endswith("_b") and not name.startswith(("fold", "lift")):
            params[f"{name}.b"] = jnp.zeros(columns)
    return params


# ---------------------------------------------------------------- truth and training


def truth_of(scene):
    """Return the `Seen` of a scene, without the axis B, and its image uint8 [128, 128, 3]."""
    whole, cells = scenes.render(scene, SIZE), scenes.render(scene, CELLS)
    ids = cells.object
    shape, color = (np.array([*[names.index(getattr(solid, kind)) for solid in scene.solids], len(names), len(names)])
                    for kind, names in (("shape", SHAPES), ("color", COLORS)))   # ids -1 and -2: ground and wall
    surface = np.where(ids >= 0, 0, np.where(ids == scenes.GROUND, 1, 2))
    return Seen(shape[ids], color[ids], surface, cells.lit.astype(int), cells.depth, cells.normal), whole.image


def of_seed(seed):
    return truth_of(scenes.sample(seed))


def drawn(seeds):
    """Return (`Seen`, images uint8 [B, 128, 128, 3]) of the scenes of these seeds, rendered by all cores."""
    if len(seeds) < 500:                                         # starting processes takes as long
        found = list(map(of_seed, seeds))
    else:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(of_seed, seeds, chunksize=50))
    seen, images = zip(*found)
    return Seen(*(np.stack(part) for part in zip(*seen))), np.stack(images)


def reconstruct(model, images, noise=0.0):
    """What the autoencoder makes of images, uint8; `noise` is an error of its latents, such as a flow model makes."""
    import vae
    cfg, params = model.vae

    @jax.jit
    def run(params, images, key):
        latents = vae.encode(params, cfg, images.astype(jnp.float32) / 127.5 - 1)
        latents += noise * jax.random.normal(key, latents.shape)
        return jnp.round((vae.decode(params, cfg, latents).clip(-1, 1) + 1) * 127.5).astype(jnp.uint8)

    keys = jax.random.split(jax.random.key(0), len(images))
    return np.concatenate([np.asarray(run(params, images[i:i + 20], keys[i])) for i in range(0, len(images), 20)])


def loss_fn(params, x, seen):
    """Cross entropies of the labels, and squared errors of depth (in tens of units) and normal."""
    out, total = outputs(params, x), 0.0
    for name in ("shape", "color", "surface", "lit"):
        total += optax.softmax_cross_entropy_with_integer_labels(out[name], seen[name]).mean()
    depth = ((out["depth"][..., 0] - seen["depth"]) / 10) ** 2
    return total + depth.mean() + ((out["normal"] - seen["normal"]) ** 2).sum(-1).mean()


def train(model=None, count=16_000, passed=2_000, epochs=6, batch=64, seed=0):
    """Parameters trained on `count` renders; `passed` of them also as the autoencoder of `model` shows them."""
    seen, images = drawn(range(TRAIN_SEED, TRAIN_SEED + count))
    if model is not None:
        images = np.concatenate([images, *[reconstruct(model, images[:passed], noise=n) for n in (0.05, 0.3)]])
        seen = Seen(*(np.concatenate([part, part[:passed], part[:passed]]) for part in seen))
    arrays = {name: np.asarray(value, np.int32 if name in ("shape", "color", "surface", "lit") else np.float32)
              for name, value in seen._asdict().items()}
    steps, rng = len(images) * epochs // batch, np.random.default_rng(seed)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3, 0.1), weight_decay=1e-2)
    params = init(jax.random.key(seed))
    state, step = optimizer.init(params), make_step(optimizer, batch)
    for i in range(steps):
        rows = rng.integers(0, len(images), batch)
        params, state, loss = step(params, state, images[rows], {name: a[rows] for name, a in arrays.items()},
                                   jax.random.fold_in(jax.random.key(seed), i))
        if (i + 1) % 100 == 0:
            print(f"inverse: step {i + 1} of {steps}, loss {loss:.4f}", flush=True)
    return params


def make_step(optimizer, batch):
    """Return the program (params, state, images [batch, 128, 128, 3], truth, key) → (params, state, loss). Each device
    takes its part of the batch; on a CPU one image after the other, see `cpu.mean`."""
    devices = jax.devices()[:math.gcd(batch, len(jax.devices()))]
    size = 1 if devices[0].platform == "cpu" else batch // len(devices)

    def gradients(params, images, seen, key):
        cut = lambda x: x.reshape(-1, size, *x.shape[1:])
        keys = jax.random.split(jax.random.fold_in(key, jax.lax.axis_index("data")), len(images) // size)
        one = lambda part: jax.value_and_grad(loss_fn)(params, _augmented(part[0], part[2]), part[1])
        return jax.lax.pmean(cpu.mean(one, (cut(images), jax.tree.map(cut, seen), keys)), "data")

    every, part = PartitionSpec(), PartitionSpec("data")
    gradients = jax.shard_map(gradients, mesh=Mesh(np.array(devices), ("data",)), check_vma=False,
                              in_specs=(every, part, part, every), out_specs=every)

    def step(params, state, images, seen, key):
        value, grads = gradients(params, images, seen, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def _augmented(images, key):
    """Images in -1…1, a little brighter or darker, and noisy: generated ones are not clean."""
    gain, level, noise = jax.random.split(key, 3)
    some = lambda key, low, high: jax.random.uniform(key, (len(images), 1, 1, 1), minval=low, maxval=high)
    x = images.astype(jnp.float32) / 127.5 * some(gain, 0.94, 1.06) - 1
    return x + some(level, 0, 0.05) * jax.random.normal(noise, x.shape)


def check(network, count=1_000, grid=8):
    """How well the network reads held-out renders: {what: share of tokens right}, mean errors of depth and normal.

    A token shows what most of its cells show; for a shadow, whether half of it is in shadow."""
    truth, images = drawn(range(CHECK_SEED, CHECK_SEED + count))
    seen = read(network, images)
    found = {}
    for name, n in (("surface", len(SURFACES)), ("shape", len(SHAPES) + 1), ("color", len(COLORS) + 1)):
        most = [np.stack([_pooled(getattr(one, name) == i, grid) for i in range(n)]).argmax(0) for one in (truth, seen)]
        found[name] = float((most[0] == most[1]).mean())
        on = most[0] < len(SHAPES) if name == "shape" else most[0] < len(COLORS)
        if name != "surface":
            found[f"{name}, tokens of solids"] = float((most[0] == most[1])[on].mean())
    a, b = (tokens(one, grid)["shadow"] >= 0.5 for one in (truth, seen))
    found["shadow"] = float((a == b).mean())
    found["depth, mean error in units"] = float(np.abs(truth.depth - seen.depth).mean())
    cosine = (truth.normal * seen.normal).sum(-1).clip(-1, 1)
    found["normal, mean error in degrees"] = float(np.degrees(np.arccos(cosine)).mean())
    return found


def main(check_only=False, model="nano", out="", **unknown):
    """Train the network (with --check_only: only check the one that is there), and print how well it reads renders."""
    session.no_unknown_flags(unknown)
    file = Path(out) if out else FILE
    if not check_only:
        import flux
        params = train(flux.load(model, dtype=jnp.float32) if model else None)
        save_file({name: np.asarray(value, jnp.bfloat16) for name, value in params.items()}, file)
    for name, value in check(load(file)).items():
        print(f"{name}: {value:.2f}" if "error" in name else f"{name}: {value:.1%}", flush=True)


if __name__ == "__main__":
    session.command(main)
