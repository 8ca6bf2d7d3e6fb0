"""Measure size and speed of dashboards, as Markdown tables: python bench/dashboards.py [pages|memory] [FEATURES ...]

memory: the memory that the statistics of 1,000 images of 256 x 256 pixels need besides the model and the SAE, for image
tokens in one step, and for both streams (256 text tokens) in four steps. Codes are random: 32 features per token, from
1,024 features per image, drawn with a heavy-tailed popularity. Each row runs in its own process.

pages: pages from random statistics of 1,000 images with 64 image tokens each. Every feature has all its examples, and a
fifth of the tokens fire in each map, more than for real features. First paint and sorting are medians of nine runs in
Chromium, from disk, with a cold cache.
"""
import dataclasses
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_dash import large

import dash
import pages
import stats


def build(features: int, folder: Path, images: int = 1000) -> tuple[float, float, int]:
    """Write a dashboard. Return seconds, megabytes and number of files."""
    found, rng = large(features, images), np.random.default_rng(1)
    found.quantile_image[:] = rng.integers(0, images, found.quantile_image.shape)
    found.quantile_value[:] = rng.random(found.quantile_value.shape)
    for maps in (found.top_map, found.quantile_map):
        maps[:] = rng.random(maps.shape, np.float32) * (rng.random(maps.shape, np.float32) < 0.2)
    start = time.perf_counter()
    pages.write(found, folder)
    seconds = time.perf_counter() - start
    (folder / "images").mkdir()
    for i in range(images):
        image = rng.integers(0, 256, (16, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        dash.save_image(folder / "images" / f"{i}.webp", image)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return seconds, sum(path.stat().st_size for path in files) / 1e6, len(files)


def browse(folder: Path, runs: int = 9) -> list[float]:
    """Return milliseconds to the first paint of the index, to the filled table, and to sort it."""
    from playwright.sync_api import sync_playwright
    paints, fills, sorts = [], [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"),
                                             args=["--no-sandbox", "--disable-gpu"])
        for _ in range(runs):
            page = browser.new_page()
            page.goto((folder / "index.html").as_uri())
            page.wait_for_selector("#table tbody tr")
            fills.append(page.evaluate("performance.now()"))
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            sorts.append(page.evaluate("(() => { const t = performance.now(); sortBy('max', -1); "
                                       "document.body.offsetHeight; return performance.now() - t; })()"))
            page.close()
        browser.close()
    return [statistics.median(values) for values in (paints, fills, sorts)]


def pages_table(features: Sequence[int]) -> None:
    """Print the table of pages, a row per number of features."""
    print("| features | seconds to write | MB | files | first paint, ms | filled, ms | sort, ms |\n|" + "---:|" * 7)
    for count in features:
        with tempfile.TemporaryDirectory() as folder:
            seconds, size, files = build(count, Path(folder))
            paint, fill, sort = browse(Path(folder))
        cells = (f"{count:,}", *(f"{v:,.0f}" for v in (seconds, size, files, paint, fill, sort)))
        print(f"| {' | '.join(cells)} |", flush=True)


def memory_table(features: Sequence[int]) -> None:
    """Print the table of memory; each row is a subprocess."""
    print("| features | activations of | peak memory, GB | saved state, MB | statistics, MB | pairs that fire "
          "together, millions | ms per image | s to finish |\n|---:|---|" + "---:|" * 6, flush=True)
    for count in features:
        for timesteps, text in ((1, 0), (4, 256)):
            subprocess.run([sys.executable, __file__, "row", str(count), str(timesteps), str(text)], check=True)


def memory_row(features: int, timesteps: int, text: int, images: int = 1000, k: int = 32, width: int = 1024) -> None:
    """Collect random statistics in this process, and print the row."""
    layout, rng = stats.Layout(timesteps, text, (16, 16)), np.random.default_rng(0)
    counts, popularity = stats.Counts(features, layout), 2 * np.log(rng.exponential(size=features))
    before, took, state = peak(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(images):
            here = np.argpartition(-(popularity + rng.gumbel(size=features)), width)[:width]
            at = np.argpartition(rng.random((layout.positions, width), np.float32), k, 1)[:, :k]
            start = time.perf_counter()
            counts.add(i, rng.lognormal(size=at.shape).astype(np.float32), here[at], 0)
            took += time.perf_counter() - start
            if i % (images // 4) == images // 4 - 1:             # as dash.py does every minute
                dash.Partial(Path(folder), {}).save(counts.settled(), i)
                state = (Path(folder) / "partial.safetensors").stat().st_size
        pairs, start = len(counts.a["pair"]), time.perf_counter()
        found = counts.finish(rng.standard_normal((features, 64), np.float32), np.zeros((images, 0), bool),
                              np.zeros((0, features), np.float32),
                              {"images": images, "layout": dataclasses.asdict(layout)})
        stats.save(Path(folder) / "collect", found)
        seconds = time.perf_counter() - start
        size = (Path(folder) / "collect" / "stats.safetensors").stat().st_size
    what = f"both streams, {timesteps} steps" if text else "image tokens, one step"
    print(f"| {features:,} | {what} | {peak() - before:.2f} | {state / 1e6:,.0f} | {size / 1e6:,.0f} | "
          f"{pairs / 1e6:.1f} | {1e3 * took / images:.0f} | {seconds:.0f} |", flush=True)


def peak() -> float:
    """Return the peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9         # Linux counts KiB


def main(what: str = "pages", *features: str) -> None:
    """Print one of the tables; "row" is for internal use."""
    features = [int(n) for n in features]
    if what == "row":
        memory_row(*features)
    elif what == "memory":
        memory_table(features or (16384, 65536))
    else:
        pages_table(features or (2048, 16384))


if __name__ == "__main__":
    main(*sys.argv[1:])
