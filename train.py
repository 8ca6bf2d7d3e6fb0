"""Train a sparse autoencoder on FLUX.1's activations: prompts → one layer's residual stream → a TopK SAE.

    python train.py                                        # on a CPU: the bundled nano model, a few minutes
    python train.py --layer 10 --features 16384            # on a TPU: FLUX.1-schnell
    python train.py --model FOLDER --prompts captions.jsonl.gz --prompt_field text --resume

Copy it with `recipe.py`, what the two import, and `nano/` for the bundled model. A run is a pure function of its flags.
It works through the prompts in chunks: a chunk's activations are shuffled whole, then the SAE trains on them batch by
batch, while the next chunk is harvested between the steps. The step number alone says where a run stands, so a resumed
run harvests its chunk again and goes on bit for bit, and no activations are ever stored.
"""
import contextlib
import itertools
import json
import os
import shutil
import signal
import time
from dataclasses import asdict, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import checkpoint
import data
import flux
import sae
import session
import shard
from recipe import Run, absolute, begun_from, config, defaults, identified, resumed, saved
from session import Mistake

# ---------------------------------------------------------------- the run


def train(run, model, prompts, out, *, mesh=None, resume, log_every, save_every, stop=lambda step: False):
    """Train to `run.steps`; checkpoints into the folder `out`. Returns rows of the closing table. mesh: of several
    devices, over which the SAE's features are split. Of several hosts the first one writes. stop(step): whether to
    end before that step; then a checkpoint is written, and None returned."""
    activations = data.Activations(run, model, prompts, mesh)
    prompts_each = f", from {activations.forwards * run.prompt_batch:,} prompts each"
    count = prompts_each if activations.all_taken else " without padding"
    print(f"data: chunks of {activations.tokens:,} tokens{count}, shuffled whole ({activations.batches} batches of "
          f"{run.batch:,})")
    metadata, window = describe(run, model), []
    with tqdm(total=run.steps, unit="step", dynamic_ncols=True, disable=not shard.first()) as bar:
        if resume:
            state, cfg, unlogged = load_state(out, run)
            step, first = int(state.step), unlogged.pop("position", None)
            activations.seek(step // activations.batches, None if first is None else int(first))
            window = [dict(zip(unlogged, values)) for values in zip(*unlogged.values())]
            if shard.first():
                trim_metrics(out, step)
        else:
            if not activations.ready(0, partial(stop, 0), bar):
                return None
            half, order = activations.order(0)
            first, cfg = (half, order[:65536]), config(run, model.cfg.width, activations.groups)
            state = sae.init(jax.random.key(run.seed), cfg, activations.rows[first].astype(np.float32),
                             activations.groups_of(first))
            if run.init:
                state = sae.unfold(checkpoint.load(begun_from(run.init))[0], cfg, state)
            if shard.first():
                begin(out, state, cfg, metadata)
        bar.initial = bar.n = bar.last_print_n = int(state.step)         # or the time left would count old steps
        state = loop(run, activations, state, cfg, mesh, window, out, metadata, bar, log_every, save_every, stop)
        if int(state.step) < run.steps:
            return None
        bar.set_description("evaluating")
        state = shard.whole(state._replace(spare=None))
        rows = evaluate(run, activations, state, cfg, partial(stop, run.steps))
    if rows:
        save(out, state, cfg, metadata | {"evaluation": rows}, activations.place(run.steps))
    return rows


@lru_cache
def stepper(mesh, form, *leaves):
    """`sae.step`, compiled once in a process for runs of the same shapes. form, leaves: where its results lie."""
    return jax.jit(partial(sae.step, mesh=mesh), static_argnums=1, donate_argnums=0,
                   out_shardings=jax.tree.unflatten(form, leaves))


def loop(run, activations, state, cfg, mesh, window, out, metadata, bar, log_every, save_every, stop):
    """Steps from where `state` stands to the end, or until stop(step), and then a checkpoint. `window`: metrics of the
    steps that are not in metrics.jsonl yet."""
    def keep():
        unlogged = {name: np.array([m[name] for m in window]) for name in (window or [{}])[0]}
        save(out, shard.whole(state._replace(spare=None)), cfg, metadata, unlogged | activations.place(int(state.step)))

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
            window = jax.device_get(window)                      # waits for the steps, so that the time is theirs
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


def summary(step, batch, window, speed):
    """A line of metrics.jsonl: means over the window, but for `dead`, which is the last value."""
    means = {name: float(np.mean([m[name] for m in window])) for name in window[0]}
    return {"step": step, "tokens": step * batch, **means, "dead": float(window[-1]["dead"]), "tokens_per_s": speed}


def evaluate(run, activations, state, cfg, stop=lambda: False):
    """Rows of the closing table, on activations of prompts that are held out (or of seen ones, where none are) and of
    new noise: the SAE, PCA with k components fitted on these very activations (which flatters it), and random features
    (an SAE before any step). None where stop() came first."""
    prompts = data.stream(run.prompts, run.prompt_field, run.held_out or None)
    x, group, number = [], [], data.TABLE
    while sum(map(len, x)) < min(activations.tokens, 65536):
        if stop():
            return None
        some = list(itertools.islice(prompts, run.prompt_batch))
        taken, _ = activations.tokens_of(some, activations.forward_tokens)
        x.append(activations.fetch(activations.send(some, number, data.DRAWN, "of the evaluation"))[taken])
        group.append(activations.pattern[taken])
        number += len(some) * run.seeds_per_prompt
    x, group = np.concatenate(x).astype(np.float32), np.concatenate(group)
    parts = [x[group == g] for g in range(max(len(cfg.groups), 1))]
    rows, each = {}, scores(state, cfg, parts)
    rows["SAE"] = mean_score(each)
    rows |= {f"SAE, {name}": mean_score([score]) for name, score in zip(cfg.groups, each)}
    if cfg.d_out is None:
        u = np.concatenate([(part - part.mean(0)) / np.maximum(part.std(0), 1e-30) for part in parts])
        variances = np.linalg.eigvalsh(np.cov(u.astype(np.float64), rowvar=False))
        unexplained = float(max(0, variances[:-run.k].sum() / variances.sum()))
        rows[f"PCA, {run.k} components"] = {"fvu_standardized": unexplained, "l0": float(min(run.k, cfg.d_in))}
    fresh = sae.init(jax.random.key(run.seed), cfg, x, group if cfg.groups else None, like=state)
    return rows | {"random features": mean_score(scores(fresh, cfg, parts))}


def scores(state, cfg, parts):
    """`sae.evaluate` of each group's SAE on the group's activations."""
    return [sae.evaluate(sae.fold(state, cfg, g), cfg, part) for g, part in enumerate(parts)]


def mean_score(each):
    """Over groups by their tokens; a feature is dead where it fires in none of them."""
    tokens = np.array([score.tokens for score in each])
    mean = {name: float(np.average([getattr(score, name) for score in each], weights=tokens))
            for name in each[0]._fields if name not in ("tokens", "density")}
    return mean | {"tokens": int(tokens.sum()), "dead": float(np.mean(sum(score.density for score in each) == 0))}


# ---------------------------------------------------------------- files


def describe(run, model):
    """Metadata of the checkpoint: what is needed to reproduce it."""
    return {"model": run.model, "revision": run.revision, "layer": run.layer, "site": run.site, "seed": run.seed,
            "normalization": f"{run.normalization}, folded into the weights",
            "versions": {"jax": jax.__version__, "numpy": np.__version__}, "run": asdict(run)}


def save(out, state, cfg, metadata, extra=None):
    """A checkpoint; state.safetensors too says of which run it is."""
    if shard.first():
        name = np.frombuffer(json.dumps(metadata["run"]).encode(), np.uint8)
        checkpoint.save_state(out, state, cfg, metadata=metadata, extra={"run": name} | (extra or {}))


def load_state(out, run):
    """(state, its Config, extra) to go on from. Of several hosts each has to see the checkpoint, and the same one.
    Raises Mistake for the state of another run, whose shapes may well be the same."""
    state, cfg, extra = shard.together(checkpoint.load_state, out)
    ours, theirs = json.loads(json.dumps(asdict(run))), json.loads(bytes(extra.pop("run", b"{}")))
    for name, value in theirs.items():
        moved = name == "prompts" and run.prompts_sha256         # a file is known by its contents
        if name != "steps" and not moved and value != ours.get(name, value):
            raise Mistake(f"--resume: {out / checkpoint.STATE} is of another run than {out / checkpoint.CONFIG}: its "
                          f"{name} is {value}, not {ours[name]}")
    steps = shard.of_all(np.asarray(state.step)).tolist()
    if len(set(steps)) > 1:
        raise Mistake(f"--resume: the hosts see different checkpoints in {out}, of steps {steps}")
    if cfg.decay and theirs.get("steps", run.steps) != run.steps:
        cfg = replace(cfg, decay=(min(cfg.decay[0], run.steps), run.steps + 1))
    return state, cfg, extra


def begin(out, state, cfg, metadata):
    """The first checkpoint. A folder that is there stays, as it may be a mount or `.`; in it the new checkpoint is made
    whole, and then takes the place of an old one, file by file, cfg.json last: so --overwrite always works again."""
    fresh = out / f".new{checkpoint.TMP}" if out.exists() else out
    shutil.rmtree(out / f".new{checkpoint.TMP}", ignore_errors=True)    # of a run that was killed right here
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


def ours(out):
    """Names of what a checkpoint has in the folder `out`."""
    about = checkpoint.load_metadata(out) if (out / checkpoint.CONFIG).is_file() else {}
    groups = (about.get("training") or {}).get("groups") or ()
    written = checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.STATE, "metrics.jsonl"
    return {*written, "eval.json", *groups}                      # eval.json: score.py's


def check_out(out, resume, overwrite):
    """Refuse, before any work, to touch a folder that is not meant."""
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


def trim_metrics(out, step):
    """Keep the lines up to `step`: not those that a killed run wrote after its last checkpoint, which will come again,
    nor what is torn or damaged."""
    file, new = out / "metrics.jsonl", out / ".metrics.jsonl.new"
    lines = file.read_bytes().splitlines() if file.exists() else []
    kept = (line for line in lines if (read := checkpoint.logged(line)) and 0 <= read["step"] <= step)
    new.write_bytes(b"".join(line + b"\n" for line in kept))
    os.replace(new, file)


# ---------------------------------------------------------------- the command line


def main(*, out="ckpt", resume=False, overwrite=False, log_every=20, save_every=200, push="", distributed="", **flags):
    """Train a sparse autoencoder on the residual stream of one layer, and write it to a folder.

    A flag left out takes what suits the model or, with --resume, what the checkpoint says. SIGTERM, SIGHUP and Ctrl-C
    write a checkpoint first; a second one ends at once.

    Args:
        out: the checkpoint's folder
        resume: go on from the checkpoint; only --steps may differ
        overwrite: start anew where a checkpoint is
        log_every: steps from a line of metrics.jsonl to the next
        save_every: steps from a checkpoint to the next
        push: owner/repo on the Hugging Face hub, where it goes at the end; with --resume, a finished one at once
        distributed: this process is one of several (of a TPU pod; elsewhere: host:port,processes,number)
    """
    given = {name: value for name, value in flags.items() if value not in (None, "")}
    session.no_unknown_flags({name: value for name, value in flags.items() if name not in FLAGS})
    if type(given.get("matryoshka")) is int:
        given["matryoshka"] = (given["matryoshka"],)
    model = given.pop("model", "auto")
    session.check_whole({"log_every": log_every, "save_every": save_every})
    out = Path(out)
    if distributed:
        shard.join(*([] if distributed in (True, "True", "true") else address(distributed)))
    with shard.as_one(f"if a host was lost, go on from the checkpoint in {out}: --resume on all of them"), \
            contextlib.ExitStack() as held:
        shard.together(lambda: shard.first() and held.enter_context(session.claim(out)))
        shard.together(lambda: push and shard.first() and checkpoint.check_push(push))
        stop = held.enter_context(session.stopping())
        run, stream = shard.together(prepare, str(model), given, out, resume, overwrite)
        if push and resume and finished(out, run):
            shard.together(publish, out, run, push)
            return
        print(f"run: layer {run.layer} ({run.site}), {run.features:,} features, k {run.k}, {run.steps:,} steps of "
              f"{run.batch:,} tokens, prompts from {run.prompts}{', one in twenty held out' * run.held_out}")
        if mesh := shard.several():
            images = run.prompt_batch * run.seeds_per_prompt
            print(f"devices: {mesh.size}, each with 1/{mesh.size} of the blocks' weights and of the features, and "
                  f"{-(-images // mesh.size)} of the {images} images of a pass")
        last = max(run.layer, run.transcoder or 0) if run.timesteps == 1 else None     # more timesteps need all layers
        loaded = session.load_model(run.model, asdict(run), last=last)
        run = replace(run, size=run.size or min(256, loaded.size), text_tokens=run.text_tokens or loaded.text_tokens)
        rows = train(run, loaded, stream, out, mesh=mesh, resume=resume, log_every=log_every, save_every=save_every,
                     stop=stop)
        number = stop(run.steps)
        print(table(rows, run) if rows else f"stopped by {signal.Signals(number).name}; --resume goes on")
        print(f"checkpoint: {out if out.exists() else 'none yet'}")
        if number:
            raise SystemExit(128 + number)
        if push:
            shard.together(publish, out, run, push)


FLAGS = {field.name: field for field in fields(Run)}
main = session.with_flags(main, FLAGS.values())


def finished(out, run):
    """Whether the folder holds the end of this run, and not a step on the way."""
    about, state = checkpoint.load_metadata(out), checkpoint.load_state(out)[0]
    return "evaluation" in about and saved(out) == run and int(state.step) == run.steps


def publish(out, run, repo):
    """Put the finished checkpoint on the hub, on the first host."""
    if not shard.first():
        return
    base = flux.REPOS.get(run.model, run.model)
    try:
        base = base if base.count("/") == 1 and not Path(base).exists() else None
        print(f"pushed: {checkpoint.push(out, repo, base)}")
    except session.MISTAKES as error:
        raise Mistake(f"{error}; the checkpoint is whole, to try again: python train.py --resume --out {out} "
                         f"--push {repo}") from None


def address(given):
    """`shard.join`'s arguments from the flag --distributed host:port,processes,number."""
    try:
        where, processes, number = given if isinstance(given, tuple) else str(given).split(",")
        return str(where), int(processes), int(number)
    except ValueError:
        raise Mistake(f"--distributed {given}: it takes nothing, or host:port,processes,number") from None


def prepare(model, given, out, resume, overwrite):
    """(Run, stream of prompts): all that can be checked before the model is loaded. Only the first host looks into a
    folder that it shall write."""
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


def table(rows, run):
    """The closing table, as text."""
    title = "held-out" if run.held_out else "seen prompts, new noise"
    columns = {"fvu_standardized": "FVU (std.)", "fvu": "FVU (raw)", "l0": "L0", "dead": "dead %", "cosine": "cosine",
               "variance_explained": "var. expl."}
    lines = [title.ljust(24) + "".join(title.rjust(12) for title in columns.values())]
    for name, row in rows.items():
        cells = (f"{row[key] * (100 if key == 'dead' else 1):.3f}" if key in row else "" for key in columns)
        lines.append(name.ljust(24) + "".join(cell.rjust(12) for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    session.command(main)
