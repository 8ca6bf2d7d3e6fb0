"""Make the README's pictures of a dashboard, and docs/dash, from the default run. Needs playwright and Chromium.

    python train.py && python dash.py ckpt/ --features 0:40 && python bench/pictures.py

docs/index.webp and docs/feature.webp are screenshots of the index and of one feature: the feature with a page that
predicts an attribute of the scene best. docs/dash is the dashboard without what `dash.py` collected.
docs/steering.webp and docs/truth.svg come from bench/steering.py and bench/truth.py.
"""
import io
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

import session
import stats

VIEW = {"width": 1280, "height": 1100}


def main(dashboard: str = "dash", out: str = str(ROOT / "docs"), feature: int | None = None, **unknown) -> None:
    """Write the pictures into the folder --out, from the finished dashboard in a folder. --feature: the one to show."""
    session.no_unknown_flags(unknown)
    source, out = Path(dashboard), Path(out)
    found = stats.load(source / "collect")
    shown = sorted(int(file.stem) for file in (source / "feature").glob("*.html"))
    feature = best(found, shown) if feature is None else feature
    shutil.rmtree(out / "dash", ignore_errors=True)
    shutil.copytree(source, out / "dash", ignore=shutil.ignore_patterns("collect"))
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEW)
        for name, file in (("index", "index.html"), ("feature", f"feature/{feature}.html")):
            page.goto((out / "dash" / file).resolve().as_uri())
            page.wait_for_load_state("networkidle")
            Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(out / f"{name}.webp", quality=85, method=6)
            print(out / f"{name}.webp")
        browser.close()


def best(found: stats.Collected, shown: list[int]) -> int:
    """Return the feature of `shown` with the AUROC farthest from 0.5; the most frequent one if no scene is known."""
    told = [found.best_attribute(f) for f in shown]
    score = [abs(one[1] - 0.5) if one else found.images[f] / 1e9 for f, one in zip(shown, told)]
    return shown[int(np.argmax(score))]


if __name__ == "__main__":
    session.command(main)
