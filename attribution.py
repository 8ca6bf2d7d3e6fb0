"""Explain why a feature of an SAE fires: gradient × value, for features of an earlier layer's SAE and for the prompt.

    python score.py ckptB/ --attribute 123 --prompt "a red cube" --from ckptA/

Copy it with `flux.py`, `sae.py`, `shard.py`, `session.py` and what these import. From Python:

    target, source = (session.subject(model, folder) for folder in ("ckptB", "ckptA"))
    found = attribution.attribute(model, target, 123, "a red cube", source)
    effects = attribution.ablate(found, found.features[:20])     # the true effect of removing each

B batch, N tokens, T text tokens, D model width, F features.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import flux
import sae
import shard
from data import beginning
from session import Mistake, Subject, streams


@dataclass(frozen=True, eq=False)
class Attribution:
    """Why a feature fires: gradient × value of its causes, in one forward pass at pure noise.

    The target is the sum of the feature's pre-activations over the tokens on which it fires; these tokens stay fixed.
    An earlier residual is the sum of v_f W_dec[f] over the active features f of its SAE, and an error, which stays
    fixed. The attribution of f is v_f times the target's gradient along W_dec[f], summed over tokens. For a text token
    it is the gradient by its T5 state times the difference from the empty prompt's state at the same place. For the
    pooled vector of CLIP it is computed in the same way.
    """
    target: float
    where: np.ndarray                                            # [N] bool: tokens on which the feature fires
    features: np.ndarray                                         # [n] earlier features that fire, by |attribution|
    values: np.ndarray                                           # [n] their attributions
    tokens: np.ndarray                                           # [T] attributions of the text tokens
    pooled: float
    run: "Forward"
    codes: dict                                                  # {name: (values, indices) [N, width]} of the source


def attribute(model: flux.Model, target: Subject, feature: int, prompt: str, source: Subject | None = None, *,
              seed: int = 0, number: int = 0, size: int | tuple[int, int] | None = None,
              text_tokens: int | None = None) -> Attribution:
    """Return the `Attribution` of the target's `feature` to the prompt, and to the features of `source`, the SAE of an
    earlier layer. number: of the noise. Raise Mistake if the feature does not fire."""
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


def ablate(found: Attribution, features: Sequence[int], batch: int = 16) -> np.ndarray:
    """Return by how much the target falls [n] if each of the earlier `features` alone is set to 0 at all tokens."""
    run, out = found.run, []
    for first in range(0, len(features), batch):
        some = np.resize(features[first:first + batch], batch)
        shifts = {}
        for name, (values, indices) in found.codes.items():
            v = np.stack([np.where(indices == f, values, 0).sum(-1) for f in some])
            shifts[name] = -jnp.asarray(v)[..., None] * run.source.at(1.0)[name]["W_dec"][some][:, None]
        out.append(found.target - np.asarray(run.read(shifts)))
    return np.concatenate([*out, np.zeros(0)])[:len(features)]


def ablate_tokens(found: Attribution, model: flux.Model, batch: int = 16) -> np.ndarray:
    """Return by how much the target falls [T] if the T5 state of each text token alone becomes the empty prompt's."""
    text = found.run.start.condition[0]
    nothing, T = flux.encode_text(model, [""], text.shape[1])[0][0], text.shape[1]
    out = []
    for first in range(0, T, batch):
        places = np.resize(np.arange(first, min(first + batch, T)), batch)
        changed = jnp.repeat(text, batch, 0).at[np.arange(batch), places].set(nothing[places].astype(text.dtype))
        out.append(found.target - np.asarray(found.run.read({}, changed)))
    return np.concatenate([part[:min(batch, T - i * batch)] for i, part in enumerate(out)])


def explain(model: flux.Model, target: Subject, feature: int, prompt: str, source: Subject | None, seed: int,
            shown: int = 20) -> None:
    """Print a feature's attributions beside the true effects of ablation."""
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
    """Run a prompt's forward pass from the residual that `source` reads (None: no source) to a feature of `target`."""

    def __init__(self, model: flux.Model, target: Subject, source: Subject | None, feature: int, start: flux.Start):
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
            raise Mistake(f"feature {feature} does not fire for this prompt and noise; take another prompt or --seed")

    def residual(self, subject: Subject) -> dict[str, Array]:
        """Return the residual that the subject reads in the unchanged pass: {name: [1, tokens, D]}."""
        text, pooled, level, guidance = flux.at(self.start, 0)
        x = flux.residual(self.model.params, self.model.cfg, self.start.latents, text, pooled, level, guidance,
                          grid=self.start.grid, layer=subject.layer, site=subject.site, walk=self.model.walk)
        return {name: part for _, name, part in streams(subject, x[None], self.start)}

    def fires(self, tokens: dict[str, Array]) -> np.ndarray:
        """Return the feature's values [B, N] for the residuals {name: [B, tokens, D]}."""
        out = []
        for name, x in tokens.items():
            values, indices = sae.encode(self.target.at(1.0)[name], self.target.cfg, x.astype(jnp.float32))
            out.append(np.asarray(jnp.sum(jnp.where(indices == self.feature, values, 0), -1)))
        return np.concatenate(out, 1)

    def read(self, shifts: dict[str, Array], text: Array | None = None, gradient: bool = False
             ) -> Array | tuple[dict[str, Array], Array, Array]:
        """Return the target [B] with `shifts` {name: [B, N, D]} added to the source's residual, or with other text
        states. With `gradient`, return the gradients of its sum by shifts, text and pooled."""
        own, pooled, level, guidance = flux.at(self.start, 0)
        text = own if text is None else text
        B = max(len(text), *(len(x) for x in shifts.values())) if shifts else len(text)
        full = lambda x: x if x is None or len(x) == B else jnp.repeat(x, B, 0)
        source = (self.source.layer, self.source.names) if shifts else None
        args = (self.model.params, self.model.cfg, full(self.start.latents), shifts, full(text), full(pooled),
                full(level), full(guidance), self.w, self.b, jnp.asarray(self.where, jnp.float32))
        return (_gradient if gradient else _read)(*args, grid=self.start.grid, source=source, walk=self.walk,
                                                  target=(self.target.layer, self.target.site))


def check_order(source: Subject, target: Subject) -> None:
    """Raise Mistake if the source is not of an earlier layer."""
    if source.layer >= target.layer:
        raise Mistake(f"{source.name} is an SAE of layer {source.layer}: attribution needs one before layer "
                      f"{target.layer}, the layer of {target.name}")


def traceable(model: flux.Model) -> Callable | None:
    """Return a walk over the blocks that can be traced and differentiated: one scan. On several chips the model's own
    walk calls a program for each block, which tracing would unroll."""
    mesh = shard.mesh_of(model.params)
    return shard.scan(mesh) if mesh else None


def shift(name: str, value: Array, each: dict[str, Array], shared: None) -> Array:
    """Add each[name] [B, N, D]: the function of a `flux.Edit`."""
    return value + each[name].astype(value.dtype)


@partial(jax.jit, static_argnames=("cfg", "grid", "source", "target", "walk"))
def _read(params, cfg, latents, shifts, text, pooled, level, guidance, w, b, where, *, grid, source, target, walk):
    """Return the target [B]: the feature's pre-activations, summed over the tokens `where`."""
    changed = (flux.Edit(*source, shift, each=shifts),) if source else ()
    x = flux.residual(params, cfg, latents, text, pooled, level, guidance, grid=grid, layer=target[0], site=target[1],
                      walk=walk, edits=changed)
    at = jnp.einsum("bnd,nd->bn", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST) + b
    return jnp.sum(jnp.where(where > 0, at, 0), 1)


@partial(jax.jit, static_argnames=("cfg", "grid", "source", "target", "walk"))
def _gradient(params, cfg, latents, shifts, text, pooled, *args, **options):
    """Return the gradients of the target, summed over the batch, by shifts, text and pooled."""
    def total(shifts, text, pooled):
        return jnp.sum(_read(params, cfg, latents, shifts, text, pooled, *args, **options))
    return jax.grad(total, argnums=(0, 1, 2))(shifts, text, pooled)
