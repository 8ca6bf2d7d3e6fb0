"""SAEs over layers, k and features on nano, beside other trainers and baselines on the same saved tokens, as Markdown.

    python tests/bench_sweep.py results.jsonl --what sweep           # k = 8 … 64, F = 1,024 … 16,384
    python tests/bench_sweep.py results.jsonl --what sites           # train.py's defaults on img, txt and both
    python tests/bench_sweep.py results.jsonl --what beside          # SAELens and sparsify (pip install eai-sparsify)
    python tests/bench_sweep.py results.jsonl --what baselines       # PCA, random features, MLP neurons, ITDA
    python tests/bench_sweep.py results.jsonl --what tables          # only print what is there

One pass of the model catches every layer; its tokens, shuffled as train.py does it, are kept in --acts (default: a
temporary folder that is removed) and read by all runs. A run is then `sae.step` alone, with the learning rate, warmup
and decay of train.py. Results are appended to the file, a line each, and what has its line there is not done again: the
command can be stopped and repeated. FVU (standardized), dead features and L0 are of 65,536 tokens of held-out prompts;
"silent" is the trainer's own counter of dead features, where it has one, after the last step.
"""
import itertools
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "JAX_PLATFORMS": "cpu"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import baselines
import jax
import jax.numpy as jnp
import numpy as np

import flux
import prompts
import sae
import train
from harvest import reap

BATCH, CHUNK = 2048, 2 ** 17                                     # tokens of a step; shuffled together
TOKENS = 2 ** 16                                                 # held out; and as many to fit baselines on
STEP = jax.jit(sae.step, static_argnums=1, donate_argnums=0)


# ---------------------------------------------------------------- activations


def saved(folder, site, steps):
    """A list over layers of {"train": [at least steps * BATCH, D], "fit", "test": [TOKENS, D + 4D]}, mapped from files
    that are made where they are missing: residuals; in the latter two with the neurons of the block's MLP."""
    folder = Path(folder, site)
    marker, layers = folder / "steps", range(flux.read_config("nano")[1].layers)
    if not marker.exists() or int(marker.read_text()) < steps:
        folder.mkdir(parents=True, exist_ok=True)
        harvest(folder, site, steps)
        marker.write_text(str(steps))
    return [{name: np.load(folder / f"{name}.{layer}.npy", mmap_mode="r") for name in ("train", "fit", "test")}
            for layer in layers]


def harvest(folder, site, steps):
    """Run nano as train.py does: 4 noises of each of 32 prompts at a time, tokens shuffled in chunks of 2^17. First for
    `steps` steps, then for TOKENS more tokens, then for TOKENS of noise that training never sees."""
    model = flux.load("nano", dtype=jnp.float32)
    stream, position = prompts.stream("scenes"), itertools.count()

    def caught(tokens, neurons=False, first=0):
        """[L, at least `tokens`, D or 5D] of the next prompts."""
        rows, n = [], 0
        while n < tokens:
            rows.append(forward(model, list(itertools.islice(stream, 32)), first + 32 * next(position), site, neurons))
            n += rows[-1].shape[1]
        return np.concatenate(rows, 1)

    shape, layers = (steps * BATCH, model.cfg.width), range(model.cfg.layers)
    files = [np.lib.format.open_memmap(folder / f"train.{layer}.npy", "w+", np.float32, shape) for layer in layers]
    for start in range(0, steps * BATCH, CHUNK):
        rows = caught(CHUNK)
        order = np.random.default_rng((0, start)).permutation(rows.shape[1])
        for file, of_layer in zip(files, rows):
            part = file[start:start + CHUNK]
            part[:] = of_layer[order[:len(part)]]
    for name, first in (("fit", 0), ("test", train.HELD_OUT)):
        for layer, rows in enumerate(caught(TOKENS, True, first)):
            np.save(folder / f"{name}.{layer}.npy", rows[:TOKENS])


def forward(model, captions, first, site, neurons, seeds=4):
    """[L, tokens, D or 5D] of every caption with `seeds` noises, numbered from seeds * first."""
    text, pooled = (jnp.repeat(x, seeds, 0) for x in flux.encode_text(model, captions))
    grid = flux.token_grid(model, min(256, model.size))
    shape = grid[0] * grid[1], model.cfg.in_channels
    noise = flux.draw_noise(0, first * seeds + np.arange(len(text)), shape)
    sigma = flux.sigmas(model.scheduler, 1, shape[0])[0]
    acts = _all_layers(model.params, model.cfg, noise, text, pooled, sigma, grid, site, neurons)
    return np.asarray(acts).reshape(model.cfg.layers, -1, acts.shape[-1])


@partial(jax.jit, static_argnums=(1, 6, 7, 8))
def _all_layers(params, cfg, latents, text, pooled, sigma, grid, site, neurons):
    """The residual streams of all layers [L, B, N, D] or, with the MLPs' neurons beside them, [L, B, N, 5D]."""
    T = text.shape[1]
    sites, tokens = {"img": (("img",), slice(T, None)), "txt": (("txt",), slice(T)),
                     "both": (("txt", "img"), slice(None))}[site]
    names = [f"{kind}.{s}" for kind in ("double", "single") for s in sites]
    names += [*(f"double.{s}.neurons" for s in sites), "single.neurons"] if neurons else []
    run = reap(partial(flux.velocity, grid=grid), tuple(names))
    found = run(params, cfg, latents, text, pooled, jnp.full(len(latents), sigma), None)[1]
    streams = [jnp.concatenate([found[f"{kind}.{s}"] for s in sites], 2) for kind in ("double", "single")]
    if neurons:
        of = [jnp.concatenate([found[f"double.{s}.neurons"] for s in sites], 2), found["single.neurons"][:, :, tokens]]
        streams = [jnp.concatenate(pair, -1) for pair in zip(streams, of)]
    return jnp.concatenate(streams)


# ---------------------------------------------------------------- trainers: tokens → (State, Config, silent features)


def config(width, steps, features, **options):
    """train.py's recipe at small models."""
    warmup = min(300, steps * 3 // 10)
    return sae.Config(**{"d_in": width, "features": features, "lr": 9 * sae.default_lr(features), "warmup": warmup,
                         "decay": (warmup, steps + 1)} | options)


def ours(x, steps, **options):
    state, cfg = begun(x, steps, **options)
    for i in range(steps):
        state, metrics = STEP(state, cfg, x[i * BATCH:(i + 1) * BATCH])
    return state, cfg, float(metrics["dead"]) if steps else None


def saelens(x, steps, lr=None, **options):
    """SAELens' TopKTrainingSAE in its SAETrainer, everything at its defaults; or, with lr, with our schedule."""
    import torch
    from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    torch.manual_seed(0)
    start, cfg = begun(x, steps, **options)
    schedule = {"lr_warm_up_steps": cfg.warmup, "lr_decay_steps": steps - cfg.warmup}
    model = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=cfg.d_in, d_sae=cfg.features, k=cfg.k))
    trainer = SAETrainer(data_provider=iter(()), sae=model, cfg=SAETrainerConfig(
        total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, logger=LoggingConfig(log_to_wandb=False),
        lr_end=3e-5,                                             # must be there; constant rates ignore it
        **({"lr": lr} | schedule if lr else {})))
    for i in range(steps):
        trainer.step(torch.from_numpy(units(start, x, i)))
        trainer.n_training_steps += 1
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    norm = np.linalg.norm(w["W_dec"], axis=1) if model.cfg.rescale_acts_by_decoder_norm else 1.0
    w |= {"enc": (w["W_enc"] * norm).T, "b_enc": w["b_enc"] * norm, "dec": (w["W_dec"].T / norm).T}
    assert model.cfg.apply_b_dec_to_input                        # as ours
    params = {name: w[name] for name in start.params}
    return start._replace(params=params), cfg, float(trainer.dead_neurons.float().mean())


def sparsify(x, steps, optimizer="signum", lr=None, **options):
    """sparsify's SparseCoder, stepped as its Trainer does, which needs a language model. "signum": its default
    optimizer and rate, without a schedule; "adam": with our schedule, and its own rate unless lr is given."""
    import torch
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    torch.manual_seed(0)
    start, cfg = begun(x, steps, **options)
    model = SparseCoder(cfg.d_in, SparseCoderConfig(num_latents=cfg.features, k=cfg.k))
    model.b_dec.data = torch.from_numpy(units(start, x, 0)).mean(0)
    scale = (cfg.features / 2 ** 14) ** -0.5
    if optimizer == "signum":
        opt, schedule = ScheduleFreeWrapper(SignSGD(model.parameters(), lr=lr or 5e-3 * scale), momentum=0.95), None
        opt.train()
    else:
        opt = torch.optim.Adam(model.parameters(), lr=lr or 2e-4 * scale)
        rise, fall = lambda i: (i + 1) / cfg.warmup, lambda i: (steps - i) / (steps - cfg.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(rise(i), fall(i)))
    for i in range(steps):
        model.set_decoder_norm_to_unit_norm()
        model(torch.from_numpy(units(start, x, i))).fvu.backward()
        model.remove_gradient_parallel_to_decoder_directions()
        opt.step()
        opt.zero_grad()
        if schedule:
            schedule.step()
    if optimizer == "signum":
        opt.eval()                                               # the averaged weights
    model.set_decoder_norm_to_unit_norm()
    params = {"enc": model.encoder.weight, "b_enc": model.encoder.bias, "dec": model.W_dec, "b_dec": model.b_dec}
    return start._replace(params={name: p.detach().numpy() for name, p in params.items()}), cfg, None


def begun(x, steps, **options):
    """(State, Config) of fae before its first step: the others get its normalization, and give their weights to it."""
    cfg = config(x.shape[1], steps, **options)
    return sae.init(jax.random.key(0), cfg, np.asarray(x[:65536])), cfg


def units(state, x, i):
    """Batch i in the space that is trained in."""
    return (x[i * BATCH:(i + 1) * BATCH] - np.asarray(state.mean)) / np.asarray(state.std)


# ---------------------------------------------------------------- baselines: a layer → its test tokens reconstructed


def units_of(layer):
    """(moments, fit tokens, test tokens): standardized, and the mean and std that did it, of the training tokens."""
    width, sample = layer["train"].shape[1], layer["train"][:65536]
    moments = tuple(f(sample, 0, dtype=np.float64).astype(np.float32) for f in (np.mean, np.std))
    return moments, *((layer[name][:, :width] - moments[0]) / moments[1] for name in ("fit", "test"))


def pca(layer, features, k):
    _, fit, test = units_of(layer)
    return baselines.pca(fit, test, k)


def neurons(layer, features, k):
    _, fit, _ = units_of(layer)
    width = fit.shape[1]
    return baselines.largest(layer["fit"][:, width:], fit, layer["test"][:, width:], k)


def random_dictionary(layer, features, k):
    _, _, test = units_of(layer)
    return baselines.pursue(test, baselines.random_dictionary(jax.random.key(0), features, test.shape[1]), k)[0]


def itda(layer, features, k):
    (mean, std), _, test = units_of(layer)
    batches = [(layer["train"][i * BATCH:(i + 1) * BATCH] - mean) / std for i in range(64)]
    return baselines.pursue(test, baselines.itda(batches, features, k), k)[0]


# ---------------------------------------------------------------- what is measured

TRAINERS = {"fae": ours, "SAELens": saelens, "sparsify": sparsify}
BASELINES = {"PCA": pca, "MLP neurons": neurons, "random dictionary": random_dictionary, "ITDA": itda}


def plan(what, layers, steps):
    """Jobs: dicts of `trainer`, `site`, `layer`, `steps` and what else the trainer takes."""
    def jobs(trainer, site="img", steps=steps, features=2048, k=32, **options):
        job = {"trainer": trainer, "site": site, "steps": steps, "features": features, "k": k, **options}
        return [job | {"layer": layer} for layer in layers]

    if what == "sites":
        kinds = [{"trainer": "fae", "site": site, "steps": 1000} for site in ("txt", "both", "img")]
    elif what == "sweep":
        sizes = [(2048, k) for k in (8, 16, 32, 64)] + [(features, 32) for features in (1024, 4096, 8192, 16384)]
        kinds = [{"trainer": "fae", "features": features, "k": k} for features, k in sizes]
    elif what == "beside":
        lr = 9 * sae.default_lr(2048)
        theirs = [{"trainer": "SAELens"}, {"trainer": "SAELens", "lr": lr}, {"trainer": "sparsify"},
                  {"trainer": "sparsify", "optimizer": "adam"}, {"trainer": "sparsify", "optimizer": "adam", "lr": lr}]
        kinds = [{"trainer": "fae"}, *theirs, *(kind | {"normalization": "scale"} for kind in theirs)]
    elif what == "baselines":
        kinds = [{"trainer": trainer} for trainer in ("fae", *BASELINES)] + [{"trainer": "fae", "steps": 0}]
    else:
        raise ValueError(f"--what {what}: it is sweep, sites, beside, baselines or tables")
    return [job for kind in kinds for job in jobs(**kind)]


def measure(layer, trainer, site, steps, **options):
    """Of held-out tokens: standardized FVU, and what else a kind of trainer has; seconds that its making took."""
    since = time.monotonic()
    if trainer in BASELINES:
        found = BASELINES[trainer](layer, **options)
        _, _, test = units_of(layer)
        fvu = np.mean(np.sum((test - found) ** 2, 0) / np.sum((test - test.mean(0)) ** 2, 0))
        return {"fvu_standardized": float(fvu), "seconds": time.monotonic() - since}
    state, cfg, silent = TRAINERS[trainer](layer["train"], steps, **options)
    seconds = time.monotonic() - since
    found = sae.evaluate(sae.fold(state, cfg), cfg, layer["test"][:, :cfg.d_in])._asdict()
    return {name: value for name, value in found.items() if name != "density"} | {"silent": silent, "seconds": seconds}


# ---------------------------------------------------------------- results


def read(path):
    """{job as sorted items: results} of a file of results; a line that a stopped run left torn is dropped."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(line["job"]): line["found"] for line in map(json.loads, (x for x in lines if x.endswith("}}")))}


def key(job):
    return tuple(sorted(job.items()))


def table(results):
    """A row for each kind of job, over its layers."""
    kinds = {}
    for job, found in results.items():
        kinds.setdefault(tuple(pair for pair in job if pair[0] != "layer"), {})[dict(job)["layer"]] = found
    lines = ["| trainer | site | F | k | steps | layers | FVU, mean | least (layer) | most (layer) | dead %, worst | "
             "silent %, worst | L0 | seconds |", "|---|---|" + "--:|" * 11]
    for kind, layers in kinds.items():
        job = dict(kind)
        rest = [f"{name} {job[name]:.3g}" if isinstance(job[name], float) else f"{name} {job[name]}"
                for name in job if name not in ("trainer", "site", "features", "k", "steps")]
        fvu = {layer: found["fvu_standardized"] for layer, found in layers.items()}
        ends = [f"{fvu[layer]:.3f} ({layer})" for layer in (min(fvu, key=fvu.get), max(fvu, key=fvu.get))]
        worst = [worst_of(layers, name, lambda v: f"{100 * max(v):.2f}") for name in ("dead", "silent")]
        cells = [", ".join([job["trainer"], *rest]), job["site"], f"{job['features']:,}", job["k"], job["steps"],
                 len(layers), f"{np.mean(list(fvu.values())):.4f}", *ends, *worst,
                 worst_of(layers, "l0", lambda v: f"{np.mean(v):.1f}"),
                 worst_of(layers, "seconds", lambda v: f"{np.median(v):.0f}")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def worst_of(layers, name, summary):
    """summary of what all layers have under a name; empty where they have nothing."""
    values = [found[name] for found in layers.values() if found.get(name) is not None]
    return summary(values) if values else ""


def rises(results):
    """Pairs of runs of fae on one layer of which the one with more features or larger k has no lower FVU."""
    runs = [(dict(job), found["fvu_standardized"]) for job, found in results.items()]
    same = lambda a, b: all(a[name] == b[name] for name in a if name not in ("features", "k"))
    return [(a, b) for a, x in runs for b, y in runs if a["trainer"] == b["trainer"] == "fae" and a.keys() == b.keys()
            and same(a, b) and a != b and a["features"] <= b["features"] and a["k"] <= b["k"] and y >= x]


def main(results, what="tables", acts="", layers=None, steps=500, **unknown):
    flux.no_unknown_flags(unknown)
    path, done = Path(results), read(Path(results))
    every = range(flux.read_config("nano")[1].layers)
    layers = every if layers is None else layers if isinstance(layers, (list, tuple)) else [layers]
    jobs = plan(what, layers, steps) if what != "tables" else []
    with tempfile.TemporaryDirectory() as temporary:
        for site in dict.fromkeys(job["site"] for job in jobs):
            todo = [job for job in jobs if job["site"] == site and key(job) not in done]
            tokens = saved(acts or temporary, site, max(job["steps"] for job in todo)) if todo else None
            for job in todo:
                found = measure(tokens[job["layer"]], **{name: value for name, value in job.items() if name != "layer"})
                done[key(job)] = found
                print(job, found, flush=True)
                with open(path, "a") as file:
                    file.write(json.dumps({"job": job, "found": found}) + "\n")
    print(table(done))
    for a, b in rises(done):
        print(f"FVU does not fall from {a} to {b}")


if __name__ == "__main__":
    flux.command(main)
