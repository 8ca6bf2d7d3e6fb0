"""harvest: a test per transformation, then nested at random; values and gradients against un-reaped functions."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pathlib
import random
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

import harvest
from harvest import reap, sow

L, B, D = 5, 3, 7
W = jax.random.normal(jax.random.key(0), (L, D, D)) / 2
X = jax.random.normal(jax.random.key(1), (B, D))


def mark(x, name):
    """What replaces `sow` in the functions below to have them without."""
    return x


def stack(sow, wrap=lambda f: f, **options):
    """A stack of L layers, [L, D, D] and [B, D] -> [B, D], that sows each layer's output as 'h'."""
    def layer(h, w):
        return sow(h + jnp.tanh(h @ w), "h"), h.sum()
    return lambda w, x: lax.scan(wrap(layer), x, w, **options)[0]


def layers(w=W, x=X):
    """What `stack` sows, by a Python loop: [L, B, D]."""
    hs = [x]
    for i in range(len(w)):
        hs.append(hs[-1] + jnp.tanh(hs[-1] @ w[i]))
    return jnp.stack(hs[1:])


def loss(f):
    return lambda *args: (f(*args) ** 2).sum()


def same(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert jnp.shape(a) == jnp.shape(b), (jnp.shape(a), jnp.shape(b))
        np.testing.assert_allclose(a, b, **{"rtol": 2e-5, "atol": 2e-5, **tolerance})


# the interface

def test_sow_is_an_identity_on_pytrees():
    value = {"a": jnp.arange(3), "b": (2.5, None)}
    same(sow(value, name="v"), value)
    out, caught = reap(lambda x: sow({"a": x, "b": (2.5, None)}, "v")["a"] * 2)(X)
    same((out, caught), (X * 2, {"v": {"a": X, "b": (2.5, None)}}))


def test_names():
    f = lambda x: sow(sow(x, "a") + 1, "b") * 2
    for names, want in [(None, "ab"), ("a", "a"), (["b", "a"], "ba"), ({"b"}, "b"), ((), ""), ({"a": None}, "a")]:
        out, caught = reap(f, names)(X)
        same(out, (X + 1) * 2)
        same(caught, {n: {"a": X, "b": X + 1}[n] for n in want})
        assert list(caught) == list(want)
    assert reap(lambda x: x)(X)[1] == {}


def test_arguments_and_results_that_are_not_arrays():
    def f(params, n, *, mode, key):
        assert isinstance(n, int) and mode == "twice"
        return {"y": sow(params["w"] * n, "y") + jax.random.normal(key), "n": n, "none": None, "one": 1.0}
    out, caught = reap(f)({"w": X, "unused": "text"}, 2, mode="twice", key=jax.random.key(3))
    same(out, {"y": X * 2 + jax.random.normal(jax.random.key(3)), "n": 2, "none": None, "one": 1.0})
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((out, caught)))
    same(caught, {"y": X * 2})
    assert reap(lambda: sow(jnp.ones(2), "one"))()[1]["one"].shape == (2,)       # no arguments
    same(jax.jit(lambda w: reap(lambda x: sow(x @ w, "y"))(X))(W[0]), (X @ W[0], {"y": X @ W[0]}))     # closed over


def test_keeps_dtypes_and_keys():
    f = lambda x: sow({"half": x.astype("bfloat16"), "int": jnp.int8(3), "bool": x > 0, "key": jax.random.key(0)}, "v")
    for caught in reap(f)(X)[1]["v"], reap(lambda x: lax.cond(x.sum() > 1e9, f, f, x))(X)[1]["v"]:
        assert [caught[k].dtype for k in ("half", "int", "bool")] == [jnp.bfloat16, jnp.int8, bool]
        assert caught["key"] == jax.random.key(0)


def test_nested_reaps():
    def f(x):
        y, caught = reap(lambda x: sow(sow(x * 2, "a") + 1, "b"), "a")(x)
        return y + caught["a"]
    same(reap(f)(X), (X * 4 + 1, {"b": X * 2 + 1}))


# errors

@pytest.mark.parametrize("name", ["", None, 3, b"h"])
def test_sow_rejects_names(name):
    with pytest.raises(ValueError, match="non-empty string"):
        sow(X, name)


@pytest.mark.parametrize("names, error, match", [
    ("q", ValueError, r"\['q'\]: never sown; sown are: \['h'\]"),
    (["h", "q"], ValueError, "'q'"),
    ({"q": 1}, ValueError, "'q'"),
    ({"h": L}, IndexError, f"length {L} has no iteration .{L}."),
    ({"h": [0, -L - 1]}, IndexError, str(-L - 1)),
    ({"h": [1, 1 - L]}, ValueError, "twice"),
    ({"h": []}, ValueError, "no iteration"),
    ({"h": 1.5}, TypeError, "integer"),
])
def test_names_that_cannot_be_had(names, error, match):
    with pytest.raises(error, match=match):
        reap(stack(sow), names)(W, X)


def test_iterations_outside_a_scan():
    with pytest.raises(ValueError, match="not sown inside a scan"):
        reap(lambda x: sow(x, "h"), {"h": 0})(X)


@pytest.mark.parametrize("f", [
    lambda x: sow(sow(x, "h"), "h"),
    lambda x: jax.jit(lambda x: sow(x, "h"))(sow(x, "h")),
    lambda x: stack(sow)(W, sow(x, "h")),
    lambda x: stack(sow)(W, stack(sow)(W, x)),
])
def test_a_name_sown_twice(f):
    with pytest.raises(ValueError, match=r"\['h'\]: sown more than once"):
        reap(f)(X)
    reap(lambda x: sow(f(x), "other"), "other")(X)      # of no concern where it is not asked for


@jax.custom_batching.custom_vmap
def own_vmap(x):
    return sow(x, "s")


@own_vmap.def_vmap
def _own_vmap_rule(size, batched, x):
    return sow(x, "s"), True


@jax.custom_vjp
def noisy(x):
    jax.debug.callback(lambda: None)
    return sow(x, "s")


noisy.defvjp(lambda x: (x, None), lambda _, g: (g,))


def copy_kernel(x_ref, o_ref):
    o_ref[...] = sow(x_ref[...], "s")


UNHANDLED = {
    "pallas_call": lambda x: pl.pallas_call(copy_kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x),
    "custom_linear_solve": lambda x: lax.custom_linear_solve(
        lambda y: sow(2 * y, "s"), x, lambda _, b: b / 2, symmetric=True),
    "composite": lambda x: lax.composite(lambda x: sow(x, "s"), "a.b")(x),
    "custom_vmap_call": own_vmap,
    "reduce": lambda x: lax.reduce(x, np.float32(0), lambda a, b: sow(a * b + jnp.sin(a), "s"), (0,)),
    "platform_dependent": lambda x: lax.platform_dependent(x, cpu=lambda x: sow(x, "s"), default=lambda x: x),
    "the condition of a `while`": lambda x: lax.while_loop(lambda x: sow(x.sum(), "s") < 9, lambda x: x + 1, x),
    "condition is mapped by vmap": jax.vmap(
        lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: sow(x + 1, "s"), x)),
    "custom_vjp_call` with side effects": noisy,
}


@pytest.mark.parametrize("where", UNHANDLED)
def test_unhandled_raises_at_any_depth(where):
    f = UNHANDLED[where]
    nested = lambda x: lax.scan(lambda c, _: (jax.jit(jax.checkpoint(f))(x).sum(), None), 0.0, length=2)[0]
    for g in (f, jax.jit(f), nested):
        for names in (None, "s", ["s"]):
            with pytest.raises(NotImplementedError, match=re.escape(where)) as error:
                reap(g, names)(X)
            assert "'s'" in str(error.value)
        if "with side effects" not in where:
            same(reap(lambda x, g=g: (g(x), sow(x, "other"))[1], "other")(X), (X, {"other": X}))      # not asked for


def test_a_sow_that_jax_drops_raises():
    def f(x):
        def body(c, _):
            sow(c * 2, "lost")
            return jnp.sin(c), None
        return lax.scan(body, x, length=3)[0]
    assert reap(f)(1.0)[1]["lost"].shape == (3,)
    for names in (None, "lost"):
        with pytest.raises(ValueError, match=r"\['lost'\]: dropped by JAX"):
            reap(jax.grad(f), names)(1.0)

    @jax.jit
    def unused(x):
        sow(x * 2, "lost")
        return jnp.sin(x)
    with pytest.raises(ValueError, match=r"\['lost'\]: dropped by JAX"):
        reap(jax.grad(unused))(1.0)
    same(reap(unused)(1.0)[1], {"lost": 2.0})


def test_backward_pass_alone_raises():
    f = jax.checkpoint(lambda x: sow(jnp.sin(x), "s") ** 2)
    pullback = jax.vjp(f, 1.0)[1]
    with pytest.raises(ValueError, match="only recomputed"):
        reap(lambda g: pullback(g))(1.0)


# one transformation at a time

@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.named_call(f, name="n"),
                                  lambda f: jax.jit(f, inline=True), lambda f: jax.jit(jax.jit(f), keep_unused=True)])
def test_calls(wrap):
    f = wrap(lambda x, w: sow(jnp.tanh(x @ w), "h") * 2)
    h = jnp.tanh(X @ W[0])
    for run in (lambda f: f, jax.jit):
        same(run(reap(f))(X, W[0]), (h * 2, {"h": h}))


def test_jit_keeps_donation_and_static_arguments():
    f = jax.jit(lambda x, n: sow(x * n, "h") + 1, static_argnums=1, donate_argnums=0)
    x = X + 0
    same(reap(f)(x, 3), (X * 3 + 1, {"h": X * 3}))
    assert x.is_deleted()
    text = str(jax.make_jaxpr(reap(jax.jit(lambda x: sow(x, "h") + 1, donate_argnums=0, keep_unused=True)))(X))
    assert "donated_invars=(True,)" in text and "keep_unused=True" in text


def test_checkpoint_keeps_policy_and_prevent_cse():
    policy = jax.checkpoint_policies.dots_saveable
    f = jax.checkpoint(lambda x: sow(jnp.sin(x @ W[0]), "h") ** 2, policy=policy, prevent_cse=False)
    equation, = (e for e in jax.make_jaxpr(reap(f))(X).eqns if "prevent_cse" in e.params)
    assert equation.params["policy"] is policy and equation.params["prevent_cse"] is False


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}, {"unroll": True, "reverse": True}])
@pytest.mark.parametrize("pick", [None, -2, [4, -5, 1], np.int64(3), range(1, 3)])
def test_scan(options, pick):
    f = stack(sow, **options)
    want = layers()
    if options.get("reverse"):
        want = layers(W[::-1])[::-1]
    out, caught = jax.jit(reap(f, {"h": pick}))(W, X)
    same(out, stack(mark, **options)(W, X))
    same(caught["h"], want if pick is None else want[np.asarray(pick)])


def test_scan_of_length_zero():
    same(reap(stack(sow))(W[:0], X), (X, {"h": jnp.zeros((0, B, D))}))
    with pytest.raises(IndexError, match="length 0"):
        reap(stack(sow), {"h": 0})(W[:0], X)


def test_nested_scans_pick_in_the_innermost():
    def f(x):
        return lax.scan(lambda h, t: (sow(stack(sow)(W, h + t), "step"), None), x, jnp.arange(3.0))[0]
    h, hs = X, []
    for t in range(3):
        hs.append(layers(x=h + t))
        h = hs[-1][-1]
    hs = jnp.stack(hs)
    same(reap(f)(X)[1], {"h": hs, "step": hs[:, -1]})
    same(reap(f, {"h": [3, 1], "step": 2})(X)[1], {"h": hs[:, [3, 1]], "step": hs[2, -1]})
    same(reap(f, {"h": 3})(X)[1], {"h": hs[:, 3]})


def test_fori_and_map():
    fixed = lambda x: lax.fori_loop(0, 3, lambda i, c: sow(c + i, "c"), x)
    same(reap(jax.grad(fixed))(1.0)[1], {"c": jnp.array([1.0, 2.0, 4.0])})
    same(reap(lambda n, x: lax.fori_loop(0, n, lambda i, c: sow(c + i, "c"), x))(jnp.int32(3), 1.0)[1], {"c": 4.0})
    same(reap(lambda x: lax.map(lambda r: sow(r.sum(), "r"), x))(X)[1], {"r": X.sum(1)})


def test_while():
    f = lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, sow(c[1] * 2, "c")), (0, x))[1]
    for run in (lambda f: f, jax.jit):
        same(run(reap(f))(X), (X * 8, {"c": X * 8}))
    never = lambda x: lax.while_loop(lambda c: c.sum() > 1e9, lambda c: sow(c * 2, "c"), x)
    same(reap(never)(X), (X, {"c": jnp.zeros_like(X)}))


def test_cond_and_switch():
    f = lambda p, x: lax.cond(p, lambda x: sow(sow(x * 2, "both") + 1, "yes"), lambda x: sow(x * 3, "both"), x)
    zero = jnp.zeros_like(X)
    for run in (lambda f: f, jax.jit):
        same(run(reap(f))(True, X), (X * 2 + 1, {"both": X * 2, "yes": X * 2 + 1}))
        same(run(reap(f))(jnp.bool_(False), X), (X * 3, {"both": X * 3, "yes": zero}))
    g = lambda i, x: lax.switch(i, [lambda x: x, lambda x: sow(x + 1, "a"), lambda x: sow(x + 2, "b")], x)
    for i, want in enumerate([(zero, zero), (X + 1, zero), (zero, X + 2)]):
        same(jax.jit(reap(g))(i, X)[1], dict(zip("ab", want)))


@pytest.mark.parametrize("other", [lambda x: sow(x[0], "s"), lambda x: sow(x.astype(jnp.bfloat16), "s"),
                                   lambda x: sow((x,), "s")])
def test_branches_that_disagree(other):
    f = lambda x: lax.cond(x.sum() > 0, lambda x: sow(x, "s").sum(), lambda x: (other(x), x.sum())[1], x)
    with pytest.raises(ValueError, match="'s': the branches of a cond"):
        reap(f)(X)


def test_vmap():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    f = lambda x: sow({"row": jnp.sin(x), "sum": x.sum()}, "v")["row"]
    want = {"v": {"row": jnp.sin(x), "sum": x.sum(-1)}}
    two = jax.vmap(jax.vmap(f))
    same(reap(two)(x), (jnp.sin(x), want))
    same(jax.vmap(jax.vmap(reap(f)))(x), (jnp.sin(x), want))
    same(jax.vmap(reap(jax.vmap(f)))(x), (jnp.sin(x), want))
    # other axes: the outermost vmap's comes first
    odd = jax.vmap(jax.vmap(f, in_axes=1, out_axes=1), in_axes=1, out_axes=1)      # outer maps axis 1, inner axis 2
    same(reap(odd)(x)[1]["v"], {"row": jnp.sin(x).transpose(1, 2, 0), "sum": x.sum(0)})
    same(reap(odd)(x)[0], odd(x))
    # what does not depend on the mapped argument has no mapped axis, unless the reap is inside
    g = lambda w, x: sow(w, "w") * x
    assert reap(jax.vmap(g, (None, 0)))(2.0, x)[1]["w"].shape == ()
    assert jax.vmap(reap(g), (None, 0))(2.0, x)[1]["w"].shape == (2,)


def test_vmap_of_scan_and_scan_of_vmap():
    xs = jnp.stack([X, -X])
    want = jax.vmap(lambda x: layers(x=x), out_axes=1)(xs)      # [L, 2, B, D]
    f = jax.vmap(stack(sow), (None, 0))
    same(reap(f)(W, xs)[1]["h"], want)
    same(reap(f, {"h": [3, 0]})(W, xs)[1]["h"], want[jnp.array([3, 0])])
    same(jax.vmap(reap(stack(sow), {"h": 2}), (None, 0))(W, xs)[1]["h"], want[2])
    rows = lambda w, x: lax.scan(lambda h, w: (jax.vmap(lambda r: sow(r + jnp.tanh(r @ w), "h"))(h), None), x, w)[0]
    same(reap(rows)(W, X)[1]["h"], layers())


def test_vmap_lanes_that_loop_and_branch_differently():
    x = jnp.arange(1.0, 5.0)
    loop = lambda x: lax.while_loop(lambda c: c < 7, lambda c: sow(c * 2, "c"), x)
    same(jax.vmap(reap(loop))(x), (jnp.array([8.0, 8, 12, 8]), {"c": jnp.array([8.0, 8, 12, 8])}))
    branch = lambda x: lax.cond(x > 2, lambda x: sow(x * 2, "c"), lambda x: x, x)
    same(jax.vmap(reap(branch))(x)[1], {"c": jnp.array([0.0, 0, 6, 8])})
    same(reap(jax.vmap(branch))(x)[1], {"c": x * 2})     # as documented: a select, both branches ran


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(jax.jit(f)))])
def test_grad(wrap):
    f = loss(stack(sow, wrap))
    plain = jax.value_and_grad(loss(stack(mark)), (0, 1))(W, X)
    same(reap(jax.value_and_grad(f, (0, 1)))(W, X), (plain, {"h": layers()}), rtol=1e-3)
    for pick, want in [(None, layers()), (2, layers()[2])]:
        (out, caught), grads = jax.jit(jax.value_and_grad(reap(f, {"h": pick}), (0, 1), has_aux=True))(W, X)
        same(((out, grads), caught), (plain, {"h": want}), rtol=1e-3)
    through = jax.grad(lambda w: (reap(f, {"h": [3, 1]})(w, X)[1]["h"] ** 3).sum())(W)      # what was caught
    same(through, jax.grad(lambda w: (layers(w)[jnp.array([3, 1])] ** 3).sum())(W), rtol=1e-3)


def test_recomputed_values_are_caught_once():
    def f(x):       # its backward pass needs, and so recomputes, what is sown
        return lax.scan(jax.checkpoint(lambda c, _: (sow(jnp.sin(c), "s") ** 2, None)), x, length=2)[0]
    first = jnp.sin(0.3)
    want = {"s": jnp.stack([first, jnp.sin(first ** 2)])}
    jaxpr = jax.make_jaxpr(jax.grad(f))(0.3)
    assert str(jaxpr).count("sow[") == 2, jaxpr
    same(reap(jax.grad(f))(0.3), (jax.grad(f)(0.3), want))
    same(reap(jax.grad(f), {"s": 1})(0.3)[1], {"s": want["s"][1]})


def test_jvp_linearize_and_hessian():
    f = lambda x: sow(jnp.sin(x), "s") ** 2
    same(reap(lambda x: jax.jvp(f, (x,), (1.0,)))(0.3)[1], {"s": jnp.sin(0.3)})
    same(reap(lambda x: jax.linearize(f, x)[1](1.0))(0.3), (jax.grad(f)(0.3), {"s": jnp.sin(0.3)}))
    same(reap(jax.hessian(f))(0.3), (2 * jnp.cos(0.6), {"s": jnp.sin(0.3)}))
    same(jax.linear_transpose(lambda x: sow(3 * x, "s"), 1.0)(2.0), (6.0,))
    twice = jax.grad(jax.grad(jax.checkpoint(f)))
    with pytest.raises(ValueError, match="more than once"):      # the recomputation is inlined
        reap(twice)(0.3)
    same(jax.grad(jax.grad(lambda x: reap(jax.checkpoint(f))(x)[0]))(0.3), twice(0.3))


def rule_jvp(f):
    """`f` with a derivative of its own: 3 times the identity."""
    g = jax.custom_jvp(f)
    g.defjvp(lambda xs, ts: (f(*xs), 3 * ts[0]))
    return g


def rule_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (f(x), None), lambda _, ct: (3 * ct,))
    return g


@pytest.mark.parametrize("rule", [rule_jvp, rule_vjp, lambda f: rule_vjp(rule_jvp(f)), lambda f: rule_vjp(jax.jit(f))])
def test_custom_derivatives(rule):
    f = rule(lambda x: sow(jnp.sin(x), "s") * 2)
    want = jnp.sin(X) * 2, {"s": jnp.sin(X)}
    same(jax.jit(reap(f))(X), want)
    threes = jnp.full_like(X, 3)
    same(reap(jax.grad(lambda x: f(x).sum()))(X), (threes, want[1]))
    out, pullback, caught = jax.vjp(reap(f), X, has_aux=True)
    same((out, *pullback(jnp.ones_like(X)), caught), (want[0], threes, want[1]))
    same(jax.grad(lambda x: reap(f)(x)[1]["s"].sum())(X), jnp.cos(X))       # what was caught has no rule of its own
    scanned = lambda x: lax.scan(lambda c, _: (f(c), None), x, length=2)[0]
    same(reap(jax.grad(lambda x: scanned(x).sum()), {"s": 1})(X), (threes * 3, {"s": jnp.sin(jnp.sin(X) * 2)}))
    same(jax.grad(lambda x: reap(scanned)(x)[0].sum())(X), threes * 3)


def test_rules_and_kernels_without_a_sow_survive():
    triple = rule_jvp(jnp.sin)
    double = pl.pallas_call(lambda x, o: o.__setitem__(..., x[...] * 2), jax.ShapeDtypeStruct(X.shape, X.dtype),
                            interpret=True)
    f = lambda x: triple(sow(x, "x")).sum()
    same(jax.grad(reap(f), has_aux=True)(X), (jnp.full_like(X, 3), {"x": X}))
    same(reap(lambda x: sow(double(x), "y"))(X), (X * 2, {"y": X * 2}))


def test_side_effects_happen_once(capfd):
    def f(x):
        jax.debug.print("seen {}", x)
        return lax.scan(lambda c, _: (jax.debug.print("step"), sow(c + 1, "c"))[1:] * 2, x, length=2)[0]
    jax.block_until_ready(jax.jit(reap(f))(1.0))
    jax.effects_barrier()
    text = capfd.readouterr().out
    assert text.count("seen 1.0") == 1 and text.count("step") == 2


# what it costs

def hlo(f, *args):
    text = jax.jit(f).lower(*args).compile().as_text()
    text = text[re.search(r"^(%|ENTRY)", text, re.MULTILINE).start():]      # behind the tables of source lines
    text = re.sub(r", metadata=\{[^}]*\}|, origin=\{[^}]*\}", "", text)
    names = {}      # instruction numbers depend on what was dropped on the way: number them by appearance
    return re.sub(r"%[\w.-]+|\b[\w-]+\.\d+\b", lambda m: names.setdefault(m[0].lstrip("%"), f"v{len(names)}"), text)


@pytest.mark.parametrize("make", [
    lambda sow: lambda w, x: sow(jnp.sin(sow(x @ w[0], "a")), "b") + 1,
    lambda sow: stack(sow),
    lambda sow: jax.grad(loss(stack(sow))),
    lambda sow: jax.grad(loss(stack(sow, jax.checkpoint))),
    lambda sow: lambda w, x: jax.vmap(stack(sow), (None, 1), 1)(w, jnp.stack([x, x], 1)),
    lambda sow: lambda w, x: jax.vmap(lambda c: sow(jnp.tanh(c), "c") * 2, 1, 1)(x),
    lambda sow: lambda w, x: lax.while_loop(lambda c: c.sum() < 9, lambda c: sow(c + 1, "c"), x),
    lambda sow: jax.grad(lambda w, x: lax.cond(x.sum() > 0, lambda: sow(x @ w[0], "c").sum(), lambda: w.sum())),
])
def test_costs_nothing_outside_reap(make):
    with_sow, without = hlo(make(sow), W, X), hlo(make(mark), W, X)
    assert with_sow == without
    assert "sow" not in with_sow
    assert hlo(lambda w, x: make(mark)(w, x * 2), W, X) != without      # the comparison can fail


def test_one_layer_of_57_costs_the_memory_of_one():
    w, x = jnp.ones((57, 32, 32)), jnp.ones((256, 32))
    one = x.nbytes

    def cost(f):
        memory = jax.jit(f).lower(w, x).compile().memory_analysis()
        return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / one

    plain = cost(stack(mark))
    assert cost(reap(stack(sow))) > plain + 56
    assert cost(reap(stack(sow), {"h": 10})) < plain + 1.1
    assert cost(reap(stack(sow), {"h": [50, 10]})) < plain + 2.1
    assert cost(reap(stack(sow, jax.checkpoint), {"h": 10})) < plain + 1.1


def test_no_retracing_under_an_outer_jit():
    traces = []
    f = jax.jit(reap(lambda x: (traces.append(1), sow(x + 1, "h"))[1]))
    f(X), f(X + 1), f(X * 2)
    assert len(traces) == 1


def test_alone_and_without_touching_a_device(tmp_path):
    (tmp_path / "harvest.py").write_text(pathlib.Path(harvest.__file__).read_text())
    code = "import harvest, jax; from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})


# several devices, in a process of their own

def shard_map_checks():
    assert len(jax.devices()) == 4
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
        place = lambda value, *spec, mesh=mesh: jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))
        w, x = place(W), place(jnp.arange(28.0).reshape(4, 7) / 28, "x")
        check_shard_map(mesh, w, x, check_vma=kind == jax.sharding.AxisType.Auto)
        check_nested_shard_map(mesh, place(jnp.arange(16.0).reshape(4, 4), "x", "y"))
        check_global_sharding(mesh, w, x)
    print("shard_map checks passed")


def check_shard_map(mesh, w, x, check_vma):
    """Values [4 devices, ...], gradients on both sides of reap, and reap inside of shard_map."""
    host = np.asarray(x)

    def local(w, x):
        h = stack(sow)(w, x)
        n = lax.while_loop(lambda c: lax.psum(c.sum(), "x") < 1e3, lambda c: sow(c * 2, "n"), jnp.exp(h))
        c = lax.cond(lax.axis_index("x") > 0, lambda h: sow(h + 1, "c"), lambda h: h, h)
        return sow(lax.psum(h, "x"), "sum") + 0 * (n + c)
    f = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("x")), out_specs=PartitionSpec("x"),
                      check_vma=check_vma)
    out, caught = jax.jit(reap(f))(w, x)
    same(out, f(w, x))
    halves = [layers(W, host[i:i + 2]) for i in (0, 2)]
    blocks = jnp.stack([halves[0], halves[0], halves[1], halves[1]])        # device (i, j) holds half i
    same(caught["h"], blocks)
    same(caught["sum"], jnp.stack([halves[0][-1] + halves[1][-1]] * 4))
    same(caught["c"], jnp.where(jnp.arange(4)[:, None, None] >= 2, blocks[:, -1] + 1, 0))
    assert caught["n"].shape == (4, 2, 7) and caught["h"].sharding.spec[0] == ("x", "y")
    same(jax.jit(reap(f, {"h": [3, 1]}))(w, x)[1], {"h": blocks[:, [3, 1]]})
    same(reap(f, {"h": 2})(w, x)[1], {"h": blocks[:, 2]})
    total = jax.shard_map(lambda w, x: lax.psum(loss(stack(sow))(w, x), "x"), mesh=mesh, out_specs=PartitionSpec(),
                          in_specs=(PartitionSpec(), PartitionSpec("x")), check_vma=check_vma)
    want = jax.grad(loss(stack(mark)))(W, host)
    same(jax.jit(reap(jax.grad(total)))(w, x), (want, {"h": blocks}), rtol=1e-3)
    same(jax.jit(jax.grad(reap(total, {"h": 1}), has_aux=True))(w, x), (want, {"h": blocks[:, 1]}), rtol=1e-3)
    inside = jax.shard_map(reap(stack(sow), {"h": [3, 1]}), mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("x")),
                           out_specs=(PartitionSpec("x"), PartitionSpec(None, "x")), check_vma=check_vma)
    same(jax.jit(inside)(w, x)[1], {"h": layers(W, host)[jnp.array([3, 1])]})


def check_nested_shard_map(mesh, x):
    spec = PartitionSpec
    inner = jax.shard_map(lambda x: sow(x * 2, "s"), in_specs=spec(None, "y"), out_specs=spec(None, "y"),
                          axis_names={"y"})
    outer = jax.shard_map(lambda x: inner(x), mesh=mesh, in_specs=spec("x"), out_specs=spec("x"), axis_names={"x"})
    got = jax.jit(reap(outer))(x)
    blocks = np.asarray(x * 2).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3)    # [x, y, rows, columns]
    same(got, (np.asarray(x * 2), {"s": blocks}))


def check_global_sharding(mesh, w, x):
    """Under plain jit a caught value keeps its sharding, and jit's own out_shardings are kept."""
    for pick in (None, 2, [3, 1]):
        out, caught = jax.jit(reap(stack(sow), {"h": pick}))(w, x)
        want = layers(W, np.asarray(x))
        same(caught["h"], want if pick is None else want[jnp.array(pick)])
        assert caught["h"].sharding.spec[caught["h"].ndim - 2] == "x" and out.sharding.spec[0] == "x"
    f = jax.jit(lambda x: sow(x, "s") + 1, out_shardings=NamedSharding(mesh, PartitionSpec("y")))
    out, caught = reap(f)(x)
    assert out.sharding.spec[0] == "y" and caught["s"].sharding.spec[0] == "x"


def test_shard_map_on_four_devices():
    code = "import test_harvest; test_harvest.shard_map_checks()"
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu",
           "PYTHONPATH": os.pathsep.join(os.path.dirname(os.path.abspath(f)) for f in (harvest.__file__, __file__))}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "shard_map checks passed" in run.stdout, run.stderr[-3000:]


# nested at random: each wrapper changes a pair of functions, one that sows and one in plain Python that returns
# `(y, {name: (value, number of scan axes)})`

def base(_):
    def plain(t, x):
        v = jnp.sin(x) * t
        return v + x, {"v0": (v, 0)}
    return (lambda t, x: sow(jnp.sin(x) * t, "v0") + x), plain


def wrap_call(rng, f, plain):
    return rng.choice([jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])(f), plain


def wrap_scan(rng, f, plain):
    n, reverse = rng.choice([1, 2, 3]), rng.random() < 0.5

    def run(t, x):
        y, tail = lax.scan(lambda c, s: (f(t, c + s), c.sum()), x, jnp.arange(n) / 2, reverse=reverse)
        return y + tail.sum() / 9

    def loop(t, x):
        tail, steps = 0, [None] * n
        for i in reversed(range(n)) if reverse else range(n):
            tail += x.sum() / 9
            x, steps[i] = plain(t, x + i / 2)
        return x + tail, {k: (jnp.stack([s[k][0] for s in steps]), steps[0][k][1] + 1) for k in steps[0]}

    return run, loop


def wrap_while(rng, f, plain):
    n = rng.choice([0, 1, 2])

    def run(t, x):
        return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, f(t, c[1])), (0, x))[1]

    def loop(t, x):
        caught = {k: (jnp.zeros_like(v), axes) for k, (v, axes) in plain(t, x)[1].items()}
        for _ in range(n):
            x, caught = plain(t, x)
        return x, caught

    return run, loop


def wrap_cond(rng, f, plain):
    taken = rng.random() < 0.7

    def run(t, x):
        return lax.cond((t > 0) == taken, lambda x: f(t, x), lambda x: x * 2, x)

    def branch(t, x):
        y, caught = plain(t, x)
        return (y, caught) if taken else (x * 2, {k: (jnp.zeros_like(v), axes) for k, (v, axes) in caught.items()})

    return run, branch


def wrap_vmap(rng, f, plain):
    def run(t, x):
        return jax.vmap(f, (None, 1))(t, jnp.stack([x, 2 * x], 1)).sum(0)

    def lanes(t, x):
        (a, caught), (b, more) = plain(t, x), plain(t, 2 * x)
        return a + b, {k: (jnp.stack([v, more[k][0]], axes), axes) for k, (v, axes) in caught.items()}

    return run, lanes


def wrap_rule(rng, f, plain):
    g = rng.choice([jax.custom_jvp, jax.custom_vjp])(f)
    if isinstance(g, jax.custom_jvp):
        g.defjvp(lambda xs, ts: (g(*xs), 3 * ts[1]))
    else:
        g.defvjp(lambda t, x: (g(t, x), None), lambda _, ct: (0.0, 3 * ct))

    def ruled(t, x):
        y, caught = plain(t, x)
        return lax.stop_gradient(y - 3 * x) + 3 * x, caught

    return (lambda t, x: g(t, x)), ruled


def wrap_grad(rng, f, plain):
    def run(t, x):
        return x - jax.grad(lambda x: f(t, x).sum())(x)

    def gradient(t, x):
        axes = {k: a for k, (_, a) in plain(t, x)[1].items()}

        def total(x):
            y, caught = plain(t, x)
            return y.sum(), {k: v for k, (v, _) in caught.items()}
        slope, caught = jax.grad(total, has_aux=True)(x)
        return x - slope, {k: (v, axes[k]) for k, v in caught.items()}

    return run, gradient


def also_sow(f, plain, name):
    """Sows the result of `f`, too."""
    def both(t, x):
        y, caught = plain(t, x)
        return y, {**caught, name: (y, 0)}
    return (lambda t, x: sow(f(t, x), name)), both


@pytest.mark.parametrize("seed", range(16))
def test_random_nesting(seed):
    rng = random.Random(seed)
    f, plain = base(rng)
    chosen = []
    for depth in range(1, rng.choice([2, 3, 3, 3]) + 1):
        wraps = [wrap_call, wrap_scan, wrap_while, wrap_cond, wrap_vmap, wrap_rule, wrap_grad]
        if wrap_grad in chosen or wrap_while in chosen:
            wraps.remove(wrap_grad)     # while loops have no reverse derivative; a checkpoint is reaped under one grad
        chosen.append(rng.choice(wraps))
        f, plain = also_sow(*chosen[-1](rng, f, plain), f"v{depth}")
    t, x = 0.7, jnp.array([0.3, -0.8, 1.1])
    want_y, want = plain(t, x)
    want = {k: v for k, (v, _) in want.items()}
    y, caught = (jax.jit(reap(f)) if seed % 2 else reap(f))(t, x)
    same(f(t, x), want_y)
    same((y, caught), (want_y, want))
    name = rng.choice(sorted(want))
    same(jax.jit(reap(f, name))(t, x), (want_y, {name: want[name]}))
    if wrap_while not in chosen:
        def total(out):
            return out[0].sum() + sum(jnp.sin(v).sum() for v in out[1].values())
        undo = lambda out: (out[0], {k: v for k, (v, _) in out[1].items()})
        got = jax.jit(jax.grad(lambda x: total(reap(f)(t, x))))(x)
        same(got, jax.grad(lambda x: total(undo(plain(t, x))))(x), rtol=1e-3, atol=1e-3)
