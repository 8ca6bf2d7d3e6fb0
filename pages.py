"""The HTML of dashboards: what `dash.py` collected → pages that open from disk, offline, on any machine.

Copy it with `dash.css` and `dash.js`; it needs numpy and tqdm. `found` is a `dash.Collected`: arrays over F features.

    index.html        headline numbers, training curves, a scatter, and the table of all features
    feature/7.html    a feature: examples under their heatmaps, statistics, neighbours
    run.html          configuration, definitions, how to load the SAE
    steer/            the images of strips, where `dash.py --steer` drew some
    images/, maps/    each image once; the index's heatmaps in chunks, as scripts, since pages from disk cannot fetch
"""
import html
import json
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

SCALES = (0, 1, 2, 4, 8)                                         # of a strip: what a feature is multiplied by
CHUNK = 256                                                      # features whose thumbnails' maps share a file
CSP = "default-src 'none'; img-src 'self' file:; style-src 'self' file: 'unsafe-inline'; script-src 'self' file:"
CONTROLS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n"} | {127: "\u2421"}


def write(found, folder, wanted=None):
    """Write index.html, run.html, a page per feature of `wanted` (all), style and script into `folder`.

    Nothing is fetched when they are opened, from disk or from a server. Prompts are untrusted: they reach a page only
    through `text` or as JSON in a script file.
    """
    folder = Path(folder)
    wanted = list(range(found.features)) if wanted is None else wanted
    (folder / "feature").mkdir(parents=True, exist_ok=True)
    (folder / "maps").mkdir(exist_ok=True)
    for name in ("dash.css", "dash.js"):
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    write_text(folder / "data.js", f"const DATA = {json.dumps(index_data(found, wanted))};\n")
    for start in range(0, found.features, CHUNK):
        maps = {f: packed(found, found.top_map[f, 0]) for f in range(start, min(start + CHUNK, found.features))}
        write_text(folder / "maps" / f"{start // CHUNK}.js", f"addMaps({json.dumps(maps)});\n")
    write_text(folder / "index.html", index_page(found, wanted))
    write_text(folder / "run.html", run_page(found))
    linked = set(wanted)
    for place, f in enumerate(tqdm(wanted, unit="page", desc="writing", dynamic_ncols=True)):
        around = [wanted[i] if 0 <= i < len(wanted) else None for i in (place - 1, place + 1)]
        drawn = (folder / "steer" / f"{f}-{SCALES[-1]}.webp").is_file()
        write_text(folder / "feature" / f"{f}.html", feature_page(found, f, *around, linked, drawn))


def text(value):
    """Untrusted text for HTML, between tags or in a quoted attribute; control characters become their pictures."""
    return html.escape(str(value).encode("utf-8", "replace").decode().translate(CONTROLS), quote=True)


def write_text(path, content):
    path.write_text(content, encoding="utf-8")


def number(value, digits=4):
    return f"{value:.{digits}g}"


def title_of(found):
    info = found.info
    return f"{Path(info.get('model', 'model')).name or 'model'}, layer {info['layer']}, {info['site']}"


def page(found, title, body, *, kind, root=""):
    """A whole page. body: HTML. root: the way to the dashboard's folder."""
    scripts = "".join(f'<script src="{root}{name}" defer></script>'
                      for name in (["data.js"] if kind == "index" else []) + ["dash.js"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{CSP}">
<title>{text(title)} · {text(title_of(found))}</title>
<link rel="stylesheet" href="{root}dash.css">
{scripts}
</head>
<body data-page="{kind}">
<a class="skip" href="#main">Skip to content</a>
{body}
</body>
</html>
"""


def header(found, root, extra=""):
    return f"""<header><nav aria-label="Pages"><a href="{root}index.html">All features</a>
<a href="{root}run.html">Run</a>{extra}</nav>
<p class="what">{text(title_of(found))}</p>
<label class="heat">Heatmap <input type="range" id="strength" min="0" max="100" value="70"></label></header>"""


def figures(rows):
    """A list of (name, value as text)."""
    return '<dl class="numbers">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in rows) + "</dl>"


# ---- the index


def index_data(found, wanted):
    """Columns of the index, feature by feature, for dash.js."""
    best = [found.best_attribute(f) for f in wanted]
    short = lambda array: [float(f"{v:.4g}") for v in np.asarray(array, np.float64)[wanted]]
    return {"feature": wanted, "density": short(found.density), "max": short(found.maximum), "mean": short(found.mean),
            "images": found.images[wanted].tolist(), "spread": short(found.spread),
            "concentration": short(found.concentration),
            "top": [[i for i in row if i >= 0] for row in found.top_image[wanted].tolist()],
            "attribute": [b[0] if b else "" for b in best], "auroc": [float(f"{b[1]:.4g}") if b else 0 for b in best],
            "prompts": found.info["prompts"], "grid": found.info["layout"]["grid"], "chunk": CHUNK}


COLUMNS = {"feature": "Feature", "density": "Density", "max": "Max", "mean": "Mean", "images": "Images",
           "spread": "Spread", "concentration": "Concentration", "auroc": "Scene truth"}


def index_page(found, wanted):
    dead = found.fired == 0
    evaluation = found.info.get("checkpoint", {}).get("metadata", {}).get("evaluation", {}).get("SAE", {})
    facts = [("Features", f"{found.features:,}"), ("Never fired here", f"{int(dead.sum()):,} ({dead.mean():.1%})"),
             ("L0", number(found.fired.sum() / max(found.info["tokens"], 1), 3)),
             ("FVU, held out", number(evaluation["fvu_standardized"], 3) if "fvu_standardized" in evaluation else "–"),
             ("Images", f"{found.info['images']:,}"), ("Tokens", f"{found.info['tokens']:,}")]
    columns = {k: v for k, v in COLUMNS.items() if k != "auroc" or found.info["attributes"]}
    heads = '<th scope="col">Best example</th>' + "".join(
        f'<th scope="col" aria-sort="none"><button type="button" data-sort="{k}">{v}</button></th>'
        for k, v in columns.items())
    body = f"""{header(found, "")}
<main id="main"><h1>Features of {text(title_of(found))}</h1>
{figures(facts)}
<div class="wide">{curves(found.info.get("metrics", []))}
<section aria-labelledby="map"><h2 id="map">Density against maximum</h2>
<div class="plot"><canvas id="scatter" role="img"
aria-label="Scatter plot of the density of each feature against its maximum"></canvas><output id="dot"></output></div>
<p class="hint">Each dot is a feature that fires; click it to open it. The table below holds the same numbers.</p>
</section></div>
<section aria-labelledby="all"><h2 id="all">All features</h2>
<form id="filters" class="filters">
<label>Prompts of top examples contain <input type="search" id="search" autocomplete="off"></label>
<label>Density from <input type="number" id="low" min="0" max="1" step="any" placeholder="0"></label>
<label>to <input type="number" id="high" min="0" max="1" step="any" placeholder="1"></label>
<label>Show <select id="alive"><option value="alive">alive</option><option value="dead">dead</option>
<option value="all">all</option></select></label>
<output id="count" aria-live="polite"></output></form>
<div class="scroll" tabindex="0" role="region" aria-label="Table of features"><table id="table"><thead><tr>{heads}</tr>
</thead><tbody></tbody></table></div>
<nav class="pager" aria-label="Parts of the table"><button type="button" id="before">Previous</button>
<output id="part"></output><button type="button" id="after">Next</button></nav>
<noscript><p>The table needs JavaScript, <a href="feature/{wanted[0]}.html">features' pages</a> do not.</p></noscript>
</section></main>"""
    return page(found, "Features", body, kind="index")


def curves(metrics):
    """Small line charts of the training run, from the lines of metrics.jsonl."""
    if len(metrics) < 2:
        return ""
    charts = []
    for name, label in (("loss", "Loss"), ("fvu", "FVU"), ("dead", "Dead"), ("l0", "L0")):
        points = [(line["step"], line[name]) for line in metrics if np.isfinite(line.get(name, np.nan))]
        if len(points) < 2:
            continue
        x, y = np.array(points, float).T
        top = max(np.quantile(y, 0.98), 1e-12)                   # the first steps would flatten all others
        xs, ys = 300 * (x - x[0]) / max(x[-1] - x[0], 1), 80 - 76 * np.clip(y / top, 0, 1)
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys))
        charts.append(f'<figure><svg viewBox="0 0 300 84" preserveAspectRatio="none" role="img" aria-label="{label} '
                      f'over {len(points)} logged steps, last {number(y[-1], 3)}"><polyline points="{line}"/></svg>'
                      f"<figcaption>{label} <b>{number(y[-1], 3)}</b> at step {int(x[-1]):,}</figcaption></figure>")
    return f'<section aria-label="Training"><h2>Training</h2><div class="curves">{"".join(charts)}</div></section>'


# ---- a feature


def feature_page(found, f, before, after, linked, steered=False):
    """steered: whether the images of its strip are in the folder steer."""
    turn = "".join(f'<a rel="{rel}" href="{other}.html" title="{key}">{label}</a>' if other is not None else
                   f'<span class="off">{label}</span>'
                   for rel, other, label, key in (("prev", before, "← Previous", "left arrow key"),
                                                  ("next", after, "Next →", "right arrow key")))
    best = found.best_attribute(f) if found.fired[f] else None
    facts = [("Density", number(found.density[f])), ("Max", number(found.maximum[f])), ("Mean", number(found.mean[f])),
             ("Images", f"{found.images[f]:,} of {found.info['images']:,}")]
    if found.info["layout"]["grid"][0]:
        facts += [("Area", f"{found.area[f]:.1%}"), ("Concentration", number(found.concentration[f], 3)),
                  ("Spread", number(found.spread[f], 3))]
    if best:
        facts.append((f"AUROC of {text(best[0])}", number(best[1], 3)))
    if not found.fired[f]:
        content = '<p class="dead">This feature never fired on these prompts.</p>'
    else:
        parts = overview(found, f), strip(found, f) if steered else "", examples(found, f), quantiles(found, f)
        content = "\n".join(filter(None, parts))
    body = f"""{header(found, "../", turn)}
<main id="main"><h1>Feature {f}</h1>
{figures(facts)}
{content}
{neighbours(found, "Nearest by decoder cosine", "cosine", found.nearest[f], found.nearest_cosine[f], linked)}
{neighbours(found, "Fire together most", "Jaccard", found.together[f], found.together_jaccard[f], linked)}
</main>
<dialog id="large" aria-label="Enlarged example"><form method="dialog"><button>Close</button></form><div></div></dialog>
<output id="tip"></output>"""
    return page(found, f"Feature {f}", body, kind="feature", root="../")


def overview(found, f):
    grid, parts = found.info["layout"]["grid"], []
    if grid[0]:
        values = found.mean_map[f]
        label = f"Mean activation at each image token, at most {number(values.max())}"
        parts.append(f'<figure><div class="pic plain" style="--ratio:{grid[1]}/{grid[0]}">'
                     f'{canvas(values, grid, values.max(), label)}</div>'
                     "<figcaption>Mean over all images</figcaption></figure>")
    parts.append(f"<figure>{histogram(found, f)}<figcaption>Values above zero, by size (log)</figcaption></figure>")
    if found.info["attributes"]:
        order = np.argsort(-np.abs(np.nan_to_num(found.auroc[f], nan=0.5) - 0.5), kind="stable")[:5]
        rows = "".join(f"<tr><th scope='row'>{text(found.info['attributes'][a])}</th>"
                       f"<td>{number(found.auroc[f, a], 3)}</td></tr>" for a in order)
        parts.append('<figure><table class="truth"><thead><tr><th scope="col">Of the scene</th><th scope="col">AUROC'
                     f"</th></tr></thead><tbody>{rows}</tbody></table><figcaption>What its maximum in an image says of "
                     "the captioned scene: 0.5 is nothing, below it fires where that is absent</figcaption></figure>")
    return f'<section class="overview" aria-label="Statistics">{"".join(parts)}</section>'


def histogram(found, f):
    counts = found.histogram[f]
    used = np.flatnonzero(counts)
    low, high = used[0], used[-1] + 1
    height = np.log1p(counts[low:high]) / np.log1p(counts.max())
    width = 300 / (high - low)
    edges = [*found.info["edges"], np.inf]
    bars = "".join(f'<rect x="{i * width:.2f}" y="{100 - 96 * h:.2f}" width="{max(width - 1, 0.5):.2f}" '
                   f'height="{96 * h:.2f}"><title>{edges[low + i]:.3g} to {edges[low + i + 1]:.3g}: '
                   f'{counts[low + i]:,}</title></rect>' for i, h in enumerate(height) if h)
    return (f'<svg class="histogram" viewBox="0 0 300 116" role="img" aria-label="Histogram of {counts.sum():,} values '
            f'from {edges[low]:.3g} to {found.maximum[f]:.4g}">{bars}<text x="0" y="113">{edges[low]:.3g}</text>'
            f'<text x="300" y="113" text-anchor="end">{edges[high]:.3g}</text></svg>')


def examples(found, f):
    shown = [example(found, f, *item) for item in zip(found.top_value[f], found.top_image[f], found.top_map[f])
             if item[1] >= 0]
    return (f'<section aria-labelledby="top"><h2 id="top">Top examples</h2><div class="grid">{"".join(shown)}</div>'
            "</section>")


def strip(found, f):
    """The best example with the feature's values multiplied, in the same noise."""
    image = found.top_image[f, 0]
    prompt, shown = found.info["prompts"][image], []
    for scale in SCALES:
        name = "ablated" if scale == 0 else f"×{scale}" + (", as it is" if scale == 1 else "")
        file = f"images/{image}.webp" if scale == 1 else f"steer/{f}-{scale}.webp"
        shown.append(f'<figure><button type="button" class="pic" aria-label="Enlarge: {name}"><img src="../{file}" '
                     f'alt="{name}: {text(prompt[:200])}" {pixels(found)} loading="lazy"></button>'
                     f"<figcaption><b>{name}</b></figcaption></figure>")
    return ('<section aria-labelledby="steer"><h2 id="steer">Steered</h2><p class="hint">The best example drawn again '
            f"from the same noise, the feature's values multiplied in every step: <bdi>{text(prompt)}</bdi></p>"
            f'<div class="grid small">{"".join(shown)}</div></section>')


def quantiles(found, f):
    names = ("Highest quarter below the top", "Second quarter", "Third quarter", "Lowest quarter")
    groups = []
    for name, *items in zip(names, found.quantile_value[f], found.quantile_image[f], found.quantile_map[f]):
        shown = "".join(example(found, f, *item) for item in zip(*items) if item[1] >= 0)
        if shown:
            groups.append(f'<h3>{name}</h3><div class="grid small">{shown}</div>')
    if not groups:
        return ""
    return ('<section aria-labelledby="some"><h2 id="some">At random, below the top</h2>'
            '<p class="hint">Images on which the feature fires less: what its top hides.</p>'
            f'{"".join(groups)}</section>')


def example(found, f, value, image, values):
    """One image under its heatmap (at the timestep of its maximum), its prompt and its value."""
    prompt, layout = found.info["prompts"][image], found.layout
    step = int(layout.by_step(values).max(1).argmax())
    when = f", step {step + 1} of {layout.timesteps}" if layout.timesteps > 1 else ""
    overlay = ""
    if layout.image_tokens:
        overlay = canvas(layout.image_part(values)[step], layout.grid, found.maximum[f])
    words = f"<bdi>{text(prompt)}</bdi>"
    if layout.text_tokens:
        words = highlighted(found.info["words"][image], layout.text_part(values)[step], found.maximum[f])
    return (f'<figure><button type="button" class="pic" aria-label="Enlarge image {image}">'
            f'<img src="../images/{image}.webp" alt="Drawn for: {text(prompt[:200])}" {pixels(found)} loading="lazy">'
            f"{overlay}</button>"
            f'<figcaption><b>{number(value)}</b>{when} <span class="prompt">{words}</span></figcaption></figure>')


def pixels(found):
    """Width and height of the images, so that a page keeps its place while they load."""
    size = found.info["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return f'width="{width}" height="{height}"'


def highlighted(words, values, most):
    """Tokens in a run, each on a ground as strong as its value; what lies behind the text is counted, not shown."""
    spans = [f'<span style="--v:{v / most:.3f}" title="{number(v)}">{text(word)}</span>' if v > 0 else
             f"<span>{text(word)}</span>" for word, v in zip(words, values)]
    padding = values[len(words):]
    if (padding > 0).any():
        spans.append(f'<span class="pad" style="--v:{padding.max() / most:.3f}" title="{number(padding.max())}">'
                     f"{(padding > 0).sum()} of {len(padding)} padding tokens</span>")
    return f'<bdi class="tokens">{" ".join(spans)}</bdi>'


def neighbours(found, title, measure, others, values, linked):
    items = []
    for other, value in zip(others.tolist(), values):
        if other < 0:
            continue
        image = found.top_image[other, 0]
        picture = f'<img src="../images/{image}.webp" alt="" loading="lazy">' if image >= 0 else '<i class="none"></i>'
        name = f"{picture}<span>{other}</span> <b>{number(value, 3)}</b>"
        items.append(f'<li><a href="{other}.html">{name}</a></li>' if other in linked else f"<li>{name}</li>")
    if not items:
        return ""
    return f'<section><h2>{title}</h2><p class="hint">{measure}</p><ol class="near">{"".join(items)}</ol></section>'


def canvas(values, grid, most, label=""):
    """A map [I] for dash.js to paint. Without a label it only overlays an image that has one."""
    role = f'role="img" aria-label="{label}"' if label else 'aria-hidden="true"'
    return (f'<canvas {role} data-map="{sparse(values)}" data-grid="{grid[0]} {grid[1]}" '
            f'data-max="{number(most, 6)}"></canvas>')


def sparse(values):
    """A map as text for dash.js: "place value" of what is above zero, joined by commas."""
    values = np.asarray(values).reshape(-1)
    return ",".join(f"{i} {values[i]:.5g}" for i in np.flatnonzero(values > 0))


def packed(found, values):
    """The map of an index thumbnail."""
    layout = found.layout
    if not layout.image_tokens:
        return ""
    parts = layout.image_part(values)
    return sparse(parts[int(parts.max(1).argmax())])


# ---- the run


DEFINITIONS = {
    "Density": "share of tokens at which the feature is above zero.",
    "Max, mean": "of its values above zero, on raw residuals: decoder rows have unit length before normalization is "
                 "folded in, so values compare within a feature, not between SAEs.",
    "Images": "on which it fires at least once.",
    "Area": "share of an image's tokens at which it fires, mean over the images where it does.",
    "Concentration": "1 − (Σv)² / (I Σv²) over the I tokens of an image: 0 is spread evenly, near 1 is a single token.",
    "Spread": "root mean square distance of the activation from its own centre, in sides of the image.",
    "Jaccard": "tokens at which both features fire ÷ tokens at which either does.",
    "AUROC": "the chance that the feature's maximum in an image is larger where the attribute holds than where it does "
             "not. It is an attribute of the scene that the prompt was written for; a caption does not state them all.",
    "FVU": "fraction of variance unexplained: squared error ÷ squared deviation from the mean, every dimension scaled "
           "to unit variance.",
    "L0": "features above zero per token.",
    "Random examples": "from each quarter, by value, of the images where the feature fires, the top ones left out; the "
                       "quarters are those of a uniform sample of 32 images.",
}


def run_page(found):
    info = found.info
    checkpoint = info.get("checkpoint", {})
    metadata = checkpoint.get("metadata", {})
    rows = {"model": info.get("model"), "layer": info["layer"], "site": info["site"], "features": found.features,
            "k": checkpoint.get("k"), "width": checkpoint.get("d_in"), "prompts": f"{info['images']:,}, from "
            f"{info.get('source', 'a list')}", "image": f"{info['size']} pixels a side, {info['steps']} steps",
            "noise": f"seed {info['seed']}, numbers from {info['first_noise']:,}", **flat(metadata)}
    table = "".join(f"<tr><th scope='row'>{text(k)}</th><td>{text(v)}</td></tr>" for k, v in rows.items())
    terms = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in DEFINITIONS.items())
    code = f"""import sae                                   # fae's sae.py and kernels.py
params, cfg = sae.load("ckpt")               # acts on raw residuals [..., {checkpoint.get('d_in', 'D')}]
values, indices = sae.encode(params, cfg, x)

from sae_lens import SAE                     # the same folder in SAELens 6
sae = SAE.load_from_disk("ckpt")

import dash                                  # what these pages show, as arrays
found = dash.load("dash/collect")"""
    body = f"""{header(found, "")}
<main id="main"><h1>The run</h1>
{curves(info.get("metrics", []))}
{scores_section(info.get("scores"))}
{truth_section((info.get("scores") or {}).get("truth"))}
<section><h2>Configuration</h2><div class="scroll" tabindex="0" role="region" aria-label="Configuration">
<table class="facts"><tbody>{table}</tbody></table></div></section>
<section><h2>What the numbers mean</h2><dl class="terms">{terms}</dl></section>
<section><h2>Load the SAE</h2><pre tabindex="0">{text(code)}</pre></section>
</main>"""
    return page(found, "The run", body, kind="run")


def scores_section(scores):
    """What score.py measured, as a table by noise level; nothing where it did not, or in a way not known here."""
    columns = {"t": "Noise level", "clean": "Model", "spliced": "Spliced", "zero": "Zero", "mean": "Mean",
               "recovered_zero": "Recovered (zero)", "recovered_mean": "Recovered (mean)"}
    try:
        rows = [*scores["per_timestep"], {"t": "all"} | scores["loss"], {"t": "trained"} | scores["loss_where_trained"]]
        cells = [[score_cell(row[name]) + "*" * (name == "t" and row.get("trained", False)) for name in columns]
                 for row in rows]
        image, stats = scores["image"], scores["sae"]
        facts = [("Loss recovered", score_cell(scores["loss"]["recovered_zero"])),
                 ("… where trained", score_cell(scores["loss_where_trained"]["recovered_zero"])),
                 ("FVU, raw", score_cell(stats["fvu"])), ("FVU, standardized", score_cell(stats["fvu_standardized"])),
                 ("L0", score_cell(stats["l0"])), ("Dead", f"{stats['dead']:.1%}"),
                 *((f"Image RMSE, {name}", score_cell(image[name]["rmse"])) for name in ("spliced", "zero", "mean")),
                 ("Decoder norm", score_cell(scores["decoder_norm"]["median"])),
                 ("Encoder·decoder", score_cell(scores["encoder_decoder_cosine"]["median"]))]
        origin, shown = text(f"{scores['images']} images, {scores['data']}"), density_bars(stats["density"])
        steps = text(image["steps"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""
    head = "".join(f'<th scope="col">{title}</th>' for title in columns.values())
    body = "".join(f"<tr><th scope='row'>{first}</th>{''.join(f'<td>{c}</td>' for c in rest)}</tr>"
                   for first, *rest in cells)
    return f"""<section aria-labelledby="scores"><h2 id="scores">What the SAE leaves out</h2>
{figures(facts)}
<p class="hint">Flow-matching loss of the model, with the SAE's reconstruction spliced in, and with zeros or the mean in
the residual's place ({origin}). Recovered: (ablated − spliced) ÷ (ablated − model). * noise levels of training.
Image RMSE: of pixels in levels of 255, images drawn so in {steps} steps against the model's own.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Loss by noise level"><table class="truth">
<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{shown}</section>"""


def score_cell(value):
    return "–" if value is None else number(value, 3) if isinstance(value, (int, float)) else text(value)


def density_bars(density):
    """Features by the power of ten of the share of tokens on which they fire."""
    starts, counts = [float(x) for x in density["log10_from"]], [int(n) for n in density["features"]]
    width, most = 300 / len(counts), max(*counts, 1)
    bars = "".join(f'<rect x="{i * width:.2f}" y="{100 - 96 * n / most:.2f}" width="{width - 1:.2f}" '
                   f'height="{96 * n / most:.2f}"><title>density from 1e{start:g}: {n:,} features</title></rect>'
                   for i, (start, n) in enumerate(zip(starts, counts)))
    return (f'<figure><svg class="histogram" viewBox="0 0 300 116" role="img" aria-label="Histogram of the density of '
            f'{sum(counts):,} features">{bars}<text x="0" y="113">1e{starts[0]:g}</text>'
            f'<text x="300" y="113" text-anchor="end">1</text></svg><figcaption>Features by density (log); '
            f'{int(density["never"]):,} never fired</figcaption></figure>')


COLORS = ("#c02942", "#e08a9a", "#2a7ab0", "#3a9a5c", "#999999", "#d99a00", "#222222")


def truth_section(truth):
    """How well single directions tell what is true of the scenes, as tables and a plot over layers; nothing where it
    was not measured (by tests/bench_truth.py), or in a way not known here."""
    try:
        tables = "".join(truth_table(where, truth["tables"][where]) for where in ("tokens", "images"))
        plot, hint = truth_plot(truth["layers"]), text(truth["data"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return ""
    return f"""<section aria-labelledby="truth"><h2 id="truth">Does it find what is there?</h2>
<p class="hint">AUROC (0.5 is chance) of the best single direction for each attribute of the scene, chosen on one half
of the scenes and scored on the other: {hint}.</p>
{tables}<figure>{plot}<figcaption>Mean over attributes, by layer</figcaption></figure></section>"""


def truth_table(where, rows):
    """rows: {direction: {attribute: AUROC}}."""
    heads = "".join(f'<th scope="col">{text(name)}</th>' for name in rows)
    body = "".join(f"<tr><th scope='row'>{text(attribute)}</th>"
                   f"{''.join(f'<td>{float(row[attribute]):.3f}</td>' for row in rows.values())}</tr>"
                   for attribute in next(iter(rows.values())))
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="AUROC over {where}"><table class="truth">'
            f'<thead><tr><th scope="col">Over {where}</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>')


def truth_plot(layers):
    """SVG of {"tokens", "images": {direction: {layer: mean AUROC}}}, one panel for each."""
    names = list(dict.fromkeys(name for rows in layers.values() for name in rows))
    numbers = sorted({int(layer) for rows in layers.values() for row in rows.values() for layer in row})
    first, last = numbers[0], numbers[-1]
    place = lambda layer: (int(layer) - first) / max(last - first, 1)
    out = []
    for p, where in enumerate(("tokens", "images")):
        x, y = lambda layer: 60 + 400 * p + 320 * place(layer), lambda value: 520 - 480 * float(value)
        out += [f'<line x1="{60 + 400 * p}" x2="{380 + 400 * p}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ddd"/>'
                f'<text x="{52 + 400 * p}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.1f}</text>'
                for v in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
        out += [f'<text x="{x(n):.1f}" y="298" text-anchor="middle">{n}</text>' for n in numbers]
        out.append(f'<text x="{220 + 400 * p}" y="24" text-anchor="middle" font-weight="bold">best single direction, '
                   f"AUROC over {where}</text>")
        for name, row in layers[where].items():
            points = [(x(n), y(row[n])) for n in sorted(row, key=int)]
            line, color = " ".join(f"{a:.1f},{b:.1f}" for a, b in points), COLORS[names.index(name) % len(COLORS)]
            out.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2.5"/>')
            out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in points]
    for i, name in enumerate(names):
        left, top = 60 + 190 * (i % 4), 326 + 20 * (i // 4)
        out.append(f'<line x1="{left}" x2="{left + 24}" y1="{top}" y2="{top}" stroke="{COLORS[i % len(COLORS)]}" '
                   f'stroke-width="3"/><text x="{left + 30}" y="{top + 4}">{text(name)}</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 360" font-family="sans-serif" font-size="12" '
            'role="img" aria-label="AUROC of the best direction over layers"><rect width="840" height="360" '
            f'fill="white"/>{"".join(out)}</svg>')


def flat(values, prefix=""):
    """Nested dicts as one, names joined by dots."""
    out = {}
    for name, value in values.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out
