"""Sparse autoencoders: configuration, training step, encode and decode. TopK after Gao et al. 2024 (arXiv 2406.04093),
BatchTopK (2412.06410), JumpReLU (2407.14435), nested "Matryoshka" dictionaries (2503.17547), transcoders (2406.11944).

Copy `apply.py`, `kernels.py` and `normalize.py` with this file, `checkpoint.py` for files. It needs jax, numpy and
optax.

    cfg = sae.Config(d_in=3072, features=16384, k=32)
    state = sae.init(jax.random.key(0), cfg, sample)                  # sample [N, D]: raw residuals of many prompts
    step = jax.jit(sae.step, static_argnums=1, donate_argnums=0)
    state, metrics = step(state, cfg, x)                              # x [B, D]: raw residuals
    params = sae.fold(state, cfg)                                     # acts on raw residuals, as SAELens' SAEs do
    values, indices = sae.encode(params, cfg, x)
    x_hat = sae.decode(params, cfg, values, indices)

There are two spaces. Training runs on standardized residuals u (see `normalize.py`). Its parameters keep features as
rows: `enc` [F, D] and `dec` [F, D], `b_enc` [F], `b_dec` [D]. `fold` makes an SAE on *raw* residuals of them, with the
names and shapes of the file: `W_enc` [D, F], `b_enc` [F], `W_dec` [F, D], `b_dec` [D], and `threshold` [F] if a feature
fires above its threshold, not among the top k.

A transcoder reads one residual and writes another. Its x is [B, d_in + d_out], both residuals of the same token.

B batch, D model width, C columns of x, F features, k active features, G groups of tokens with their own normalization.
"""

import dataclasses
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh

import kernels
import normalize
from apply import Params, cosine, decode, encode  # noqa: F401 (API)
from normalize import NORMALIZATIONS, Mistake, fold, standardize, unfold  # noqa: F401 (API)

NEVER = 2**30  # tokens since it last fired, for a feature that never fired
ACTIVATIONS = ("topk", "batchtopk", "jumprelu")


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of an SAE and how it is trained. None: `__post_init__` derives the number from the shape."""

    d_in: int
    features: int
    k: int  # active features of a token; with thresholds their mean number
    activation: str = "topk"  # or "batchtopk", "jumprelu": these end with a threshold per feature
    matryoshka: tuple[int, ...] | None = None  # nested prefixes of the features; each must reconstruct by itself
    d_out: int | None = None  # width that a transcoder writes; None reconstructs the input
    normalization: str = "std"  # see `normalize.py`
    removed: int = 0  # directions of the residuals that are removed before training, see `normalize.py`
    groups: tuple[str, ...] = ()  # names of groups of tokens with their own mean and std; empty: one for all tokens
    k_aux: int | None = None
    aux_coefficient: float = 1 / 32  # appendix A.2
    dead_after: int | None = None  # a feature is dead after so many tokens without firing
    l0_coefficient: float = 1.0  # JumpReLU: weight of (l0 / k - 1)²
    bandwidth: float = 0.2  # JumpReLU: width of the threshold's pseudo-derivative, as a fraction of the threshold
    restraint: float = 0.15  # the learning rate is halved when this fraction of the features is falling silent
    lr: float | None = None
    warmup: int = 200  # steps; most dead features die early: at lr 3e-3 a warmup of 50 killed 27 %, of 200 6 %
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
        """C, the columns of x: d_in, and for a transcoder also d_out."""
        return self.d_in + (self.d_out or 0)

    def split(self, x: Array) -> tuple[Array, Array]:
        """Split x [..., C] into what is read [..., d_in] and what is to be written [..., d_out]."""
        return (x, x) if self.d_out is None else (x[..., : self.d_in], x[..., self.d_in :])

    @property
    def width(self) -> int:
        """The most active features of a token in a training step: k, and more with thresholds."""
        return self.k if self.activation == "topk" else min(self.features, 4 * self.k)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the arrays of an SAE on raw residuals."""
        d, f, out = self.d_in, self.features, self.d_out or self.d_in
        arrays = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, out), "b_dec": (out,)}
        return arrays if self.activation == "topk" else arrays | {"threshold": (f,)}

    @property
    def removed_shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the arrays for `apply.removed`; none if no directions are removed."""
        return {"read": (self.d_in, r), "write": (r, self.d_in), "offset": (r,)} if (r := self.removed) else {}


def _check_choices(cfg):
    # A group's name becomes a folder, and files may contain anything
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
    if not 0 <= cfg.removed < cfg.d_in or (cfg.removed and (cfg.d_out is not None or cfg.normalization == "scale")):
        raise Mistake(f"removed = {cfg.removed} of {cfg.d_in} dimensions, normalization {cfg.normalization}, d_out "
                      f"{cfg.d_out}; removing some needs an SAE, no transcoder, and normalization std or pca")
    if cfg.d_out is not None and (cfg.d_out < 1 or cfg.activation == "topk" or cfg.normalization == "pca"):
        raise Mistake("a transcoder has d_out >= 1, a threshold (activation batchtopk or jumprelu: SAELens knows no "
                      f"TopK transcoder) and no PCA; not {cfg.d_out}, {cfg.activation}, {cfg.normalization}")


def default_k_aux(d_in: int, features: int) -> int:
    """Return a power of two close to D / 2, at most 512 (appendix A.2). More would cost more than the SAE itself."""
    return min(512, features, 2 ** round(np.log2(max(d_in / 2, 1))))


def default_dead_after(features: int, k: int) -> int:
    """Return 1000 times the mean interval between firings, in tokens: 64,000 for 2048 features, 512,000 for 16,384.

    The paper's 10 million (about ten times as much at its smallest) suits runs of billions; ours may last 2 million.
    """
    return 1000 * features // k


def default_lr(features: int) -> float:
    """Return the paper's scaling, 1 / sqrt(features), with EleutherAI sparsify's constant. Short runs can take more."""
    return 2e-4 / (features / 2**14) ** 0.5


class State(NamedTuple):
    """Everything that training changes or needs; a pytree of arrays."""

    # In standardized space: enc [F, d_in], b_enc [F], dec [F, d_out] with unit rows, b_dec [d_out]; JumpReLU also has
    # log_threshold [F]
    params: Params
    mean: Array  # [C] of the raw residuals; [G, C] if cfg has groups
    std: Array  # likewise
    basis: Array | None  # [D, D], principal axes of the standardized residuals as columns
    removed: Array | None  # [D, R], orthonormal directions of the standardized residuals, along which u is zero
    opt: Any  # optax
    since_fired: Array  # [F] int32, tokens since the feature last fired
    threshold: Array | None  # BatchTopK: running mean of the lowest value that is among the top of a batch
    step: Array  # int32

    def __repr__(self):
        features, width = self.params["enc"].shape
        return f"<SAE in training: {features:,} features of width {width}>"


# ---- training -------------------------------------------------------------------------------------------------------


def init(
    key: Array, cfg: Config, sample: np.ndarray, groups: np.ndarray | None = None, like: State | None = None,
    without: np.ndarray | None = None) -> State:
    """Return a new state. The sample gives its normalization and its pre-bias; encoder and decoder are tied (A.1).

    sample [N, C]: raw residuals. groups [N]: the group of each token. like: a state whose normalization to take.
    without [cfg.removed, D], with groups [G, cfg.removed, D]: directions of raw residuals to remove. Raises Mistake for
    a sample of another shape, that is not finite, or that lacks one of the groups.
    """
    sample = np.asarray(sample)
    _check_groups(cfg, groups)
    if sample.ndim != 2 or sample.shape[1] != cfg.columns or len(sample) < 2:
        raise Mistake(f"sample has shape {sample.shape}; need [N, {cfg.columns}] with N >= 2")
    if like is None:
        numbers = np.zeros(len(sample), int) if groups is None else groups
        mean, std, basis, removed = normalize.fit(sample, numbers, cfg.groups or ("all",), cfg.normalization,
                                                  normalize.directions(cfg, without))
        mean, std = (mean, std) if cfg.groups else (mean[0], std[0])
    else:
        mean, std, basis, removed = like.mean, like.std, like.basis, like.removed
    some = slice(0, 32768)
    with jax.ensure_compile_time_eval():  # so that `jax.eval_shape` can ask for the state's shapes
        of = None if groups is None else groups[some]
        u = np.asarray(standardize(sample[some].astype(np.float32), mean, std, basis, of))
    kept = None if removed is None else basis.T @ basis
    params, threshold = _tied(key, cfg, u[:1024], normalize.geometric_median(u), kept)
    since_fired, arrays = jnp.full(cfg.features, NEVER, jnp.int32), (mean, std, basis, removed)
    return State(params, *(None if a is None else jnp.asarray(a) for a in arrays), _optimizer(cfg).init(params),
                 since_fired, threshold, jnp.zeros((), jnp.int32))


def _check_groups(cfg, group):
    if (group is None) == bool(cfg.groups):
        raise Mistake(f"cfg.groups are {cfg.groups}: the group of each token is needed if there are any, else not")


@jax.jit(static_argnums=1)
def _tied(key: Array, cfg: Config, u: Array, center: Array, kept: Array | None) -> tuple[Params, Array | None]:
    """Return parameters and BatchTopK's threshold.

    Decoder rows are random unit vectors. Encoder rows are parallel to them, with the one length that fits the
    reconstructions to u. A transcoder's encoder rows are random too: they live in another space. Thresholds begin where
    they leave k features active on these tokens. kept [D, D]: a projection, which takes from rows what u lacks.
    """
    keys = (key, key) if cfg.d_out is None else jax.random.split(key)
    x, center, b_dec = cfg.split(u - center)[0], *cfg.split(center)
    rows = (jax.random.normal(key, (cfg.features, size)) for key, size in zip(keys, (cfg.d_in, cfg.d_out or cfg.d_in)))
    enc, dec = (_unit(row if kept is None else row @ kept) for row in rows)
    bias = jnp.zeros(cfg.features)
    values, indices = kernels.sparse_encode(x, enc, bias, cfg.k)
    out = kernels.sparse_decode(values, indices, enc)
    scale = jnp.sum(out * x) / jnp.maximum(jnp.sum(out * out), 1e-30)
    # A sample without variation gives the scale 0, and then no feature could ever fire
    scale = jnp.where(scale > 0, scale, 1)
    b_enc = bias if cfg.d_out is None else -scale * enc @ center
    params = {"enc": scale * enc, "b_enc": b_enc, "dec": dec, "b_dec": b_dec}
    if cfg.activation == "topk":
        return params, None
    level = jnp.maximum(_lowest(kernels.sparse_encode(x, scale * enc, bias, cfg.width)[0], cfg.k), 1e-6)
    if cfg.activation == "batchtopk":
        return params, level
    return params | {"log_threshold": jnp.full(cfg.features, jnp.log(level))}, None


def step(
    state: State, cfg: Config, x: Array, group: Array | None = None, mesh: Mesh | None = None
) -> tuple[State, dict[str, Array]]:
    """Train one step on raw residuals x [B, C]; group [B] int if cfg has groups. Jit: cfg static, state donated.

    mesh: one axis of devices over which the features are split. Give it for a single TPU too: it allows TPU kernels.

    Metrics are scalars of this batch in standardized space: `loss` (the minimized quantity), `fvu` (squared error /
    squared deviation from the batch's mean), `aux` (the same for AuxK), `l0`, `cosine`, `dead` (fraction of features
    that did not fire for dead_after tokens) and `variance_explained` (see `apply.Evaluation`).
    """
    if x.ndim != 2 or x.shape[1] != cfg.columns:
        raise Mistake(f"x has shape {x.shape}; need [B, {cfg.columns}]")
    _check_groups(cfg, group)
    params = state.params
    u = standardize(x, state.mean, state.std, state.basis, group)
    (loss, (fvu, values, indices, out)), grads = _gradients(params, cfg, u, mesh)
    fired = jnp.zeros(cfg.features, int).at[indices].max((values > 0).astype(int))  # GPUs have no atomic for bool
    since_fired = jnp.where(fired > 0, 0, jnp.minimum(state.since_fired, NEVER) + len(x))
    dead = since_fired >= cfg.dead_after
    y = cfg.split(u)[1]
    aux, grads = _with_aux(grads, params, cfg, u, dead, y - out, mesh)
    params, opt = _updated(state, cfg, grads, since_fired)
    metrics = {
        "loss": loss + cfg.aux_coefficient * aux,
        "fvu": fvu,
        "aux": aux,
        "l0": jnp.mean(jnp.sum(values > 0, axis=1)),
        "cosine": jnp.mean(cosine(y, out)),
        "dead": jnp.mean(dead),
        "variance_explained": jnp.mean(_correlation(y, out) ** 2),
    }
    return state._replace(
        params=params, opt=opt, since_fired=since_fired, threshold=_followed(state, values),
        step=state.step + 1), metrics


def _optimizer(cfg):
    def lr(count):
        scale = jnp.minimum(1.0, (count + 1) / max(cfg.warmup, 1))
        if cfg.decay is not None:
            start, end = cfg.decay
            scale = scale * jnp.clip((end - count) / max(end - start, 1), 0.0, 1.0)
        return cfg.lr * scale

    return optax.adam(lr, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)


def _updated(state, cfg, grads, since_fired):
    """Return parameters and optimizer after one step along grads.

    The decoder's gradients lose the part that only changes the length of its rows (appendix A). Then all gradients are
    clipped by their global norm, and after the step decoder rows get unit length again.
    """
    params = state.params
    along = _along(grads["dec"], params["dec"])
    left = jnp.maximum(jnp.sum(grads["dec"] ** 2, axis=1, keepdims=True) - along**2, 0)  # rounding may leave less
    norm = jnp.sqrt(sum(jnp.sum(g * g) for name, g in grads.items() if name != "dec") + jnp.sum(left))
    scale = cfg.clip / jnp.maximum(norm, cfg.clip)
    grads = grads | {"dec": remove_parallel(grads["dec"], params["dec"])}
    grads = {name: scale * g for name, g in grads.items()}
    updates, opt = _optimizer(cfg).update(grads, state.opt, params)
    rate, each = _restrained(cfg, since_fired)
    rates = {name: rate if name == "b_dec" else each.reshape(-1, *[1] * (u.ndim - 1)) for name, u in updates.items()}
    params = optax.apply_updates(params, {name: rates[name] * u for name, u in updates.items()})
    return params | {"dec": kernels.by_rows(_unit, params["dec"])}, opt


def _restrained(cfg, since_fired):
    """Return the factor of the learning rate, for all [] and for each feature [F].

    It is 1 / (1 + (p / cfg.restraint)^4), where p is the fraction of features that are falling silent: they did fire
    once, but not for a quarter of dead_after. Dead features keep the full rate: only AuxK moves them.

    A feature that dies makes room for others to become dense, which kills more. Without restraint, layer 5 of an
    earlier nano kept 99 % of its features for 1,000 steps and lost 76 % in 3,000.
    """
    falling = jnp.mean((since_fired >= cfg.dead_after // 4) & (since_fired < NEVER))
    rate = 1 / (1 + (falling / cfg.restraint) ** 4)
    return rate, jnp.where(since_fired < cfg.dead_after, rate, 1)


def remove_parallel(gradient: Array, rows: Array) -> Array:
    """Return gradient [F, D] without its part along the unit rows [F, D], which only changes their length."""
    return gradient - _along(gradient, rows) * rows


def _along(gradient, rows):
    """Return the length [F, 1] of each row of the gradient along the unit row."""
    return jnp.sum(gradient * rows, axis=1, keepdims=True)


def _unit(rows):
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _followed(state, values):
    """Return BatchTopK's threshold: the running mean, over about 100 steps, of a batch's lowest value above zero."""
    if state.threshold is None:
        return None
    lowest = jnp.min(jnp.where(values > 0, values, jnp.inf))
    rate = jnp.maximum(0.01, 1 / (state.step + 2))
    return jnp.where(jnp.isfinite(lowest), state.threshold + rate * (lowest - state.threshold), state.threshold)


def _correlation(a, b):
    """Return Pearson's r [D] of a [B, D] and b [B, D] over the batch; 0 where one of them is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    norms = jnp.sqrt(jnp.sum(a * a, 0) * jnp.sum(b * b, 0))
    return jnp.where(norms > 0, jnp.sum(a * b, 0) / jnp.where(norms > 0, norms, 1), 0)


# ---- the loss, in standardized space --------------------------------------------------------------------------------


def _gradients(params, cfg, u, mesh):
    """Return what `_reconstruct` returns, and the gradients of its loss."""
    returned, grads = jax.value_and_grad(_reconstruct, has_aux=True)(params, cfg, u, mesh)
    if cfg.d_out is None:  # b_dec shifts every pre-activation, as b_enc does: one product instead of a sum per token
        seen = jnp.matmul(grads["b_enc"], params["enc"], precision=lax.Precision.HIGH)
        grads = grads | {"b_dec": grads["b_dec"] - seen}
    return returned, grads


def _reconstruct(params, cfg, u, mesh=None):
    """Return loss, (FVU, values, indices, reconstruction). The loss's gradient for b_dec lacks the encoder's part.

    The loss is the FVU or, with nested prefixes, the mean of their FVUs. JumpReLU adds the penalty on L0.
    """
    x, y = lax.stop_gradient(_seen(params, cfg, u)), cfg.split(u)[1]
    values, indices, penalty = _activate(params, cfg, x, mesh)
    outs = _nested(params, cfg, values, indices, mesh)
    fvus = [jnp.sum((out - y) ** 2) / _variation(y) for out in outs]
    return sum(fvus) / len(fvus) + penalty, (fvus[-1], values, indices, outs[-1])


def _variation(u):
    """Return the summed squared deviation of u [B, D] from the batch's mean, never zero."""
    centered = u - u.mean(0)
    return jnp.maximum(jnp.vdot(centered, centered, precision=lax.Precision.HIGHEST), 1e-30)


def _seen(params, cfg, u):
    """Return what the encoder sees [B, d_in] of u [B, C]: for an SAE u - b_dec (equation 1)."""
    return u - params["b_dec"] if cfg.d_out is None else cfg.split(u)[0]


def _nested(params, cfg, values, indices, mesh):
    """Return the reconstructions [B, d_out] from each prefix of the features; the last one is from all of them."""
    if cfg.matryoshka is None:
        return [kernels.sparse_decode(values, indices, params["dec"], mesh) + params["b_dec"]]
    outs, total, start = [], params["b_dec"], 0
    for end in cfg.matryoshka:
        inside = (start <= indices) & (indices < end)
        total = total + kernels.sparse_decode(jnp.where(inside, values, 0), indices, params["dec"], mesh)
        outs, start = [*outs, total], end
    return outs


def _activate(params, cfg, x, mesh=None):
    """Return values and indices [B, cfg.width], and the loss's penalty on L0."""
    if cfg.activation != "jumprelu":
        values, indices = kernels.sparse_encode(x, params["enc"], params["b_enc"], cfg.width, mesh)
        if cfg.activation == "batchtopk":
            values = jnp.where(values >= _lowest(values, cfg.k), values, 0)
        return values, indices, 0.0
    threshold = jnp.exp(params["log_threshold"])
    # Also select features below their threshold that are within the reach of its pseudo-derivative
    reach = lax.stop_gradient(threshold * (1 - cfg.bandwidth / 2))
    above, indices = kernels.sparse_encode(x, params["enc"], params["b_enc"] - reach, cfg.width, mesh)
    p, log_threshold = jnp.where(above > 0, above + reach[indices], 0), kernels.gather(params["log_threshold"], indices)
    l0 = jnp.sum(_jump(p, log_threshold, cfg.bandwidth, False)) / len(x)
    penalty = cfg.l0_coefficient * (l0 / cfg.k - 1) ** 2
    return _jump(p, log_threshold, cfg.bandwidth, True), indices, penalty


def _lowest(values, k):
    """Return the smallest of the B k largest values. values [B, W]: the W largest of each row, >= 0. Exact, unless a
    row has more than W of the B k largest."""
    return lax.stop_gradient(lax.top_k(values.reshape(-1), len(values) * k)[0][-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _jump(p: Array, log_threshold: Array, bandwidth: float, relu: bool) -> Array:
    """Return p where it is above its threshold (without `relu`: 1), else 0. The derivatives for the threshold are those
    of Rajamanoharan et al. 2024 (equations 11, 12), with a rectangular kernel of width bandwidth x threshold."""
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


def _with_aux(grads, params, cfg, u, dead, error, mesh):
    """Return AuxK's loss, and grads with its gradient added.

    It costs nothing while no feature is dead, and little while few are: their gradients leave the conditional as a few
    rows. If more than k_aux are dead, it sees some of the tokens only: else a run's first steps would be slow.
    """
    count, size = jnp.sum(dead), aux_tokens(cfg, len(u))
    # The fill lies outside: reading takes some row, which does not count, and writing drops it
    (places,) = jnp.nonzero(dead, size=cfg.k_aux, fill_value=cfg.features)
    rows = {name: params[name].at[places].get(mode="clip") for name in ("enc", "b_enc", "dec")}

    def few(size, rows):
        first, there = {name: row[:size] for name, row in rows.items()}, jnp.arange(size) < count
        loss, aux = jax.value_and_grad(_aux_loss_of_few)(first, there, _seen(params, cfg, u), error)
        return loss, {name: jnp.zeros_like(rows[name]).at[:size].set(a) for name, a in aux.items()}

    def many(_, carry):
        loss, aux = jax.value_and_grad(_aux_loss)(params, cfg, u[:size], dead, error[:size], mesh)
        return loss, jax.tree.map(lambda g, a: g + cfg.aux_coefficient * a, carry[1], aux)

    # A loop of one step or none adds in place. A conditional would copy all of grads, also where it adds nothing
    of_many, grads = lax.fori_loop(0, (count > cfg.k_aux).astype(int), many, (jnp.zeros(()), grads))
    half = max(1, cfg.k_aux // 2)
    which = jnp.where(count > cfg.k_aux, 0, (count > 0).astype(int) + (count > half))
    of_few, aux = lax.switch(which, [lambda rows: (jnp.zeros(()), jax.tree.map(jnp.zeros_like, rows)),
                                     partial(few, half), partial(few, cfg.k_aux)], rows)
    add = lambda g, a: g.at[places].add(cfg.aux_coefficient * a, mode="drop", unique_indices=True)
    return of_many + of_few, grads | {name: add(grads[name], a) for name, a in aux.items()}


def aux_tokens(cfg: Config, tokens: int) -> int:
    """Return how many of a batch's tokens AuxK sees while more than k_aux features are dead: with k_aux features each,
    they have a quarter of the active features of the whole batch, but no fewer than 64."""
    return min(tokens, max(64, tokens * cfg.k // (4 * cfg.k_aux)))


def _aux_loss(params, cfg, u, dead, error, mesh=None):
    """Return how badly the k_aux best *dead* features reconstruct the error y - y_hat (AuxK, appendix A.2).

    The values pass the ReLU, as in the main loss: without it dead features learn to explain the error with negative
    values, which never fire. The gradient reaches only the rows and biases of dead features.
    """
    x = lax.stop_gradient(_seen(params, cfg, u))
    b_enc = jnp.where(dead, params["b_enc"], -jnp.inf)
    values, indices = kernels.sparse_encode(x, params["enc"], b_enc, cfg.k_aux, mesh)
    return jnp.sum((error - kernels.sparse_decode(values, indices, params["dec"], mesh)) ** 2) / _variation(error)


def _aux_loss_of_few(rows, there, x, error):
    """Return `_aux_loss` if at most k_aux features are dead: two small dense products, since every token has all of
    them. rows: the parameters of k_aux features; those not `there` [k_aux] do not count."""
    product = partial(jnp.matmul, precision=lax.Precision.HIGH)  # as in `kernels.preactivations`
    values = jnp.where(there, jax.nn.relu(product(x, rows["enc"].T) + rows["b_enc"]), 0)
    return jnp.sum((error - product(values, rows["dec"])) ** 2) / _variation(error)
