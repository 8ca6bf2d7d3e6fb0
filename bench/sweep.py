"""Compare SAEs over layers, k and features with other trainers and baselines, on the same tokens of nano, as Markdown.

    python bench/sweep.py results.jsonl --what sites           # txt, img, both (train.py uses --steps 1000;
                                                               # --ckpts DIR saves the SAEs of img: layer0, …)
    python bench/sweep.py results.jsonl --what sweep           # k = 8 … 64; F = 1,024 … 16,384 at k = 8, 16
    python bench/sweep.py results.jsonl --what beside          # SAELens and sparsify (pip install eai-sparsify)
    python bench/sweep.py results.jsonl --what baselines       # PCA, MLP neurons, dictionaries by pursuit
    python bench/sweep.py results.jsonl --what kinds           # BatchTopK, JumpReLU, nested prefixes
    python bench/sweep.py results.jsonl --what dense           # F = 1,024 … 4,096 at k = 32 = D / 4
    python bench/sweep.py results.jsonl --what tables          # only print the saved results

--passes 200 of the model give the tokens of every layer: 1.6 million image tokens, 0.8 million text tokens. All runs
read them from --acts (default: a temporary folder that is removed); long runs read them several times. A run is only
`sae.step` with the learning rate, warmup and decay of train.py. Each result is appended to the file as a line, and a
result in the file is not computed again. You can stop and repeat the command, and several commands can share the folder
and the file once the tokens exist (--layers 0,1,2).

FVU (standardized), dead features and L0 use held-out prompts: 131,072 image tokens, 65,536 text tokens. "silent" is the
trainer's own count of dead features after the last step, if it has one.
"""
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"TQDM_DISABLE": "1", "JAX_PLATFORMS": "cpu"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import baselines
import jax
import jax.numpy as jnp
import numpy as np

import checkpoint
import data
import flux
import recipe as recipes
import sae
import session
import train
from harvest import reap

BATCH, FIT, TEST = 2048, 8, 16                                  # tokens per step; passes to fit baselines, to test
GROUPS = "txt", "img"                                           # each has its own mean and std, as in train.py
STEP = jax.jit(sae.step, static_argnums=1, donate_argnums=0)
Trained = tuple[sae.State, sae.Config, float | None]            # the last is the share of silent features, if known


# ---------------------------------------------------------------- activations


def saved(folder: Path, layer: int, site: str) -> dict[str, Any]:
    """Load {"train", "fit", "test": [N, D], "fit_neurons", "test_neurons": [N, 4D]} of a layer from `harvest`'s files.
    Neurons are those of image tokens."""
    names = {name: f"{name}.{site}" for name in ("train", "fit", "test")}
    names |= {f"{name}_neurons": f"{name}.neurons" for name in ("fit", "test")}
    if site == "both":
        return mixed(*(saved(folder, layer, site) for site in GROUPS))
    return {name: np.load(folder / f"{file}.{layer}.npy", mmap_mode="r") for name, file in names.items()}


def mixed(*sites: dict) -> dict[str, Any]:
    """Shuffle the training tokens of the sites in GROUPS together, and return the site number of each as "group"."""
    rows = np.concatenate([site["train"] for site in sites])
    group = np.repeat(np.arange(len(sites)), [len(site["train"]) for site in sites])
    order = np.random.default_rng(0).permutation(len(rows))
    return {"train": rows[order], "group": group[order], "test": [site["test"] for site in sites]}


def harvest(folder: Path, passes: int) -> None:
    """Run nano as train.py does, with 4 noises for each of 32 prompts per pass, and save the streams of all layers and
    sites in float16: `passes` to train on, shuffled 16 at a time, then FIT and TEST. TEST has its own noise."""
    model = flux.load("nano", dtype=jnp.float32)
    stream, position = data.stream("scenes"), itertools.count()

    def captured(passes, neurons=False, first=0):
        """Return {site: [L, N, D]} of the next prompts, and "neurons" [L, N, 4D] if asked."""
        found = [forward(model, list(itertools.islice(stream, 32)), first + 32 * next(position), neurons)
                 for _ in range(passes)]
        return {name: np.concatenate([f[name] for f in found], 1) for name in found[0]}

    files = {}
    for start in range(0, passes, 16):
        n = min(16, passes - start)
        for site, rows in captured(n).items():
            order, size = np.random.default_rng((0, start)).permutation(rows.shape[1]), rows.shape[1] // n
            for layer, of_layer in enumerate(rows):
                path = folder / f"train.{site}.{layer}.npy"
                if start == 0:
                    files[path] = np.lib.format.open_memmap(path, "w+", rows.dtype, (passes * size, rows.shape[2]))
                files[path][start * size:(start + n) * size] = of_layer[order]
    for name, passes, first in (("fit", FIT, 0), ("test", TEST, data.TABLE // 4)):
        for site, rows in captured(passes, True, first).items():
            for layer, of_layer in enumerate(rows):
                np.save(folder / f"{name}.{site}.{layer}.npy", of_layer)


def forward(model: flux.Model, captions: list[str], first: int, neurons: bool, seeds: int = 4) -> dict:
    """Return {"txt", "img": [L, tokens, D]} for every caption with `seeds` noises, and the image tokens' "neurons"."""
    text, pooled = (jnp.repeat(x, seeds, 0) for x in flux.encode_text(model, captions))
    grid = flux.token_grid(model, min(256, model.size))
    shape = grid[0] * grid[1], model.cfg.in_channels
    noise = flux.draw_noise(0, first * seeds + np.arange(len(text)), shape)
    sigma = flux.sigmas(model.scheduler, 1, shape[0])[0]
    found = {name: np.asarray(x) for name, x in _all_layers(model.params, model.cfg, noise, text, pooled, sigma, grid,
                                                            neurons).items()}
    if not all(np.isfinite(x).all() for x in found.values()):
        raise ValueError("activations hold NaN or values above the largest float16, 65504")
    return {name: x.reshape(len(x), -1, x.shape[-1]) for name, x in found.items()}


@partial(jax.jit, static_argnums=(1, 6, 7))
def _all_layers(params, cfg, latents, text, pooled, sigma, grid, neurons):
    names = "double.txt", "double.img", "single.txt", "single.img"
    names += ("double.img.neurons", "single.neurons") if neurons else ()
    run = reap(partial(flux.velocity, grid=grid), names)
    found = run(params, cfg, latents, text, pooled, jnp.full(len(latents), sigma), None)[1]
    pairs = {site: [found[f"double.{site}"], found[f"single.{site}"]] for site in ("txt", "img")}
    if neurons:
        pairs["neurons"] = [found["double.img.neurons"], found["single.neurons"][:, :, text.shape[1]:]]
    return {name: jnp.concatenate(pair).astype(jnp.float16) for name, pair in pairs.items()}


def batch(x: np.ndarray, i: int, dtype: Any = np.float32) -> np.ndarray:
    """Return the tokens of step i. After the last tokens, start again with the first."""
    i %= len(x) // BATCH
    return np.asarray(x[i * BATCH:(i + 1) * BATCH], dtype)


# ---------------------------------------------------------------- trainers: tokens → Trained


def config(width: int, steps: int, features: int, k: int, **options) -> sae.Config:
    """Return the Config of train.py's recipe for small models."""
    lr = recipes.rate(features, k, width, "img", small=True)
    recipe = recipes.recipe("img", width) | recipes.schedule(steps) | {"k": k, "lr": lr}
    return sae.Config(**{"d_in": width, "features": features} | recipe | options)


def ours(x: np.ndarray, steps: int, group: np.ndarray | None = None, **options) -> Trained:
    """Train with fae."""
    state, cfg = begun(x, steps, group, **options)
    for i in range(steps):
        state, metrics = STEP(state, cfg, batch(x, i), None if group is None else batch(group, i, int))
    return state, cfg, float(metrics["dead"]) if steps else None


def saelens(x: np.ndarray, steps: int, lr: float | None = None, **options) -> Trained:
    """Train SAELens' TopKTrainingSAE in its SAETrainer, with its defaults or, if lr is given, with our schedule."""
    import torch
    from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    torch.manual_seed(0)
    start, cfg = begun(x, steps, **{"normalization": "std"} | options)
    schedule = {"lr_warm_up_steps": cfg.warmup, "lr_decay_steps": steps - cfg.warmup}
    model = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=cfg.d_in, d_sae=cfg.features, k=cfg.k))
    trainer = SAETrainer(data_provider=iter(()), sae=model, cfg=SAETrainerConfig(
        total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, logger=LoggingConfig(log_to_wandb=False),
        lr_end=3e-5,                                             # required, but a constant rate ignores it
        **({"lr": lr} | schedule if lr else {})))
    for i in range(steps):
        trainer.step(torch.from_numpy(units(start, x, i)))
        trainer.n_training_steps += 1
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    norm = np.linalg.norm(w["W_dec"], axis=1) if model.cfg.rescale_acts_by_decoder_norm else 1.0
    w |= {"enc": (w["W_enc"] * norm).T, "b_enc": w["b_enc"] * norm, "dec": (w["W_dec"].T / norm).T}
    assert model.cfg.apply_b_dec_to_input                        # as in fae
    params = {name: w[name] for name in start.params}
    return start._replace(params=params), cfg, float(trainer.dead_neurons.float().mean())


def sparsify(x: np.ndarray, steps: int, optimizer: str = "signum", lr: float | None = None, **options) -> Trained:
    """Train sparsify's SparseCoder as its Trainer does; the Trainer itself needs a language model. "signum": the
    default optimizer and rate, without a schedule; "adam": our schedule, with sparsify's rate unless lr is given."""
    import torch
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    torch.manual_seed(0)
    start, cfg = begun(x, steps, **{"normalization": "std"} | options)
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


def begun(x: np.ndarray, steps: int, group: np.ndarray | None = None, **options) -> tuple[sae.State, sae.Config]:
    """Return fae's (State, Config) before the first step. Other trainers use its mean and std, and return it with their
    weights."""
    cfg = config(x.shape[1], steps, **options | ({} if group is None else {"groups": GROUPS}))
    sample = np.asarray(x[:65536], np.float32), None if group is None else group[:65536]
    return sae.init(jax.random.key(0), cfg, *sample), cfg


def units(state: sae.State, x: np.ndarray, i: int) -> np.ndarray:
    """Return batch i, standardized as in training."""
    return (batch(x, i) - np.asarray(state.mean)) / np.asarray(state.std)


# ---------------------------------------------------------------- baselines: reconstruct the test tokens of a layer


def units_of(layer: dict) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
    """Return ((mean, std) of the training tokens, fit tokens, test tokens); both token sets are standardized."""
    sample = np.asarray(layer["train"][:65536], np.float32)
    moments = tuple(f(sample, 0, dtype=np.float64).astype(np.float32) for f in (np.mean, np.std))
    return moments, *((layer[name] - moments[0]) / moments[1] for name in ("fit", "test"))


def pca(layer: dict, steps: int, features: int, k: int) -> np.ndarray:
    """Use principal components."""
    _, fit, test = units_of(layer)
    return baselines.pca(fit, test, k)


def neurons(layer: dict, steps: int, features: int, k: int) -> np.ndarray:
    """Use the largest MLP neurons."""
    _, fit, _ = units_of(layer)
    codes, others = (layer[f"{name}_neurons"].astype(np.float32) for name in ("fit", "test"))
    return baselines.largest(codes, fit, others, k)


def random_dictionary(layer: dict, steps: int, features: int, k: int) -> np.ndarray:
    """Use gradient pursuit on random directions."""
    _, _, test = units_of(layer)
    return baselines.pursue(test, baselines.random_dictionary(jax.random.key(0), features, test.shape[1]), k)[0]


def itda(layer: dict, steps: int, features: int, k: int) -> np.ndarray:
    """Use gradient pursuit on a dictionary of tokens."""
    (mean, std), _, test = units_of(layer)
    tokens = [(batch(layer["train"], i) - mean) / std for i in range(64)]
    return baselines.pursue(test, baselines.itda(tokens, features, k), k)[0]


def pursued(layer: dict, steps: int, features: int, k: int) -> np.ndarray:
    """Train with `ours`, but take the codes from gradient pursuit instead of the encoder."""
    state, _, _ = ours(layer["train"], steps, features=features, k=k, normalization="std")
    u = (layer["test"] - np.asarray(state.mean)) / np.asarray(state.std) - np.asarray(state.params["b_dec"])
    return baselines.pursue(u, state.params["dec"], k)[0] + np.asarray(state.params["b_dec"])


# ---------------------------------------------------------------- jobs

TRAINERS = {"fae": ours, "SAELens": saelens, "sparsify": sparsify}
BASELINES = {"PCA": pca, "MLP neurons": neurons, "random dictionary": random_dictionary, "ITDA": itda,
             "fae's dictionary": pursued}


def plan(what: str, layers: Sequence[int], steps: int) -> list[dict]:
    """Return the jobs: dicts of `trainer`, `site`, `layer`, `steps` and the trainer's other options."""
    def jobs(trainer, site="img", steps=steps, features=2048, k=16, **options):
        job = {"trainer": trainer, "site": site, "steps": steps, "features": features, "k": k, **options}
        return [job | {"layer": layer} for layer in layers]

    if what == "sites":
        text = {"site": "txt"} | recipes.recipe("txt", 128)
        text |= {"lr": recipes.rate(2048, text["k"], 128, "txt", small=True)}
        kinds = [{"trainer": "fae"}, {"trainer": "fae"} | text, {"trainer": "fae", "site": "both"}]
    elif what == "sweep":
        sizes = [(2048, k) for k in (8, 16, 32, 64)] + list(itertools.product((1024, 4096, 16384), (8, 16)))
        kinds = [{"trainer": "fae", "features": features, "k": k} for features, k in sizes]
    elif what == "dense":
        kinds = [{"trainer": "fae", "features": features, "k": 32} for features in (1024, 2048, 4096)]
    elif what == "beside":
        kinds = []
        for k in (8, 16, 32):
            lr = recipes.rate(2048, k, 128, "img", small=True)
            theirs = [{"trainer": "fae"}, {"trainer": "SAELens"}, {"trainer": "SAELens", "lr": lr},
                      {"trainer": "sparsify"}, {"trainer": "sparsify", "optimizer": "adam", "lr": lr}]
            kinds += [kind | {"k": k} for kind in theirs]
        kinds += [kind | {"normalization": "scale"} for kind in theirs]
    elif what == "kinds":
        kinds = [{"trainer": "fae", "activation": name} for name in sae.ACTIVATIONS] + [
            {"trainer": "fae", "activation": "topk", "matryoshka": [512, 2048]}]
    elif what == "baselines":
        kinds = [{"trainer": trainer} for trainer in ("fae", *BASELINES)] + [{"trainer": "fae", "steps": 0}]
    else:
        raise ValueError(f"--what {what}: it must be sites, sweep, dense, beside, baselines, kinds or tables")
    return [job for kind in kinds for job in jobs(**kind)]


def measure(layer: dict, trainer: str, site: str, steps: int, keep: Callable | None = None, **options) -> dict:
    """Return the standardized FVU on held-out tokens, the trainer's other results, and the seconds of training.
    keep(state, cfg) is called with the trained SAE."""
    since = time.monotonic()
    if trainer in BASELINES:
        found = BASELINES[trainer](layer, steps, **options)
        _, _, test = units_of(layer)
        fvu = np.mean(np.sum((test - found) ** 2, 0) / np.sum((test - test.mean(0)) ** 2, 0))
        return {"fvu_standardized": float(fvu), "seconds": time.monotonic() - since}
    options |= {"group": layer["group"]} if site == "both" else {}
    state, cfg, silent = TRAINERS[trainer](layer["train"], steps, **options)
    seconds = time.monotonic() - since
    if keep:
        keep(state, cfg)
    found = train.mean_score(train.scores([sae.fold(state, cfg, g) for g in range(max(len(cfg.groups), 1))], cfg,
                                           layer["test"] if site == "both" else [layer["test"]]))
    return found | {"silent": silent, "seconds": seconds}


def keeper(ckpts: str, job: dict) -> Callable | None:
    """Return a function that saves an SAE of image tokens as a checkpoint for steer.py and score.py, or None."""
    if not ckpts or job["trainer"] != "fae" or job["site"] != "img":
        return None
    about = {"model": "nano", "layer": job["layer"], "site": "img"}
    run = about | {"timesteps": 1, "prompts": "scenes", "prompt_field": None}
    return lambda state, cfg: checkpoint.save_state(Path(ckpts) / f"layer{job['layer']}", state, cfg,
                                             metadata=about | {"run": run})


# ---------------------------------------------------------------- results


def read(path: Path) -> dict[tuple, dict]:
    """Return {job as sorted items: results} from a results file, without an incomplete line of a stopped run."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(line["job"]): line["found"] for line in map(json.loads, (x for x in lines if x.endswith("}}")))}


def key(job: dict) -> tuple:
    """Return a job as sorted items, which can be a key of a dict."""
    return tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in job.items()))


def table(results: dict[tuple, dict]) -> str:
    """Return a Markdown table with a row for each kind of job, over its layers."""
    kinds = {}
    for job, found in results.items():
        kinds.setdefault(tuple(pair for pair in job if pair[0] != "layer"), {})[dict(job)["layer"]] = found
    lines = ["| trainer | site | F | k | steps | layers | FVU, mean | minimum (layer) | maximum (layer) | "
             "dead %, worst | silent %, worst | L0 | seconds |", "|---|---|" + "--:|" * 11]
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


def worst_of(layers: dict[int, dict], name: str, summary: Callable[[list], str]) -> str:
    """Return the summary of all layers' values of this name, or "" if there are none."""
    values = [found[name] for found in layers.values() if found.get(name) is not None]
    return summary(values) if values else ""


def rises(results: dict[tuple, dict]) -> list[tuple[dict, dict]]:
    """Return pairs of fae's jobs on one layer where more features or a larger k did not lower the FVU."""
    runs = [(dict(job), found["fvu_standardized"]) for job, found in results.items()]
    same = lambda a, b: all(a[name] == b[name] for name in a if name not in ("features", "k"))
    return [(a, b) for a, x in runs for b, y in runs if a["trainer"] == b["trainer"] == "fae" and a.keys() == b.keys()
            and same(a, b) and a != b and a["features"] <= b["features"] and a["k"] <= b["k"] and y >= x]


def main(results: str, what: str = "tables", acts: str = "", layers: Sequence[int] | None = None, steps: int = 400,
         passes: int = 200, ckpts: str = "", **unknown) -> None:
    """Run the jobs of `what` that are not in the file `results`, append them, and print all tables."""
    session.no_unknown_flags(unknown)
    path, done = Path(results), read(Path(results))
    layers = range(flux.read_config("nano")[1].layers) if layers is None else np.atleast_1d(layers).tolist()
    todo = [job for job in (plan(what, layers, steps) if what != "tables" else []) if key(job) not in done]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(acts or temporary)
        if todo and not (folder / "whole").exists():
            folder.mkdir(parents=True, exist_ok=True)
            harvest(folder, passes)
            (folder / "whole").touch()
        for job in todo:
            tokens = saved(folder, job["layer"], job["site"])
            done[key(job)] = measure(tokens, keep=keeper(ckpts if what == "sites" else "", job),
                                     **{name: value for name, value in job.items() if name != "layer"})
            print(job, done[key(job)], flush=True)
            with open(path, "a") as file:
                file.write(json.dumps({"job": job, "found": done[key(job)]}) + "\n")
    print(table(done))
    for a, b in rises(done):
        print(f"FVU does not fall from {a} to {b}")


if __name__ == "__main__":
    session.command(main)
