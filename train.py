"""Train a sparse autoencoder on FLUX.1's activations: prompts → one layer's residual stream → a TopK SAE.

    python train.py                                        # on a CPU: the bundled nano model, a few minutes
    python train.py --layer 10 --features 16384            # on a TPU: FLUX.1-schnell
    python train.py --model FOLDER --prompts captions.jsonl.gz --prompt_field text --resume

Copy it with `recipe.py`, what the two import, and `nano/` for the bundled model. The flags alone decide what a run
computes. It takes the prompts in chunks: it shuffles all activations of a chunk and trains the SAE on them batch by
batch; between the steps it harvests the next chunk. The step number alone says where a run is. A resumed run therefore
harvests its chunk again and continues bit for bit, and no activations are ever stored.
"""
import contextlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

import apply
import checkpoint
import data
import flux
import inputs
import normalize
import sae
import session
import shard
import variance
from activations import Activations
from recipe import Run, absolute, begun_from, config, defaults, identified, resumed, saved
from session import Mistake

EVALUATED = 65536                                                # tokens of the closing table, at most a chunk

# ---------------------------------------------------------------- the run


def train(run: Run, model: flux.Model, prompts: Iterator[str], out: Path, *, mesh: Mesh | None = None, resume: bool,
          log_every: int, save_every: int, stop: Callable = lambda step: False) -> dict[str, dict] | None:
    """Train to `run.steps`, with checkpoints in the folder `out`. Return the rows of the closing table.

    mesh: several devices, over which the SAE's features are split. With several hosts, only the first writes files.
    stop(step): whether to end before that step. The function then writes a checkpoint and returns None.
    """
    activations = Activations(run, model, prompts, mesh)
    prompts_each = f", from {activations.forwards * run.prompt_batch:,} prompts each"
    count = prompts_each if activations.all_taken else " without padding"
    print(f"data: chunks of {activations.tokens:,} tokens{count}, shuffled whole ({activations.batches} batches of "
          f"{run.batch:,})")
    metadata, window = describe(run, model), []
    with tqdm(total=run.steps, unit="step", dynamic_ncols=True, disable=not shard.first()) as bar:
        if resume:
            state, cfg, window = resumed_state(run, activations, out)
        elif activations.ready(0, partial(stop, 0), bar):
            state, cfg = first_state(run, activations)
            if shard.first():
                begin(out, state, cfg, metadata)
        else:
            return None
        bar.initial = bar.n = bar.last_print_n = int(state.step)         # or the time left would count old steps
        state = loop(run, activations, state, cfg, mesh, window, out, metadata, bar, log_every, save_every, stop)
        if int(state.step) < run.steps:
            return None
        bar.set_description("evaluating")
        state = shard.whole(state)
        rows = evaluate(run, activations, state, cfg, partial(stop, run.steps))
    if rows:
        save(out, state, cfg, metadata | {"evaluation": rows}, activations.place(run.steps))
    return rows


def resumed_state(run: Run, activations: Activations, out: Path) -> tuple[sae.State, sae.Config, list[dict]]:
    """Return the state and Config of the checkpoint, and the metrics of the steps that are not in metrics.jsonl yet."""
    state, cfg, unlogged = load_state(out, run)
    step, first = int(state.step), unlogged.pop("position", None)
    activations.seek(step // activations.batches, None if first is None else int(first))
    if shard.first():
        trim_metrics(out, step)
    return state, cfg, [dict(zip(unlogged, values)) for values in zip(*unlogged.values())]


def first_state(run: Run, activations: Activations) -> tuple[sae.State, sae.Config]:
    """Return a new state and its Config, from the first activations that training uses."""
    half, order = activations.order(0)
    first, cfg = (half, order[:65536]), config(run, activations.model.cfg, activations.groups)
    state = sae.init(jax.random.key(run.seed), cfg, activations.rows[first].astype(np.float32),
                     activations.groups_of(first),
                     without=input_directions(run, activations) if run.without == "input" else None)
    return (sae.unfold(checkpoint.load(begun_from(run.init))[0], cfg, state) if run.init else state), cfg


def input_directions(run: Run, activations: Activations) -> np.ndarray:
    """Return where the latents are written in the residuals: [C, D], with groups of tokens [G, C, D]. They come from as
    many tokens as the closing table, but at least 32 C of each group."""
    groups, cfg = max(len(activations.groups), 1), activations.model.cfg
    moments = [inputs.Moments(cfg.width, cfg.in_channels) for _ in range(groups)]
    prompts = data.stream(run.prompts, run.prompt_field, False if run.held_out else None)
    tokens = max(min(activations.tokens, EVALUATED), 32 * cfg.in_channels * groups)
    for rows, latents in activations.with_inputs(prompts, tokens):
        for g, one in enumerate(moments):
            here = activations.pattern == g
            one.add(rows[here], latents[here])
    found = np.stack([one.directions() for one in moments])
    return found if activations.groups else found[0]


@lru_cache
def stepper(mesh: Mesh, form: Any, *leaves: Any) -> Callable:
    """Return the jitted `sae.step`. It compiles once per process for runs of equal shapes. form, leaves: a pytree of
    the shardings of its results."""
    return jax.jit(partial(sae.step, mesh=mesh), static_argnums=1, donate_argnums=0,
                   out_shardings=jax.tree.unflatten(form, leaves))


def loop(run: Run, activations: Activations, state: sae.State, cfg: sae.Config, mesh: Mesh | None,
         window: list[dict], out: Path, metadata: dict, bar: tqdm, log_every: int, save_every: int, stop: Callable
         ) -> sae.State:
    """Train from the step of `state` to the end, or until stop(step), and save a checkpoint. Return the state.
    window: metrics of the steps that are not in metrics.jsonl yet."""
    def keep():
        unlogged = {name: np.array([m[name] for m in window]) for name in (window or [{}])[0]}
        save(out, shard.whole(state), cfg, metadata, unlogged | activations.place(int(state.step)))

    state = shard.split(mesh, state, run.features) if mesh else state
    where = (jax.tree.map(lambda leaf: leaf.sharding, state), shard.everywhere(mesh)) if mesh else None
    leaves, form = jax.tree.flatten(where)
    step_fn = stepper(shard.tensor(mesh or shard.mesh()), form, *leaves)
    since, old = time.monotonic(), len(window)
    for step in range(int(state.step), run.steps):
        if stop(step) or not activations.ready(step, partial(stop, step), bar):
            keep()
            break
        groups = activations.groups_of(activations.places(step))
        state, metrics = shard.wait(mesh, step_fn(state, cfg, activations.batch(step), groups))
        window.append(metrics)
        bar.update()
        if (step + 1) % log_every == 0 or step + 1 == run.steps:
            window = jax.device_get(window)                      # waits for the steps, so that the time includes them
            line = summary(step + 1, run.batch, window, (len(window) - old) * run.batch / (time.monotonic() - since))
            if shard.first():
                with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            bar.set_description("train")
            bar.set_postfix_str(f"FVU {line['fvu']:.3f}, L0 {line['l0']:.1f}, dead {100 * line['dead']:.1f} %, "
                                f"{line['tokens_per_s']:,.0f} tokens/s")
            window, since, old = [], time.monotonic(), 0
        if (step + 1) % save_every == 0 or step + 1 == run.steps:
            keep()
    return state


def summary(step: int, batch: int, window: list[dict], speed: float) -> dict[str, float]:
    """Return a line of metrics.jsonl: means over the window, except `dead`, which is the last value."""
    means = {name: float(np.mean([m[name] for m in window])) for name in window[0]}
    return {"step": step, "tokens": step * batch, **means, "dead": float(window[-1]["dead"]), "tokens_per_s": speed}


def evaluate(run: Run, activations: Activations, state: sae.State, cfg: sae.Config,
             stop: Callable = lambda: False) -> dict[str, dict] | None:
    """Return the rows of the closing table, or None if stop() ended it.

    The rows are the SAE, PCA with k components (fitted to the same activations, which flatters it), and random features
    (an SAE before training). The activations come from held-out prompts (from seen ones if none are held out) and
    from new noise.
    """
    prompts = data.stream(run.prompts, run.prompt_field, run.held_out or None)
    x, group, number = [], [], data.TABLE
    while sum(map(len, x)) < min(activations.tokens, EVALUATED):
        if stop():
            return None
        some = list(itertools.islice(prompts, run.prompt_batch))
        taken, _ = activations.tokens_of(some, activations.forward_tokens)
        x.append(activations.fetch(activations.send(some, number, data.DRAWN, "of the evaluation"))[taken])
        group.append(activations.pattern[taken])
        number += len(some) * run.seeds_per_prompt
    x, group = np.concatenate(x).astype(np.float32), np.concatenate(group)
    parts = [x[group == g] for g in range(max(len(cfg.groups), 1))]
    params = [sae.fold(state, cfg, g) for g in range(len(parts))]
    rows, each = {}, scores(params, cfg, parts)
    rows["SAE"] = mean_score(each)
    rows |= {f"SAE, {name}": mean_score([score]) for name, score in zip(cfg.groups, each)}
    if cfg.d_out is None:
        kept = [part - np.asarray(apply.removed(p, part)) for p, part in zip(params, parts)]
        u = np.concatenate([(part - part.mean(0)) / np.maximum(part.std(0), 1e-30) for part in kept])
        variances = np.linalg.eigvalsh(np.cov(u.astype(np.float64), rowvar=False))
        unexplained = float(max(0, variances[:-run.k].sum() / max(variances.sum(), 1e-300)))
        rows[f"PCA, {run.k} components"] = {"fvu_standardized": unexplained, "l0": float(min(run.k, cfg.d_in))}
    fresh = sae.init(jax.random.key(run.seed), cfg, x, group if cfg.groups else None, like=state)
    fresh = [sae.fold(fresh, cfg, g) for g in range(len(parts))]
    rows["random features"] = mean_score(scores(fresh, cfg, parts))
    features, residual = explained(run, activations, state, params, cfg, number)
    rows["SAE"] |= {"variance": features.summary(), "variance_of_input": residual.pooled}
    return rows


def explained(run: Run, activations: Activations, state: sae.State, params: list[sae.Params], cfg: sae.Config,
              first: int) -> tuple[variance.Shares, variance.Shares]:
    """Return what explains the variance of the features, and of the standardized residuals that the SAE reads, on up to
    64 prompts. params: of each group. first: the number of the first noise."""
    source = data.stream(run.prompts, run.prompt_field, run.held_out or None)
    group = activations.pattern.reshape(run.timesteps, run.prompt_batch * run.seeds_per_prompt, -1)[:, 0]
    seeds = variance.seeds_for(cfg.features, group.size)
    prompts = max(2, min(64, min(activations.tokens, EVALUATED) // (seeds * group.size)))
    features, residual = (variance.Sums(size, seeds, group.size) for size in (cfg.features, cfg.columns))
    for rows in activations.crossed(list(itertools.islice(source, prompts)), seeds, first):
        rows, real = rows.astype(np.float32), rows.any(-1, keepdims=True)
        acts = np.moveaxis(rows.reshape(seeds, *group.shape, -1), 0, 1)[..., :cfg.d_in]
        values, indices = (np.moveaxis(code, 1, 0).reshape(seeds, group.size, -1)
                           for code in session.encode(params, cfg, acts, run.site, run.text_tokens))
        features.add(values * real, indices)
        of = np.tile(group.reshape(-1), seeds) if cfg.groups else None
        u = normalize.standardize(rows.reshape(-1, cfg.columns), state.mean, state.std, state.basis, of)
        residual.add(np.asarray(u).reshape(rows.shape) * real)
    return features.finish(), residual.finish()


def scores(params: list[sae.Params], cfg: sae.Config, parts: list[np.ndarray]) -> list[apply.Evaluation]:
    """Return `apply.evaluate` of each group's SAE on the group's activations."""
    return [apply.evaluate(p, cfg, part) for p, part in zip(params, parts)]


def mean_score(each: list[apply.Evaluation]) -> dict[str, float]:
    """Return the means over groups, weighted by tokens. A feature is dead if it fires in no group."""
    tokens = np.array([score.tokens for score in each])
    mean = {name: float(np.average([getattr(score, name) for score in each], weights=tokens))
            for name in each[0]._fields if name not in ("tokens", "density")}
    return mean | {"tokens": int(tokens.sum()), "dead": float(np.mean(sum(score.density for score in each) == 0))}


# ---------------------------------------------------------------- files


def describe(run: Run, model: flux.Model) -> dict[str, Any]:
    """Return the checkpoint's metadata: all that is needed to reproduce it."""
    return {"model": run.model, "revision": run.revision, "layer": run.layer, "site": run.site, "seed": run.seed,
            "normalization": f"{run.normalization}, folded into the weights",
            "versions": {"jax": jax.__version__, "numpy": np.__version__}, "run": asdict(run)}


def save(out: Path, state: sae.State, cfg: sae.Config, metadata: dict, extra: dict | None = None) -> None:
    """Write a checkpoint on the first host. state.safetensors holds the run's flags too."""
    if shard.first():
        name = np.frombuffer(json.dumps(metadata["run"]).encode(), np.uint8)
        checkpoint.save_state(out, state, cfg, metadata=metadata, extra={"run": name} | (extra or {}))


def load_state(out: Path, run: Run) -> tuple[sae.State, sae.Config, dict[str, np.ndarray]]:
    """Return the state, its Config and extra arrays to resume from. Every host must see the same checkpoint. Raises
    Mistake for the state of another run, even if its shapes are the same."""
    state, cfg, extra = shard.together(checkpoint.load_state, out)
    ours, theirs = json.loads(json.dumps(asdict(run))), json.loads(bytes(extra.pop("run", b"{}")))
    for name, value in theirs.items():
        moved = name == "prompts" and run.prompts_sha256         # a file is identified by its contents
        if name != "steps" and not moved and value != ours.get(name, value):
            raise Mistake(f"--resume: {out / checkpoint.STATE} is of another run than {out / checkpoint.CONFIG}: its "
                          f"{name} is {value}, not {ours[name]}")
    steps = shard.of_all(np.asarray(state.step)).tolist()
    if len(set(steps)) > 1:
        raise Mistake(f"--resume: the hosts see different checkpoints in {out}, of steps {steps}")
    if cfg.decay and theirs.get("steps", run.steps) != run.steps:
        cfg = replace(cfg, decay=(min(cfg.decay[0], run.steps), run.steps + 1))
    return state, cfg, extra


def begin(out: Path, state: sae.State, cfg: sae.Config, metadata: dict) -> None:
    """Write the first checkpoint.

    An existing folder stays: it may be a mount or the current folder. The new checkpoint is completed inside it, then
    replaces an old one file by file, cfg.json last, so that --overwrite works again after a kill.
    """
    fresh = out / f".new{checkpoint.TMP}" if out.exists() else out
    shutil.rmtree(out / f".new{checkpoint.TMP}", ignore_errors=True)    # left by a run that was killed here
    save(fresh, state, cfg, metadata, {"position": np.array(0)})
    if fresh == out:
        return
    new = sorted(fresh.iterdir(), key=lambda path: path.name == checkpoint.CONFIG)
    for path in [path for path in out.iterdir() if path.name in ours(out)]:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in {path.name for path in new}:
            path.unlink()
    for path in new:
        os.replace(path, out / path.name)
    fresh.rmdir()


def ours(out: Path) -> set[str]:
    """Return the names of the files and folders that runs write into `out`."""
    about = checkpoint.load_metadata(out) if (out / checkpoint.CONFIG).is_file() else {}
    groups = (about.get("training") or {}).get("groups") or ()
    written = checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.REMOVED, checkpoint.STATE, "metrics.jsonl"
    return {*written, "eval.json", *groups}                      # eval.json: score.py's


def check_out(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise Mistake, before any work, if the run must not write into the folder `out`."""
    if resume and overwrite:
        raise Mistake("--resume and --overwrite exclude each other")
    if resume:
        if not (out / checkpoint.STATE).is_file():
            raise Mistake(f"--resume: there is no checkpoint in {out}")
    elif out.exists() and not (out.is_dir() and all(path.name.startswith(".") for path in out.iterdir())):
        if not (out / checkpoint.CONFIG).is_file():
            raise Mistake(f"{out} exists and is not a checkpoint; choose another --out")
        if not overwrite:
            raise Mistake(f"{out} already holds a checkpoint: --resume goes on with it, --overwrite starts anew")
        known = ours(out)
        foreign = sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.startswith("."))
        if foreign:
            raise Mistake(f"--overwrite: {out} holds something that is not ours: {', '.join(foreign[:5])}")


def trim_metrics(out: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step`. Drop torn lines, and lines that a killed run wrote after its last
    checkpoint: they will come again."""
    file, new = out / "metrics.jsonl", out / ".metrics.jsonl.new"
    lines = file.read_bytes().splitlines() if file.exists() else []
    kept = (line for line in lines if (read := checkpoint.logged(line)) and 0 <= read["step"] <= step)
    new.write_bytes(b"".join(line + b"\n" for line in kept))
    os.replace(new, file)


# ---------------------------------------------------------------- the command line


def main(*, out="ckpt", resume=False, overwrite=False, log_every=20, save_every=200, push="", distributed="", **flags):
    """Train a sparse autoencoder on the residual stream of one layer, and write it to a folder.

    A flag that is left out gets a default that suits the model or, with --resume, the checkpoint's value.
    SIGTERM, SIGHUP and Ctrl-C write a checkpoint before the run ends; a second signal ends it at once.

    Args:
        out: the checkpoint's folder
        resume: go on from the checkpoint; only --steps may differ
        overwrite: replace a checkpoint that is there
        log_every: steps between two lines of metrics.jsonl
        save_every: steps between two checkpoints
        push: owner/repo on the Hugging Face hub, to upload to at the end; with --resume, a finished run at once
        distributed: this process is one of several (on a TPU pod; elsewhere: host:port,processes,number)
    """
    out, (model, given) = Path(out), read_flags(flags)
    session.check_whole({"log_every": log_every, "save_every": save_every})
    if distributed:
        shard.join(*([] if distributed in (True, "True", "true") else address(distributed)))
    with shard.as_one(f"if a host was lost, go on from the checkpoint in {out}: --resume on all of them"), \
            contextlib.ExitStack() as held:
        shard.together(lambda: shard.first() and held.enter_context(session.claim(out)))
        shard.together(lambda: push and shard.first() and checkpoint.check_push(push))
        stop = held.enter_context(session.stopping())
        run, stream = shard.together(prepare, model, given, out, resume, overwrite)
        if push and resume and finished(out, run):
            return shard.together(publish, out, run, push)
        announce(run)
        last = max(run.layer, run.transcoder or 0) if run.timesteps == 1 else None     # more timesteps need all layers
        loaded = session.load_model(run.model, asdict(run), last=last)
        run = replace(run, size=run.size or min(256, loaded.size), text_tokens=run.text_tokens or loaded.text_tokens)
        rows = train(run, loaded, stream, out, mesh=shard.several(), resume=resume, log_every=log_every,
                     save_every=save_every, stop=stop)
        number = stop(run.steps)
        print(table(rows, run) if rows else f"stopped by {signal.Signals(number).name}; --resume goes on")
        print(f"checkpoint: {out if out.exists() else 'none yet'}")
        if number:
            raise SystemExit(128 + number)
        if push:
            shard.together(publish, out, run, push)


FLAGS = {field.name: field for field in fields(Run)}
main = session.with_flags(main, FLAGS.values())


def read_flags(flags: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the model's name and the flags of `Run` that were given. Raises Mistake for unknown ones."""
    session.no_unknown_flags({name: value for name, value in flags.items() if name not in FLAGS})
    given = {name: value for name, value in flags.items() if value not in (None, "")}
    if type(given.get("matryoshka")) is int:
        given["matryoshka"] = (given["matryoshka"],)
    return str(given.pop("model", "auto")), given


def announce(run: Run) -> None:
    """Print what the run computes, and on which devices."""
    print(f"run: layer {run.layer} ({run.site}), {run.features:,} features, k {run.k}, {run.steps:,} steps of "
          f"{run.batch:,} tokens, prompts from {run.prompts}{', one in twenty held out' * run.held_out}")
    if mesh := shard.several():
        images = run.prompt_batch * run.seeds_per_prompt
        print(f"devices: {mesh.size}, each with 1/{mesh.size} of the blocks' weights and of the features, and "
              f"{-(-images // mesh.size)} of the {images} images of a pass")


def finished(out: Path, run: Run) -> bool:
    """Return whether the folder holds the end of this run, not a step on the way."""
    about, state = checkpoint.load_metadata(out), checkpoint.load_state(out)[0]
    return "evaluation" in about and saved(out) == run and int(state.step) == run.steps


def publish(out: Path, run: Run, repo: str) -> None:
    """Push the finished checkpoint to the hub, on the first host."""
    if not shard.first():
        return
    base = flux.REPOS.get(run.model, run.model)
    try:
        base = base if base.count("/") == 1 and not Path(base).exists() else None
        print(f"pushed: {checkpoint.push(out, repo, base)}")
    except session.MISTAKES as error:
        raise Mistake(f"{error}; the checkpoint is complete, try again with: python train.py --resume --out {out} "
                      f"--push {repo}") from None


def address(given: str | tuple) -> tuple[str, int, int]:
    """Return the arguments of `shard.join` from the flag --distributed host:port,processes,number."""
    try:
        where, processes, number = given if isinstance(given, tuple) else str(given).split(",")
        return str(where), int(processes), int(number)
    except ValueError:
        raise Mistake(f"--distributed {given}: it takes nothing, or host:port,processes,number") from None


def prepare(model: str, given: dict[str, Any], out: Path, resume: bool, overwrite: bool
            ) -> tuple[Run, Iterator[str]]:
    """Return the Run and its stream of prompts, after all checks that need no weights. Only the first host checks a
    folder that the run will write."""
    if resume or shard.first():
        check_out(out, resume, overwrite)
    given |= {name: absolute(given[name]) for name in ("transformer", "init") if name in given}
    if resume:
        run = resumed(out, model, given)
    else:
        name = session.announce(model)
        at = f"{name}@{given['revision']}" if "revision" in given else name
        folder, cfg = flux.read_config(at, *([given["transformer"]] if "transformer" in given else []))
        run = defaults(name, folder, cfg, given)
        if run.size:
            flux.check_size(folder, run.size)
        run = identified(run, given)
    if mesh := shard.several():
        shard.check(mesh, run.features)
    stream = data.stream(run.prompts, run.prompt_field, False if run.held_out else None)
    return run, itertools.chain([next(stream)], stream)          # a bad source of prompts fails here


def table(rows: dict[str, dict], run: Run) -> str:
    """Return the closing table as text."""
    title = "held-out" if run.held_out else "seen prompts, new noise"
    columns = {"fvu_standardized": "FVU (std.)", "fvu": "FVU (raw)", "l0": "L0", "dead": "dead %", "cosine": "cosine",
               "variance_explained": "var. expl."}
    lines = [title.ljust(24) + "".join(title.rjust(12) for title in columns.values())]
    for name, row in rows.items():
        cells = (f"{row[key] * (100 if key == 'dead' else 1):.3f}" if key in row else "" for key in columns)
        lines.append(name.ljust(24) + "".join(cell.rjust(12) for cell in cells))
    shares, read = rows["SAE"]["variance"], rows["SAE"]["variance_of_input"]
    lines += ["", "explained by".ljust(24) + "".join(name.rjust(12) for name in variance.NAMES)]
    for name, row in (("what the SAE reads", read), ("features, mean", shares)):
        lines.append(name.ljust(24) + "".join(f"{row.get(key, float('nan')):.1%}".rjust(12) for key in variance.NAMES))
    lines.append(f"{shares['follow_prompt']:,} of {shares['varying']:,} features follow the prompt, "
                 f"{shares['follow_prompt_or_image']:,} the prompt or the image, more than the noise draw")
    return "\n".join(lines)


if __name__ == "__main__":
    session.command(main)
