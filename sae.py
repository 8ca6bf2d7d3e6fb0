"""TopK sparse autoencoders after Gao et al. 2024 (arXiv 2406.04093): parameters, training step, statistics, files.

Copy `kernels.py` with this file; it needs jax, numpy, optax and safetensors.

    cfg = sae.Config(d_in=3072, features=16384, k=32)
    state = sae.init(jax.random.key(0), cfg, sample)                  # sample [N, D]: raw residuals of many prompts
    step = jax.jit(sae.step, static_argnums=1, donate_argnums=0)
    state, metrics = step(state, cfg, x)                              # x [B, D]: raw residuals
    sae.checkpoint(folder, state, cfg, metadata={"layer": 18})        # weights and everything a resumed run needs
    params, cfg = sae.load(folder)                                    # acts on raw residuals, as SAELens does
    values, indices = sae.encode(params, cfg, x)
    x_hat = sae.decode(params, cfg, values, indices)

Two spaces. Training happens on *standardized* residuals u = (x - mean) / std, per dimension: raw FLUX residuals are
dominated by a few huge directions, and trained on those nearly every feature dies. Its parameters keep features as
rows: `enc` and `dec` are [F, D], `b_enc` [F], `b_dec` [D]. `fold` turns them into an SAE on *raw* residuals, whose
parameters have the names and shapes of the file: `W_enc` [D, F], `b_enc` [F], `W_dec` [F, D], `b_dec` [D].

B batch, D model width, F features, k active features.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
from jax import Array, lax
from safetensors.numpy import save_file

import kernels

Params = dict[str, Array]
CONFIG, WEIGHTS, STATE = "cfg.json", "sae_weights.safetensors", "state.safetensors"
TMP = ".fae-tmp"                                                 # how names of unfinished saves end
SAE_LENS_VERSION = "6.54.12"  # the format written; SAELens takes a file that names no version >= 6 for an old one


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of an SAE and how it is trained. None means: derive it from the shape; read back, it is a number."""

    d_in: int
    features: int
    k: int
    k_aux: int | None = None
    aux_coefficient: float = 1 / 32  # appendix A.2
    dead_after: int | None = None  # tokens without firing
    lr: float | None = None
    warmup: int = (
        200  # steps; most features that die do so early: at lr 3e-3 a warmup of 50 killed 27 %, 200 killed 6 %
    )
    decay: tuple[int, int] | None = None  # steps (from, to) in which the learning rate falls linearly to zero
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 6.25e-10  # appendix A: the gradient per feature is tiny
    clip: float = 1.0  # global norm; the paper clips its large runs

    def __post_init__(self):
        if self.d_in < 1 or not 1 <= self.k <= self.features:
            raise ValueError(f"d_in = {self.d_in}, k = {self.k}, features = {self.features}; need 1 <= k <= features")
        defaults = {
            "k_aux": default_k_aux(self.d_in, self.features),
            "dead_after": default_dead_after(self.features, self.k),
            "lr": default_lr(self.features),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.decay is not None:
            object.__setattr__(self, "decay", tuple(self.decay))
        if not 1 <= self.k_aux <= self.features:
            raise ValueError(f"k_aux = {self.k_aux} of {self.features} features; it must lie in 1..features")


def default_k_aux(d_in: int, features: int) -> int:
    """Appendix A.2: a power of two close to D / 2, typically 512; more would cost more than the SAE itself."""
    return min(512, features, 2 ** round(np.log2(max(d_in / 2, 1))))


def default_dead_after(features: int, k: int) -> int:
    """A thousand times the mean interval between firings, in tokens: 64,000 for 2048 features, 512,000 for 16,384.

    The paper's 10 million (about ten times as much at its smallest) suits runs of billions; ours may last 2 million.
    """
    return 1000 * features // k


def default_lr(features: int) -> float:
    """The paper's scaling, 1 / sqrt(features), with EleutherAI sparsify's constant. Short runs bear 9 times it."""
    return 2e-4 / (features / 2**14) ** 0.5


class State(NamedTuple):
    """Everything that training changes or needs; a pytree of arrays."""

    params: Params  # in standardized space: enc [F, D], b_enc [F], dec [F, D] with unit rows, b_dec [D]
    mean: Array  # [D] of the raw residuals
    std: Array  # [D]
    opt: Any  # optax
    idle: Array  # [F] int32, tokens since the feature last fired
    step: Array  # int32


# ---- training -------------------------------------------------------------------------------------------------------


def init(key: Array, cfg: Config, sample: np.ndarray) -> State:
    """sample [N, D] of raw residuals -> a state: normalization and pre-bias from the data, tied weights (A.1)."""
    mean, std = _moments(np.asarray(sample), cfg.d_in)
    u = ((np.asarray(sample[:32768], np.float32) - mean) / std).astype(np.float32)
    params = _tied(key, cfg, u[:1024], _geometric_median(u))
    idle, count = jnp.zeros(cfg.features, jnp.int32), jnp.zeros((), jnp.int32)
    return State(params, jnp.asarray(mean), jnp.asarray(std), _optimizer(cfg).init(params), idle, count)


@jax.jit(static_argnums=1)
def _tied(key: Array, cfg: Config, u: Array, b_dec: Array) -> Params:
    """Random unit decoder rows; encoder rows parallel to them, of the one length that fits reconstructions to u."""
    dec, b_enc = _unit(jax.random.normal(key, (cfg.features, cfg.d_in))), jnp.zeros(cfg.features)
    values, indices = kernels.sparse_encode(u - b_dec, dec, b_enc, cfg.k)
    out = kernels.sparse_decode(values, indices, dec)
    scale = jnp.sum(out * (u - b_dec)) / jnp.maximum(jnp.sum(out * out), 1e-30)
    # A sample without variation leaves the scale at 0, from which no feature could ever fire
    return {"enc": dec * jnp.where(scale > 0, scale, 1), "b_enc": b_enc, "dec": dec, "b_dec": b_dec}


def _moments(sample: np.ndarray, d_in: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] -> mean [D], std [D], summed in float64 in chunks; a constant dimension gets the rms of all as its std."""
    if sample.ndim != 2 or sample.shape[1] != d_in or len(sample) < 2:
        raise ValueError(f"sample has shape {sample.shape}; need [N, {d_in}] with N >= 2")
    chunks = [sample[i : i + 4096] for i in range(0, len(sample), 4096)]
    mean = sum(c.sum(0, dtype=np.float64) for c in chunks) / len(sample)
    var = sum(((c.astype(np.float64) - mean) ** 2).sum(0) for c in chunks) / len(sample)
    if not np.isfinite(var).all():
        raise ValueError(f"sample is not finite in {int((~np.isfinite(var)).sum())} of {d_in} dimensions")
    std, rms = np.sqrt(var), np.sqrt(var.mean())
    constant = (std <= 1e-6 * np.abs(mean)) | (std <= 1e-8 * rms)
    return mean.astype(np.float32), np.where(constant, rms or 1.0, std).astype(np.float32)


def _geometric_median(u: np.ndarray, iterations: int = 20) -> np.ndarray:
    """[N, D] -> [D], the point with the least summed distance, by Weiszfeld's iteration."""
    center = u.mean(0)
    for _ in range(iterations):
        weight = 1 / np.maximum(np.linalg.norm(u - center, axis=1), 1e-6)
        center = (weight @ u) / weight.sum()
    return center.astype(np.float32)


def _unit(rows: Array) -> Array:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _optimizer(cfg: Config) -> optax.GradientTransformation:
    def lr(count):
        scale = jnp.minimum(1.0, (count + 1) / max(cfg.warmup, 1))
        if cfg.decay is not None:
            start, end = cfg.decay
            scale = scale * jnp.clip((end - count) / max(end - start, 1), 0.0, 1.0)
        return cfg.lr * scale

    return optax.adam(lr, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)


def _updated(state: State, cfg: Config, grads: Params) -> tuple[Params, Any]:
    """Parameters and optimizer after a step along grads: clipped by their global norm once the decoder's have lost what
    only changes its rows' lengths (appendix A); then its rows are made unit again."""
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values()) - jnp.sum(_parallel(grads["dec"], state.params["dec"]) ** 2))
    scale = cfg.clip / jnp.maximum(norm, cfg.clip)

    def move(part, grads):
        params, opt = part
        grads = {name: scale * g for name, g in grads.items()}
        if "dec" in grads:
            grads["dec"] = remove_parallel(grads["dec"], params["dec"])
        updates, opt = _optimizer(cfg).update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return (params | {"dec": _unit(params["dec"])} if "dec" in params else params), opt

    def only(tree, names):  # of every dict of parameters in it
        return jax.tree.map(lambda d: {n: d[n] for n in names} if isinstance(d, dict) else d, tree, is_leaf=_is_dict)

    rows, rest = ("enc", "b_enc", "dec"), ("b_dec",)
    whole = state.params, state.opt
    moved = kernels.by_rows(move, only(whole, rows), only(grads, rows))
    other = move(only(whole, rest), only(grads, rest))
    return jax.tree.map(lambda a, b: a | b if isinstance(a, dict) else b, moved, other, is_leaf=_is_dict)


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict)


def _parallel(gradient: Array, rows: Array) -> Array:
    """[F, D], [F, D] with unit rows -> [F, 1], the length of each gradient along its row."""
    return jnp.sum(gradient * rows, axis=1, keepdims=True)


def _variation(u: Array) -> Array:
    """[B, D] -> the summed squared deviation from the batch's mean, never zero."""
    return jnp.maximum(jnp.sum((u - u.mean(0)) ** 2), 1e-30)


def _reconstruct(params: Params, cfg: Config, u: Array):
    """-> FVU, (pre-activations [B, F], values, indices, reconstruction). The encoder sees u - b_dec (equation 1)."""
    centered = u - params["b_dec"]
    pre = kernels.preactivations(centered, params["enc"], params["b_enc"])
    values, indices = kernels.select(pre, cfg.k, centered, params["enc"], params["b_enc"])
    u_hat = kernels.sparse_decode(values, indices, params["dec"]) + params["b_dec"]
    return jnp.sum((u - u_hat) ** 2) / _variation(u), (pre, values, indices, u_hat)


def _aux_loss(params: Params, cfg: Config, u: Array, pre: Array, dead: Array, error: Array) -> Array:
    """AuxK (appendix A.2): how badly the k_aux best *dead* features reconstruct what the living left, u - u_hat.

    After the ReLU, as in the main loss: without it dead features learn to explain the error with negative values,
    which never fire. Its gradient reaches the dead features' rows and biases only.
    """
    centered = lax.stop_gradient(u - params["b_dec"])
    masked = jnp.where(dead, pre, -jnp.inf)
    values, indices = kernels.select(masked, cfg.k_aux, centered, params["enc"], params["b_enc"])
    return jnp.sum((error - kernels.sparse_decode(values, indices, params["dec"])) ** 2) / _variation(error)


def _with_aux(grads: Params, params: Params, cfg: Config, u: Array, pre: Array, dead: Array, error: Array):
    """Adds AuxK's gradient, but only while some feature is dead, so that it costs nothing otherwise."""

    def add(grads):
        loss, aux = jax.value_and_grad(_aux_loss)(params, cfg, u, pre, dead, error)
        return loss, jax.tree.map(lambda g, a: g + cfg.aux_coefficient * a, grads, aux)

    return lax.cond(dead.any(), add, lambda grads: (jnp.zeros(()), grads), grads)


def step(state: State, cfg: Config, x: Array) -> tuple[State, dict[str, Array]]:
    """One step on raw residuals x [B, D]. Pure: jit it with cfg static and state donated.

    Metrics are scalars of this batch in standardized space: `loss` = fvu + aux_coefficient * aux, `fvu` (squared error
    over squared deviation from the batch's mean), `aux` (the same for AuxK), `l0`, `cosine`, `dead` (the fraction
    silent for dead_after tokens) and `variance_explained` (see `Evaluation`; raw space would give the same).
    """
    if x.ndim != 2 or x.shape[1] != cfg.d_in:
        raise ValueError(f"x has shape {x.shape}; need [B, {cfg.d_in}]")
    params = state.params
    u = (x.astype(jnp.float32) - state.mean) / state.std
    (fvu, (pre, values, indices, u_hat)), grads = jax.value_and_grad(_reconstruct, has_aux=True)(params, cfg, u)
    fired = jnp.zeros(cfg.features, bool).at[indices].max(values > 0)
    idle = jnp.where(fired, 0, jnp.minimum(state.idle, 2**30) + len(x))
    dead = idle >= cfg.dead_after
    aux, grads = _with_aux(grads, params, cfg, u, pre, dead, u - u_hat)
    params, opt = _updated(state, cfg, grads)
    metrics = {
        "loss": fvu + cfg.aux_coefficient * aux,
        "fvu": fvu,
        "aux": aux,
        "l0": jnp.mean(jnp.sum(values > 0, axis=1)),
        "cosine": jnp.mean(_cosine(u, u_hat)),
        "dead": jnp.mean(dead),
        "variance_explained": jnp.mean(_correlation(u, u_hat) ** 2),
    }
    return State(params, state.mean, state.std, opt, idle, state.step + 1), metrics


def remove_parallel(gradient: Array, rows: Array) -> Array:
    """[F, D], [F, D] with unit rows -> the gradient without what only changes the rows' length (appendix A)."""
    return gradient - _parallel(gradient, rows) * rows


def _cosine(a: Array, b: Array) -> Array:
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    return jnp.sum(a * b, axis=1) / jnp.maximum(norms, 1e-30)


def _correlation(a: Array, b: Array) -> Array:
    """Pearson's r over the batch of each dimension: [B, D], [B, D] -> [D]; 0 where either is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    norms = jnp.sqrt(jnp.sum(a * a, 0) * jnp.sum(b * b, 0))
    return jnp.where(norms > 0, jnp.sum(a * b, 0) / jnp.where(norms > 0, norms, 1), 0)


def fold(state: State, cfg: Config) -> Params:
    """The trained SAE on raw residuals: W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D], computed in float64."""
    p = {name: np.asarray(value) for name, value in state.params.items()}
    mean, std = np.asarray(state.mean, np.float64), np.asarray(state.std, np.float64)
    folded = {  # one at a time: in float64 each of the large ones is twice as large
        "W_enc": lambda: (p["enc"] / std).T,
        "b_enc": lambda: p["b_enc"] - p["enc"] @ (mean / std + p["b_dec"]),
        "W_dec": lambda: p["dec"] * std,
        "b_dec": lambda: p["b_dec"] * std + mean,
    }
    return {name: jnp.asarray(value(), jnp.float32) for name, value in folded.items()}


# ---- using an SAE on raw residuals ----------------------------------------------------------------------------------


def encode(params: Params, cfg: Config, x: Array) -> tuple[Array, Array]:
    """Raw residuals x [..., D] -> values, indices [..., k]: ReLU(top-k(x W_enc + b_enc)), values falling.

    A value of 0 means that fewer than k features fired; its index then says nothing.
    """
    flat = jnp.asarray(x, jnp.float32).reshape(-1, cfg.d_in)
    values, indices = kernels.sparse_encode(flat, params["W_enc"].T, params["b_enc"], cfg.k)
    return values.reshape(*x.shape[:-1], cfg.k), indices.reshape(*x.shape[:-1], cfg.k)


def decode(params: Params, cfg: Config, values: Array, indices: Array) -> Array:
    """values, indices [..., n] -> raw residuals [..., D]. n is usually k; any selection of features will do."""
    n = values.shape[-1]
    flat = kernels.sparse_decode(values.reshape(-1, n), indices.reshape(-1, n), params["W_dec"])
    return (flat + params["b_dec"]).reshape(*values.shape[:-1], cfg.d_in)


class Evaluation(NamedTuple):
    """What an SAE does to raw residuals, summed over all tokens in float64."""

    tokens: int
    fvu: float  # raw space: squared error over squared deviation from the mean; huge dimensions decide
    fvu_standardized: float  # the same with every dimension scaled to unit variance: the space of training
    l0: float  # features with value > 0 per token
    cosine: float  # mean over tokens of cos(x, x_hat), raw space, mean not removed
    dead: float  # fraction of features that never fired on these tokens
    variance_explained: float  # the FLUX SAE paper's: mean over dimensions of the squared correlation. NOT 1 - fvu
    density: np.ndarray  # [F], fraction of tokens on which each feature fires


def evaluate(params: Params, cfg: Config, batches: Array | Iterable[Array]) -> Evaluation:
    """Raw residuals, one array [..., D] or a stream of them -> statistics. Memory does not grow with the stream."""
    total, shift = None, None
    for x in _chunks(batches, cfg.d_in):
        # Sums of squares around a point near the mean: around zero, float32 would lose the variance in the mean.
        shift = x.mean(0, dtype=np.float64).astype(np.float32) if shift is None else shift
        sums = {name: np.asarray(value, np.float64) for name, value in _sums(params, cfg, x, shift).items()}
        total = sums if total is None else {name: total[name] + sums[name] for name in sums}
    if total is None:
        raise ValueError("no residuals to evaluate on")
    n = float(total["tokens"])
    var_x, var_y = total["xx"] - total["x"] ** 2 / n, total["yy"] - total["y"] ** 2 / n
    covariance, alive = total["xy"] - total["x"] * total["y"] / n, var_x > 0
    both = alive & (var_y > 0)
    correlation = np.where(both, covariance / np.sqrt(np.where(both, var_x * var_y, 1)), 0)
    return Evaluation(
        tokens=int(n),
        fvu=float(total["error"].sum() / max(var_x.sum(), 1e-300)),
        fvu_standardized=float(np.mean(total["error"][alive] / var_x[alive])) if alive.any() else 0.0,
        l0=float(total["fired"].sum() / n),
        cosine=float(total["cosine"] / n),
        dead=float(np.mean(total["fired"] == 0)),
        variance_explained=float(np.mean(correlation**2)),
        density=total["fired"] / n,
    )


def _chunks(batches: Array | Iterable[Array], d_in: int, size: int = 4096) -> Iterable[np.ndarray]:
    """Pieces [<= size, D] in float32, so that [size, F] bounds the memory."""
    for batch in [batches] if hasattr(batches, "shape") else batches:
        rows = np.asarray(batch, np.float32).reshape(-1, d_in)
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


@jax.jit(static_argnums=1)
def _sums(params: Params, cfg: Config, x: Array, shift: Array) -> dict[str, Array]:
    values, indices = encode(params, cfg, x)
    x_hat = decode(params, cfg, values, indices)
    a, b = x - shift, x_hat - shift
    per_dimension = {"x": a, "xx": a * a, "y": b, "yy": b * b, "xy": a * b, "error": (x - x_hat) ** 2}
    sums = {name: jnp.sum(value, axis=0) for name, value in per_dimension.items()}
    fired = jnp.zeros(cfg.features, jnp.int32).at[indices].add(values > 0)
    return sums | {"tokens": jnp.asarray(len(x)), "fired": fired, "cosine": jnp.sum(_cosine(x, x_hat))}


# ---- files ----------------------------------------------------------------------------------------------------------


def save(folder: str | Path, params: Params, cfg: Config, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes an SAE on raw residuals as SAELens reads it: cfg.json and sae_weights.safetensors."""
    _write(Path(folder), _sae_files(params, cfg, metadata), cfg)


def checkpoint(
    folder: str | Path,
    state: State,
    cfg: Config,
    *,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes the folded SAE (see `save`) and state.safetensors, from which a run goes on bit for bit.

    `metadata` says what the SAE belongs to (model, revision, layer, site, seed, ...; JSON). `extra` holds what else the
    run needs to resume: a flat dict of arrays (PRNG keys as `jax.random.key_data`). A folder that is not there yet
    appears whole or not at all; in one that is, each file is replaced whole. `state.safetensors` alone decides where a
    resumed run goes on.
    """
    arrays = _flatten(state) | {f"extra/{name}": np.asarray(value) for name, value in (extra or {}).items()}
    header = {"config": dataclasses.asdict(cfg)}
    files = _sae_files(fold(state, cfg), cfg, metadata)
    _write(Path(folder), {STATE: lambda path: _save_arrays(path, arrays, header)} | files, cfg)


def _sae_files(params: Params, cfg: Config, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Name -> a function that writes that file. cfg.json last: without it a folder is not taken for an SAE."""
    arrays = {name: np.asarray(params[name], np.float32) for name in _shapes(cfg)}
    _check_arrays("params", arrays, _shapes(cfg))
    text = json.dumps(_sealed(_description(cfg, metadata or {})), indent=2) + "\n"
    return {
        WEIGHTS: lambda path: _save_arrays(path, arrays, {}),
        CONFIG: lambda path: path.write_text(text),
    }


def _description(cfg: Config, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json. Every default is stated, because SAELens' classes disagree on them."""
    return {
        "architecture": "topk",
        "d_in": cfg.d_in,
        "d_sae": cfg.features,
        "k": cfg.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, "training": dataclasses.asdict(cfg), **metadata},
    }


def _sealed(described: dict[str, Any]) -> dict[str, Any]:
    """With a digest of what decides how the weights are used and where they come from. Other tools may add to it."""
    described = json.loads(json.dumps(described))
    described["metadata"].pop("digest", None)  # of another SAE, whose metadata this one continues
    shape = [name for name in described if name not in ("metadata", "dtype", "device")]
    origin = [name for name in described["metadata"] if name != "sae_lens_version"]
    described["metadata"]["digest"] = {"of": shape, "of_metadata": origin, "sha256": _digest(described, shape, origin)}
    return described


def _digest(described: dict[str, Any], shape: list[str], origin: list[str]) -> str:
    said = [[part.get(name) for name in names] for part, names in ((described, shape), (described["metadata"], origin))]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    d, f = cfg.d_in, cfg.features
    return {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}


def load(folder: str | Path) -> tuple[Params, Config]:
    """A folder written by us or by SAELens (architecture topk) -> params on raw residuals and their config.

    What SAELens can put around the weights (b_dec subtracted first, decoder norms) is folded into them.
    """
    folder = Path(folder)
    described = _read_config(folder / CONFIG)
    training = described["metadata"].get("training") or {}
    known = {f.name for f in dataclasses.fields(Config)}
    shape = {"d_in": described["d_in"], "features": described["d_sae"], "k": described["k"]}
    cfg = Config(**{name: value for name, value in training.items() if name in known} | shape)
    arrays, _ = _load_arrays(folder / WEIGHTS)
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    _check_arrays(folder / WEIGHTS, arrays, _shapes(cfg))
    p = {name: value.astype(np.float64) for name, value in arrays.items()}
    if described["apply_b_dec_to_input"]:
        p["b_enc"] = p["b_enc"] - p["b_dec"] @ p["W_enc"]
    if described["rescale_acts_by_decoder_norm"]:
        norm = np.linalg.norm(p["W_dec"], axis=1)
        p |= {"W_enc": p["W_enc"] * norm, "b_enc": p["b_enc"] * norm, "W_dec": p["W_dec"] / norm[:, None]}
    return {name: jnp.asarray(value, jnp.float32) for name, value in p.items()}, cfg


def load_metadata(folder: str | Path) -> dict[str, Any]:
    """What the SAE in this folder belongs to: the `metadata` it was saved with, and `training`, its Config."""
    return _read_config(Path(folder) / CONFIG)["metadata"]


def _read_config(path: Path) -> dict[str, Any]:
    """cfg.json, checked. Defaults where a file is silent are those of SAELens' TopKSAEConfig."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {path.parent} is not an SAE folder")
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(read, dict) or read.get("architecture") != "topk":
        found = read.get("architecture") if isinstance(read, dict) else read
        raise ValueError(f"{path}: architecture is {found!r}; only 'topk' can be loaded")
    defaults = {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False, "metadata": {}}
    described = defaults | {"normalize_activations": "none", "reshape_activations": "none"} | read
    for name in ("d_in", "d_sae", "k"):
        if type(described.get(name)) is not int or described[name] < 1:
            raise ValueError(f"{path}: {name} is {described.get(name)!r}; need a positive integer")
    for name in ("normalize_activations", "reshape_activations"):
        if described[name] != "none":
            raise ValueError(f"{path}: {name} is {described[name]!r}; only 'none' can be loaded")
    seal = described["metadata"].get("digest") if isinstance(described["metadata"], dict) else None
    try:
        whole = seal is None or seal["sha256"] == _digest(read, seal["of"], seal["of_metadata"])
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: its digest is another (if it was edited on purpose, remove the digest)")
    return described


def load_state(folder: str | Path) -> tuple[State, Config, dict[str, np.ndarray]]:
    """What `checkpoint` wrote: state, config and `extra`, bit for bit."""
    path = Path(folder) / STATE
    arrays, header = _load_arrays(path)
    try:
        cfg = Config(**header["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no usable config in its header: {error!r}") from None
    sample = np.zeros((2, cfg.d_in), np.float32)
    template = jax.eval_shape(lambda: init(jax.random.key(0), cfg, sample))
    extra = {name[6:]: arrays.pop(name) for name in list(arrays) if name.startswith("extra/")}
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    expected = {_name(keys): leaf for keys, leaf in paths}
    _check_arrays(path, arrays, {name: leaf.shape for name, leaf in expected.items()})
    for name, leaf in expected.items():
        if arrays[name].dtype != leaf.dtype:
            raise ValueError(f"{path}: {name} is {arrays[name].dtype}; need {leaf.dtype}")
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in expected]), cfg, extra


def _name(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _flatten(state: State) -> dict[str, np.ndarray]:
    return {_name(keys): np.asarray(leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: dict[str, Any]) -> None:
    # safetensors writes an array's memory as it lies there: a transposed view would come back scrambled
    arrays = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in arrays.items()}
    # One entry of metadata: safetensors writes several in any order, and a resumed run is to end in the same bytes
    save_file(arrays, path, {"fae": json.dumps(header | {"sha256": _checksum(arrays, header)}, sort_keys=True)})


def _checksum(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> str:
    """Of names, types, shapes and every bit: safetensors itself would not notice a flipped one."""
    checksum = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        checksum.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        checksum.update(arrays[name].reshape(-1).view(np.uint8))
    return checksum.hexdigest()


def _load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, "np") as file:
            names, header = file.keys(), json.loads((file.metadata() or {}).get("fae", "{}"))
            arrays = {name: file.get_tensor(name) for name in names}
            saved = header.pop("sha256", None)
    except Exception as error:  # safetensors' own, and what numpy says to types that it does not know
        raise ValueError(f"{path} is damaged: {error} ({path.stat().st_size} bytes)") from None
    if saved is not None and saved != _checksum(arrays, header):
        raise ValueError(f"{path} is damaged: its contents are not those that were saved")
    return arrays, header


def _check_arrays(source: Any, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Exactly these names and shapes, and every number finite; else a ValueError that names the first offender."""
    if arrays.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
        raise ValueError(f"{source}: missing tensors {missing}, unknown tensors {unknown}")
    for name, array in arrays.items():
        if array.shape != tuple(shapes[name]):
            raise ValueError(f"{source}: {name} has shape {list(array.shape)}; its config says {list(shapes[name])}")
        if not np.isfinite(array).all():
            raise ValueError(f"{source}: {name} holds {int((~np.isfinite(array)).sum())} values that are not finite")


def _write(folder: Path, files: Mapping[str, Any], cfg: Config) -> None:
    """Writes each file so that a kill at any moment leaves only whole ones; a new folder appears with all of them."""
    folder = folder.resolve()
    if (folder / CONFIG).exists():
        _check_replaceable(folder / CONFIG, cfg)
    _remove_leftovers(folder)
    # Files are made in a folder of ours, for safetensors leaves temporaries of its own beside what it was writing.
    new = not folder.exists()
    mine = f"{os.getpid()}{TMP}"
    building = folder.parent / f".{folder.name}.{mine}" if new else folder / f".{mine}"
    building.mkdir(parents=True)
    try:
        for name, write in files.items():
            write(building / name)
            _sync(building / name)
    except (OSError, safetensors.SafetensorError) as error:  # a full disk
        shutil.rmtree(building)
        raise OSError(f"cannot save {folder}: {error}; what was there before is as it was") from None
    if new:
        _sync(building)
        os.rename(building, folder)
        _sync(folder.parent)
    else:
        for name in files:
            os.replace(building / name, folder / name)
            _sync(folder)
        building.rmdir()


def _check_replaceable(path: Path, cfg: Config) -> None:
    """Weights and cfg.json are replaced one after the other, so both must fit whichever of the other is there."""
    new, old = _description(cfg, {}), _read_config(path)
    for name in new.keys() - {"dtype", "device", "metadata"}:
        if old[name] != new[name]:
            raise ValueError(f"{path}: {name} is {old[name]!r}, not {new[name]!r}; save another SAE to another folder")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Deletes folders of saves that were killed: ours by their name, and their process no longer there."""
    for parent, prefix in ((folder, "."), (folder.parent, f".{folder.name}.")):
        for path in parent.glob(f".*{TMP}") if parent.is_dir() else ():
            match = re.fullmatch(rf"{re.escape(prefix)}(\d+){re.escape(TMP)}", path.name)
            if path.is_dir() and match and not _running(int(match[1])):
                shutil.rmtree(path)


def _running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()  # our own name on a temporary means that an earlier save of ours failed
