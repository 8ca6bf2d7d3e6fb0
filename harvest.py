"""Name values inside a JAX function and reach them from outside: `sow` marks, `reap` captures, `plant` replaces.

This file works alone: copy it. It needs only `jax` (0.10.2 to 0.12). Importing it touches no device.

    def model(w, x):                                        # any JAX function, with any transformations
        return jax.lax.scan(lambda h, w: (sow(jnp.tanh(h @ w), name="h"), None), x, w)[0]
    y, captured = jax.jit(reap(model))(w, x)                # captured["h"]: [L, B, D], all L layers
    y, captured = jax.jit(reap(model, {"h": 10}))(w, x)     # captured["h"]: [B, D], needs the memory of one layer
    y = jax.jit(plant(model, {"h": {10: lambda h: 2 * h}}))(w, x)       # doubles the output of layer 10; or {10: value}

Both trace the function to a jaxpr and run it equation by equation. An equation that contains no wanted sow is bound
unchanged, so kernels and derivative rules survive. The others are rebuilt with JAX's public functions:

    the sow is inside        value that is captured; a planted value has the same shape
    jit, remat               the value. A checkpoint keeps its policy. Its recomputation is planted, not captured again
    scan (map, fori_loop     the values, stacked by iteration index on a new axis 0 (also if reverse=True). Nested scans
      with fixed bounds)     stack the outermost first. A planted function sees the value of one iteration
    while                    the last iteration's value, planted in all; zeros if none ran. In the condition: raises
    cond, switch             the value in the branch that runs; zeros if that branch does not sow it. Shapes must agree
    vmap                     the value with the mapped axes first (after those of scans); no axis if it is not mapped
    grad, jvp, vjp           the forward value. You can also differentiate a reaped function (has_aux=True).
                             grad(plant(f)) differentiates the planted value: a constant stops the gradient there.
                             plant(grad(f)) changes the point where f is differentiated: sow's derivative is identity
    shard_map                each device's block, on a new axis 0 over all devices, sharded over the manual mesh axes.
                             If check_vma proves that devices agree, the first device's block is planted in all
    custom_jvp, custom_vjp   the value, computed beside the call, which keeps its rule (XLA merges the two). The
                             captured value itself has the ordinary derivative. Under grad the rule's own forward
                             function runs: sow and plant there. Planting in the call would lose its rule, and raises
    anything else            raises NotImplementedError with the names of the primitive and the sow (pallas_call, ...)

Good to know:
- Put `jit` outside `reap`, and use what `sow` returns: JAX drops unused work when it differentiates a scan or jit.
  Asking for a dropped name always raises; with names=None, a dropped name in an already traced jit can go unnoticed.
- Under `grad`, JAX moves a value that no iteration changes out of its scan. It is then captured once, not stacked.
- `reap(vmap(f))` sees what vmap made of `f`: a cond with a mapped predicate is now a select, and both branches ran for
  all lanes; a while with a mapped condition raises. `vmap(reap(f))` captures what each lane did.
- A name sown twice raises, except in two branches of one cond. Differentiating a checkpoint twice repeats its sows:
  reap inside, `grad(grad(...))` outside. An inner reap takes its names; others, also planted, stay visible outside.
"""

import contextlib
import contextvars
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jax.tree_util import Partial


class Plan(NamedTuple):
    """Tell a walk what to capture or, if there are `plants`, what to replace."""
    picks: Mapping[str, int | tuple[int, ...] | None]       # name -> iterations of the innermost scan; None: all
    plants: Mapping[str, list]      # name -> a value or a function for each pick (a Partial, which has no leaves)
    turns: Mapping[str, Any]        # name -> index of the current iteration among its picks; len(picks): not picked


def sow(x: Any, name: str) -> Any:
    """Mark `x`, an array or a pytree of arrays, with `name` for `reap` and `plant`. Return `x` unchanged.

    Raise ValueError unless `name` is a non-empty string. Alone, it costs nothing in the compiled program.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"sow needs a non-empty string as its name, got {name!r}")
    if (seen := _seen.get()) is not None:
        seen.add(name)
    leaves, tree = jax.tree.flatten(x)
    return tree.unflatten(sow_p.bind(*leaves, name=name, tree=tree, axes=((),) * len(leaves)))


def reap(fn: Callable, names: str | Iterable[str] | Mapping[str, Any] | None = None) -> Callable:
    """Return a function with the arguments of `fn` that returns `(out, captured)`, `captured = {name: sown value}`.

    `names` is one name, several, or None for all. A mapping `{name: iterations}` keeps only some iterations of the
    innermost scan around the sow (outer scans stack as usual): an int keeps one, without the stacked axis; a sequence
    stacks its iterations in its order; None keeps all. Negative numbers count from the end. Only kept values use
    memory. Non-array arguments (Python numbers, strings, ...) reach `fn` unchanged; results become arrays as in jit.

    A call raises ValueError for a name never sown, dropped by JAX or sown twice, for iterations of a name outside any
    scan and for branches that disagree; IndexError for iterations out of range; NotImplementedError as listed above.
    """
    return functools.wraps(fn)(lambda *args, **kwargs: _run(fn, args, kwargs, names, {}))


def plant(fn: Callable, plants: Mapping[str, Any]) -> Callable:
    """Return a function with the arguments and results of `fn` that runs with sown values replaced.

    `plants` maps each name to a value with the shape that `reap` captures: `plant(fn, reap(fn)(x)[1])(x)` is `fn(x)`.
    Or to a function of the sown value (in a scan: of each iteration's value). Or to `{iteration: value or function}`, a
    mapping whose keys are all ints: it changes these iterations of the innermost scan and costs nothing in the others.
    Values and functions may use traced values, and gradients flow into them. Structure and shape must equal those of
    the sown value. A dtype is cast if it promotes to the sown dtype (bfloat16 to float32, Python numbers). A call
    raises ValueError if a value does not fit, and all errors of `reap`.
    """
    static = lambda what: Partial(lambda value: what(value)) if callable(what) else what
    chosen = lambda what: isinstance(what, Mapping) and what and all(isinstance(i, int | np.integer) for i in what)
    split = {name: what if chosen(what) else {None: what} for name, what in plants.items()}
    picks = {name: None if None in what else tuple(what) for name, what in split.items()}
    whats = {name: [*map(static, what.values())] for name, what in split.items()}
    return functools.wraps(fn)(lambda *args, **kwargs: _run(fn, args, kwargs, picks, whats)[0])


# JAX's internals. Only this part uses what JAX may change without notice. It fits jax 0.10.2 to 0.12; the tests of this
# part show what a newer JAX has changed.

# The primitive: an identity that carries `name`, the pytree of its operands, and for each operand the axes that vmap
# gave it (outermost first). The axes stay in place until the value is reaped: moving them would cost a transpose.

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

# The parameters that each primitive's rule reads, by their names in jax 0.10.
_PARAMS = {
    "scan": "jaxpr num_consts num_carry length reverse unroll",
    "while": "cond_jaxpr cond_nconsts body_jaxpr body_nconsts",
    "cond": "branches",
    "shard_map": "jaxpr mesh in_specs out_specs newly_manual_axes check_vma",
    "jit": "jaxpr name in_shardings out_shardings in_layouts out_layouts donated_invars keep_unused inline "
           "compiler_options_kvs",
    **dict.fromkeys(["checkpoint", "remat2"], "jaxpr prevent_cse differentiated"),
    **dict.fromkeys(["closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"], "call_jaxpr"),
}


def _params(eqn: JaxprEqn) -> SimpleNamespace:
    """Return the parameters of `eqn` that its rule reads. Raise an error if this JAX lacks one of them."""
    params = dict(eqn.params)
    try:
        if "ft_in" in params:       # a scan since jax 0.11: the tree of its constants, carry and other inputs
            params["num_consts"], params["num_carry"], _ = map(len, params["ft_in"].unpack())
        return SimpleNamespace(**{name: params[name] for name in _PARAMS[eqn.primitive.name].split()})
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise NotImplementedError(f"harvest.py does not fit jax {jax.__version__}: `{eqn.primitive.name}` has no "
                                  f"{error}, only {sorted(eqn.params)}; use jax 0.10.2 to 0.12") from error


def _bind(eqn: JaxprEqn, args: list, **changed: Any) -> list:
    """Run one equation unchanged, except for the parameters `changed`."""
    outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params({**eqn.params, **changed}))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _setting(eqn: JaxprEqn) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return two contexts that keep an equation's source location, its named scopes and its settings."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager


def _inner(eqn: JaxprEqn) -> list[Jaxpr | ClosedJaxpr]:
    """Return the jaxprs in an equation's parameters."""
    return [x for x in jax.tree.leaves(eqn.params) if isinstance(x, Jaxpr | ClosedJaxpr)]


def _lift(jaxpr: ClosedJaxpr) -> Jaxpr:
    """Return `jaxpr` with its constants as its first inputs."""
    return jaxpr.jaxpr.replace(constvars=[], invars=[*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars])


def _zeros(shapes: Any, rows: tuple[int, ...] = ()) -> Any:
    """Return zeros of `shapes` behind axes of size `rows`. A carry also needs their sharding and varying axes."""
    def zeros(x):       # since jax 0.11 full_like loses the explicit axes of a mesh that is not set
        with jax.sharding.use_abstract_mesh(x.sharding.mesh) if x.sharding else contextlib.nullcontext():
            return jnp.broadcast_to(lax.full_like(x, 0), rows + x.shape)
    return jax.tree.map(zeros, shapes)


_open = lambda jaxpr: (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, [])
_varying = lambda kind: kind.mat.varying     # the axes over which a value of this type may differ, for check_vma
_recomputes = lambda eqn: eqn.params.get("differentiated", False)    # a checkpoint's backward pass repeats its forward



# The names sown while the innermost `reap` or `plant` traces. They show where JAX drops an unused sow.
_seen = contextvars.ContextVar("_seen", default=None)


def _run(fn: Callable, args: tuple, kwargs: dict, names: Any, plants: dict[str, list]) -> tuple[Any, dict[str, Any]]:
    """Return (out, captured) of `fn` for `names` as in `reap`; or (out, {}) after replacing values with `plants`."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}
    call = lambda args, kwargs: fn(*args, **kwargs)
    flat = lambda arrays: call(*tree.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)]))
    outer, token = _seen.get(), _seen.set(seen := set())
    try:
        jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(arrays)
    finally:
        _seen.reset(token)
    picks = _picks(names, jaxpr.eqns, seen)
    if outer is not None:
        outer |= seen if plants else seen - picks.keys()
    values = [name for name in plants if jax.tree.leaves(plants[name])]
    shapes = _shapes(jaxpr, Plan({name: picks[name] and picks[name][0] for name in values}, {}, {}))
    depths = lambda name: {scans for eqn, scans in _sows(jaxpr.eqns, True) if eqn.params["name"] == name}
    if uneven := [name for name in plants if (picks[name] or name in values) and len(depths(name)) > 1]:
        raise _unhandled("scans at several depths", uneven, "plant one function for all, or plant outside of grad")
    plants = {name: [_fit(name, what, shapes[name]) if jax.tree.leaves(what) else what for what in whats]
              for name, whats in plants.items()}
    outs, caught = _walk(jaxpr, arrays.values(), Plan(picks, plants, {}))
    outs = jax.tree.unflatten(jax.tree.structure(out), map(jnp.asarray, outs))
    return outs, {name: caught[name] for name in picks if not plants}


def _picks(names: Any, eqns: list[JaxprEqn], seen: set[str]) -> dict[str, Any]:
    """Normalize the `names` given to `reap`. Raise ValueError for a name or an iteration that cannot be captured."""
    found, again = _sown(eqns), _sown(eqns, recomputed=True)
    names = [*found, *sorted((seen | again.keys()) - found.keys())] if names is None else names
    plan = dict(names) if isinstance(names, Mapping) else dict.fromkeys([names] if isinstance(names, str) else names)
    if lost := plan.keys() - found.keys():
        why = ("only recomputed, in the backward pass of a checkpoint" if lost & again.keys() else
               "dropped by JAX, because nothing uses the value that sow returned" if lost & seen else "never sown")
        raise ValueError(f"{sorted(lost)}: {why}; sown are: {sorted(found)}")
    for name, pick in plan.items():
        if pick is not None:
            if not found[name]:
                raise ValueError(f"{name!r} is not sown inside a scan, so there are no iterations {pick!r} to pick")
            plan[name] = operator.index(pick) if np.ndim(pick) == 0 else tuple(map(operator.index, pick))
    return plan


def _sows(eqns: Iterable[JaxprEqn], recomputed: bool, scans: int = 0) -> Iterator[tuple[JaxprEqn, int]]:
    """Yield the sows in `eqns`, at any depth, and the number of scans around each."""
    for eqn in eqns:
        if eqn.primitive is sow_p:
            yield eqn, scans
        elif recomputed or not _recomputes(eqn):
            for jaxpr in _inner(eqn):
                yield from _sows(jaxpr.eqns, recomputed, scans + (eqn.primitive.name == "scan"))


def _sown(eqns: Iterable[JaxprEqn], plan: Plan | None = None, recomputed: bool = False) -> dict[str, int]:
    """Return {sown name: number of scans around it}, only names of `plan` if given. Plants are recomputed, too."""
    found = {eqn.params["name"]: scans for eqn, scans in _sows(eqns, bool(plan.plants) if plan else recomputed)}
    return {name: found[name] for name in found if plan is None or name in plan.picks}


# Running a jaxpr. `_RULES`, at the end, maps each primitive to the rule that rebuilds it if it contains a wanted sow.

def _walk(jaxpr: Jaxpr | ClosedJaxpr, args: Iterable, plan: Plan) -> tuple[list, dict[str, Any]]:
    """Evaluate `jaxpr` on `args`. Return its results and {name: value} for the names that `plan` wants."""
    jaxpr, consts = _open(jaxpr)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    read = lambda atom: atom.val if isinstance(atom, Literal) else env[atom]
    caught, once = {}, set()
    for eqn in jaxpr.eqns:
        inputs, wanted = [read(x) for x in eqn.invars], _sown([eqn], plan)
        if wanted and eqn.primitive.name not in _RULES:
            raise _unhandled(f"`{eqn.primitive.name}`", wanted)
        if twice := once & (sown := wanted.keys() & _sown([eqn]).keys()):
            raise ValueError(f"{sorted(twice)}: sown more than once; use a different name for each sow")
        source, settings = _setting(eqn)
        with source, settings:
            outs, new = _RULES[eqn.primitive.name](eqn, inputs, plan) if wanted else (_bind(eqn, inputs), {})
        caught, once = caught | new, once | sown
        env.update(zip(eqn.outvars, outs))
    return [read(x) for x in jaxpr.outvars], caught


def _unhandled(where: str, names: Iterable[str], hint: str = "move the sow out of it") -> NotImplementedError:
    return NotImplementedError(f"cannot reap or plant {sorted(names)} inside {where}: {hint}")


def _shapes(jaxpr: Jaxpr | ClosedJaxpr, plan: Plan) -> dict[str, Any]:
    """Return what `_walk` would capture, as shape structs."""
    args = [x.aval for x in _open(jaxpr)[0].invars]
    return jax.eval_shape(lambda *args: _walk(jaxpr, args, plan)[1], *args) if plan.picks and not plan.plants else {}


def _fit(name: str, new: Any, old: Any) -> Any:
    """Return `new` with the dtypes of `old`, which it replaces. Raise ValueError if the two do not fit."""
    def fit(a, b):
        if jnp.shape(a) != b.shape or getattr(a, "dtype", None) != b.dtype != jnp.result_type(a, b.dtype):
            raise ValueError
        a = jnp.asarray(a, b.dtype)
        axes = tuple(_varying(jax.typeof(b)) - _varying(jax.typeof(a)))
        return lax.pcast(a, axes, to="varying") if axes else a

    try:
        return jax.tree.map(fit, new, old)
    except (ValueError, TypeError, AttributeError) as error:
        given, needed = jax.tree.map(jax.typeof, (new, old))
        raise ValueError(f"{name!r}: cannot plant {given} where {needed} is sown") from error


# The rules: rule(eqn, inputs, plan) -> (results of eqn, {name: value sown inside eqn}).

def _sow_rule(eqn, args, plan):
    name, tree, axes = (eqn.params[key] for key in ("name", "tree", "axes"))
    front = [jnp.moveaxis(x, a, range(len(a))) if a else jnp.asarray(x) for x, a in zip(args, axes)]
    value = tree.unflatten(front)
    if not plan.plants:
        return args, {name: value}
    new = [lambda old, what=what: _fit(name, what(old) if isinstance(what, Partial) else what, old)
           for what in plan.plants[name]]
    value = lax.switch(plan.turns[name], [*new, lambda old: old], value) if name in plan.turns else new[0](value)
    back = [jnp.moveaxis(x, range(len(a)), a) if a else x for x, a in zip(jax.tree.leaves(value), axes)]
    return sow_p.bind(*back, **eqn.params), {}


def _jit_rule(eqn, args, plan):
    p = _params(eqn)
    if any(layout is not None for layout in (*p.in_layouts, *p.out_layouts)):
        raise _unhandled("a `jit` with array layouts", _sown([eqn]))
    given = lambda shardings: [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]
    inner = lambda *args: _walk(p.jaxpr, args, plan)
    inner.__name__ = p.name
    return jax.jit(inner, in_shardings=tuple(given(p.in_shardings)),
                   out_shardings=(given(p.out_shardings), None), keep_unused=p.keep_unused, inline=p.inline,
                   donate_argnums=tuple(i for i, donated in enumerate(p.donated_invars) if donated),
                   compiler_options=dict(p.compiler_options_kvs) or None)(*args)


def _remat_rule(eqn, args, plan):
    p = _params(eqn)
    jaxpr, out = jax.make_jaxpr(lambda *args: _walk(p.jaxpr, args, plan), return_shape=True)(*args)
    cse = cse if isinstance(cse := p.prevent_cse, bool) else (False,) * len(jaxpr.consts) + cse
    outs = _bind(eqn, [*jaxpr.consts, *args], jaxpr=_lift(jaxpr), prevent_cse=cse)
    return jax.tree.unflatten(jax.tree.structure(out), outs)


def _scan_rule(eqn, args, plan):
    p = _params(eqn)
    n, m = p.num_consts, p.num_consts + p.num_carry
    wanted = _sown(p.jaxpr.eqns, plan)
    slots = {name: _slots(name, plan.picks[name], p.length) for name, scans in wanted.items()
             if plan.picks[name] is not None and not scans}
    plants = {name: plan.plants[name] for name in plan.plants.keys() & wanted.keys() - slots.keys()}
    shapes = _shapes(p.jaxpr, plan) if slots else {}
    kept = {name: _zeros(shapes[name], (np.size(plan.picks[name]),)) for name in slots if name in shapes}
    keep = lambda slot: lambda buffer, value: buffer.at[slot].set(value, mode="drop", unique_indices=True)

    def body(state, x):
        (carry, kept), (x, slot, plants) = state, x
        inner = Plan(plan.picks, {**plan.plants, **plants}, {**plan.turns, **slot})
        outs, caught = _walk(p.jaxpr, [*args[:n], *carry, *x], inner)
        kept = {name: jax.tree.map(keep(slot[name]), kept[name], caught.pop(name)) for name in kept}
        return (outs[:m - n], kept), (outs[m - n:], caught)

    (carry, kept), (ys, caught) = lax.scan(body, (args[n:m], kept), (args[m:], slots, plants), length=p.length,
                                           reverse=p.reverse, unroll=p.unroll)
    for name, value in kept.items():
        caught[name] = jax.tree.map(lambda x: x[0], value) if isinstance(plan.picks[name], int) else value
    return [*carry, *ys], caught


def _slots(name: str, pick: int | tuple[int, ...], length: int) -> np.ndarray:
    """Return the buffer row that each of `length` iterations fills; unwanted iterations point past the last row."""
    picks = np.atleast_1d(np.asarray(pick, int))
    if bad := [int(i) for i in picks if not -length <= i < length]:
        raise IndexError(f"{name!r}: a scan of length {length} has no iteration {bad}")
    slots = np.full(length, len(picks), np.int32)
    slots[picks] = np.arange(len(picks))
    if not 0 < len(picks) == (slots < len(picks)).sum():
        raise ValueError(f"{name!r}: {pick} picks no iteration, or one twice; pick each at most once")
    return slots


def _while_rule(eqn, args, plan):
    p = _params(eqn)
    n, m = p.cond_nconsts, p.cond_nconsts + p.body_nconsts
    test, body = p.cond_jaxpr, p.body_jaxpr
    if inside := _sown(test.eqns, plan):
        raise _unhandled("the condition of a `while`", inside)
    if test.out_avals[0].shape:     # lanes that have stopped would still sow
        raise _unhandled("a `while` whose condition is mapped by vmap", _sown([eqn], plan), "put vmap outside")
    return lax.while_loop(lambda state: _walk(test, [*args[:n], *state[0]], Plan({}, {}, {}))[0][0],
                          lambda state: _walk(body, [*args[n:m], *state[0]], plan),
                          (args[m:], _zeros(_shapes(body, plan))))


def _cond_rule(eqn, args, plan):
    if eqn.params.get("branches_platforms"):
        raise _unhandled("`platform_dependent`", _sown([eqn]))
    branches, shapes = _params(eqn).branches, {}
    for name, new in [item for branch in branches for item in _shapes(branch, plan).items()]:
        kinds = [jax.tree.map(lambda x: f"{x.dtype}{x.shape}", value) for value in (shapes.setdefault(name, new), new)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{name!r}: the branches of a cond sow different shapes, {kinds[0]} and {kinds[1]}")

    def run(branch, *args):
        outs, caught = _walk(branch, args, plan)
        return outs, {name: caught[name] if name in caught else _zeros(shapes[name]) for name in shapes}

    return lax.switch(args[0], [functools.partial(run, branch) for branch in branches], *args[1:])


def _shard_map_rule(eqn, args, plan):
    p = _params(eqn)
    axes = tuple(axis for axis in p.mesh.axis_names if axis in p.newly_manual_axes)
    agree = {}      # name -> for each leaf, the axes over which the sown value does not vary
    for sown, _ in _sows(p.jaxpr.eqns, recomputed=True):
        new = [set(axes) - _varying(x.aval) if p.check_vma else set() for x in sown.outvars]
        agree[sown.params["name"]] = [a & b for a, b in zip(new, agree.get(sown.params["name"], new))]

    def own(x, agree):
        for axis in agree:
            x = lax.psum(jnp.where(lax.axis_index(axis) == 0, x, 0), axis).astype(x.dtype)
        return x[0]

    def inner(plants, *args):
        plants = {name: jax.tree.unflatten(jax.tree.structure(x), map(own, jax.tree.leaves(x), agree[name] * len(x)))
                  for name, x in plants.items()}
        outs, caught = _walk(p.jaxpr, args, Plan(plan.picks, {**plan.plants, **plants}, plan.turns))
        return outs, jax.tree.map(lambda x: x[None], caught)

    plants = {name: plan.plants[name] for name in plan.plants.keys() & agree.keys()}
    return jax.shard_map(inner, mesh=p.mesh, in_specs=(PartitionSpec(axes), *p.in_specs), axis_names=set(axes),
                         out_specs=(list(p.out_specs), PartitionSpec(axes)), check_vma=p.check_vma)(plants, *args)


def _custom_rule(eqn, args, plan):
    if plan.plants:
        raise _unhandled(f"a `{eqn.primitive.name}`", _sown([eqn], plan), "planting would lose its derivative rule")
    if eqn.effects:     # they would happen twice
        raise _unhandled(f"a `{eqn.primitive.name}` with side effects", _sown([eqn]))
    return _bind(eqn, args), _walk(_params(eqn).call_jaxpr, args, plan)[1]


_call_rule = lambda eqn, args, plan: _walk(_params(eqn).call_jaxpr, args, plan)
_RULES = {
    "sow": _sow_rule, "scan": _scan_rule, "while": _while_rule, "cond": _cond_rule, "shard_map": _shard_map_rule,
    "jit": _jit_rule, "closed_call": _call_rule, "core_call": _call_rule, "remat2": _remat_rule,
    "checkpoint": _remat_rule, "custom_jvp_call": _custom_rule, "custom_vjp_call": _custom_rule,
}
