"""Make the README's pictures, and docs/dash, from the default run. This needs playwright and Chromium.

    python train.py && python dash.py ckpt/
    python steer.py ckpt/ "a red cube" --set "67+8, 93*0" --box 1,3,6,7 --grid 0.5,1 && python bench/pictures.py

docs/index.webp and docs/feature.webp are screenshots of the index and of the feature that predicts an attribute of the
scene best. docs/dash has the pages of a few features, and the images on them. docs/steered.webp is steer/steer.png.
Other pictures come from bench/nf4.py, bench/steering.py and bench/truth.py.
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

import pages
import session
import stats

VIEW = {"width": 1280, "height": 1100}
FEATURES = (*range(12), 67, 93)                                  # of docs/dash


def main(dashboard: str = "dash", out: str = str(ROOT / "docs"), feature: int | None = None, **unknown) -> None:
    """Write the pictures into the folder --out, from the finished dashboard in a folder. --feature: the one to show."""
    session.no_unknown_flags(unknown)
    source, out = Path(dashboard), Path(out)
    found = stats.load(source / "collect")
    feature = best(found) if feature is None else feature
    shutil.rmtree(out / "dash", ignore_errors=True)
    (out / "dash" / "images").mkdir(parents=True)
    few = list(FEATURES)
    for i in {*found.top_image[few].flat, *found.quantile_image[few].flat} - {-1}:
        shutil.copyfile(source / "images" / f"{i}.webp", out / "dash" / "images" / f"{i}.webp")
    pages.write(found, out / "dash", few)
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEW)
        for name, file in (("index", "index.html"), ("feature", f"feature/{feature}.html")):
            page.goto((source / file).resolve().as_uri())
            page.wait_for_load_state("networkidle")
            Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(out / f"{name}.webp", quality=85, method=6)
            print(out / f"{name}.webp")
        browser.close()
    Image.open("steer/steer.png").save(out / "steered.webp", quality=90, method=6)


def best(found: stats.Collected) -> int:
    """Return the feature with the AUROC farthest from 0.5."""
    return int(np.nanargmax(np.nanmax(np.abs(found.auroc - 0.5), 1)))


if __name__ == "__main__":
    session.command(main)
