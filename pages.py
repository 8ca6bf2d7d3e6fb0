"""Write the HTML pages of a dashboard from what `dash.py` collected. The pages open directly from disk.

Copy `templates/` and `variance.py` with this file. It needs jinja2, numpy, tqdm. `found` is a `stats.Collected`: arrays
over F features.

    index.html        summary numbers, training curves, a scatter plot and the table of all features
    feature/7.html    one feature: examples with heatmaps, statistics, similar features
    run.html          configuration, definitions, how to load the SAE
    steer/            steered images, if `dash.py --steer` drew any
    images/, maps/    each image once; heatmaps for the index, as scripts, because pages from disk cannot fetch data
"""
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from tqdm import tqdm

import variance

if TYPE_CHECKING:
    from stats import Collected

SCALES = (0, 1, 2, 4, 8)                                         # the factors of a steering strip
CHUNK = 256                                                      # features per file of index heatmaps
CONTROLS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n"} | {127: "\u2421"}
TEMPLATES = Path(__file__).with_name("templates")
COLUMNS = {"feature": "Feature", "density": "Density", "max": "Max activation", "mean": "Mean activation",
           "images": "Images", "prompt": "Prompt", "noise": "Noise", "spread": "Spread",
           "concentration": "Concentration", "auroc": "Best AUROC"}
QUARTERS = ("Highest quarter, without the top examples", "Second quarter", "Third quarter", "Lowest quarter")


def write(found: "Collected", folder: Path | str, wanted: Sequence[int] | None = None) -> None:
    """Write index.html, run.html, a page per feature in `wanted` (default: all), the style and the script.

    The pages fetch no data, from disk or from a server. Prompts are untrusted: they reach a page only through a
    template, which escapes them, or as JSON in a script file.
    """
    folder, wanted = Path(folder), list(range(found.features)) if wanted is None else wanted
    (folder / "feature").mkdir(parents=True, exist_ok=True)
    (folder / "maps").mkdir(exist_ok=True)
    for name in ("dash.css", "dash.js"):
        shutil.copyfile(TEMPLATES / name, folder / name)
    write_text(folder / "data.js", f"const DATA = {json.dumps(index_data(found, wanted))};\n")
    for start in range(0, found.features, CHUNK):
        maps = {f: thumbnail(found, f) for f in range(start, min(start + CHUNK, found.features))}
        write_text(folder / "maps" / f"{start // CHUNK}.js", f"addMaps({json.dumps(maps)});\n")
    render = renderer(found)
    write_text(folder / "index.html", render("index", **index_page(found, wanted)))
    write_text(folder / "run.html", render("run", **run_page(found)))
    linked = set(wanted)
    for place, f in enumerate(tqdm(wanted, unit="page", desc="writing", dynamic_ncols=True)):
        turn = [(rel, wanted[i] if 0 <= i < len(wanted) else None, label, key) for rel, i, label, key in (
            ("prev", place - 1, "← Previous", "left arrow key"), ("next", place + 1, "Next →", "right arrow key"))]
        steered = (folder / "steer" / f"{f}-{SCALES[-1]}.webp").is_file()
        content = render("feature", root="../", turn=turn, **feature_page(found, f, linked, steered))
        write_text(folder / "feature" / f"{f}.html", content)


def renderer(found: "Collected") -> Callable:
    """Return render(kind, **values) → HTML. It escapes all values and makes control characters visible."""
    def clean(value):
        if isinstance(value, str) and not hasattr(value, "__html__"):
            return value.encode("utf-8", "replace").decode().translate(CONTROLS)
        return value

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, finalize=clean,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    info = found.info
    templates = {kind: environment.get_template(f"{kind}.html") for kind in ("index", "feature", "run")}
    what = f"{Path(info.get('model', 'model')).name or 'model'}, layer {info['layer']}, {info['site']}"
    height, width = (info["size"], info["size"]) if isinstance(info["size"], int) else info["size"]
    shared = {"root": "", "what": what, "height": height, "width": width}
    return lambda kind, **values: templates[kind].render(shared | {"kind": kind} | values)


def write_text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


def number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}"


# ---- the index


def index_data(found: "Collected", wanted: Sequence[int]) -> dict[str, Any]:
    """Return the columns of the feature table, for dash.js."""
    best = [found.best_attribute(f) for f in wanted]
    short = lambda array: [float(f"{v:.4g}") for v in np.asarray(array, np.float64)[wanted]]
    return {"feature": wanted, "density": short(found.density), "max": short(found.maximum), "mean": short(found.mean),
            "images": found.images[wanted].tolist(), "spread": short(found.spread),
            "prompt": short(np.nan_to_num(found.variance[:, 1])), "noise": short(np.nan_to_num(found.variance[:, 2])),
            "concentration": short(found.concentration),
            "top": [[i for i in row if i >= 0] for row in found.top_image[wanted].tolist()],
            "attribute": [b[0] if b else "" for b in best], "auroc": [float(f"{b[1]:.4g}") if b else 0 for b in best],
            "prompts": found.info["prompts"], "grid": found.info["layout"]["grid"], "chunk": CHUNK}


def index_page(found: "Collected", wanted: Sequence[int]) -> dict[str, Any]:
    """Return the values of the index template."""
    dead = found.fired == 0
    evaluation = ((found.info.get("checkpoint", {}).get("metadata") or {}).get("evaluation") or {}).get("SAE", {})
    facts = [("Features", f"{found.features:,}"), ("Never fired", f"{int(dead.sum()):,} ({dead.mean():.1%})"),
             ("L0", number(found.fired.sum() / max(found.info["tokens"], 1), 3)),
             ("FVU (held out)", number(evaluation["fvu_standardized"], 3) if "fvu_standardized" in evaluation else "–"),
             *followers(found), ("Images", f"{found.info['images']:,}"), ("Tokens", f"{found.info['tokens']:,}")]
    columns = {k: v for k, v in COLUMNS.items() if k != "auroc" or found.info["attributes"]}
    return {"facts": facts, "curves": curves(found.info.get("metrics", [])), "columns": columns, "first": wanted[0]}


def followers(found: "Collected") -> list[tuple[str, str]]:
    """Return how many alive features follow the prompt, if that is known."""
    follow = variance.follows_prompt(found.variance[~np.isnan(found.variance).any(1)])
    return [("Follow the prompt", f"{int(follow.sum()):,} ({follow.mean():.1%})")] if len(follow) else []


def curves(metrics: Iterable[dict]) -> list[dict]:
    """Return small line charts of the training run, from the lines of metrics.jsonl."""
    charts = []
    for name, label in (("loss", "Loss"), ("fvu", "FVU"), ("dead", "Dead features"), ("l0", "L0")):
        points = [(line["step"], line[name]) for line in metrics if np.isfinite(line.get(name, np.nan))]
        if len(points) < 2:
            continue
        x, y = np.array(points, float).T
        top = max(np.quantile(y, 0.98), 1e-12)                   # cuts the first steps, which would flatten the rest
        xs, ys = 300 * (x - x[0]) / max(x[-1] - x[0], 1), 80 - 76 * np.clip(y / top, 0, 1)
        charts.append({"label": label, "count": len(points), "last": number(y[-1], 3), "step": f"{int(x[-1]):,}",
                       "points": " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys))})
    return charts


# ---- a feature


def feature_page(found: "Collected", f: int, linked: set[int], steered: bool = False) -> dict[str, Any]:
    """Return the values of the feature template. linked: features that have a page. steered: steer/ has its images."""
    info, fires = found.info, bool(found.fired[f])
    facts = [("Density", number(found.density[f])), ("Max activation", number(found.maximum[f])),
             ("Mean activation", number(found.mean[f])), ("Images", f"{found.images[f]:,} of {info['images']:,}")]
    if found.layout.image_tokens:
        facts += [("Area", f"{found.area[f]:.1%}"), ("Concentration", number(found.concentration[f], 3)),
                  ("Spread", number(found.spread[f], 3))]
    if best := found.best_attribute(f) if fires else None:
        facts.append((f"AUROC for {best[0]}", number(best[1], 3)))
    values = {"f": f, "facts": facts, "top": [], "nearest": neighbours(found, found.nearest[f], found.nearest_cosine[f],
              linked), "together": neighbours(found, found.together[f], found.together_jaccard[f], linked)}
    if not fires:
        return values
    quarters = zip(QUARTERS, found.quantile_value[f], found.quantile_image[f], found.quantile_map[f])
    some = [(name, examples(found, f, *items)) for name, *items in quarters]
    return values | {
        "top": examples(found, f, found.top_value[f], found.top_image[f], found.top_map[f]),
        "quantiles": [(name, items) for name, items in some if items], "strip": strip(found, f) if steered else [],
        "mean_map": mean_map(found, f), "histogram": histogram(found, f), "attributes": attributes(found, f),
        "explained": explained(found, f)}


def mean_map(found: "Collected", f: int) -> dict | None:
    """Return the heatmap of the feature's mean activation at each image token; None without image tokens."""
    if not found.layout.image_tokens:
        return None
    values = found.mean_map[f]
    return heatmap(values, found.layout.grid, values.max(),
                   f"Mean activation at each image token; the maximum is {number(values.max())}")


def explained(found: "Collected", f: int) -> list[tuple[str, str]]:
    """Return (cause, share of the feature's variance); nothing if it is not known."""
    causes = zip(("position", "prompt", "noise", "prompt × noise"), found.variance[f])
    return [] if np.isnan(found.variance[f]).any() else [(name, f"{share:.0%}") for name, share in causes]


def attributes(found: "Collected", f: int, shown: int = 5) -> list[tuple[str, str]]:
    """Return (attribute of the scene, AUROC) for the attributes that the feature predicts best."""
    order = np.argsort(-np.abs(np.nan_to_num(found.auroc[f], nan=0.5) - 0.5), kind="stable")[:shown]
    return [(found.info["attributes"][a], number(found.auroc[f, a], 3)) for a in order]


def histogram(found: "Collected", f: int) -> dict:
    """Return the chart of the feature's activations above zero."""
    counts, edges = found.histogram[f], [*found.info["edges"], np.inf]
    used = np.flatnonzero(counts)
    low, high = used[0], used[-1] + 1
    titles = [f"{edges[i]:.3g} to {edges[i + 1]:.3g}: {counts[i]:,}" for i in range(low, high)]
    label = f"Histogram of {counts.sum():,} activations from {edges[low]:.3g} to {found.maximum[f]:.4g}"
    return bars(np.log1p(counts[low:high]) / np.log1p(counts.max()), titles, label, f"{edges[low]:.3g}",
                f"{edges[high]:.3g}")


def bars(heights: np.ndarray, titles: Sequence[str], label: str, low: str, high: str) -> dict:
    """Return a bar chart for the macro `histogram` of parts.html; heights are in 0…1."""
    width = 300 / len(heights)
    return {"label": label, "low": low, "high": high, "bars": [
        {"x": f"{i * width:.2f}", "y": f"{100 - 96 * h:.2f}", "width": f"{max(width - 1, 0.5):.2f}",
         "height": f"{96 * h:.2f}", "title": title} for i, (h, title) in enumerate(zip(heights, titles)) if h]}


def strip(found: "Collected", f: int) -> list[tuple[str, str]]:
    """Return (name, file) of the best example with the feature's activations multiplied by each of `SCALES`."""
    names = {0: "ablated", 1: "×1, unchanged"}
    files = {1: f"images/{found.top_image[f, 0]}.webp"}
    return [(names.get(scale, f"×{scale}"), files.get(scale, f"steer/{f}-{scale}.webp")) for scale in SCALES]


def examples(found: "Collected", f: int, values: np.ndarray, images: np.ndarray, maps: np.ndarray) -> list[dict]:
    return [example(found, f, *item) for item in zip(values, images, maps) if item[1] >= 0]


def example(found: "Collected", f: int, value: float, image: int, values: np.ndarray) -> dict:
    """Return one image with its prompt, its activation, and its heatmap at the timestep of the maximum."""
    layout = found.layout
    step = int(layout.by_step(values).max(1).argmax())
    shown = {"image": image, "value": number(value), "prompt": found.info["prompts"][image], "map": None, "words": [],
             "padding": None, "when": f", step {step + 1} of {layout.timesteps}" if layout.timesteps > 1 else ""}
    if layout.image_tokens:
        shown["map"] = heatmap(layout.image_part(values)[step], layout.grid, found.maximum[f])
    if layout.text_tokens:
        shown |= highlighted(found.info["words"][image], layout.text_part(values)[step], found.maximum[f])
    return shown


def highlighted(words: Sequence[str], values: np.ndarray, most: float) -> dict:
    """Return the text tokens with their activations. Padding tokens are only counted."""
    shade = lambda v: {"share": f"{v / most:.3f}", "value": number(v)} if v > 0 else {"share": ""}
    padding = values[len(words):]
    counted = {"text": f"{(padding > 0).sum()} of {len(padding)} padding tokens"}
    return {"words": [{"text": word} | shade(v) for word, v in zip(words, values)],
            "padding": counted | shade(padding.max()) if (padding > 0).any() else None}


def neighbours(found: "Collected", others: np.ndarray, values: np.ndarray, linked: set[int]) -> list[dict]:
    return [{"feature": other, "value": number(value, 3), "image": int(found.top_image[other, 0]),
             "linked": other in linked} for other, value in zip(others.tolist(), values) if other >= 0]


def heatmap(values: np.ndarray, grid: tuple[int, int], most: float, label: str = "") -> dict:
    return {"places": sparse(values), "grid": grid, "most": number(most, 6), "label": label}


def sparse(values: np.ndarray) -> str:
    """Write a map as text for dash.js: "index value" of each value above zero, joined by commas."""
    values = np.asarray(values).reshape(-1)
    return ",".join(f"{i} {values[i]:.5g}" for i in np.flatnonzero(values > 0))


def thumbnail(found: "Collected", f: int) -> str:
    """Return the map of the best example, for the index."""
    layout = found.layout
    if not layout.image_tokens:
        return ""
    parts = layout.image_part(found.top_map[f, 0])
    return sparse(parts[int(parts.max(1).argmax())])


# ---- the run


def run_page(found: "Collected") -> dict[str, Any]:
    """Return the values of the run template."""
    info = found.info
    checkpoint = info.get("checkpoint", {})
    rows = {"model": info.get("model"), "layer": info["layer"], "site": info["site"], "d_sae": found.features,
            "k": checkpoint.get("k"), "d_in": checkpoint.get("d_in"),
            "prompts": f"{info['images']:,}, from {info.get('source', 'a list')}",
            "images": f"{info['size']} pixels, {info['steps']} sampling steps",
            "noise": f"seed {info['seed']}, image numbers from {info['first_noise']:,}"}
    rows |= flat(checkpoint.get("metadata") or {})
    return {"curves": curves(info.get("metrics", [])), "scores": scores(info.get("scores")), "configuration": rows,
            "width": checkpoint.get("d_in", "D")}


def scores(found: dict | None) -> dict[str, Any] | None:
    """Return the results of score.py as a table by noise level; None if there are none or their format is unknown."""
    columns = {"t": "Noise level", "clean": "Original", "spliced": "SAE spliced in", "zero": "Zero ablation",
               "mean": "Mean ablation", "recovered_zero": "Recovered (zero)", "recovered_mean": "Recovered (mean)"}
    try:
        rows = [*found["per_timestep"], {"t": "all"} | found["loss"], {"t": "trained"} | found["loss_where_trained"]]
        cells = [[cell(row[name]) + "*" * (name == "t" and row.get("trained", False)) for name in columns]
                 for row in rows]
        image, stats = found["image"], found["sae"]
        facts = [("Loss recovered", cell(found["loss"]["recovered_zero"])),
                 ("… at trained levels", cell(found["loss_where_trained"]["recovered_zero"])),
                 ("FVU (raw)", cell(stats["fvu"])), ("FVU (standardized)", cell(stats["fvu_standardized"])),
                 ("L0", cell(stats["l0"])), ("Dead features", f"{stats['dead']:.1%}"),
                 *((f"Image RMSE: {columns[k]}", cell(image[k]["rmse"])) for k in ("spliced", "zero", "mean")),
                 ("Median decoder norm", cell(found["decoder_norm"]["median"])),
                 ("Median encoder–decoder cosine", cell(found["encoder_decoder_cosine"]["median"]))]
        return {"facts": facts, "columns": list(columns.values()), "rows": cells, "steps": image["steps"],
                "origin": f"{found['images']} images, {found['data']}", "density": density(stats["density"]),
                "never": f"{int(stats['density']['never']):,}"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def cell(value: Any) -> str:
    return "–" if value is None else number(value, 3) if isinstance(value, (int, float)) else str(value)


def density(found: dict) -> dict:
    """Return a histogram of the features' density (share of tokens on which they fire), with a log axis."""
    starts, counts = [float(x) for x in found["log10_from"]], [int(n) for n in found["features"]]
    titles = [f"density from 1e{start:g}: {n:,} features" for start, n in zip(starts, counts)]
    return bars(np.array(counts) / max(*counts, 1), titles, f"Histogram of the density of {sum(counts):,} features",
                f"1e{starts[0]:g}", "1")


def flat(values: dict, prefix: str = "") -> dict:
    """Flatten nested dicts to one dict, with names joined by dots."""
    out = {}
    for name, value in values.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out
