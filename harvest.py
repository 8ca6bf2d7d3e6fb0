"""Name values inside a JAX function, and collect them from outside: `sow` marks, `reap` gathers.

Stands alone: copy this one file. It needs `jax` only, and importing it touches no device.

    def model(w, x):                                        # any JAX function, transformed as you like
        return jax.lax.scan(lambda h, w: (sow(jnp.tanh(h @ w), name="h"), None), x, w)[0]
    y, caught = jax.jit(reap(model))(w, x)                  # caught["h"]: [L, B, D], all L layers
    y, caught = jax.jit(reap(model, {"h": 10}))(w, x)       # caught["h"]: [B, D], costs the memory of one layer

`reap` traces the function to a jaxpr and runs that equation by equation. Equations without a wanted sow inside are
bound as they are, so kernels and derivative rules survive; the others are rebuilt with JAX's public functions:

    the sow is inside        what is caught
    jit, remat               the value. A checkpoint keeps its policy; its recomputation is not caught a second time
    scan (map, fori_loop     the values stacked on a new axis 0, each at its iteration's index (also if reverse=True);
      with fixed bounds)     nested scans stack outermost first
    while                    the last iteration's value; zeros if the body never ran. In the condition: raises
    cond, switch             the value in the branch taken; zeros if that one does not sow it. Shapes must agree
    vmap                     the value with the mapped axes in front (behind those of scans); none if it is not mapped
    grad, jvp, vjp           the forward value. Differentiating a reaped function (has_aux=True) works as well
    shard_map                the device's block, on a new axis 0 over all devices, sharded over the manual mesh axes
    custom_jvp, custom_vjp   the value, computed beside the call (XLA merges the two), which so keeps its own rule.
                             The derivative of the caught value itself is the ordinary one. Under grad it is the rule's
                             own forward function that runs, and so that has to sow
    anything else            raises NotImplementedError that names the primitive and the sow (pallas_call, ...)

Good to know:
- Put `jit` outside `reap`, and use what `sow` returns: JAX drops unused work when it differentiates a scan or jit. A
  name asked for and lost so always raises; with names=None one hidden in an already traced jit can go unnoticed.
- Under `grad` JAX moves a value that no iteration changes out of its scan: it is then caught once, not stacked.
- `reap(vmap(f))` sees what vmap made of `f`: a cond with a mapped predicate has become a select whose two branches ran
  for all; a while with a mapped condition raises. `vmap(reap(f))` catches what each lane did.
- A name sown twice raises, unless in two branches of one cond. Differentiating a checkpoint twice repeats its sows:
  reap inside, `grad(grad(...))` outside. A reap inside a reaped function takes its names; others stay visible outside.
"""

import contextlib
import contextvars
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

Plan = Mapping[str, int | tuple[int, ...] | None]       # name wanted -> iterations of the innermost scan; None is all


def sow(x: Any, name: str) -> Any:
    """Mark `x`, an array or a pytree of arrays, with `name` for `reap`; returns `x` unchanged.

    Raises ValueError unless `name` is a non-empty string. Outside `reap` it costs nothing in the compiled program.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"sow needs a non-empty string as name, got {name!r}")
    if (seen := _seen.get()) is not None:
        seen.add(name)
    leaves, tree = jax.tree.flatten(x)
    return tree.unflatten(sow_p.bind(*leaves, name=name, tree=tree, axes=((),) * len(leaves)))


def reap(fn: Callable, names: str | Iterable[str] | Mapping[str, Any] | None = None) -> Callable:
    """Make of `fn` a function of the same arguments that returns `(out, caught)`, `caught = {name: sown value}`.

    `names` is one name, several, or None for all that are sown. As a mapping `{name: iterations}` it keeps only some
    iterations of the innermost scan around the sow (scans further out stack as ever): an int keeps that one, without
    the stacked axis; a sequence stacks those, in its order; None keeps all. Negative ones count from the end. Only what
    is kept is ever allocated. Arguments that are not arrays (Python numbers, strings, ...) reach `fn` as they are;
    results become arrays, as under jit.

    Calling it raises ValueError for a name never sown, dropped by JAX or sown twice, for iterations of a name outside
    any scan and for branches that disagree; IndexError for iterations out of range; NotImplementedError as said above.
    """
    @functools.wraps(fn)
    def reaped(*args, **kwargs):
        jaxpr, arrays, tree, seen = _trace(fn, args, kwargs)
        plan = _plan(names, jaxpr.jaxpr, seen)
        if (outer := _seen.get()) is not None:
            outer |= seen - plan.keys()
        outs, caught = _walk(jaxpr, arrays, plan)
        return tree.unflatten(map(jnp.asarray, outs)), {name: caught[name] for name in plan}

    return reaped


# The primitive: an identity that carries `name`, the pytree of its operands, and for each operand the axes that vmap
# gave it (outermost first). They stay where they are until the value is reaped: moving them would cost a transpose.

sow_p = Primitive("sow")
sow_p.multiple_results = True
sow_p.def_impl(lambda *xs, **_: list(xs))
sow_p.def_abstract_eval(lambda *avals, **_: list(avals))
mlir.register_lowering(sow_p, lambda ctx, *xs, **_: list(xs))
ad.primitive_jvps[sow_p] = lambda xs, tangents, **params: (sow_p.bind(*xs, **params), list(tangents))
ad.primitive_transposes[sow_p] = lambda cotangents, *_, **__: list(cotangents)


def _batch_sow(xs, dims, *, axes, **params):
    axes = tuple(a if d is None else (d, *(i + (i >= d) for i in a)) for a, d in zip(axes, dims))
    return sow_p.bind(*xs, axes=axes, **params), dims


batching.primitive_batchers[sow_p] = _batch_sow

# The names sown while the innermost `reap` traces, to raise where JAX drops a sow since nothing uses what it returned.
_seen = contextvars.ContextVar("_seen", default=None)


# What a function sows, and what of it is wanted.

def _trace(fn: Callable, args: tuple, kwargs: dict) -> tuple[ClosedJaxpr, list, Any, set[str]]:
    """The jaxpr of `fn` over the arrays among its arguments, these arrays, its result's tree, and the names seen."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}

    def flat(arrays):
        args, kwargs = tree.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
        return fn(*args, **kwargs)

    token = _seen.set(seen := set())
    try:
        jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(arrays)
    finally:
        _seen.reset(token)
    return jaxpr, list(arrays.values()), jax.tree.structure(out), seen


def _plan(names: Any, jaxpr: Jaxpr, seen: set[str]) -> Plan:
    """Normalize the `names` given to `reap`; raises for those that cannot be had."""
    found, again = _sown(jaxpr.eqns), _sown(jaxpr.eqns, recomputed=True)
    if names is None:
        names = [*found, *sorted((seen | again.keys()) - found.keys())]
    plan = dict(names) if isinstance(names, Mapping) else dict.fromkeys([names] if isinstance(names, str) else names)
    if lost := plan.keys() - found.keys():
        why = ("only recomputed, in the backward pass of a checkpoint" if lost & again.keys() else
               "dropped by JAX, as nothing uses what sow returned" if lost & seen else "never sown")
        raise ValueError(f"{sorted(lost)}: {why}; sown are: {sorted(found)}")
    for name, pick in plan.items():
        if pick is not None:
            if not found[name]:
                raise ValueError(f"{name!r} is not sown inside a scan, so there are no iterations {pick!r} to pick")
            plan[name] = operator.index(pick) if np.ndim(pick) == 0 else tuple(map(operator.index, pick))
    return plan


def _sown(eqns: Iterable[JaxprEqn], *, recomputed: bool = False, in_scan: bool = False) -> dict[str, bool]:
    """The names sown in `eqns`, at any depth -> whether inside a scan. Recomputed ones count only if asked for."""
    found = {}
    for eqn in eqns:
        if eqn.primitive is sow_p:
            found[eqn.params["name"]] = in_scan
        elif recomputed or not eqn.params.get("differentiated"):    # a checkpoint's backward pass repeats its forward
            for jaxpr in _jaxprs(eqn.params):
                found |= _sown(jaxpr.eqns, recomputed=recomputed, in_scan=in_scan or eqn.primitive.name == "scan")
    return found


def _jaxprs(param: Any) -> Iterator[Jaxpr]:
    """All jaxprs in an equation's parameters, however they are nested."""
    if isinstance(param, Jaxpr | ClosedJaxpr):
        yield _open(param)[0]
    elif isinstance(param, dict | list | tuple):
        for value in param.values() if isinstance(param, dict) else param:
            yield from _jaxprs(value)


# Running a jaxpr. `_RULES`, at the end, says how each primitive with a wanted sow inside is rebuilt.

def _walk(jaxpr: Jaxpr | ClosedJaxpr, args: Iterable, plan: Plan) -> tuple[list, dict[str, Any]]:
    """Evaluate `jaxpr` on `args`; returns its results, and {name: value} of what `plan` wants of it."""
    jaxpr, consts = _open(jaxpr)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    read = lambda atom: atom.val if isinstance(atom, Literal) else env[atom]
    caught = {}
    for eqn in jaxpr.eqns:
        inputs, wanted = [read(x) for x in eqn.invars], _sown([eqn]).keys() & plan.keys()
        if wanted and eqn.primitive.name not in _RULES:
            raise _unhandled(f"`{eqn.primitive.name}`", wanted)
        with _context(eqn):
            outs, new = _RULES[eqn.primitive.name](eqn, inputs, plan) if wanted else (_bind(eqn, inputs), {})
        if twice := new.keys() & caught.keys():
            raise ValueError(f"{sorted(twice)}: sown more than once, so which value is meant? Use a name for each")
        caught |= new
        env.update(zip(eqn.outvars, outs))
    return [read(x) for x in jaxpr.outvars], caught


def _unhandled(where: str, names: Iterable[str], hint: str = "move the sow out of it") -> NotImplementedError:
    return NotImplementedError(f"cannot reap {sorted(names)} from inside {where}: {hint}")


def _shapes(jaxpr: Jaxpr | ClosedJaxpr, plan: Plan) -> dict[str, Any]:
    """What `_walk` would catch, as shape structs."""
    return jax.eval_shape(lambda *args: _walk(jaxpr, args, plan)[1], *(v.aval for v in _open(jaxpr)[0].invars))


def _zeros(shapes: Any, rows: tuple[int, ...] = ()) -> Any:
    # full_like also takes over how a value is sharded and what it varies over in a shard_map: carries insist on both
    return jax.tree.map(lambda x: jnp.broadcast_to(lax.full_like(x, 0), rows + x.shape), shapes)


# The corners of JAX that are not quite public, all of them.

def _open(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, list]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, [])


def _bind(eqn: JaxprEqn, args: list) -> list:
    """Run one equation as it stands."""
    functions, params = (), eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):       # before JAX 0.10
        functions, params = params
    outs = eqn.primitive.bind(*functions, *args, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


@contextlib.contextmanager
def _context(eqn: JaxprEqn):
    """The mesh, the named scopes and the source line under which an equation was traced."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield


# The rules: rule(eqn, inputs, plan) -> (its results, {name: value} of what was sown in it).

def _sow_rule(eqn, args, plan):
    p = eqn.params
    values = [jnp.moveaxis(x, axes, range(len(axes))) if axes else jnp.asarray(x) for x, axes in zip(args, p["axes"])]
    return args, {p["name"]: p["tree"].unflatten(values)}


def _call_rule(eqn, args, plan):
    return _walk(eqn.params["call_jaxpr"], args, plan)


def _jit_rule(eqn, args, plan):
    p = eqn.params
    if any(layout is not None for layout in (*p["in_layouts"], *p["out_layouts"])):
        raise _unhandled("a `jit` with array layouts", _sown([eqn]))
    given = lambda shardings: [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]
    inner = lambda *args: _walk(p["jaxpr"], args, plan)
    inner.__name__ = p["name"]
    return jax.jit(inner, in_shardings=tuple(given(p["in_shardings"])),
                   out_shardings=(given(p["out_shardings"]), None), keep_unused=p["keep_unused"], inline=p["inline"],
                   donate_argnums=tuple(i for i, donated in enumerate(p["donated_invars"]) if donated),
                   compiler_options=dict(p["compiler_options_kvs"]) or None)(*args)


def _remat_rule(eqn, args, plan):
    p = eqn.params
    inner = lambda *args: _walk(p["jaxpr"], args, plan)
    return jax.checkpoint(inner, prevent_cse=p["prevent_cse"], policy=p["policy"])(*args)


def _scan_rule(eqn, args, plan):
    p, jaxpr = eqn.params, eqn.params["jaxpr"]
    n, m = p["num_consts"], p["num_consts"] + p["num_carry"]
    slots = {name: _slots(name, plan[name], p["length"]) for name, in_scan in _sown(jaxpr.jaxpr.eqns).items()
             if plan.get(name) is not None and not in_scan}
    shapes = _shapes(jaxpr, plan) if slots else {}
    kept = {name: _zeros(shapes[name], (np.size(plan[name]),)) for name in slots}
    keep = lambda slot, buffers, values: jax.tree.map(
        lambda buffer, value: buffer.at[slot].set(value, mode="drop", unique_indices=True), buffers, values)

    def body(state, x):
        (carry, kept), (x, slot) = state, x
        outs, caught = _walk(jaxpr, [*args[:n], *carry, *x], plan)
        kept = {name: keep(slot[name], kept[name], caught.pop(name)) for name in kept}
        return (outs[:m - n], kept), (outs[m - n:], caught)

    more = {key: p[key] for key in ("unroll", "_split_transpose") if key in p}
    (carry, kept), (ys, caught) = lax.scan(
        body, (args[n:m], kept), (args[m:], slots), length=p["length"], reverse=p["reverse"], **more)
    for name, value in kept.items():
        caught[name] = jax.tree.map(lambda x: x[0], value) if isinstance(plan[name], int) else value
    return [*carry, *ys], caught


def _slots(name: str, pick: int | tuple[int, ...], length: int) -> np.ndarray:
    """For each of `length` iterations the row of the buffer that it fills; unwanted ones point behind its end."""
    picks = np.atleast_1d(np.asarray(pick, int))
    if bad := [int(i) for i in picks if not -length <= i < length]:
        raise IndexError(f"{name!r}: a scan of length {length} has no iteration {bad}")
    slots = np.full(length, len(picks), np.int32)
    slots[picks] = np.arange(len(picks))
    if not 0 < len(picks) == (slots < len(picks)).sum():
        raise ValueError(f"{name!r}: {pick} picks no iteration, or one twice")
    return slots


def _while_rule(eqn, args, plan):
    p = eqn.params
    n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    test, body = p["cond_jaxpr"], p["body_jaxpr"]
    if inside := _sown(test.jaxpr.eqns).keys() & plan.keys():
        raise _unhandled("the condition of a `while`", inside)
    if test.out_avals[0].shape:     # lanes that have stopped would go on sowing
        raise _unhandled("a `while` whose condition is mapped by vmap", _sown([eqn]), "write vmap(reap(f))")
    return lax.while_loop(lambda state: _walk(test, [*args[:n], *state[0]], {})[0][0],
                          lambda state: _walk(body, [*args[n:m], *state[0]], plan),
                          (args[m:], _zeros(_shapes(body, plan))))


def _cond_rule(eqn, args, plan):
    if eqn.params.get("branches_platforms"):
        raise _unhandled("`platform_dependent`", _sown([eqn]))
    branches, shapes = eqn.params["branches"], {}
    for name, new in [item for branch in branches for item in _shapes(branch, plan).items()]:
        kinds = [jax.tree.map(lambda x: f"{x.dtype}{x.shape}", value) for value in (shapes.setdefault(name, new), new)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{name!r}: the branches of a cond sow different shapes, {kinds[0]} and {kinds[1]}")

    def run(branch, *args):
        outs, caught = _walk(branch, args, plan)
        return outs, {name: caught[name] if name in caught else _zeros(shapes[name]) for name in shapes}

    return lax.switch(args[0], [functools.partial(run, branch) for branch in branches], *args[1:])


def _shard_map_rule(eqn, args, plan):
    p = eqn.params
    manual = p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]       # the name before JAX 0.10
    axes = tuple(axis for axis in p["mesh"].axis_names if axis in manual)

    def inner(*args):
        outs, caught = _walk(p["jaxpr"], args, plan)
        return outs, jax.tree.map(lambda x: x[None], caught)

    return jax.shard_map(inner, mesh=p["mesh"], in_specs=tuple(p["in_specs"]), axis_names=set(axes),
                         out_specs=(list(p["out_specs"]), PartitionSpec(axes)), check_vma=p["check_vma"])(*args)


def _custom_rule(eqn, args, plan):
    if eqn.effects:     # they would happen twice
        raise _unhandled(f"a `{eqn.primitive.name}` with side effects", _sown([eqn]))
    return _bind(eqn, args), _walk(eqn.params["call_jaxpr"], args, plan)[1]


_RULES = {
    "sow": _sow_rule, "scan": _scan_rule, "while": _while_rule, "cond": _cond_rule, "shard_map": _shard_map_rule,
    "jit": _jit_rule, "pjit": _jit_rule, "closed_call": _call_rule, "core_call": _call_rule,
    "remat2": _remat_rule, "remat": _remat_rule, "checkpoint": _remat_rule,
    "custom_jvp_call": _custom_rule, "custom_vjp_call": _custom_rule,
}
