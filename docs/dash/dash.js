"use strict";
// The script of fae's dashboards: heatmaps, the feature table, the scatter plot, arrow keys. No library, no requests.

const $ = (id) => document.getElementById(id);
const format = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4)));

// ---- heatmaps: "index value,index value" on a grid; dark where the feature does not fire, bright where it does

function parse(text, count) {
  const values = new Float64Array(count);
  if (text) for (const pair of text.split(",")) {
    const [place, value] = pair.split(" ");
    values[+place] = +value;
  }
  return values;
}

function strength() {
  return $("strength") ? $("strength").value / 100 : 0.7;
}

function paint(canvas) {
  const [rows, columns] = canvas.dataset.grid.split(" ").map(Number);
  const values = (canvas.values ??= parse(canvas.dataset.map, rows * columns));
  const most = Number(canvas.dataset.max) || 1, s = strength();
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), pixels = context.createImageData(columns, rows);
  values.forEach((value, i) => {
    const t = Math.min(value / most, 1);
    pixels.data.set([20 + 235 * Math.min(1, 1.6 * t), 16 + 190 * t * t, 34 * (1 - t), 255 * s * (t ? 0.45 + 0.4 * t : 0.6)],
      4 * i);
  });
  context.putImageData(pixels, 0, 0);
}

const paintAll = () => document.querySelectorAll("canvas[data-map]").forEach(paint);

function remember(key, value) {                 // a browser may forbid storage for pages from disk
  try {
    if (value !== undefined) localStorage.setItem(key, value);
    return localStorage.getItem(key);
  } catch { return null; }
}

if ($("strength")) {
  const slider = $("strength"), old = remember("fae-strength");
  if (old !== null && old !== "") slider.value = old;
  slider.addEventListener("input", () => { remember("fae-strength", slider.value); paintAll(); });
}

// ---- the feature page: activation under the pointer, enlarged images, arrow keys

function showTip(event) {
  const canvas = event.target.closest?.(".pic")?.querySelector("canvas[data-map]"), tip = $("tip");
  if (!canvas) { tip.style.display = "none"; return; }
  const box = canvas.getBoundingClientRect(), [rows, columns] = canvas.dataset.grid.split(" ").map(Number);
  const column = Math.floor((event.clientX - box.left) / box.width * columns);
  const row = Math.floor((event.clientY - box.top) / box.height * rows);
  if (row < 0 || column < 0 || row >= rows || column >= columns) return;
  tip.textContent = `row ${row}, column ${column}: ${format(canvas.values[row * columns + column])}`;
  tip.style.display = "block";
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${event.clientY + 18}px`;
  const host = document.querySelector("dialog[open]") ?? document.body;     // an open dialog covers everything else
  if (tip.parentNode !== host) host.append(tip);
}

function enlarge(button) {
  const figure = button.closest("figure").cloneNode(true), large = $("large");
  const picture = figure.querySelector(".pic"), plain = document.createElement("div");
  plain.className = "pic";
  plain.append(...picture.childNodes);
  picture.replaceWith(plain);
  large.querySelector("div").replaceChildren(figure);
  figure.querySelectorAll("canvas[data-map]").forEach(paint);
  large.showModal();
}

function startFeature() {
  paintAll();
  document.addEventListener("pointermove", showTip);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.pic");
    if (button) enlarge(button);
  });
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, dialog")) return;
    const link = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    if (link) document.querySelector(`a[rel=${link}]`)?.click();
  });
}

// ---- the index

const ROWS = 50;
let order = [], matching = [], part = 0, sorted = ["feature", 1];
const maps = new Map(), waiting = new Map();

function addMaps(chunk) {                       // called by maps/*.js: pages from disk can load data only as scripts
  for (const [feature, text] of Object.entries(chunk)) {
    maps.set(+feature, text);
    waiting.get(+feature)?.();
    waiting.delete(+feature);
  }
}

function withMap(feature, use) {
  if (maps.has(feature)) return use(maps.get(feature));
  waiting.set(feature, () => use(maps.get(feature)));
  const name = `maps/${Math.floor(feature / DATA.chunk)}.js`;
  if (!document.querySelector(`script[src="${name}"]`)) {
    const script = document.createElement("script");
    script.src = name;
    document.head.append(script);
  }
}

function sortBy(key, direction) {
  sorted = [key, direction];
  const column = DATA[key];
  const distance = key === "auroc" ? (i) => Math.abs(column[i] - 0.5) : (i) => column[i];
  const keys = Float64Array.from(column, (_, i) => distance(i));
  order.sort((a, b) => direction * (keys[a] - keys[b]) || a - b);
  document.querySelectorAll("[data-sort]").forEach((button) => {
    const on = button.dataset.sort === key;
    button.parentNode.setAttribute("aria-sort", on ? (direction > 0 ? "ascending" : "descending") : "none");
  });
  filter();
}

function filter() {
  const words = $("search").value.trim().toLowerCase();
  const low = parseFloat($("low").value), high = parseFloat($("high").value), alive = $("alive").value;
  const hit = words && DATA.prompts.map((prompt) => prompt.toLowerCase().includes(words));
  matching = order.filter((i) => (alive === "all" || (DATA.density[i] > 0) === (alive === "alive"))
    && !(DATA.density[i] < low) && !(DATA.density[i] > high) && (!words || DATA.top[i].some((image) => hit[image])));
  part = 0;
  $("count").textContent = `${matching.length.toLocaleString("en")} of ${DATA.feature.length.toLocaleString("en")} features`;
  fill();
  scatter();
}

function cell(row, content) {
  const td = document.createElement("td");
  td.append(content);
  row.append(td);
  return td;
}

function thumbnail(i) {
  const link = document.createElement("a"), feature = DATA.feature[i], image = DATA.top[i][0];
  link.className = "pic";
  link.href = `feature/${feature}.html`;
  link.tabIndex = -1;                           // the feature number has the same link
  link.setAttribute("aria-hidden", "true");
  if (image === undefined) return link;
  const picture = document.createElement("img");
  picture.src = `images/${image}.webp`;
  picture.alt = "";
  picture.title = DATA.prompts[image].slice(0, 500);
  link.append(picture);
  if (DATA.grid[0]) withMap(feature, (text) => {
    const canvas = document.createElement("canvas");
    Object.assign(canvas.dataset, { map: text, grid: DATA.grid.join(" "), max: DATA.max[i] });
    link.append(canvas);
    paint(canvas);
  });
  return link;
}

function fill() {
  const rows = document.createDocumentFragment(), keys = [...document.querySelectorAll("[data-sort]")].map((b) => b.dataset.sort);
  for (const i of matching.slice(part * ROWS, (part + 1) * ROWS)) {
    const row = document.createElement("tr");
    cell(row, thumbnail(i));
    for (const key of keys) {
      if (key === "feature") {
        const link = document.createElement("a");
        link.href = `feature/${DATA.feature[i]}.html`;
        link.textContent = DATA.feature[i];
        cell(row, link);
      } else if (key === "auroc") cell(row, DATA.density[i] && DATA.attribute[i] ? `${DATA.attribute[i]} ${format(DATA.auroc[i])}` : "–");
      else cell(row, format(DATA[key][i]));
    }
    rows.append(row);
  }
  $("table").tBodies[0].replaceChildren(rows);
  const parts = Math.max(1, Math.ceil(matching.length / ROWS));
  $("part").textContent = `page ${part + 1} of ${parts}`;
  $("before").disabled = part === 0;
  $("after").disabled = part + 1 >= parts;
}

// ---- the scatter plot: log density (x) and log maximum activation (y); features that match the filters are highlighted

let dots = [];

function scatter() {
  const canvas = $("scatter"), context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--accent"), soft = style.getPropertyValue("--soft"), line = style.getPropertyValue("--line");
  const width = canvas.clientWidth, height = Math.max(240, Math.min(280, Math.round(0.5 * width))), ratio = devicePixelRatio || 1;
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  canvas.style.height = `${height}px`;
  context.scale(ratio, ratio);
  const alive = order.filter((i) => DATA.density[i] > 0), left = 52, bottom = height - 30, right = width - 14;
  dots = [];
  if (!alive.length) return;
  const limits = (key) => alive.reduce(([a, b], i) => [Math.min(a, Math.log10(DATA[key][i])), Math.max(b, Math.log10(DATA[key][i]))], [Infinity, -Infinity]);
  const [x0, x1] = widen(limits("density")), [y0, y1] = widen(limits("max"));
  const x = (v) => left + (Math.log10(v) - x0) / (x1 - x0) * (right - left);
  const y = (v) => bottom - (Math.log10(v) - y0) / (y1 - y0) * (bottom - 14);
  context.font = "13px system-ui, sans-serif";
  context.fillStyle = soft;
  context.strokeStyle = line;
  context.textAlign = "center";
  for (const v of ticks(x0, x1)) {
    context.fillText(format(v), x(v), bottom + 19);
    context.strokeRect(x(v), 10, 0, bottom - 10);
  }
  context.textAlign = "right";
  for (const v of ticks(y0, y1)) {
    context.fillText(format(v), left - 8, y(v) + 4);
    context.strokeRect(left, y(v), right - left, 0);
  }
  context.fillText("density →", right - 4, bottom - 8);
  context.textAlign = "left";
  context.fillText("max activation ↑", left + 6, 22);
  const shown = new Set(matching);
  for (const on of [false, true]) {
    context.fillStyle = on ? ink : line;
    for (const i of alive) if (shown.has(i) === on) {
      const dot = [x(DATA.density[i]), y(DATA.max[i]), i];
      context.fillRect(dot[0] - 1.5, dot[1] - 1.5, 3, 3);
      dots.push(dot);
    }
  }
}

function ticks(low, high) {                     // 1, 2, 5, 10, ...; only powers of ten if the range is over three decades
  const steps = high - low > 3 ? [1] : [1, 2, 5], found = [];
  for (let e = Math.floor(low); e <= high; e++)
    for (const step of steps) {
      const v = +(step * 10 ** e).toPrecision(1), log = Math.log10(v);
      if (log >= low && log <= high) found.push(v);
    }
  return found;
}

function widen([low, high]) {
  const more = Math.max(0.05, 0.03 * (high - low));
  return [low - more, high + more];
}

function nearestDot(event) {
  const box = $("scatter").getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
  let best = null, least = 14 ** 2;
  for (const dot of dots) {
    const distance = (dot[0] - px) ** 2 + (dot[1] - py) ** 2;
    if (distance <= least) [best, least] = [dot, distance];
  }
  return best && { feature: DATA.feature[best[2]], i: best[2], left: best[0], top: best[1] };
}

function startIndex() {
  order = DATA.feature.map((_, i) => i);
  document.querySelectorAll("[data-sort]").forEach((button) => button.addEventListener("click", () => {
    const key = button.dataset.sort;              // numbers sort in descending order first
    sortBy(key, sorted[0] === key ? -sorted[1] : key === "feature" ? 1 : -1);
  }));
  for (const id of ["search", "low", "high", "alive"]) $(id).addEventListener("input", filter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("before").addEventListener("click", () => { part--; fill(); });
  $("after").addEventListener("click", () => { part++; fill(); });
  const canvas = $("scatter"), label = $("dot");
  canvas.addEventListener("pointermove", (event) => {
    const dot = nearestDot(event);
    label.style.display = dot ? "block" : "none";
    canvas.style.cursor = dot ? "pointer" : "crosshair";
    if (!dot) return;
    label.textContent = `feature ${dot.feature}: density ${format(DATA.density[dot.i])}, max activation ${format(DATA.max[dot.i])}`;
    label.style.top = `${dot.top - 34}px`;
    label.style.left = `${Math.min(dot.left, canvas.clientWidth - label.offsetWidth - 4)}px`;
  });
  canvas.addEventListener("pointerleave", () => { label.style.display = "none"; });
  canvas.addEventListener("click", (event) => {
    const dot = nearestDot(event);
    if (dot) location.href = `feature/${dot.feature}.html`;
  });
  addEventListener("resize", scatter);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", scatter);
  sortBy("feature", 1);
}

if (document.body.dataset.page === "index") startIndex();
if (document.body.dataset.page === "feature") startFeature();
