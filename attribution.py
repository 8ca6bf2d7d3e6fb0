"""Why a feature of an SAE fires: gradient × value, to the features of an earlier layer's SAE and to the prompt.

    python score.py ckptB/ --attribute 123 --prompt "a red cube" --from ckptA/

Copy it with `flux.py`, `sae.py`, `shard.py`, `session.py` and what these import. From Python:

    target, source = (session.subject(model, folder) for folder in ("ckptB", "ckptA"))
    found = attribution.attribute(model, target, 123, "a red cube", source)
    effects = attribution.ablate(found, found.features[:20])     # what really happens without each

B batch, N tokens, T text tokens, D model width, F features.
"""
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import flux
import sae
import shard
from data import beginning
from session import Mistake, streams


@dataclass(frozen=True, eq=False)
class Attribution:
    """Why a feature fires: gradient × value of what it was made from, in one forward pass at pure noise.

    The target is the sum of the feature's pre-activations over the tokens on which it fires, those held fixed. An
    earlier residual is split into what each active feature f of its SAE writes there, v_f W_dec[f], and an error that
    stays as it is; f's attribution is the target's gradient along W_dec[f], times v_f, summed over tokens. A text
    token's is the gradient by its T5 state times what sets that apart from the empty prompt's state in its place;
    likewise the pooled vector of CLIP.
    """
    target: float
    where: np.ndarray                                            # [N] bool: tokens on which the feature fires
    features: np.ndarray                                         # [n] earlier features that fire, by |attribution|
    values: np.ndarray                                           # [n]: of each, attribution
    tokens: np.ndarray                                           # [T]
    pooled: float
    run: "Forward"
    codes: dict                                                  # {name: (values, indices) [N, width]} of the source


def attribute(model, target, feature, prompt, source=None, *, seed=0, number=0, size=None, text_tokens=None):
    """The `Attribution` of `feature` of the `Subject` target, to features of an earlier one (or none) and to the
    prompt. Raises ValueError for a feature that does not fire."""
    grid = flux.token_grid(model, size or min(256, model.size))
    levels = np.array([1, 0], np.float32)
    start = beginning(model, [prompt], [number], levels, grid, seed, text_tokens)
    run = Forward(model, target, source, feature, start)
    found = run.residual(source) if source else {}
    shifts = {name: jnp.zeros(x.shape, jnp.float32) for name, x in found.items()}
    slopes, by_text, by_pooled = run.read(shifts, gradient=True)
    codes, total = {}, np.zeros(source.cfg.features if source else 0)
    for name, x in found.items():
        p = source.at(1.0)[name]
        values, indices = (np.asarray(a[0]) for a in sae.encode(p, source.cfg, x.astype(jnp.float32)))
        along = np.einsum("nd,nkd->nk", np.asarray(slopes[name][0]), np.asarray(p["W_dec"])[indices])
        np.add.at(total, indices, along * values)
        codes[name] = values, indices
    alive = np.unique(np.concatenate([i[v > 0] for v, i in codes.values()])) if codes else np.zeros(0, int)
    order = alive[np.argsort(-np.abs(total[alive]), kind="stable")]
    text, pooled = (x.astype(jnp.float32) for x in start.condition[:2])
    nothing = [x.astype(jnp.float32) for x in flux.encode_text(model, [""], text_tokens)]
    return Attribution(float(run.read({})[0]), run.where, order, total[order],
                       np.asarray(jnp.sum(by_text * (text - nothing[0]), -1)[0]),
                       float(jnp.sum(by_pooled * (pooled - nothing[1]))), run, codes)


def ablate(found, features, batch=16):
    """By how much the target falls if one of the earlier `features` is set to 0 at all tokens, [n]."""
    run, out = found.run, []
    for first in range(0, len(features), batch):
        some = np.resize(features[first:first + batch], batch)
        shifts = {}
        for name, (values, indices) in found.codes.items():
            v = np.stack([np.where(indices == f, values, 0).sum(-1) for f in some])
            shifts[name] = -jnp.asarray(v)[..., None] * run.source.at(1.0)[name]["W_dec"][some][:, None]
        out.append(found.target - np.asarray(run.read(shifts)))
    return np.concatenate([*out, np.zeros(0)])[:len(features)]


def ablate_tokens(found, model, batch=16):
    """By how much the target falls if the T5 state of one text token becomes the empty prompt's, [T]."""
    text = found.run.start.condition[0]
    nothing, T = flux.encode_text(model, [""], text.shape[1])[0][0], text.shape[1]
    out = []
    for first in range(0, T, batch):
        places = np.resize(np.arange(first, min(first + batch, T)), batch)
        changed = jnp.repeat(text, batch, 0).at[np.arange(batch), places].set(nothing[places].astype(text.dtype))
        out.append(found.target - np.asarray(found.run.read({}, changed)))
    return np.concatenate([part[:min(batch, T - i * batch)] for i, part in enumerate(out)])


def explain(model, target, feature, prompt, source, seed, shown=20):
    """Print the attribution of a feature, beside what ablating does."""
    found = attribute(model, target, feature, prompt, source, seed=seed, size=target.size,
                      text_tokens=target.text_tokens)
    print(f"feature {feature} of layer {target.layer}: fires on {found.where.sum()} tokens, sum {found.target:.4f}")
    if source:
        effects = ablate(found, found.features[:shown])
        print(f"{f'feature of layer {source.layer}':24}{'attribution':>14}{'if ablated':>14}")
        for f, value, effect in zip(found.features, found.values, effects):
            print(f"{f:<24}{value:>14.4f}{effect:>14.4f}")
    effects = ablate_tokens(found, model)
    print(f"{'token':24}{'attribution':>14}{'if emptied':>14}")
    (words,) = model.words([prompt], len(effects))
    for word, value, effect in zip(words, found.tokens, effects):
        print(f"{word:24}{value:>14.4f}{effect:>14.4f}")
    rest = len(words)
    print(f"{'padding':24}{found.tokens[rest:].sum():>14.4f}{effects[rest:].sum():>14.4f}")
    print(f"{'CLIP (pooled)':24}{found.pooled:>14.4f}")


class Forward:
    """A prompt's pass from the residual that `source` (or nothing: None) reads to a feature of `target`."""

    def __init__(self, model, target, source, feature, start, where=None):
        target.check_feature(feature)
        if source:
            check_order(source, target)
        self.model, self.target, self.source, self.start, self.feature = model, target, source, start, feature
        self.walk = traceable(model)
        saes, tokens = target.at(1.0), self.residual(target)
        self.w = jnp.concatenate([jnp.tile(saes[name]["W_enc"][:, feature], (x.shape[1], 1))
                                  for name, x in tokens.items()])
        self.b = jnp.concatenate([jnp.full(x.shape[1], saes[name]["b_enc"][feature]) for name, x in tokens.items()])
        self.where = self.fires(tokens)[0] > 0
        if not self.where.any():
            raise Mistake(f"feature {feature} does not fire for this prompt and noise: nothing to explain")

    def residual(self, subject):
        """{name: [1, tokens, D]} of the unchanged pass."""
        text, pooled, level, guidance = flux.at(self.start, 0)
        x = flux.residual(self.model.params, self.model.cfg, self.start.latents, text, pooled, level, guidance,
                          grid=self.start.grid, layer=subject.layer, site=subject.site, walk=self.model.walk)
        return {name: part for _, name, part in streams(subject, x[None], self.start)}

    def fires(self, tokens):
        """The feature's values [B, N], from {name: residual}."""
        out = []
        for name, x in tokens.items():
            values, indices = sae.encode(self.target.at(1.0)[name], self.target.cfg, x.astype(jnp.float32))
            out.append(np.asarray(jnp.sum(jnp.where(indices == self.feature, values, 0), -1)))
        return np.concatenate(out, 1)

    def read(self, shifts, text=None, pooled=None, gradient=False):
        """The target [B] after `shifts` {name: [B, N, D]} of the source, or other conditions; or its gradients."""
        t, p, level, guidance = flux.at(self.start, 0)
        t, p = t if text is None else text, p if pooled is None else pooled
        B = max(len(t), *(len(x) for x in shifts.values())) if shifts else len(t)
        full = lambda x: x if x is None or len(x) == B else jnp.repeat(x, B, 0)
        source = (self.source.layer, self.source.names) if shifts else None
        args = (self.model.params, self.model.cfg, full(self.start.latents), shifts, full(t), full(p), full(level),
                full(guidance), self.w, self.b, jnp.asarray(self.where, jnp.float32))
        return (_gradient if gradient else _read)(*args, grid=self.start.grid, source=source, walk=self.walk,
                                                  target=(self.target.layer, self.target.site))


def check_order(source, target):
    """Raise Mistake unless the source is of an earlier layer."""
    if source.layer >= target.layer:
        raise Mistake(f"{source.name} is an SAE of layer {source.layer}: attribution needs one before layer "
                      f"{target.layer}, that of {target.name}")


def traceable(model):
    """A walk over the blocks that can be traced and differentiated: one scan. Of several chips the model's own calls
    a program for each block, and would be unrolled."""
    mesh = shard.mesh_of(model.params)
    return shard.scan(mesh) if mesh else None


def shift(name, value, each, shared):
    """`flux.Edit`'s function that adds each[name] [B, N, D]."""
    return value + each[name].astype(value.dtype)


@partial(jax.jit, static_argnames=("cfg", "grid", "source", "target", "walk"))
def _read(params, cfg, latents, shifts, text, pooled, level, guidance, w, b, where, *, grid, source, target, walk):
    changed = (flux.Edit(*source, shift, each=shifts),) if source else ()
    x = flux.residual(params, cfg, latents, text, pooled, level, guidance, grid=grid, layer=target[0], site=target[1],
                      walk=walk, edits=changed)
    at = jnp.einsum("bnd,nd->bn", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST) + b
    return jnp.sum(jnp.where(where > 0, at, 0), 1)


@partial(jax.jit, static_argnames=("cfg", "grid", "source", "target", "walk"))
def _gradient(params, cfg, latents, shifts, text, pooled, *args, **options):
    """Gradients of the target, summed over the batch, by shifts, text and pooled."""
    def total(shifts, text, pooled):
        return jnp.sum(_read(params, cfg, latents, shifts, text, pooled, *args, **options))
    return jax.grad(total, argnums=(0, 1, 2))(shifts, text, pooled)
