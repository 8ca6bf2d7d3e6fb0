"""How large and how quick dashboards are, as a Markdown table: python tests/bench_dash.py [--features 2048,16384]

Random statistics of 1,000 images: 64 image tokens a picture, every feature with all of its examples, and maps in which
a fifth of the tokens fire; real features fire at fewer. First paint and sorting are medians of nine in Chromium, from
disk, with a cold cache.
"""
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_dash import large

import dash
import pages


def build(features, folder, images=1000):
    """A dashboard; returns seconds, megabytes and files."""
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


def browse(folder, runs=9):
    """Milliseconds to the index's first paint, to the filled table, and to sort it."""
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


def main(features=(2048, 16384)):
    print("| features | seconds to write | MB | files | first paint, ms | filled, ms | sort, ms |\n|" + "---:|" * 7)
    for count in features:
        with tempfile.TemporaryDirectory() as folder:
            seconds, size, files = build(count, Path(folder))
            paint, fill, sort = browse(Path(folder))
        cells = (f"{count:,}", *(f"{v:,.0f}" for v in (seconds, size, files, paint, fill, sort)))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main([int(n) for n in sys.argv[2].split(",")] if sys.argv[1:2] == ["--features"] else (2048, 16384))
