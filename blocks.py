"""Run a stack of transformer blocks, and cuDNN's attention in them where a GPU can: for `mmdit.py` and `text.py`.

This file works alone: copy it. It needs jax.

    x, values = blocks.scan(block, x, stack, range(4), *context)      # the default of every `walk` argument
    stack = blocks.apart(stack)                                       # for a GPU: each layer's weights by themselves
    out = lax.platform_dependent(q, k, v, **blocks.cudnn(q, k, v), default=attend)

Letters: B batch, T tokens, H heads, K head width, L layers.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def scan(block: Callable, x: Any, stack: dict, layers: range, *context) -> tuple[Any, dict[str, Array]]:
    """Run `layers` of the stacked blocks as one `lax.scan`, so that compile time does not grow with depth.

    block: (x, parameters of one layer, *context) → (x, {name: value}). x: a pytree of arrays [B, ...]. stack: nested
    dicts of parameters [L, ...], or of what `apart` makes of them: then one compiled block is called once per layer,
    unless JAX traces the whole. Return x and the values [len(layers), ...].
    """
    if not any(type(leaf) is tuple for leaf in _leaves(stack)):
        return _scan(block, x, stack, layers, context)
    if not layers or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((x, stack, context))):
        together = lambda parts: jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)
        return _scan(block, x, jax.tree.map(together, stack, is_leaf=_is_leaf), layers, context)
    found = []
    for i in layers:
        x, values = _one(block, x, jax.tree.map(lambda parts: parts[i], stack, is_leaf=_is_leaf), context)
        found.append(values)
    return x, jax.tree.map(lambda *values: jnp.stack(values), *found)


def apart(stack: dict) -> dict:
    """Return a stack of blocks with a tuple of L arrays in place of each array [L, ...], which is freed.

    A GPU then reads each weight where it is. In a scan XLA copies every layer's weights before it multiplies by them,
    since cuBLAS takes no part of an array: 1.36 GB for a double block of FLUX.1 in bfloat16."""
    def parts(leaf):
        layers = tuple(leaf[i] for i in range(jax.tree.leaves(leaf)[0].shape[0]))
        jax.tree.map(lambda array: array.delete(), leaf)
        return layers

    return jax.tree.map(parts, stack, is_leaf=_is_leaf)


def stacks_apart(params: dict) -> dict:
    """Return a model's parameters with all its stacks of blocks `apart`."""
    return params | {name: apart(params[name]) for name in ("double", "single", "block") if name in params}


def depth(stack: dict) -> int:
    """Return the number of layers of a stack."""
    leaf = _leaves(stack)[0]
    return len(leaf) if type(leaf) is tuple else jax.tree.leaves(leaf)[0].shape[0]


def _is_leaf(node):
    return not isinstance(node, dict)                            # an array, a quantized weight, or a tuple of them


def _leaves(stack):
    return jax.tree.leaves(stack, is_leaf=_is_leaf)


@partial(jax.jit, static_argnums=(0, 3))
def _scan(block, x, stack, layers, context):
    if layers == range(depth(stack)):
        return jax.lax.scan(lambda x, p: block(x, p, *context), x, stack)
    # A shorter walk indexes the whole stack: a slice of the stack would copy its weights.
    return jax.lax.scan(lambda x, i: block(x, jax.tree.map(lambda w: w[i], stack), *context), x,
                        jnp.arange(layers.start, layers.stop))


@partial(jax.jit, static_argnums=0)
def _one(block, x, p, context):
    return block(x, p, *context)


def cudnn(q: Array, k: Array, v: Array, bias: Array | None = None, scale: float | None = None) -> dict[str, Callable]:
    """Return {"cuda": attention by cuDNN} for `lax.platform_dependent`, or {} if it does not fit q, k, v [B, T, H, K].

    bias [H, T, T] is added to the scores. It is rounded to q's type, in which such parameters are. scale: of the
    scores; None is 1 / sqrt(K).
    """
    given = (q, k, v) if bias is None else (q, k, v, bias)

    def attend(q, k, v, *bias):
        bias = bias[0][None].astype(q.dtype) if bias else None
        return jax.nn.dot_product_attention(q, k, v, bias, scale=scale, implementation="cudnn")

    return {"cuda": attend} if _fits(attend, *given) else {}


def _fits(attend, q, *others):
    """Return whether cuDNN's attention fits: in half precision, T even, K small and a multiple of 8. JAX traces it on
    every platform, and raises if it does not fit or if there is no cuDNN."""
    try:
        jax.eval_shape(attend, q, *others)
    except (RuntimeError, NotImplementedError):
        return False
    new = [float(gpu.compute_capability) >= 8 for gpu in jax.local_devices() if gpu.platform == "gpu"]
    return q.shape[1] % 2 == 0 and all(new)                      # a GPU before Ampere would fail while it compiles
