"""Run the stages of a benchmark as processes, one after another, and print what they find as tables.

A crash or missing memory costs one stage. While a stage runs, the next one imports its libraries. Every result is
printed at once. If OUT is set, $OUT/NAME.json holds the results so far, $OUT/NAME.md the tables, and $OUT/NAME.log the
other output of the stages, where NAME is that of the script.

    STAGES = {"card": (function, seconds, ("module to import early",))}     # each function takes one argument
    stages.run(__file__, STAGES, ["card"], minutes=6)            # starts `python script.py --stage card`, which calls
    stages.perform(STAGES, "card", argument)

A stage calls `tell`, or `measure` for times.
"""
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

MARK = "row: "                                                   # starts a line that holds a result

# ---------------------------------------------------------------- the script's process


@dataclass
class Started:
    """A stage that waits for a line on stdin."""
    name: str
    process: subprocess.Popen
    errors: IO


def run(script: str, stages: dict, names: Sequence[str], minutes: float, options: Sequence[str] = ()) -> None:
    """Run the named stages in this order, each at most for its seconds and all in `minutes`, and print the tables.
    options: further arguments of the script."""
    report, end, waiting = Report(Path(script).stem), time.monotonic() + 60 * minutes, []
    try:
        for name, following in zip(names, [*names[1:], None]):
            if (left := end - time.monotonic()) < 5:
                report.add({"table": "stages", "row": name, "column": "error", "text": "no time left"})
                continue
            stage = waiting.pop() if waiting else start(script, name, options)
            waiting += [start(script, following, options)] if following else []
            try:
                report.follow(stage, min(stages[name][1], left))
            finally:
                stop(stage)
    finally:
        for stage in waiting:
            stop(stage)
        report.finish()


def start(script: str, name: str, options: Sequence[str]) -> Started:
    """Start a stage."""
    errors = tempfile.TemporaryFile("w+", errors="replace")      # noqa: SIM115 (it outlives this function)
    return Started(name, subprocess.Popen(
        [sys.executable, str(Path(script).resolve()), "--stage", name, *options], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", process_group=0,
        env=os.environ | {"PYTHONUNBUFFERED": "1"}), errors)


def stop(stage: Started) -> None:
    """Kill a stage and the processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(stage.process.pid, signal.SIGKILL)
    stage.process.wait()


class Report:
    """Collect the rows of all stages, print each at once, and save them."""

    def __init__(self, name: str):
        self.rows, self.since, self.peak = [], time.monotonic(), None
        self.file = Path(os.environ["OUT"], name) if "OUT" in os.environ else None

    def follow(self, stage: Started, limit: float) -> None:
        """Let a stage run for `limit` seconds, and add its rows. Say if it did not end well."""
        begun, late, other = time.monotonic(), threading.Event(), []
        timer = threading.Timer(max(limit, 0), lambda: (late.set(), stop(stage)))
        timer.start()
        with suppress(BrokenPipeError):
            stage.process.stdin.write("go\n")
            stage.process.stdin.close()
        for line in stage.process.stdout:
            if line.startswith(MARK):
                self.add(json.loads(line.removeprefix(MARK)))
            else:
                other.append(line)
        code = stage.process.wait()
        timer.cancel()
        seconds = time.monotonic() - begun
        errors = self.log(stage, other)
        if code:
            why = f"stopped after {seconds:.0f} s" if late.is_set() else f"exit {code}: {(errors or ['?'])[-1][:200]}"
            self.add({"table": "stages", "row": stage.name, "column": "error", "text": why})
        self.add({"table": "stages", "row": stage.name, "column": "seconds", "text": f"{seconds:.1f}"})

    def log(self, stage: Started, lines: list[str]) -> list[str]:
        """Append the other output of a stage to the log. Return the lines that it wrote to stderr."""
        stage.errors.seek(0)
        errors = stage.errors.read()
        if self.file:
            with open(self.file.with_suffix(".log"), "a", encoding="utf-8") as log:
                log.write(f"\n==== {stage.name}\n{''.join(lines)}{errors}\n")
        return [line for line in errors.splitlines() if line.strip()]

    def add(self, row: dict) -> None:
        """Keep and print a row. With `flops` and `ms`, add the share of the `peak` that an earlier row told."""
        self.peak = row.get("peak", self.peak)
        if "flops" in row and self.peak:
            row["text"] += f" ({row['flops'] / (row['ms'] / 1000 * self.peak):.0%})"
        self.rows.append(row)
        name = " | ".join(filter(None, (row["table"], row["row"], row["column"])))
        print(f"{time.monotonic() - self.since:4.0f} s  {name}: {row['text']}", flush=True)
        if self.file:
            self.file.with_suffix(".json").write_text(json.dumps(self.rows, indent=1))

    def finish(self) -> None:
        """Print all tables, and save them."""
        found = tables(self.rows)
        print("\n" + found, flush=True)
        if self.file:
            self.file.with_suffix(".md").write_text(found)


def tables(rows: list[dict]) -> str:
    """Return the rows {table, row, column, text} as Markdown tables, all in the order of their first appearance."""
    found = {}
    for row in rows:
        found.setdefault(row["table"], {}).setdefault(row["row"], {})[row["column"]] = row["text"]
    lines = []
    for name, of_table in found.items():
        columns = list(dict.fromkeys(row["column"] for row in rows if row["table"] == name))
        lines += [f"| {name} | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
        lines += [f"| {row} | " + " | ".join(cells.get(column, "") for column in columns) + " |"
                  for row, cells in of_table.items()] + [""]
    return "\n".join(lines)


# ---------------------------------------------------------------- the stage's process


def perform(stages: dict, name: str, argument: Any) -> None:
    """Import the modules of a stage, wait for a line on stdin, and run the stage."""
    function, _, modules = stages[name]
    for module in modules:
        with suppress(Exception):                                # a missing library is reported where it is used
            importlib.import_module(module)
    sys.stdin.readline()
    with cell("stages", name, "error"):
        function(argument)


def tell(table: str, row: str, column: str, text: Any, **more: Any) -> None:
    """Print a result for the process that collects them."""
    text = " ".join(str(text).replace("|", "/").split())
    print("\n" + MARK + json.dumps({"table": table, "row": row, "column": column, "text": text, **more}), flush=True)


@contextmanager
def cell(table: str, row: str, column: str) -> Iterator[None]:
    """Tell an error as the result, and go on."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        if "out of memory" in said.lower():
            said = "does not fit"
        elif isinstance(error, ModuleNotFoundError):
            said = f"not installed: {error.name}"
        else:
            traceback.print_exc()
            said = f"{type(error).__name__}: {said[:150]}"
        tell(table, row, column, said)


@dataclass
class Job:
    """Hold a call to time. judge: returns a remark about its result. flops: the operations of its products."""
    table: str
    row: str
    column: str
    call: Callable
    flops: float = 0
    judge: Callable | None = None


def measure(jobs: Sequence[Job], wait: Callable, rounds: int, together: int = 8) -> None:
    """Tell the time of each job. Before that, `together` jobs at a time compile. wait(result): returns when a result is
    ready."""
    def compiled(job):
        with suppress(Exception):                                # the error comes again below
            wait(job.call())

    if together > 1:
        with ThreadPoolExecutor(together) as pool:
            list(pool.map(compiled, jobs))
    for job in jobs:
        with cell(job.table, job.row, job.column):
            said = f", {job.judge(job.call())}" if job.judge else ""
            ms = 1000 * median(job.call, wait, rounds)
            tell(job.table, job.row, job.column, f"{ms:.{1 if ms >= 20 else 2}f} ms{said}", ms=ms,
                 **({"flops": job.flops} if job.flops else {}))


def median(call: Callable, wait: Callable, rounds: int) -> float:
    """Return the median of the seconds that a call takes. Short calls are sent several at a time: a program's start
    then overlaps with the one before it, as in a training loop."""
    def seconds(n):
        begun = time.perf_counter()
        for _ in range(n):
            result = call()
        wait(result)
        return time.perf_counter() - begun

    seconds(1)
    n = int(np.clip(0.02 / seconds(1), 1, 20))
    rounds = int(np.clip(3 / seconds(n), 3, rounds))             # at most three seconds or so
    return float(np.median([seconds(n) / n for _ in range(rounds)]))
