"""Run train.py with nano, and measure where its time goes: a stage of `gpu.py`."""
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from stages import tell

import activations
import data
import flux
import session
import train


def job(sizes: Any) -> None:
    """Run train.py with nano, and tell where the time goes. Tracing, lowering and compiling count as compiling."""
    events, phases = [], {}
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, fun_name="", **_: name.startswith("/jax/core/compile") and events.append(
            (time.perf_counter() - seconds, time.perf_counter(), name.split("/")[-1], str(fun_name))))
    for owner, name in ((session, "load_model"), (train, "first_state"), (train, "loop"), (train, "evaluate"),
                        (train, "explained"), (train, "save"), (activations.Activations, "ready"),
                        (activations.Activations, "fetch"), (activations.Activations, "send"),
                        (activations.Activations, "batch"), (flux.Model, "tokenize"), (data, "beginning")):
        setattr(owner, name, timed(getattr(owner, name), name, phases))
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import train"], cwd=Path(train.__file__).parent, check=True)
    imports, begun = time.perf_counter() - begun, time.perf_counter()
    jax.block_until_ready(jnp.zeros(1))
    device, begun = time.perf_counter() - begun, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train.main(out=f"{folder}/ckpt", model="nano", **dict(sizes.run))
    ended = time.perf_counter()
    compiling = lambda spans: sum(overlap(events, *span) for span in spans)
    show = lambda name, seconds, compiled: [tell("main job", name, column, f"{value:.2f} s") for column, value in (
        ("time", seconds), ("of it compiling", compiled), ("without", seconds - compiled))]
    show("train.py --model nano", ended - begun, compiling([(begun, ended)]))
    show("imports in a new process, not in it", imports, 0)
    show("start of the device, not in it", device, 0)
    for name, spans in phases.items():
        show(f"{name}, {len(spans)} calls", sum(b - a for a, b in spans), compiling(spans))
    programs = [(name, end - start) for start, end, kind, name in events if kind == "backend_compile_duration"]
    seconds, times = Counter(), Counter(name for name, _ in programs)
    for name, taken in programs:
        seconds[name] += taken
    tell("main job", "programs", "time", len(programs))
    for name, taken in seconds.most_common(25):
        tell("programs of the main job", name, "compiled", f"{times[name]} times")
        tell("programs of the main job", name, "time", f"{taken:.2f} s")


def timed(function: Callable, name: str, phases: dict) -> Callable:
    """Return the function, which appends (start, end) of each call to phases[name]."""
    def call(*args, **options):
        begun = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            phases.setdefault(name, []).append((begun, time.perf_counter()))

    return call


def overlap(events: list[tuple], start: float, end: float) -> float:
    """Return the seconds between start and end that lie in at least one of the events (start, end, ...)."""
    total, last = 0.0, start
    for a, b, *_ in sorted(events):
        a, b = max(a, last), min(b, end)
        total, last = total + max(b - a, 0), max(last, b)
    return total
