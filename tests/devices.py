"""What test_shard.py asks, answered in a process that has eight CPU devices: `python tests/devices.py MODEL WORK`.

WORK is an empty folder. Each line printed is a JSON list: name, value.
"""
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu",
               "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import attribution
import checkpoint
import data as sources
import flux
import sae
import session
import shard
import train

PROMPTS = [f"prompt {i}" for i in range(8)]


def main(folder, work):
    meshes = {"one device": None, "fsdp 8": shard.mesh(), "data 2 x fsdp 4": shard.mesh(data=2)}

    def load(name, walk=None, mesh=None):
        options = shard.arguments(mesh, session.quantized(name))
        return flux.load(folder, dtype=jnp.float32, **options | ({"walk": walk} if walk else {}))

    plain = load("nf4")
    expected_edited = edited(plain)
    expected = answers(plain)
    for name, mesh in meshes.items():
        model = load("nf4", shard.sliced(mesh), mesh)
        ours = answers(model)
        tell(f"{name}: activations", [error(a, b) for a, b in zip(ours, expected)])
        tell(f"{name}: edited", error(edited(model), expected_edited))
        if name in ("one device", "fsdp 8"):
            scan = answers(replace(model, walk=shard.scan(mesh)))
            tell(f"{name}: scan - sliced", [float(np.abs(a - b).max()) for a, b in zip(scan, ours)])
        if mesh:
            w, bias = (model.params["single"]["in"][name] for name in "wb")
            tell(f"{name}: parts", [part(w.codes), part(w.scales), part(bias)])
        if name == "fsdp 8":
            trained, alone = train_sae(model, mesh, work), train_sae(model, None, work)
            tell(f"{name}: SAE", {key: error(trained[key], value) for key, value in alone.items()})
    tell("three prompts on eight devices", error(*[
        np.asarray(flux.residuals(m, PROMPTS[:3], layer=5, site="img")) for m in (model, plain)]))
    tell("examples a device", [examples(shard.sliced(shard.mesh()), B) for B in (1, 3, 8, 12)])
    tell("batches", [shard.batch(4), shard.batch(1, 32), shard.batch(1, 33), shard.batch(4, 16)])
    counts = []
    for layer in [0, 3, 4, 11] * 2:
        flux.residuals(model, PROMPTS, layer=layer, site="img")
        counts.append(model.walk.run._cache_size())
    tell("compilations", counts)
    exact, split = load("none"), load("none", mesh=meshes["fsdp 8"])
    tell("fsdp 8, not quantized", [error(a, b) for a, b in zip(answers(split), answers(exact))])
    one, eight = (attributed(m) for m in (exact, split))
    tell("attribution", [error(a, b) for a, b in zip(eight[0], one[0])])
    tell("scans of an attribution", [one[1], eight[1]])


def answers(model):
    """The text encoding of 8 prompts, and residuals in two sampling steps, for which every block runs."""
    encoded = flux.encode_text(model, PROMPTS)
    return [np.asarray(x) for x in (*encoded, flux.residuals(model, PROMPTS, layer=5, site="img", steps=2))]


def examples(walk, B):
    """How many of B examples each device computes, and whether they come back in their order."""
    seen = []

    def block(x, p):
        seen.append(x.shape[0])
        return x * p, {"x": x}

    x = jnp.arange(1.0, B + 1)[:, None]
    y, caught = walk(block, x, jnp.asarray([[2.0], [3.0]]), range(2))
    right = (y == 6 * x).all() and (caught["x"] == jnp.stack([x, 2 * x])).all()
    return [max(seen), bool(right)]


def edited(model):
    """The latents after two steps with two layers' image tokens changed, each example by a factor of its own."""
    def change(name, x, each, shared):
        return each[:, None, None] * x + shared

    names = [flux.residual_names(model.cfg, layer, "img") for layer in (2, 6)]
    edits = [flux.Edit(layer, name, change, jnp.linspace(0.5, 1.5, len(PROMPTS)), jnp.arange(model.cfg.width) / 100)
             for layer, name in zip((2, 6), names)]
    start = flux.prepare(model, PROMPTS, steps=2, size=128)
    return np.asarray(flux.sample(model, start, edits=lambda i: edits))


def attributed(model):
    """What makes a feature of layer 6 fire, by features of layer 1 and by text tokens; and how many equations JAX sees
    in it, which must not grow with the blocks."""
    rng, saes = np.random.default_rng(0), []
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for layer in (1, 6):
        cfg = sae.Config(d_in=model.cfg.width, features=64, k=8)
        params = {"W_enc": draw(cfg.d_in, 64), "b_enc": draw(64), "W_dec": draw(64, cfg.d_in), "b_dec": draw(cfg.d_in)}
        names = flux.residual_names(model.cfg, layer, "img")
        saes.append(session.Subject("random", [params], cfg, "nano", layer, "img", {}, names, np.ones(1)))
    grid = flux.token_grid(model, 64)
    start = sources.beginning(model, PROMPTS[:1], [0], np.array([1, 0], np.float32), grid, 0)
    x = flux.capture(model, start, layer=6, site="img")[0]
    feature = int(np.bincount(np.ravel(sae.encode(saes[1].params[0], saes[1].cfg, x)[1])).argmax())
    found = attribution.attribute(model, saes[1], feature, PROMPTS[0], saes[0], size=64)
    run = found.run
    shifts = {name: jnp.zeros(x.shape, jnp.float32) for name, x in run.residual(saes[0]).items()}
    size = len(str(jax.make_jaxpr(lambda shifts: run.read(shifts, gradient=True))(shifts)))
    return (found.values, found.tokens), size


def train_sae(model, mesh, work):
    """The weights of an SAE after 20 steps of train.py."""
    run = train.defaults("nano", model.source, model.cfg, {
        "layer": 3, "features": 256, "k": 8, "steps": 20, "batch": 256, "buffer": 2048, "prompt_batch": 8,
        "quant": "nf4", "size": 128, "text_tokens": 32, "activation": "topk", "without": "nothing"})
    out = Path(work) / f"sae{len(os.listdir(work))}"
    train.train(run, model, sources.stream(run.prompts, run.prompt_field, False), out, mesh=mesh, resume=False,
                log_every=20, save_every=20)
    return {name: np.asarray(value) for name, value in checkpoint.load(out)[0].items()}


def part(leaf):
    """On how many chips a leaf lies in parts."""
    return leaf.size // leaf.addressable_shards[0].data.size


def error(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def tell(name, value):
    print(json.dumps([name, value]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
