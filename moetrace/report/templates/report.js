"use strict";
// The page's interactive figures: one state (layer, domain, …), figures that draw it, and controls that set it.
// Deep links: #layer=3&domain=code&expert=17&measure=lift&order=layer&theme=dark.

const $ = (query, root = document) => root.querySelector(query);
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const make = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};
const SVG = $("#svg").namespaceURI;
const draw = (tag, attributes, parent, text) => {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
};
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const dark = () => luminance(color("surface")) < 0.5;
const luminance = (hex) => parseInt(hex.slice(3, 5), 16) / 255;
const known = (x) => x !== null && x !== undefined && !Number.isNaN(x);

const HINT = "Hover, or focus and use the arrow keys, for numbers.";

// -- numbers ------------------------------------------------------------------------------------------------

const whole = (x) => x.toLocaleString("en");
const digits = (x, n = 3) => {
  if (!known(x)) return "?";
  if (x === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(x)));
  return size < -4 || size > 6 ? x.toExponential(n - 1) : x.toFixed(Math.max(0, Math.min(6, n - 1 - size)));
};
const percent = (x) => (known(x) ? `${x > 0 && x < 0.0005 ? "<0.1" : (100 * x).toFixed(1)} %` : "?");
const pvalue = (p) => (p < 0.001 ? "p < 0.001" : `p = ${digits(p, 2)}`);

// -- data ---------------------------------------------------------------------------------------------------

const KINDS = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array, f8: Float64Array, f2: Uint16Array,
};

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, rest = bits & 1023;
  if (exponent === 31) return rest ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + rest / 1024) : sign * 2 ** -24 * rest;
}

async function unpack(text) {
  const packed = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const n = new DataView(raw.buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(raw.subarray(4, 4 + n)));
  const arrays = {};
  for (const [name, { dtype, shape, offset }] of Object.entries(head.arrays)) {
    const size = shape.reduce((a, b) => a * b, 1), width = Number(dtype[1]);
    const bytes = new Uint8Array(size * width);
    for (let plane = 0, at = 4 + n + offset; plane < width; plane++)
      for (let i = 0; i < size; i++) bytes[i * width + plane] = raw[at++];
    let values = new KINDS[dtype](bytes.buffer);
    if (dtype === "f2") values = Float32Array.from(values, half);
    arrays[name] = { shape, at: (...where) => values[where.reduce((sum, x, i) => sum * shape[i] + x, 0)] };
  }
  return { ...head, arrays };
}

// -- colour -------------------------------------------------------------------------------------------------

const CIVIDIS = "00224e002e6a1a386f32436d434e6c535a6d61656f6f70737d7c788c88789b9476aba072bcae6ccdbb63dec958f0d846fee838";
const PUOR = "2d004b5326878073acb1aad1d8daebf7f7f6fee0b6fcb761e08214b257067f3b08";

// on a dark ground the middle is dark and what is far from it bright
const PUOR_DARK = "cdbcffa592ea7d6cbf5b5090434163353b435a4a2f8a6520bd7f14f2a02bffd596";

function ramp(hex) {
  const stops = hex.match(/.{6}/g).map((c) => [0, 2, 4].map((i) => parseInt(c.slice(i, i + 2), 16)));
  const table = [];
  for (let i = 0; i < 256; i++) {
    const x = (i / 255) * (stops.length - 1), a = stops[Math.floor(x)], b = stops[Math.ceil(x)];
    table.push(`rgb(${a.map((v, c) => Math.round(v + (b[c] - v) * (x % 1))).join()})`);
  }
  return table;
}

// linear from 0 to high, or ratios around 1 from 1/4 to 4
function scaleOf(kind, high) {
  const ratio = kind === "ratio";
  const table = ramp(!ratio ? CIVIDIS : dark() ? PUOR_DARK : PUOR);
  const place = (v) => (ratio ? (v > 0 ? (Math.log2(v) + 2) / 4 : 0) : v / (high || 1));
  return { table, color: (v) => table[Math.max(0, Math.min(255, Math.round(255 * place(v))))] };
}

function hatch(context, ratio) {
  const tile = make("canvas"), size = Math.round(5 * ratio);
  tile.width = tile.height = size;
  const c = tile.getContext("2d");
  c.fillStyle = color("missing");
  c.fillRect(0, 0, size, size);
  c.strokeStyle = color("faint");
  c.lineWidth = 0.7 * ratio;
  c.beginPath();
  for (const shift of [-size, 0, size]) { c.moveTo(shift, size); c.lineTo(shift + size, 0); }
  c.stroke();
  return context.createPattern(tile, "repeat");
}

// -- tooltip ------------------------------------------------------------------------------------------------

const tip = $("#tip");
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = !text;
  if (!text) return;
  const { width, height } = tip.getBoundingClientRect(), wide = document.documentElement.clientWidth;
  tip.style.left = `${scrollX + Math.max(4, x + 14 + width > wide ? x - width - 14 : x + 14)}px`;
  tip.style.top = `${scrollY + (y - height - 12 < 0 ? y + 18 : y - height - 12)}px`;
}

// -- a matrix on a canvas -----------------------------------------------------------------------------------

// spec: { label, rows, columns, value(r, c) -> number, NaN (missing) or undefined (no such cell), text(r, c),
//         rowName(r), columnName(c), rowTitle, columnTitle, scale, ends, chosen: row, pick(r, c) }
class Matrix {
  constructor(host) {
    this.at = null;
    this.box = make("div", "canvas");
    this.canvas = make("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "heatmap");
    this.readout = make("p", "readout");
    this.readout.setAttribute("role", "status");
    this.legend = make("p", "scale");
    this.box.append(this.canvas);
    host.append(this.box, this.legend, this.readout);
    this.canvas.addEventListener("pointermove", (e) => this.hover(e));
    this.canvas.addEventListener("pointerleave", () => { showTip(""); });
    this.canvas.addEventListener("click", (e) => { this.hover(e); this.pick(); });
    this.canvas.addEventListener("keydown", (e) => this.key(e));
    this.canvas.addEventListener("blur", () => showTip(""));
    new ResizeObserver(() => { if (this.box.clientWidth !== this.wide) this.paint(); }).observe(this.box);
  }

  show(spec) {
    this.spec = spec;
    if (spec.at) this.at = spec.at;
    if (this.at) this.at = [Math.min(this.at[0], spec.rows - 1), Math.min(this.at[1], spec.columns - 1)];
    this.canvas.setAttribute("aria-label", `${spec.label}. Arrow keys move, Enter chooses.`);
    this.paint();
    this.say();
  }

  paint() {
    const spec = this.spec;
    this.wide = this.box.clientWidth;
    if (!spec || !this.wide) return;
    const font = `11px ${getComputedStyle(document.body).fontFamily}`;
    const c = this.canvas.getContext("2d"), ratio = Math.min(2, devicePixelRatio || 1);
    c.font = font;
    const names = Array.from({ length: spec.rows }, (_, r) => spec.rowName(r));
    const left = 20 + Math.min(110, Math.ceil(Math.max(...names.map((n) => c.measureText(n).width)))), bottom = 34, top = 4;
    let cell = Math.max(4, (this.wide - left - 4) / spec.columns);
    if (spec.square) cell = Math.min(cell, Math.max(4, 620 / spec.columns));
    const tall = spec.square ? cell : Math.max(6, Math.min(20, 640 / spec.rows));
    const width = Math.floor(left + cell * spec.columns + 4), height = Math.ceil(top + tall * spec.rows + bottom);
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    this.geometry = { left, top, cell, tall };
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    const missing = hatch(c, 1), snap = (x) => Math.round(x * ratio) / ratio;
    for (let r = 0; r < spec.rows; r++) {
      const y = snap(top + r * tall), h = snap(top + (r + 1) * tall) - y;
      for (let k = 0; k < spec.columns; k++) {
        const v = spec.value(r, k);
        if (v === undefined) continue;
        const x = snap(left + k * cell);
        c.fillStyle = Number.isNaN(v) ? missing : spec.scale.color(v);
        c.fillRect(x, y, snap(left + (k + 1) * cell) - x, h);
      }
    }
    c.font = font;
    c.fillStyle = color("ink");
    c.textBaseline = "middle";
    c.textAlign = "right";
    const each = (n, room) => [1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 50, 64, 100, 128].find((s) => s * room[0] >= room[1]) || n;
    const down = each(spec.rows, [tall, 12]), across = each(spec.columns, [cell, spec.columns > 100 ? 28 : 22]);
    for (let r = 0; r < spec.rows; r += down) {
      c.fillStyle = r === spec.chosen ? color("accent") : color("ink");
      c.fillText(names[r], left - 5, top + (r + 0.5) * tall, 110);
    }
    if (spec.chosen >= 0) {
      c.fillStyle = color("accent");
      const y = top + (spec.chosen + 0.5) * tall;
      c.beginPath(); c.moveTo(left - 4, y - 4); c.lineTo(left, y); c.lineTo(left - 4, y + 4); c.fill();
    }
    c.fillStyle = color("ink");
    c.textAlign = "center";
    c.textBaseline = "top";
    for (let k = 0; k < spec.columns; k += across)
      c.fillText(spec.columnName(k), left + (k + 0.5) * cell, top + spec.rows * tall + 4);
    c.fillStyle = color("faint");
    c.fillText(spec.columnTitle, left + Math.min(cell * spec.columns, this.wide - left) / 2, top + spec.rows * tall + 19);
    c.save();
    c.translate(2, top + (spec.rows * tall) / 2);
    c.rotate(-Math.PI / 2);
    if (spec.rows * tall > 50) c.fillText(spec.rowTitle, 0, 0);
    c.restore();
    if (this.at) {
      const [r, k] = this.at;
      c.lineWidth = 3;
      c.strokeStyle = dark() ? "#000" : "#fff";
      c.strokeRect(left + k * cell, top + r * tall, cell, tall);
      c.lineWidth = 1.5;
      c.strokeStyle = color("c4");
      c.strokeRect(left + k * cell, top + r * tall, cell, tall);
    }
    this.paintLegend(spec);
  }

  paintLegend(spec) {
    this.legend.textContent = "";
    const bar = make("canvas");
    bar.width = 256;
    bar.height = 1;
    const c = bar.getContext("2d");
    spec.scale.table.forEach((color, i) => { c.fillStyle = color; c.fillRect(i, 0, 1, 1); });
    this.legend.append(make("span", "", spec.ends[0]), bar, make("span", "", spec.ends[1]));
    this.legend.append(make("span", "", spec.unit), make("i"), make("span", "", "missing"));
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect(), g = this.geometry, spec = this.spec;
    const k = Math.floor((event.clientX - box.left - g.left) / g.cell), r = Math.floor((event.clientY - box.top - g.top) / g.tall);
    return r >= 0 && k >= 0 && r < spec.rows && k < spec.columns ? [r, k] : null;
  }

  hover(event) {
    const cell = this.cellAt(event);
    if (!cell) { showTip(""); return; }
    this.move(cell);
    showTip(this.spec.text(...cell), event.clientX, event.clientY);
  }

  move(cell) {
    if (this.at && this.at[0] === cell[0] && this.at[1] === cell[1]) return;
    this.at = cell;
    this.paint();
    this.say();
  }

  say() {
    this.readout.textContent = this.at ? this.spec.text(...this.at).replaceAll("\n", " · ") : HINT;
    this.readout.classList.toggle("empty", !this.at);
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Enter" || event.key === " ") { this.pick(); event.preventDefault(); }
    if (!step) return;
    event.preventDefault();
    const [r, k] = this.at || [0, step[1] ? -step[1] : 0];
    this.move([Math.max(0, Math.min(this.spec.rows - 1, r + step[0])), Math.max(0, Math.min(this.spec.columns - 1, k + step[1]))]);
    const g = this.geometry, x = g.left + this.at[1] * g.cell;
    if (x < this.box.scrollLeft || x > this.box.scrollLeft + this.wide - 20) this.box.scrollLeft = x - this.wide / 2;
  }

  pick() {
    if (this.at && this.spec.pick) this.spec.pick(...this.at);
  }
}

// -- lines by layer or lag ----------------------------------------------------------------------------------

function ticks(low, high, n) {
  const span = high - low || 1, rough = span / n, size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * size).find((s) => s >= rough);
  const out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return out;
}

// spec: { label, x, xTitle, yTitle, chosen: x, pick(x), series: [{ name, color, y, low, high, dash, ground, points }] }
class Chart {
  constructor(host) {
    this.host = host;
    this.keys = make("ul", "keys");
    this.svg = draw("svg", { class: "chart", tabindex: 0, role: "application" });
    this.readout = make("p", "readout");
    this.readout.setAttribute("role", "status");
    host.append(this.keys, this.svg, this.readout);
    this.at = null;
    this.svg.addEventListener("pointermove", (e) => this.move(this.nearest(e), e));
    this.svg.addEventListener("pointerleave", () => showTip(""));
    this.svg.addEventListener("blur", () => showTip(""));
    this.svg.addEventListener("click", (e) => { this.move(this.nearest(e), e); this.pick(); });
    this.svg.addEventListener("keydown", (e) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
      if (step) this.move(Math.max(0, Math.min(this.spec.x.length - 1, (this.at ?? -step) + step)));
      if (e.key === "Enter" || e.key === " ") this.pick();
      if (step || e.key === "Enter" || e.key === " ") e.preventDefault();
    });
    new ResizeObserver(() => { if (host.clientWidth !== this.wide) this.paint(); }).observe(host);
  }

  show(spec) {
    this.spec = spec;
    if (this.at !== null) this.at = Math.min(this.at, spec.x.length - 1);
    this.svg.setAttribute("aria-label", `${spec.label}. Left and right arrow keys move.`);
    this.keys.textContent = "";
    for (const s of spec.series) {
      const item = make("li"), icon = draw("svg", { viewBox: "0 0 28 12" });
      if (s.low) draw("rect", { x: 0, y: 1, width: 28, height: 10, fill: `var(--${s.color})`, opacity: s.ground ? 0.3 : 0.2 }, icon);
      if (s.points) draw("circle", { cx: 14, cy: 6, r: 4, fill: s.hollow ? "none" : `var(--${s.color})`, stroke: `var(--${s.color})`, "stroke-width": 1.5 }, icon);
      else if (!s.ground) draw("line", { x1: 0, x2: 28, y1: 6, y2: 6, stroke: `var(--${s.color})`, "stroke-width": 2, "stroke-dasharray": s.dash || "none" }, icon);
      item.append(icon, s.name);
      this.keys.append(item);
    }
    this.paint();
    this.say();
  }

  paint() {
    const spec = this.spec;
    this.wide = this.host.clientWidth;
    if (!spec || !this.wide) return;
    const height = 300, left = 58, right = 12, top = 8, bottom = 42, width = this.wide;
    const all = spec.series.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])]).filter(known);
    let low = Math.min(0, ...all), high = Math.max(...all, low + 1e-9);
    high += (high - low) * 0.04;
    const edge = spec.x.length > 1 ? (spec.x.at(-1) - spec.x[0]) * 0.015 + 0.2 : 0.5;
    const x0 = spec.x[0] - edge, x1 = spec.x.at(-1) + edge;
    const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    const py = (y) => top + (1 - (y - low) / (high - low)) * (height - top - bottom);
    this.place = px;
    this.svg.textContent = "";
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    const yTicks = ticks(low, high, 5), step = yTicks.length > 1 ? yTicks[1] - yTicks[0] : 1;
    for (const y of yTicks) {
      draw("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) }, this.svg);
      draw("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, this.svg, y.toFixed(Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9) + (/25/.test(step.toExponential()) ? 1 : 0)))));
    }
    draw("line", { class: "axis", x1: left, x2: width - right, y1: py(0), y2: py(0) }, this.svg);
    const whole = ticks(spec.x[0], spec.x.at(-1), Math.max(2, Math.min(spec.x.length - 1, width / 60))).filter(Number.isInteger);
    for (const x of whole) draw("text", { x: px(x), y: height - bottom + 18, "text-anchor": "middle" }, this.svg, x);
    draw("text", { class: "title", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, this.svg, spec.xTitle);
    draw("text", { class: "title", transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, this.svg, spec.yTitle);
    if (known(spec.chosen)) draw("rect", { x: px(spec.chosen) - 7, y: top, width: 14, height: height - top - bottom, fill: "var(--accent)", opacity: 0.14 }, this.svg);
    for (const s of spec.series) {
      const stroke = `var(--${s.color})`, i = spec.x.map((_, k) => k);
      const runs = (ok) => i.reduce((list, k) => { if (ok(k)) { if (k && ok(k - 1) && list.length) list.at(-1).push(k); else list.push([k]); } return list; }, []);
      if (s.low) for (const run of runs((k) => known(s.low[k]) && known(s.high[k]))) {
        const up = run.map((k) => `${px(spec.x[k])} ${py(s.high[k])}`), back = run.map((k) => `${px(spec.x[k])} ${py(s.low[k])}`).reverse();
        draw("path", { d: `M${[...up, ...back].join("L")}Z`, fill: stroke, stroke: run.length === 1 ? stroke : "none", opacity: s.ground ? 0.25 : 0.2 }, this.svg);
      }
      if (s.ground) continue;
      if (s.points) { for (const k of i) if (known(s.y[k])) draw("circle", { cx: px(spec.x[k]), cy: py(s.y[k]), r: 3.2, fill: s.hollow ? "var(--surface)" : stroke, stroke, "stroke-width": 1.4 }, this.svg); continue; }
      for (const run of runs((k) => known(s.y[k]))) {
        draw("path", { d: `M${run.map((k) => `${px(spec.x[k])} ${py(s.y[k])}`).join("L")}`, fill: "none", stroke, "stroke-width": 2, "stroke-dasharray": s.dash || "none" }, this.svg);
        if (run.length === 1) draw("circle", { cx: px(spec.x[run[0]]), cy: py(s.y[run[0]]), r: 2.5, fill: stroke }, this.svg);
      }
    }
    this.cursor = draw("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" }, this.svg);
    this.moveCursor();
  }

  nearest(event) {
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    return this.spec.x.reduce((best, v, k) => (Math.abs(this.place(v) - x) < Math.abs(this.place(this.spec.x[best]) - x) ? k : best), 0);
  }

  moveCursor() {
    if (this.at === null || !this.cursor) return;
    const x = this.place(this.spec.x[this.at]);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("visibility", "visible");
  }

  text(k) {
    const lines = this.spec.series.filter((s) => known(s.y[k]) || (s.ground && known(s.high[k]))).map((s) => {
      if (s.ground) return `${s.name}: up to ${digits(s.high[k])}`;
      const within = s.low && known(s.low[k]) ? ` (${digits(s.low[k])} to ${digits(s.high[k])})` : "";
      return `${s.name}: ${digits(s.y[k])}${within}`;
    });
    return [`${this.spec.xTitle} ${this.spec.x[k]}`, ...(lines.length ? lines : ["missing"])].join("\n");
  }

  say() {
    this.readout.textContent = this.at === null ? HINT : this.text(this.at).replaceAll("\n", " · ");
    this.readout.classList.toggle("empty", this.at === null);
  }

  move(k, event) {
    this.at = k;
    this.moveCursor();
    this.say();
    if (event) showTip(this.text(k), event.clientX, event.clientY);
  }

  pick() {
    if (this.at !== null && this.spec.pick) this.spec.pick(this.spec.x[this.at]);
  }
}

// -- the report's figures -----------------------------------------------------------------------------------

class Report {
  constructor(data) {
    this.data = data;
    this.state = { layer: data.start, domain: 0, expert: null, measure: "share", order: "id", family: "overlap", steps: "probability" };
    this.read();
    this.figures = {};
    const has = (name) => name in data.arrays;
    const needs = { usage: "count", layer: "count", forest: "low", persistence: "persistence", separation: "separation", transitions: "steps" };
    for (const box of $$(".widget")) {
      const name = box.dataset.widget;
      if (!has(needs[name]) || (name === "layer" && !data.domains.length)) continue;
      box.hidden = false;
      const host = $(".plot", box);
      this.figures[name] = name === "forest" ? host : new (name === "persistence" || name === "separation" ? Chart : Matrix)(host);
    }
    this.fill();
    this.show(true);
    addEventListener("hashchange", () => { if (location.hash.includes("=")) { this.read(); this.show(true); } });
  }

  // what the address says, as far as it makes sense
  read() {
    const said = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    const { layers, domains } = this.data, state = this.state;
    const layer = layers.indexOf(Number(said.get("layer")));
    if (said.has("layer") && layer >= 0) state.layer = layer;
    if (said.has("domain")) state.domain = Math.max(0, domains.indexOf(said.get("domain")) + 1);
    if (said.has("expert") && Number(said.get("expert")) >= 0 && Number(said.get("expert")) < this.experts) state.expert = Number(said.get("expert"));
    for (const [name, choices] of Object.entries(this.choices)) if (choices.some(([key]) => key === said.get(name))) state[name] = said.get(name);
    if (state.measure === "lift" && !state.domain) state.domain = domains.length ? 1 : 0;
    if (themes.includes(said.get("theme"))) root.dataset.theme = $("span", theme).textContent = said.get("theme");
  }

  get experts() { return this.data.arrays.count.shape[2]; }

  get choices() {
    return {
      measure: [["share", "% of tokens"], ["even", "times even use"], ...(this.data.domains.length > 1 ? [["lift", "lift over other domains"]] : [])],
      order: [["id", "by number"], ["layer", "by use in the chosen layer"], ["each", "by use, each layer for itself"]],
      family: [["overlap", "experts shared"], ["top1", "same first expert"]],
      steps: [["probability", "probability"], ["lift", "lift over random order"]],
    };
  }

  fill() {
    const option = (select, value, text) => { const o = make("option", "", text); o.value = value; select.append(o); };
    const many = this.data.domains.length;
    for (const box of $$("[data-bind]")) {
      const name = box.dataset.bind;
      if (name === "layer") {
        box.min = 0;
        box.max = this.data.layers.length - 1;
        box.setAttribute("aria-label", "layer");
      } else if (name === "domain") {
        option(box, 0, many ? `all prompts` : "all prompts (no labels)");
        this.data.domains.forEach((text, i) => option(box, i + 1, text.length > 40 ? `${text.slice(0, 39)}…` : text));
      } else this.choices[name].forEach(([value, text]) => option(box, value, text));
      box.addEventListener(name === "layer" ? "input" : "change", () => this.set({ [name]: /layer|domain/.test(name) ? Number(box.value) : box.value }));
    }
  }

  set(change) {
    const state = this.state;
    if (change.measure === "lift" && !state.domain) change.domain = 1;
    if (change.domain === 0 && state.measure === "lift") change.measure = "share";
    Object.assign(state, change);
    const said = new URLSearchParams({ layer: this.data.layers[state.layer] });
    if (state.domain) said.set("domain", this.data.domains[state.domain - 1]);
    if (state.expert !== null) said.set("expert", state.expert);
    for (const [name, choices] of Object.entries(this.choices)) if (state[name] !== choices[0][0]) said.set(name, state[name]);
    history.replaceState(null, "", `#${said}`);
    this.show();
  }

  show(linked = false) {
    const state = this.state, layer = this.data.layers[state.layer];
    for (const box of $$("[data-bind]")) {
      box.value = state[box.dataset.bind];
      if (box.nextElementSibling?.tagName === "OUTPUT") box.nextElementSibling.value = layer;
      if (box.dataset.bind === "layer") box.setAttribute("aria-valuetext", `layer ${layer}`);
    }
    for (const box of $$('[data-show="layer"]')) box.value = layer;
    for (const name of Object.keys(this.figures)) this[name](this.figures[name], linked);
  }

  // ---- numbers of a cell: domain d (0: all prompts), layer l, expert e

  share(d, l, e) {
    const tokens = this.data.arrays.tokens.at(d, l);
    return tokens ? this.data.arrays.count.at(d, l, e) / tokens : NaN;
  }

  lift(d, l, e) {
    let sum = 0;
    const n = this.data.domains.length, k = this.data.k[l];
    for (let i = 1; i <= n; i++) sum += this.share(i, l, e);
    return sum > 0 ? ((this.share(d, l, e) * n) / sum) : NaN;
  }

  cell(measure, d, l, e) {
    if (e >= this.data.n_expert[l]) return undefined;
    if (measure === "lift") return this.lift(d, l, e);
    const share = this.share(d, l, e);
    return measure === "even" ? (share * this.data.n_expert[l]) / this.data.k[l] : share;
  }

  describe(d, l, e) {
    const { arrays, domains, layers, n_expert, k } = this.data;
    const lines = [`layer ${layers[l]}, expert ${e}, ${d ? domains[d - 1] : "all prompts"}`];
    if (e >= n_expert[l]) return `${lines[0]}\nthis layer has ${n_expert[l]} experts`;
    const tokens = arrays.tokens.at(d, l), count = arrays.count.at(d, l, e);
    if (!tokens) return `${lines[0]}\nmissing: no token recorded`;
    lines.push(`${whole(count)} of ${whole(tokens)} tokens: ${percent(count / tokens)}`);
    lines.push(`${digits((count / tokens / k[l]) * n_expert[l])} times even use`);
    if (d && domains.length > 1) {
      const lift = this.lift(d, l, e);
      if (!known(lift)) lines.push("no domain used it");
      else {
        const low = arrays.low?.at(d - 1, l, e), high = arrays.high?.at(d - 1, l, e), p = arrays.p?.at(d - 1, l, e);
        lines.push(`lift ${digits(lift)}${known(low) ? ` (${digits(low)} to ${digits(high)})` : ""}${known(p) ? `, ${pvalue(p)}` : ""}`);
      }
    }
    return lines.join("\n");
  }

  get high() {
    if (this._high === undefined) {
      const [n, l, e] = this.data.arrays.count.shape, values = [];
      for (let d = 0; d < n; d++) for (let i = 0; i < l; i++) for (let j = 0; j < e; j++) { const v = this.share(d, i, j); if (known(v)) values.push(v); }
      values.sort((a, b) => a - b);
      this._high = values.length ? values[Math.ceil(0.999 * (values.length - 1))] || values.at(-1) : 1;
      this._top = values.at(-1) || 0;
    }
    return this._high;
  }

  scale(measure) {
    const over = this.high < this._top;
    if (measure === "share") return { scale: scaleOf("linear", this.high), ends: ["0 %", `${over ? "≥ " : ""}${percent(this.high)}`], unit: "of tokens use the expert" };
    return { scale: scaleOf("ratio"), ends: ["≤ ¼", "≥ 4"], unit: measure === "even" ? "times even use (middle: 1)" : "times the mean of domains (middle: 1)" };
  }

  ranked(d, l) {
    const ids = Array.from({ length: this.experts }, (_, e) => e);
    const v = (e) => { const x = this.cell("share", d, l, e); return x === undefined ? -2 : Number.isNaN(x) ? -1 : x; };
    return ids.sort((a, b) => v(b) - v(a) || a - b);
  }

  // ---- figures

  usage(figure, linked) {
    const { state, data } = this, d = state.domain;
    const ids = Array.from({ length: this.experts }, (_, e) => e);
    const one = state.order === "layer" ? this.ranked(d, state.layer) : ids;
    const expert = state.order === "each" ? data.layers.map((_, l) => this.ranked(d, l)) : data.layers.map(() => one);
    const at = linked && state.expert !== null ? [state.layer, expert[state.layer].indexOf(state.expert)] : null;
    figure.show({
      label: `Use of experts by layer, ${d ? data.domains[d - 1] : "all prompts"}`,
      rows: data.layers.length, columns: this.experts, chosen: state.layer, at,
      value: (r, c) => this.cell(state.measure, d, r, expert[r][c]),
      text: (r, c) => this.describe(d, r, expert[r][c]),
      rowName: (r) => String(data.layers[r]), rowTitle: "layer",
      columnName: (c) => String(state.order === "each" ? c + 1 : expert[0][c]),
      columnTitle: { id: "expert", layer: `expert, most used in layer ${data.layers[state.layer]} first`, each: "rank of the expert in its layer" }[state.order],
      pick: (r, c) => this.set({ layer: r, expert: expert[r][c] }),
      ...this.scale(state.measure),
    });
  }

  layer(figure) {
    const { state, data } = this, order = state.order === "id" ? Array.from({ length: this.experts }, (_, e) => e) : this.ranked(state.domain, state.layer);
    figure.show({
      label: `Layer ${data.layers[state.layer]}: use of experts by domain`,
      rows: data.domains.length, columns: this.experts, chosen: state.domain - 1,
      value: (r, c) => this.cell(state.measure, r + 1, state.layer, order[c]),
      text: (r, c) => this.describe(r + 1, state.layer, order[c]),
      rowName: (r) => (data.domains[r].length > 16 ? `${data.domains[r].slice(0, 15)}…` : data.domains[r]), rowTitle: "",
      columnName: (c) => String(order[c]),
      columnTitle: state.order === "id" ? "expert" : "expert, most used first",
      pick: (r, c) => this.set({ domain: r + 1, expert: order[c] }),
      ...this.scale(state.measure),
    });
  }

  separation(figure) {
    const { data, state } = this, row = (i) => data.layers.map((_, l) => data.arrays.separation.at(i, l));
    const [bits, null95, corrected, low, high, q] = [0, 1, 2, 3, 4, 5].map(row);
    const only = (ok) => bits.map((v, l) => (ok(q[l]) ? v : NaN));
    const series = [
      { name: "prompts alone (95 % of permutations)", color: "faint", ground: true, y: null95.map(() => NaN), low: null95.map((v) => (known(v) ? 0 : NaN)), high: null95 },
      { name: "corrected for bias, 95 % interval", color: "c0", y: corrected, low, high },
      { name: "measured, q ≤ 0.05", color: "ink", points: true, y: only((v) => v <= 0.05) },
      { name: "measured, q > 0.05", color: "ink", points: true, hollow: true, y: only((v) => v > 0.05) },
      { name: "measured, cannot be tested", color: "ink", points: true, hollow: true, y: only((v) => !known(v)) },
    ];
    figure.show({
      label: "Separation of domains by layer", x: data.layers, xTitle: "layer", yTitle: "divergence (bits)",
      series: series.filter((s) => (s.ground ? s.high : s.y).some(known)),
      chosen: data.layers[state.layer], pick: (x) => this.set({ layer: data.layers.indexOf(x) }),
    });
  }

  persistence(figure) {
    const { data, state } = this, from = state.family === "top1" ? 5 : 0;
    const row = (i) => data.lags.map((_, t) => data.arrays.persistence.at(from + i, state.layer, t));
    const [seen, shuffle, marginal, low, high] = [0, 1, 2, 3, 4].map(row);
    figure.show({
      label: `Persistence in layer ${data.layers[state.layer]}`, x: data.lags, xTitle: "lag", yTitle: state.family === "top1" ? "same first expert" : "experts shared",
      series: [
        { name: "observed, 95 % interval over the shuffle", color: "c0", y: seen, low: low.map((v, i) => v + shuffle[i]), high: high.map((v, i) => v + shuffle[i]) },
        { name: "same prompt, random order", color: "c1", dash: "7 4", y: shuffle },
        { name: "any two tokens", color: "faint", dash: "2 4", y: marginal },
      ],
    });
  }

  transitions(figure) {
    const { data, state } = this, l = state.layer, a = data.arrays, size = a.steps_expert.shape[1];
    const ids = Array.from({ length: size }, (_, i) => a.steps_expert.at(l, i));
    const chance = (r, c) => { const n = a.steps_from.at(l, ids[r]); return n ? a.steps.at(l, r, c) / n : NaN; };
    const value = state.steps === "lift" ? (r, c) => a.steps_lift.at(l, r, c) : chance;
    let high = 0;
    for (let r = 0; r < size; r++) for (let c = 0; c < size; c++) if (a.steps_from.at(l, ids[r]) >= 20 && chance(r, c) > high) high = chance(r, c);
    const scale = state.steps === "lift"
      ? { scale: scaleOf("ratio"), ends: ["≤ ¼", "≥ 4"], unit: "times random order (middle: 1); hatched where less than 1 is expected" }
      : { scale: scaleOf("linear", high || 1), ends: ["0", `≥ ${digits(high || 1, 2)}`], unit: "probability of the next first expert" };
    figure.show({
      label: `Transitions in layer ${data.layers[l]}`, rows: size, columns: size, square: true, value,
      text: (r, c) => {
        const n = a.steps_from.at(l, ids[r]), lift = a.steps_lift.at(l, r, c);
        return `layer ${data.layers[l]}: expert ${ids[r]} → expert ${ids[c]}\n` + (n
          ? `${whole(a.steps.at(l, r, c))} of ${whole(n)} times: ${percent(chance(r, c))}\n${known(lift) ? `lift ${digits(lift)} over random order` : "too few for a lift"}`
          : "never first before another token");
      },
      rowName: (r) => String(ids[r]), rowTitle: "first expert of a token", columnName: (c) => String(ids[c]),
      columnTitle: size < this.experts ? `first expert of the next token (the ${size} most used of the layer)` : "first expert of the next token",
      ...scale,
    });
  }

  forest(host) {
    const { data, state } = this, a = data.arrays, l = state.layer, found = [];
    data.domains.forEach((_, d) => {
      if (state.domain && state.domain !== d + 1) return;
      for (let e = 0; e < data.n_expert[l]; e++) if (known(a.low.at(d, l, e)) && a.count.at(d + 1, l, e)) found.push({ d, e, lift: this.lift(d + 1, l, e), low: a.low.at(d, l, e), high: a.high.at(d, l, e), p: a.p.at(d, l, e) });
    });
    found.sort((x, y) => y.low - x.low || y.lift - x.lift);
    const rows = found.slice(0, 12), wide = host.clientWidth || 600;
    host.textContent = "";
    if (!rows.length) { host.append(make("p", "readout", `Layer ${data.layers[l]}: no interval is known (one prompt per domain, or no token).`)); return; }
    const short = (text) => (text.length > 14 ? `${text.slice(0, 13)}…` : text);
    const left = wide < 500 ? 128 : 190, right = wide < 500 ? 12 : 150, height = 26 * rows.length + 46, low = Math.max(0.06, Math.min(0.5, ...rows.map((r) => r.low))), high = Math.max(2, ...rows.map((r) => r.high));
    const px = (v) => left + (Math.log(Math.max(v, low) / low) / Math.log(high / low)) * (wide - left - right);
    const svg = draw("svg", { class: "chart", viewBox: `0 0 ${wide} ${height}`, height, role: "img", "aria-label": `Experts of layer ${data.layers[l]} with the largest lower bounds of lift` }, host);
    for (let v = 1 / 16; v <= high; v *= 2) if (v >= low) {
      draw("line", { class: v === 1 ? "axis" : "grid", x1: px(v), x2: px(v), y1: 4, y2: height - 40, "stroke-dasharray": v === 1 ? "4 3" : "none" }, svg);
      draw("text", { x: px(v), y: height - 24, "text-anchor": "middle" }, svg, v < 1 ? `1/${1 / v}` : v);
    }
    draw("text", { class: "title", x: (left + wide - right) / 2, y: height - 6, "text-anchor": "middle" }, svg, "lift, 95 % interval");
    rows.forEach((r, i) => {
      const y = 18 + 26 * i, sure = r.p <= 0.05 && r.lift > 1, stroke = sure ? "var(--c0)" : "var(--c6)";
      draw("text", { class: "title", x: left - 8, y: y + 4, "text-anchor": "end" }, svg, `expert ${r.e} · ${short(data.domains[r.d])}`);
      draw("line", { x1: px(r.low), x2: px(r.high), y1: y, y2: y, stroke, "stroke-width": 3, opacity: 0.6 }, svg);
      draw("circle", { cx: px(r.lift), cy: y, r: 4.5, fill: sure ? stroke : "var(--surface)", stroke, "stroke-width": 1.6 }, svg);
      if (right > 100) draw("text", { x: wide - right + 8, y: y + 4 }, svg, `${digits(r.lift)}${known(r.p) ? `, ${pvalue(r.p)}` : ""}`);
    });
    host.append(make("p", "readout", `Layer ${data.layers[l]}: the ${rows.length} of largest lower bound. Full points: p ≤ 0.05 over the layer's experts and domains.`));
    if (!this.watching) { this.watching = true; let wideThen = wide; new ResizeObserver(() => { if (host.clientWidth !== wideThen) { wideThen = host.clientWidth; this.forest(host); } }).observe(host); }
  }
}

// -- tables -------------------------------------------------------------------------------------------------

function showTable(box, table) {
  const n = table.values.length ? table.values[0].length : 0, numeric = table.values.map((column) => column.every((v) => v === null || typeof v === "number"));
  const integer = table.values.map((column) => column.every((v) => v === null || Number.isInteger(v)));
  let order = Array.from({ length: n }, (_, i) => i), sorted = null, up = true, all = false;
  const scroll = make("div", "scroll"), element = make("table"), more = make("button", "", "");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "table");
  scroll.append(element);
  more.type = "button";
  more.addEventListener("click", () => { all = true; fill(); });
  const fill = () => {
    element.textContent = "";
    const head = element.createTHead().insertRow();
    table.columns.forEach((name, c) => {
      const th = make("th", numeric[c] ? "n" : ""), button = make("button", "", name.replaceAll("_", " "));
      th.scope = "col";
      if (sorted === c) th.setAttribute("aria-sort", up ? "ascending" : "descending");
      button.type = "button";
      button.addEventListener("click", () => {
        up = sorted === c ? !up : !numeric[c];
        sorted = c;
        const v = table.values[c], turn = up ? 1 : -1;
        // what is missing stays at the end, either way
        order.sort((a, b) => (v[a] === null) - (v[b] === null) || (v[a] === null ? 0 : turn * (numeric[c] ? v[a] - v[b] : String(v[a]).localeCompare(String(v[b])))) || a - b);
        fill();
        $$("button", element.tHead)[c].focus();
      });
      th.append(button);
      head.append(th);
    });
    const body = element.createTBody();
    for (const i of all ? order : order.slice(0, 50)) {
      const row = body.insertRow();
      table.values.forEach((column, c) => {
        const cell = row.insertCell(), v = column[i];
        if (numeric[c]) cell.className = "n";
        cell.textContent = v === null ? "" : numeric[c] ? (integer[c] ? whole(v).replaceAll(",", Math.abs(v) < 1e4 ? "" : ",") : digits(v, 4)) : typeof v === "object" ? JSON.stringify(v) : v;
      });
    }
    more.textContent = `show all ${whole(n)} rows`;
    more.hidden = all || n <= 50;
  };
  fill();
  box.append(scroll, more);
  if (table.rows > n) box.append(make("p", "file", `The first ${whole(n)} of ${whole(table.rows)} rows; the file above has all.`));
}

// -- the page -----------------------------------------------------------------------------------------------

const root = document.documentElement, theme = $("#theme");
const themes = ["auto", "light", "dark"];
let report;
function setTheme(name) {
  root.dataset.theme = name;
  $("span", theme).textContent = name;
  try { localStorage.setItem("moetrace-theme", name); } catch { /* a page from a file may have no storage */ }
  report?.show();
}
try { const kept = localStorage.getItem("moetrace-theme"); if (themes.includes(kept)) root.dataset.theme = kept; } catch { /* the same */ }
theme.hidden = false;
$("span", theme).textContent = root.dataset.theme;
theme.addEventListener("click", () => setTheme(themes[(themes.indexOf(root.dataset.theme) + 1) % 3]));
addEventListener("beforeprint", () => { theme.kept = root.dataset.theme; root.dataset.theme = "light"; report?.show(); });
addEventListener("afterprint", () => { root.dataset.theme = theme.kept; report?.show(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => report?.show());
if (innerWidth <= 1000) $("nav details").open = false;
addEventListener("keydown", (e) => { if (e.key === "Escape") showTip(""); });

const links = new Map($$("nav a").map((a) => [a.hash.slice(1), a]));
const watcher = new IntersectionObserver((seen) => {
  for (const entry of seen) if (entry.isIntersecting) { links.forEach((a) => a.removeAttribute("aria-current")); links.get(entry.target.id)?.setAttribute("aria-current", "true"); }
}, { rootMargin: "-10% 0px -80% 0px" });
$$("main section").forEach((section) => watcher.observe(section));

unpack($("#data").textContent).then((data) => {
  report = new Report(data);
  for (const box of $$("[data-table]")) {
    const open = () => { if (!box.dataset.open && box.open) { box.dataset.open = "1"; showTable(box, data.tables[box.dataset.table]); } };
    box.addEventListener("toggle", open);
  }
  root.dataset.ready = "1";
}, (error) => {
  const said = $("#broken");
  said.textContent = `The interactive figures could not be unpacked (${error.message}). A browser of 2023 or later can; all figures are in figures/, all tables in tables/.`;
  said.hidden = false;
  root.dataset.ready = "broken";
});
