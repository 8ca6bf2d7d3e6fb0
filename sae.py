"""Sparse autoencoders: parameters, training step, statistics. TopK after Gao et al. 2024 (arXiv 2406.04093),
BatchTopK (2412.06410), JumpReLU (2407.14435), nested "Matryoshka" dictionaries (2503.17547), transcoders (2406.11944).

Copy `kernels.py` with this file, and `checkpoint.py` for files; it needs jax, numpy and optax.

    cfg = sae.Config(d_in=3072, features=16384, k=32)
    state = sae.init(jax.random.key(0), cfg, sample)                  # sample [N, D]: raw residuals of many prompts
    step = jax.jit(sae.step, static_argnums=1, donate_argnums=0)
    state, metrics = step(state, cfg, x)                              # x [B, D]: raw residuals
    params = sae.fold(state, cfg)                                     # acts on raw residuals, as SAELens' do
    values, indices = sae.encode(params, cfg, x)
    x_hat = sae.decode(params, cfg, values, indices)

Two spaces. Training happens on *standardized* residuals u = (x - mean) / std, if wanted turned to their principal axes:
raw FLUX residuals are dominated by a few huge directions, and trained on those nearly every feature dies. Its
parameters keep features as rows: `enc` [F, D] and `dec` [F, D], `b_enc` [F], `b_dec` [D]. `fold` turns them into an SAE
on *raw* residuals, whose parameters have the names and shapes of the file: `W_enc` [D, F], `b_enc` [F], `W_dec` [F, D],
`b_dec` [D], and `threshold` [F] where a feature fires above its threshold instead of among the top k.

A transcoder reads one residual and writes another: its x is [B, d_in + d_out], both at the same tokens.

B batch, D model width, F features, k active features, G groups of tokens with a normalization of their own.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh

import kernels

Params = dict[str, Array]
NEVER = 2**30  # tokens since it last fired, of a feature that never did
ACTIVATIONS, NORMALIZATIONS = ("topk", "batchtopk", "jumprelu"), ("std", "pca", "scale")


class Mistake(ValueError):
    """What the caller can put right; its message is one line that names the value and what would be right."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of an SAE and how it is trained. None means: derive it from the shape; read back, it is a number."""

    d_in: int
    features: int
    k: int  # active features of a token; on average with thresholds
    activation: str = "topk"  # or "batchtopk", "jumprelu": these end with a threshold per feature
    matryoshka: tuple[int, ...] | None = None  # nested prefixes of the features, each to reconstruct by itself
    d_out: int | None = None  # of a transcoder; None reconstructs the input
    # "std": per dimension; "pca": so, and turned to the principal axes; "scale": one factor, else raw
    normalization: str = "std"
    groups: tuple[str, ...] = ()  # names of groups of tokens with a mean and std of their own; none: all alike
    k_aux: int | None = None
    aux_coefficient: float = 1 / 32  # appendix A.2
    dead_after: int | None = None  # tokens without firing
    l0_coefficient: float = 1.0  # JumpReLU: of (l0 / k - 1)²
    bandwidth: float = 0.2  # JumpReLU: of the threshold's pseudo-derivative, in thresholds
    restraint: float = 0.15  # fraction of features falling silent at which half of the learning rate is left
    lr: float | None = None
    warmup: int = 200  # steps; most that die do so early: at lr 3e-3 a warmup of 50 killed 27 %, 200 killed 6 %
    decay: tuple[int, int] | None = None  # steps (from, to) in which the learning rate falls linearly to zero
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 6.25e-10  # appendix A: the gradient per feature is tiny
    clip: float = 1.0  # global norm; the paper clips its large runs

    def __post_init__(self):
        if self.d_in < 1 or not 1 <= self.k <= self.features:
            raise Mistake(f"d_in = {self.d_in}, k = {self.k}, features = {self.features}; need 1 <= k <= features")
        defaults = {
            "k_aux": default_k_aux(self.d_in, self.features),
            "dead_after": default_dead_after(self.features, self.k),
            "lr": default_lr(self.features),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("decay", "groups", "matryoshka"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_choices(self)

    @property
    def columns(self) -> int:
        """Of x: what is read and, of a transcoder, what is to be written."""
        return self.d_in + (self.d_out or 0)

    @property
    def width(self) -> int:
        """The most features of a token that a training step considers. Only with thresholds are there more than k."""
        return self.k if self.activation == "topk" else min(self.features, 4 * self.k)


def _check_choices(cfg: Config) -> None:
    # Each but the first is a folder of a checkpoint, and files may say anything
    if bad := [name for name in cfg.groups if not re.fullmatch(r"\w[\w.-]*", str(name))]:
        raise Mistake(f"{bad[0]!r} is no name of a group of tokens: letters, digits, '-', '_' and '.', as in img-t0")
    if not 1 <= cfg.k_aux <= cfg.features:
        raise Mistake(f"k_aux = {cfg.k_aux} of {cfg.features} features; it must lie in 1..features")
    for name, known in (("activation", ACTIVATIONS), ("normalization", NORMALIZATIONS)):
        if getattr(cfg, name) not in known:
            raise Mistake(f"{name} is {getattr(cfg, name)!r}; it is one of {', '.join(known)}")
    ends = cfg.matryoshka
    whole = ends is None or all(type(end) is int for end in ends)
    if ends is not None and (not whole or list(ends) != sorted({*ends, cfg.features}) or ends[0] < 1):
        raise Mistake(f"matryoshka = {ends}: prefixes rise to all {cfg.features} features")
    if cfg.d_out is not None and (cfg.d_out < 1 or cfg.activation == "topk" or cfg.normalization == "pca"):
        raise Mistake("a transcoder has d_out >= 1, a threshold (activation batchtopk or jumprelu: SAELens knows no "
                         f"TopK transcoder) and no PCA; not {cfg.d_out}, {cfg.activation}, {cfg.normalization}")


def default_k_aux(d_in: int, features: int) -> int:
    """Appendix A.2: a power of two close to D / 2, typically 512; more would cost more than the SAE itself."""
    return min(512, features, 2 ** round(np.log2(max(d_in / 2, 1))))


def default_dead_after(features: int, k: int) -> int:
    """A thousand times the mean interval between firings, in tokens: 64,000 for 2048 features, 512,000 for 16,384.

    The paper's 10 million (about ten times as much at its smallest) suits runs of billions; ours may last 2 million.
    """
    return 1000 * features // k


def default_lr(features: int) -> float:
    """The paper's scaling, 1 / sqrt(features), with EleutherAI sparsify's constant. Short runs bear many times it."""
    return 2e-4 / (features / 2**14) ** 0.5


class State(NamedTuple):
    """Everything that training changes or needs; a pytree of arrays. C = cfg.columns."""

    # In standardized space: enc [F, d_in], b_enc [F], dec [F, d_out] with unit rows, b_dec [d_out]; JumpReLU has
    # log_threshold [F] too
    params: Params
    mean: Array  # [C] of the raw residuals; [G, C] where cfg has groups
    std: Array  # likewise
    basis: Array | None  # [D, D], principal axes of the standardized residuals as columns
    opt: Any  # optax
    idle: Array  # [F] int32, tokens since the feature last fired
    threshold: Array | None  # BatchTopK: running mean of the lowest value that is among the top of a batch
    step: Array  # int32
    spare: Params | None  # of a CPU: memory for the gradients of enc and dec, with the last ones; not in files

    def __repr__(self):
        features, width = self.params["enc"].shape
        return f"<SAE in training: {features:,} features of width {width}>"


# ---- training -------------------------------------------------------------------------------------------------------


def init(
    key: Array, cfg: Config, sample: np.ndarray, groups: np.ndarray | None = None, like: State | None = None
) -> State:
    """sample [N, C] of raw residuals, the group [N] of each -> a state: normalization (or that of the state `like`) and
    pre-bias from the data, tied weights (A.1). Raises ValueError for samples of other shapes, that are not finite, or
    without one of the groups."""
    sample = np.asarray(sample)
    _check_groups(cfg, groups)
    if like is None:
        mean, std, basis = _normalization(cfg, sample, np.zeros(len(sample), int) if groups is None else groups)
        mean, std = (mean, std) if cfg.groups else (mean[0], std[0])
    else:
        mean, std, basis = like.mean, like.std, like.basis
    some = slice(0, 32768)
    with jax.ensure_compile_time_eval():  # so that `jax.eval_shape` can ask for the state's shapes
        of = None if groups is None else groups[some]
        u = np.asarray(_standardize(sample[some].astype(np.float32), mean, std, basis, of))
    params, threshold = _tied(key, cfg, u[:1024], _geometric_median(u))
    idle, count = jnp.full(cfg.features, NEVER, jnp.int32), jnp.zeros((), jnp.int32)
    return State(params, *(None if a is None else jnp.asarray(a) for a in (mean, std, basis)),
                 _optimizer(cfg).init(params), idle, threshold, count, spare(params))


def spare(params: Params) -> Params | None:
    """Memory for gradients that lasts from step to step, see `kernels.sparse_decode`."""
    return {name: jnp.zeros_like(params[name]) for name in ("enc", "dec")} if jax.default_backend() == "cpu" else None


@jax.jit(static_argnums=1)
def _tied(key: Array, cfg: Config, u: Array, center: Array) -> tuple[Params, Array | None]:
    """Random unit decoder rows; encoder rows parallel to them, of the one length that fits reconstructions to u. A
    transcoder's, which live in another space, are random. Thresholds begin where they leave k features of these tokens.
    """
    keys = (key, key) if cfg.d_out is None else jax.random.split(key)
    x, center, b_dec = _parts(cfg, u - center)[0], *_parts(cfg, center)
    sizes = cfg.d_in, cfg.d_out or cfg.d_in
    enc, dec = (_unit(jax.random.normal(key, (cfg.features, size))) for key, size in zip(keys, sizes))
    bias = jnp.zeros(cfg.features)
    values, indices = kernels.sparse_encode(x, enc, bias, cfg.k)
    out = kernels.sparse_decode(values, indices, enc)
    scale = jnp.sum(out * x) / jnp.maximum(jnp.sum(out * out), 1e-30)
    # A sample without variation leaves the scale at 0, from which no feature could ever fire
    scale = jnp.where(scale > 0, scale, 1)
    b_enc = bias if cfg.d_out is None else -scale * enc @ center
    params = {"enc": scale * enc, "b_enc": b_enc, "dec": dec, "b_dec": b_dec}
    if cfg.activation == "topk":
        return params, None
    level = jnp.maximum(_lowest(kernels.sparse_encode(x, scale * enc, bias, cfg.width)[0], cfg.k), 1e-6)
    if cfg.activation == "batchtopk":
        return params, level
    return params | {"log_threshold": jnp.full(cfg.features, jnp.log(level))}, None


def _parts(cfg: Config, u: Array) -> tuple[Array, Array]:
    """[..., C] -> what is read [..., d_in], what is to be written [..., d_out]."""
    return (u, u) if cfg.d_out is None else (u[..., : cfg.d_in], u[..., cfg.d_in :])


def _normalization(cfg: Config, sample: np.ndarray, groups: np.ndarray):
    """-> mean [G, C], std [G, C], principal axes [C, C] or None, in float32.

    The axes change no distance and so no FVU, but Adam, which scales each coordinate by itself, gains from them: of
    nano's layers 0 and 5 FVU falls by 1 % at k = 16, by 1 to 5 % at 32, and fewer features fall silent.
    """
    if sample.ndim != 2 or sample.shape[1] != cfg.columns or len(sample) < 2:
        raise Mistake(f"sample has shape {sample.shape}; need [N, {cfg.columns}] with N >= 2")
    names, turned = cfg.groups or ("all",), cfg.normalization == "pca"
    parts = [sample[groups == g] for g in range(len(names))]
    if few := [name for name, part in zip(names, parts) if len(part) < 2]:
        raise Mistake(f"sample holds fewer than two tokens of the group {few[0]}")
    means, covariances = zip(*(_moments(part, full=turned) for part in parts))
    if cfg.normalization == "scale":  # as SAELens' expected_average_only_in: |x|² is D on average
        mean = np.zeros_like(means)
        std = np.sqrt([np.full_like(m, (m * m + c).mean()) for m, c in zip(means, covariances)])
        return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32), None
    std = [_spread(m, np.diag(c) if turned else c) for m, c in zip(means, covariances)]
    if not turned:
        return np.float32(means), np.float32(std), None
    pooled = sum(c / np.outer(s, s) * len(part) for c, s, part in zip(covariances, std, parts))
    # Without variation any axes will do; `load_state` asks with such a sample, and eigh takes seconds at D = 3072
    basis = np.linalg.eigh(pooled)[1] if pooled.any() else np.eye(cfg.d_in)
    return np.float32(means), np.float32(std), np.float32(basis)


def _check_groups(cfg: Config, group: Array | None) -> None:
    if (group is None) == bool(cfg.groups):
        raise Mistake(f"cfg.groups are {cfg.groups}: the group of each token is needed if there are any, else not")


def _moments(sample: np.ndarray, full: bool) -> tuple[np.ndarray, np.ndarray]:
    """[N, C] -> mean [C] and variances [C] or, `full`, covariances [C, C], summed in float64 in chunks."""
    chunks = [sample[i : i + 4096] for i in range(0, len(sample), 4096)]
    mean = sum(c.sum(0, dtype=np.float64) for c in chunks) / len(sample)
    centered = (c.astype(np.float64) - mean for c in chunks)
    var = sum(c.T @ c if full else (c**2).sum(0) for c in centered) / len(sample)
    if not np.isfinite(mean).all() or not np.isfinite(var).all():
        bad = ~np.isfinite(np.diag(var) if full else var)
        raise Mistake(f"sample is not finite in {int(bad.sum())} of {len(mean)} dimensions")
    return mean, var


def _spread(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """The std of each dimension; a constant one gets the rms of all."""
    std, rms = np.sqrt(np.maximum(var, 0)), np.sqrt(max(var.mean(), 0))
    constant = (std <= 1e-6 * np.abs(mean)) | (std <= 1e-8 * rms)
    return np.where(constant, rms or 1.0, std)


def _standardize(x: Array, mean: Array, std: Array, basis: Array | None, group: Array | None) -> Array:
    """Raw [B, C] -> u [B, C]."""
    mean, std = (mean, std) if group is None else (mean[group], std[group])
    u = (jnp.asarray(x, jnp.float32) - mean) / std
    return u if basis is None else jnp.matmul(u, basis, precision=lax.Precision.HIGH)  # as in `kernels.preactivations`


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


def _restrained(cfg: Config, idle: Array) -> tuple[Array, Array]:
    """What is left of the learning rate, for all [] and for each feature [F]: 1 / (1 + (p / cfg.restraint)^4), while a
    fraction p of the features is falling silent: those that did fire, but not for a quarter of dead_after. Dead ones,
    which AuxK alone moves, keep all of it.

    A feature that dies makes room for the others to become dense, which kills more: without restraint, nano's layer 5
    keeps 99 % of its features for 1,000 steps and loses 76 % in 3,000.
    """
    falling = jnp.mean((idle >= cfg.dead_after // 4) & (idle < NEVER))
    rate = 1 / (1 + (falling / cfg.restraint) ** 4)
    return rate, jnp.where(idle < cfg.dead_after, rate, 1)


def _updated(state: State, cfg: Config, grads: Params, idle: Array) -> tuple[Params, Any]:
    """Parameters and optimizer after a step along grads: clipped by their global norm once the decoder's have lost what
    only changes its rows' lengths (appendix A); then its rows are made unit again."""
    params = state.params
    along = _parallel(grads["dec"], params["dec"])
    # Where nothing else is left, rounding may take away more than there is
    norm = jnp.sqrt(jnp.maximum(sum(jnp.sum(g * g) for g in grads.values()) - jnp.sum(along**2), 0))
    scale = cfg.clip / jnp.maximum(norm, cfg.clip)
    grads = grads | {"dec": remove_parallel(grads["dec"], params["dec"])}
    grads = {name: scale * g for name, g in grads.items()}
    updates, opt = _optimizer(cfg).update(grads, state.opt, params)
    rate, each = _restrained(cfg, idle)
    rates = {name: rate if name == "b_dec" else each.reshape(-1, *[1] * (u.ndim - 1)) for name, u in updates.items()}
    params = optax.apply_updates(params, {name: rates[name] * u for name, u in updates.items()})
    return params | {"dec": kernels.by_rows(_unit, params["dec"])}, opt


def _parallel(gradient: Array, rows: Array) -> Array:
    """[F, D], [F, D] with unit rows -> [F, 1], the length of each gradient along its row."""
    return jnp.sum(gradient * rows, axis=1, keepdims=True)


def _variation(u: Array) -> Array:
    """[B, D] -> the summed squared deviation from the batch's mean, never zero."""
    centered = u - u.mean(0)
    return jnp.maximum(jnp.vdot(centered, centered, precision=lax.Precision.HIGHEST), 1e-30)


def _gradients(params: Params, cfg: Config, u: Array, mesh: Mesh | None, spare: Params | None):
    """-> what `_reconstruct` returns, the gradients of its loss."""
    returned, grads = jax.value_and_grad(_reconstruct, has_aux=True)(params, cfg, u, mesh, spare)
    if cfg.d_out is None:  # b_dec shifts every pre-activation, as b_enc does: one product instead of a sum per token
        seen = jnp.matmul(grads["b_enc"], params["enc"], precision=lax.Precision.HIGH)
        grads = grads | {"b_dec": grads["b_dec"] - seen}
    return returned, grads


def _reconstruct(params: Params, cfg: Config, u: Array, mesh: Mesh | None = None, spare: Params | None = None):
    """-> loss, (FVU, values, indices, reconstruction). The loss's gradient for b_dec lacks the encoder's part.

    The loss is the FVU or, with nested prefixes, the mean of their FVUs; of JumpReLU SAEs with the penalty on L0.
    """
    x, y, spare = lax.stop_gradient(_seen(params, cfg, u)), _parts(cfg, u)[1], spare or {}
    values, indices, penalty = _activate(params, cfg, x, mesh, spare.get("enc"))
    outs = _nested(params, cfg, values, indices, mesh, spare.get("dec"))
    fvus = [jnp.sum((out - y) ** 2) / _variation(y) for out in outs]
    return sum(fvus) / len(fvus) + penalty, (fvus[-1], values, indices, outs[-1])


def _seen(params: Params, cfg: Config, u: Array) -> Array:
    """[B, C] -> what the encoder sees, [B, d_in]: of an SAE u - b_dec (equation 1)."""
    return u - params["b_dec"] if cfg.d_out is None else _parts(cfg, u)[0]


def _nested(params: Params, cfg: Config, values: Array, indices: Array, mesh: Mesh | None, spare) -> list[Array]:
    """Reconstructions [B, d_out] from each prefix of the features; the last one from all of them."""
    if cfg.matryoshka is None:
        return [kernels.sparse_decode(values, indices, params["dec"], mesh, spare) + params["b_dec"]]
    outs, total, start = [], params["b_dec"], 0
    for end in cfg.matryoshka:
        inside = (start <= indices) & (indices < end)
        total = total + kernels.sparse_decode(jnp.where(inside, values, 0), indices, params["dec"], mesh)
        outs, start = [*outs, total], end
    return outs


def _activate(params: Params, cfg: Config, x: Array, mesh: Mesh | None = None, spare: Array | None = None):
    """-> values, indices [B, cfg.width], and what the loss adds to reach the wanted L0."""
    if cfg.activation != "jumprelu":
        values, indices = kernels.sparse_encode(x, params["enc"], params["b_enc"], cfg.width, mesh, spare)
    if cfg.activation == "topk":
        return values, indices, 0.0
    if cfg.activation == "batchtopk":
        return jnp.where(values >= _lowest(values, cfg.k), values, 0), indices, 0.0
    threshold = jnp.exp(params["log_threshold"])
    # What lies below a threshold, but within the reach of its pseudo-derivative, is selected too
    reach = lax.stop_gradient(threshold * (1 - cfg.bandwidth / 2))
    above, indices = kernels.sparse_encode(x, params["enc"], params["b_enc"] - reach, cfg.width, mesh, spare)
    p, log_threshold = jnp.where(above > 0, above + reach[indices], 0), kernels.gather(params["log_threshold"], indices)
    l0 = jnp.sum(_jump(p, log_threshold, cfg.bandwidth, False)) / len(x)
    penalty = cfg.l0_coefficient * (l0 / cfg.k - 1) ** 2
    return _jump(p, log_threshold, cfg.bandwidth, True), indices, penalty


def _lowest(values: Array, k: int) -> Array:
    """values [B, W] >= 0, each row's largest -> the smallest of the B k largest of all, exactly, where no row has more
    than W of these."""
    return lax.stop_gradient(lax.top_k(values.reshape(-1), len(values) * k)[0][-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _jump(p: Array, log_threshold: Array, bandwidth: float, relu: bool) -> Array:
    """JumpReLU: p where it is above its threshold, else 0; not `relu`: 1 there. The derivatives for the threshold are
    those of Rajamanoharan et al. 2024 (equations 11, 12), with a rectangular kernel of width bandwidth x threshold."""
    return jnp.where(p > jnp.exp(log_threshold), p if relu else 1.0, 0)


def _jump_forward(p, log_threshold, bandwidth, relu):
    return _jump(p, log_threshold, bandwidth, relu), (p, log_threshold)


def _jump_backward(bandwidth, relu, residuals, g):
    p, log_threshold = residuals
    threshold = jnp.exp(log_threshold)
    kernel = jnp.abs(p - threshold) < bandwidth * threshold / 2
    height = threshold if relu else 1.0  # of the jump; d threshold / d log_threshold cancels the kernel's width
    return jnp.where(p > threshold, g, 0) if relu else jnp.zeros_like(p), -g * height * kernel / bandwidth


_jump.defvjp(_jump_forward, _jump_backward)


def _aux_loss(params: Params, cfg: Config, u: Array, dead: Array, error: Array, mesh=None) -> Array:
    """AuxK (appendix A.2): how badly the k_aux best *dead* features reconstruct what the living left, y - y_hat.

    After the ReLU, as in the main loss: without it dead features learn to explain the error with negative values,
    which never fire. Its gradient reaches the dead features' rows and biases only.
    """
    x = lax.stop_gradient(_seen(params, cfg, u))
    b_enc = jnp.where(dead, params["b_enc"], -jnp.inf)
    values, indices = kernels.sparse_encode(x, params["enc"], b_enc, cfg.k_aux, mesh)
    return jnp.sum((error - kernels.sparse_decode(values, indices, params["dec"], mesh)) ** 2) / _variation(error)


def _aux_loss_of_few(rows: Params, there: Array, x: Array, error: Array) -> Array:
    """`_aux_loss` where no more than k_aux features are dead, so that each token has all of them: two small dense
    products. rows: the parameters of k_aux features, of which those not `there` [k_aux] do not count."""
    product = partial(jnp.matmul, precision=lax.Precision.HIGH)  # as in `kernels.preactivations`
    values = jnp.where(there, jax.nn.relu(product(x, rows["enc"].T) + rows["b_enc"]), 0)
    return jnp.sum((error - product(values, rows["dec"])) ** 2) / _variation(error)


def _with_aux(grads: Params, params: Params, cfg: Config, u: Array, dead: Array, error: Array, mesh):
    """-> AuxK's loss, grads with its gradient. It costs nothing while no feature is dead, and little while few are:
    their gradients leave the conditional as a few rows, for all of grads would be copied there."""
    count = jnp.sum(dead)
    (places,) = jnp.nonzero(dead, size=cfg.k_aux, fill_value=0)
    rows = {name: params[name][places] for name in ("enc", "b_enc", "dec")}

    def few(rows):
        there = jnp.arange(cfg.k_aux) < count
        return jax.value_and_grad(_aux_loss_of_few)(rows, there, _seen(params, cfg, u), error)

    def many(grads):
        loss, aux = jax.value_and_grad(_aux_loss)(params, cfg, u, dead, error, mesh)
        return loss, jax.tree.map(lambda g, a: g + cfg.aux_coefficient * a, grads, aux)

    of_many, grads = lax.cond(count > cfg.k_aux, many, lambda grads: (jnp.zeros(()), grads), grads)
    of_few, aux = lax.cond((count > 0) & (count <= cfg.k_aux), few,
                           lambda rows: (jnp.zeros(()), jax.tree.map(jnp.zeros_like, rows)), rows)
    added = {name: grads[name].at[places].add(cfg.aux_coefficient * a) for name, a in aux.items()}
    return of_many + of_few, grads | added


def step(
    state: State, cfg: Config, x: Array, group: Array | None = None, mesh: Mesh | None = None
) -> tuple[State, dict[str, Array]]:
    """One step on raw residuals x [B, C], group [B] int where cfg has them. Pure: jit with cfg static, state donated.

    mesh: the devices in one row, one axis, over which the features are split; also of a single one, so that a TPU's
    kernels can be used.

    Metrics are scalars of this batch in standardized space: `loss` (what is minimized), `fvu` (squared error over
    squared deviation from the batch's mean), `aux` (the same for AuxK), `l0`, `cosine`, `dead` (the fraction silent for
    dead_after tokens) and `variance_explained` (see `Evaluation`; without PCA raw space would give the same).
    """
    if x.ndim != 2 or x.shape[1] != cfg.columns:
        raise Mistake(f"x has shape {x.shape}; need [B, {cfg.columns}]")
    _check_groups(cfg, group)
    params = state.params
    u = _standardize(x, state.mean, state.std, state.basis, group)
    (loss, (fvu, values, indices, out)), grads = _gradients(params, cfg, u, mesh, state.spare)
    fired = jnp.zeros(cfg.features, bool).at[indices].max(values > 0)
    idle = jnp.where(fired, 0, jnp.minimum(state.idle, NEVER) + len(x))
    dead = idle >= cfg.dead_after
    y = _parts(cfg, u)[1]
    aux, grads = _with_aux(grads, params, cfg, u, dead, y - out, mesh)
    params, opt = _updated(state, cfg, grads, idle)
    metrics = {
        "loss": loss + cfg.aux_coefficient * aux,
        "fvu": fvu,
        "aux": aux,
        "l0": jnp.mean(jnp.sum(values > 0, axis=1)),
        "cosine": jnp.mean(_cosine(y, out)),
        "dead": jnp.mean(dead),
        "variance_explained": jnp.mean(_correlation(y, out) ** 2),
    }
    new = state._replace(params=params, opt=opt, idle=idle, threshold=_followed(state, values), step=state.step + 1)
    return new._replace(spare=state.spare and {name: grads[name] for name in state.spare}), metrics


def _followed(state: State, values: Array) -> Array | None:
    """BatchTopK: the running mean, over about 100 steps, of a batch's lowest value above zero."""
    if state.threshold is None:
        return None
    lowest = jnp.min(jnp.where(values > 0, values, jnp.inf))
    rate = jnp.maximum(0.01, 1 / (state.step + 2))
    return jnp.where(jnp.isfinite(lowest), state.threshold + rate * (lowest - state.threshold), state.threshold)


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


def fold(state: State, cfg: Config, group: int = 0) -> Params:
    """The trained SAE on raw residuals of a group: W_enc [d_in, F], b_enc [F], W_dec [F, d_out], b_dec [d_out], and the
    threshold [F] if it has one, computed in float64."""
    p = {name: np.asarray(value) for name, value in state.params.items()}
    (mean, mean_y), (std, std_y) = (_parts(cfg, np.asarray(a, np.float64)) for a in _of_group(state, cfg, group))
    along, back = _turns(state)
    center = along(mean / std) + (p["b_dec"] if cfg.d_out is None else 0)
    folded = {  # one at a time: in float64 each of the large ones is twice as large
        "W_enc": lambda: (back(p["enc"]) / std).T,
        "b_enc": lambda: p["b_enc"] - p["enc"] @ center,
        "W_dec": lambda: back(p["dec"]) * std_y,
        "b_dec": lambda: back(p["b_dec"]) * std_y + mean_y,
    }
    if cfg.activation != "topk":
        log = p.get("log_threshold")
        folded["threshold"] = lambda: np.full(cfg.features, state.threshold) if log is None else np.exp(log)
    return {name: jnp.asarray(value(), jnp.float32) for name, value in folded.items()}


def _of_group(state: State, cfg: Config, group: int) -> tuple[Array, Array]:
    return (state.mean[group], state.std[group]) if cfg.groups else (state.mean, state.std)


def _turns(state: State) -> tuple[Any, Any]:
    """Functions of rows [..., D]: along the principal axes, and back, in float64; nothing where there are no axes."""
    if state.basis is None:
        return (lambda rows: rows), (lambda rows: rows)
    basis = np.asarray(state.basis, np.float64)
    return (lambda rows: rows @ basis), (lambda rows: rows @ basis.T)


def unfold(params: Params, cfg: Config, state: State) -> State:
    """The state with the parameters of an SAE on raw residuals (of the first group), to train it on: `fold` makes of it
    `params` again, but for decoder rows of unit length in this state's space. Raises ValueError where shapes differ."""
    needed = {name: shape for name, shape in shapes(cfg).items() if name != "threshold"}
    check_arrays("the SAE to begin from", {name: np.asarray(params[name]) for name in needed}, needed)
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    mean, std = (np.asarray(a, np.float64) for a in _of_group(state, cfg, 0))
    along, _ = _turns(state)
    enc, dec = along(p["W_enc"].T * std), along(p["W_dec"] / std)
    length = np.maximum(np.linalg.norm(dec, axis=1), 1e-30)
    b_dec, enc = along((p["b_dec"] - mean) / std), enc * length[:, None]
    new = {"enc": enc, "b_enc": (p["b_enc"] + mean @ p["W_enc"]) * length + enc @ b_dec, "dec": dec / length[:, None]}
    threshold, new["b_dec"] = state.threshold, b_dec
    if "threshold" in p:
        level = np.maximum(p["threshold"] * length, 1e-6)
        threshold = None if threshold is None else jnp.float32(np.median(level))
        new["log_threshold"] = np.log(level)
    taken = {name: jnp.asarray(new.get(name, old), jnp.float32) for name, old in state.params.items()}
    return state._replace(params=taken, threshold=threshold)


# ---- using an SAE on raw residuals ----------------------------------------------------------------------------------


def encode(params: Params, cfg: Config, x: Array, width: int | None = None) -> tuple[Array, Array]:
    """Raw residuals x [..., d_in] -> values, indices [..., width], values falling: ReLU(x W_enc + b_enc), where it is
    among the top k or above its threshold.

    A value of 0 means that no more features fired; its index then says nothing. width: k or, with thresholds, as many
    as fire on any of these tokens (in multiples of 16). Under `jit` it has to be given with thresholds; of more
    features only the largest are kept.
    """
    flat = jnp.asarray(x, jnp.float32).reshape(-1, cfg.d_in)
    pre, most = _candidates(params, flat)
    if width is None and cfg.activation == "topk":
        width = cfg.k
    if width is None:
        if isinstance(most, jax.core.Tracer):
            raise Mistake("with thresholds, encode needs `width` under jit: the most features that a token may have")
        width = min(cfg.features, 16 * max(1, -(-int(most) // 16)))
    values, indices = _select(params, flat, pre, width)
    return values.reshape(*x.shape[:-1], width), indices.reshape(*x.shape[:-1], width)


@jax.jit
def _candidates(params: Params, x: Array) -> tuple[Array, Array]:
    """-> pre-activations [B, F], -inf where below a threshold; the most above it of any token. In full precision: raw
    residuals are far from zero, and rounding to TF32 or bfloat16 would choose other features on each kind of chip."""
    pre = kernels.preactivations(*_around_center(params, x), precision=lax.Precision.HIGHEST)
    if "threshold" not in params:
        return pre, jnp.zeros((), int)
    above = pre > jnp.maximum(params["threshold"], 0)
    return jnp.where(above, pre, -jnp.inf), above.sum(1).max()


def _around_center(params: Params, x: Array) -> tuple[Array, Array, Array]:
    """x, weights (features as rows) and biases of the same encoder, but from b_dec, which is close to the residuals'
    mean: (x - b_dec) W + (b_enc + b_dec W). Otherwise the few features that fire would be small differences of large
    products, of which each chip rounds away others.
    """
    center, W_enc, b_enc = params["b_dec"], params["W_enc"], params["b_enc"]
    if center.shape != x.shape[-1:]:
        return x, W_enc.T, b_enc
    pieces = (-(-len(center) // 32), 32)
    center_in, rows = (jnp.pad(a, [(0, -len(center) % 32)] + [(0, 0)] * (a.ndim - 1)) for a in (center, W_enc))
    parts = jnp.einsum("pd,pdf->pf", center_in.reshape(pieces), rows.reshape(*pieces, -1),
                       precision=lax.Precision.HIGHEST)

    def add(sums, part):  # Knuth's sum, which keeps what rounding loses
        total, lost = sums
        new = total + part
        back = new - total
        return (new, lost + ((total - (new - back)) + (part - back))), None

    (total, lost), _ = lax.scan(add, (b_enc, jnp.zeros_like(b_enc)), parts)
    return x - center, W_enc.T, total + lost


@partial(jax.jit, static_argnums=3)
def _select(params: Params, x: Array, pre: Array, width: int) -> tuple[Array, Array]:
    return kernels.select(pre, width, x, params["W_enc"].T, params["b_enc"])


def decode(params: Params, cfg: Config, values: Array, indices: Array) -> Array:
    """values, indices [..., n] -> raw residuals [..., d_out]. n is usually k; any selection of features will do."""
    n = values.shape[-1]
    flat = kernels.sparse_decode(values.reshape(-1, n), indices.reshape(-1, n), params["W_dec"])
    return (flat + params["b_dec"]).reshape(*values.shape[:-1], params["b_dec"].shape[0])


def splice(params: Params, cfg: Config, x: Array) -> Array:
    """Raw residuals x [..., d_in] -> their reconstruction [..., d_out] in x's dtype, also under `jit`."""
    if cfg.activation == "topk":
        return decode(params, cfg, *encode(params, cfg, x)).astype(x.dtype)
    flat = jnp.asarray(x, jnp.float32).reshape(-1, cfg.d_in)
    size = min(len(flat), 512)  # tokens at a time: no [B, F] of all
    parts = jnp.pad(flat, ((0, -len(flat) % size), (0, 0))).reshape(-1, size, cfg.d_in)
    out = lax.map(partial(_reconstruct_all, params), parts).reshape(-1, params["b_dec"].shape[0])[:len(flat)]
    return out.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _reconstruct_all(params: Params, x: Array) -> Array:
    """x [B, d_in] -> [B, d_out] by all features above their thresholds, however many these are."""
    values = jax.nn.relu(_candidates(params, x)[0])
    return jnp.matmul(values, params["W_dec"], precision=lax.Precision.HIGHEST) + params["b_dec"]


def change(params: Params, cfg: Config, x: Array, features: Array, scale: Array, add: Array) -> Array:
    """Raw residuals x [..., d_in] with some features changed: each value v of `features` [n] becomes scale * v + add.
    scale, add: [..., n], broadcast against x's tokens.

    Only the decoder rows times what the values change by are added: what the SAE leaves out of x stays, and scale = 1
    with add = 0 leaves x as it is, to the bit.
    """
    flat = jnp.asarray(x, jnp.float32).reshape(-1, cfg.d_in)
    v = _values_of(params, cfg, flat, features).reshape(*x.shape[:-1], len(features))
    by = jnp.matmul((scale - 1) * v + add, params["W_dec"][features], precision=lax.Precision.HIGHEST)
    return jnp.where(jnp.any(by != 0, -1, keepdims=True), x + by.astype(x.dtype), x)


def _values_of(params: Params, cfg: Config, x: Array, features: Array) -> Array:
    """x [B, d_in] -> what `encode` makes of `features` [n] alone, [B, n]: to know whether a feature is among the top k,
    it is enough to count those before it, which costs far less than to find the top k."""
    pre, _ = _candidates(params, x)
    own = lax.stop_gradient(pre[:, features])
    x, rows, bias = _around_center(params, x)
    v = jax.nn.relu(jnp.matmul(x, rows[features].T, precision=lax.Precision.HIGHEST) + bias[features])
    if cfg.activation != "topk":
        return jnp.where(own > 0, v, 0)                          # -inf where it is not above its threshold
    return jnp.where(_ranks(pre, own, features) < cfg.k, v, 0)


def _ranks(pre: Array, own: Array, features: Array, lanes: int = 128) -> Array:
    """How many of pre [B, F] come before own [B, n] of `features` [n] in each row; of equal ones those to the left.

    Piece by piece, so that the sums run in vectors: a CPU sums along a row one by one, which takes a hundred times as
    long.
    """
    pre = jnp.pad(pre, ((0, 0), (0, -pre.shape[1] % lanes)), constant_values=-jnp.inf)

    def add(i, counts):
        piece = lax.dynamic_slice_in_dim(pre, i * lanes, lanes, 1)[:, None]
        left = i * lanes + jnp.arange(lanes) < features[:, None]
        return counts + ((piece > own[:, :, None]) | ((piece == own[:, :, None]) & left))

    counts = jnp.zeros((*own.shape, lanes), jnp.int32)
    return lax.fori_loop(0, pre.shape[1] // lanes, add, counts).sum(-1)


class Evaluation(NamedTuple):
    """What an SAE does to raw residuals, summed over all tokens in float64. A transcoder's x is what it is to write."""

    tokens: int
    fvu: float  # raw space: squared error over squared deviation from the mean; huge dimensions decide
    fvu_standardized: float  # the same with every dimension scaled to unit variance: the space of training
    l0: float  # features with value > 0 per token
    cosine: float  # mean over tokens of cos(x, x_hat), raw space, mean not removed
    dead: float  # fraction of features that never fired on these tokens
    variance_explained: float  # the FLUX SAE paper's: mean over dimensions of the squared correlation. NOT 1 - fvu
    density: np.ndarray  # [F], fraction of tokens on which each feature fires


def evaluate(params: Params, cfg: Config, batches: Array | Iterable[Array]) -> Evaluation:
    """Raw residuals, one array [..., C] or a stream of them -> statistics. Memory does not grow with the stream."""
    total = {}
    for batch in [batches] if hasattr(batches, "shape") else batches:
        total = added(total, params, cfg, batch)
    return evaluation(total)


def added(total: dict[str, Any], params: Params, cfg: Config, batch: Array) -> dict[str, Any]:
    """What `evaluation` needs of the residuals so far ({} at first) -> the same with those of a batch [..., C]."""
    for x, y in (_parts(cfg, chunk) for chunk in _chunks(batch, cfg.columns)):
        # Sums of squares around a point near the mean: around zero, float32 would lose the variance in the mean.
        shift = total.get("shift", y.mean(0, dtype=np.float64).astype(np.float32))
        sums = _sums(params, cfg, y, *encode(params, cfg, x), shift)
        total = {name: total.get(name, 0) + np.asarray(value, np.float64) for name, value in sums.items()}
        total["shift"] = shift
    return total


def evaluation(total: dict[str, Any]) -> Evaluation:
    """The statistics of all that was `added`. Raises Mistake where that is nothing."""
    if not total:
        raise Mistake("no residuals to evaluate on")
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


def _chunks(batch: Array, columns: int, size: int = 4096) -> Iterable[np.ndarray]:
    """Pieces [<= size, D] in float32, so that [size, F] bounds the memory."""
    rows = np.asarray(batch, np.float32).reshape(-1, columns)
    yield from (rows[i : i + size] for i in range(0, len(rows), size))


@jax.jit(static_argnums=1)
def _sums(params: Params, cfg: Config, x: Array, values: Array, indices: Array, shift: Array) -> dict[str, Array]:
    x_hat = decode(params, cfg, values, indices)
    a, b = x - shift, x_hat - shift
    per_dimension = {"x": a, "xx": a * a, "y": b, "yy": b * b, "xy": a * b, "error": (x - x_hat) ** 2}
    sums = {name: jnp.sum(value, axis=0) for name, value in per_dimension.items()}
    fired = jnp.zeros(cfg.features, jnp.int32).at[indices].add(values > 0)
    return sums | {"tokens": jnp.asarray(len(x)), "fired": fired, "cosine": jnp.sum(_cosine(x, x_hat))}


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """The arrays of an SAE on raw residuals and their shapes."""
    d, f, out = cfg.d_in, cfg.features, cfg.d_out or cfg.d_in
    return {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, out), "b_dec": (out,)} | (
        {} if cfg.activation == "topk" else {"threshold": (f,)})


def check_arrays(source: Any, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises Mistake, naming the first offender, unless arrays have exactly these names and shapes, all finite."""
    if arrays.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
        raise Mistake(f"{source}: missing tensors {missing}, unknown tensors {unknown}")
    for name, array in arrays.items():
        if array.shape != tuple(shapes[name]):
            raise Mistake(f"{source}: {name} has shape {list(array.shape)}; its config says {list(shapes[name])}")
        if not np.isfinite(array).all():
            raise Mistake(f"{source}: {name} holds {int((~np.isfinite(array)).sum())} values that are not finite")
