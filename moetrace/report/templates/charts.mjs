// Charts for any numbers: a matrix, lines, intervals and a table, drawn into an element of the page. Each chart is
// shown a spec (numbers, names and what to say of them) and draws it in the page's colours, as wide as there is room.

import { digits, known, whole } from "./data.mjs";

// -- elements -----------------------------------------------------------------------------------------------

export const $ = (query, root = document) => root.querySelector(query);
export const $$ = (query, root = document) => [...root.querySelectorAll(query)];
export const make = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};
// the namespace is that of the page's own element: no address stands in a page that asks for none
const draw = (tag, attributes, parent, text) => {
  const element = document.createElementNS($("#svg").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
};

// pixels that the longest of some texts takes
const widest = (context, texts) => Math.ceil(Math.max(...texts.map((text) => context.measureText(text).width)));

const HINT = "Hover, or focus and use the arrow keys, for numbers.";

// -- colour -------------------------------------------------------------------------------------------------

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const luminance = (hex) => parseInt(hex.slice(3, 5), 16) / 255;
const dark = () => luminance(color("surface")) < 0.5;

const CIVIDIS = "00224e002e6a1a386f32436d434e6c535a6d61656f6f70737d7c788c88789b9476aba072bcae6ccdbb63dec958f0d846fee838";
const PUOR = "2d004b5326878073acb1aad1d8daebf7f7f6fee0b6fcb761e08214b257067f3b08";

// on a dark ground the middle is dark and what is far from it bright
const PUOR_DARK = "cdbcffa592ea7d6cbf5b5090434163353b435a4a2f8a6520bd7f14f2a02bffd596";

export function ramp(hex) {
  const stops = hex.match(/.{6}/g).map((c) => [0, 2, 4].map((i) => parseInt(c.slice(i, i + 2), 16)));
  const table = [];
  for (let i = 0; i < 256; i++) {
    const x = (i / 255) * (stops.length - 1), a = stops[Math.floor(x)], b = stops[Math.ceil(x)];
    table.push(`rgb(${a.map((v, c) => Math.round(v + (b[c] - v) * (x % 1))).join()})`);
  }
  return table;
}

// ["linear", high]: from 0 to high; ["ratio"]: around 1, from 1/4 to 4. Gives 256 colours, and that of a value.
export function scaleOf([kind, high], night = dark()) {
  const ratio = kind === "ratio";
  const table = ramp(!ratio ? CIVIDIS : night ? PUOR_DARK : PUOR);
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

export function showTip(text, x, y) {
  const tip = $("#tip");
  tip.textContent = text;
  tip.hidden = !text;
  if (!text) return;
  const { width, height } = tip.getBoundingClientRect(), wide = document.documentElement.clientWidth;
  tip.style.left = `${scrollX + Math.max(4, x + 14 + width > wide ? x - width - 14 : x + 14)}px`;
  tip.style.top = `${scrollY + (y - height - 12 < 0 ? y + 18 : y - height - 12)}px`;
}

// -- a matrix on a canvas -----------------------------------------------------------------------------------

// spec: { label, rows, columns, value(r, c) -> number, NaN (missing) or undefined (no such cell), text(r, c),
//         rowName(r), columnName(c), rowTitle, columnTitle, least (pixels of a column), scale (of scaleOf), ends, unit, square, chosen: row, at: [row, column], pick(r, c) }
export class Matrix {
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
    const scale = scaleOf(spec.scale), c = this.canvas.getContext("2d"), ratio = Math.min(2, devicePixelRatio || 1);
    c.font = font;
    const names = Array.from({ length: spec.rows }, (_, r) => spec.rowName(r));
    const left = 20 + Math.min(110, widest(c, names)), bottom = 34, top = 4;
    let cell = Math.max(spec.least ?? 4, (this.wide - left - 4) / spec.columns);
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
        c.fillStyle = Number.isNaN(v) ? missing : scale.color(v);
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
    this.paintLegend(spec, scale);
  }

  paintLegend(spec, scale) {
    this.legend.textContent = "";
    const bar = make("canvas");
    bar.width = 256;
    bar.height = 1;
    const c = bar.getContext("2d");
    scale.table.forEach((color, i) => { c.fillStyle = color; c.fillRect(i, 0, 1, 1); });
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

export function ticks(low, high, n) {
  const span = high - low || 1, rough = span / n, size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * size).find((s) => s >= rough);
  const out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return out;
}

// spec: { label, x, xTitle, yTitle, chosen: x, pick(x), series: [{ name, color, y, low, high, dash, ground, points }] }
export class Chart {
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

// -- intervals of a ratio -----------------------------------------------------------------------------------

// spec: { label, xTitle, rows: [{ name, whole, lift, low, high, sure, text }], note }
export class Forest {
  constructor(host) {
    this.host = host;
    new ResizeObserver(() => { if (host.clientWidth !== this.wide) this.paint(); }).observe(host);
  }

  show(spec) {
    this.spec = spec;
    this.paint();
  }

  paint() {
    if (!this.spec) return;
    const { label, xTitle, rows, note } = this.spec, host = this.host;
    this.wide = host.clientWidth;
    host.textContent = "";
    if (rows.length) {
      const pen = make("canvas").getContext("2d");
      pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
      const wide = this.wide || 600, left = 14 + widest(pen, rows.map((r) => r.name)), right = wide < 500 ? 12 : 150, height = 26 * rows.length + 46;
      const low = Math.max(0.06, Math.min(0.5, ...rows.map((r) => r.low))), high = Math.max(2, ...rows.map((r) => r.high));
      const px = (v) => left + (Math.log(Math.max(v, low) / low) / Math.log(high / low)) * (wide - left - right);
      const svg = draw("svg", { class: "chart", viewBox: `0 0 ${wide} ${height}`, height, role: "img", "aria-label": label }, host);
      for (let v = 1 / 16; v <= high; v *= 2) if (v >= low) {
        draw("line", { class: v === 1 ? "axis" : "grid", x1: px(v), x2: px(v), y1: 4, y2: height - 40, "stroke-dasharray": v === 1 ? "4 3" : "none" }, svg);
        draw("text", { x: px(v), y: height - 24, "text-anchor": "middle" }, svg, v < 1 ? `1/${1 / v}` : v);
      }
      draw("text", { class: "title", x: (left + wide - right) / 2, y: height - 6, "text-anchor": "middle" }, svg, xTitle);
      rows.forEach((r, i) => {
        const y = 18 + 26 * i, stroke = r.sure ? "var(--c0)" : "var(--c6)";
        const name = draw("text", { class: "title", x: left - 8, y: y + 4, "text-anchor": "end" }, svg, r.name);
        draw("title", {}, name, r.whole);
        draw("line", { x1: px(r.low), x2: px(r.high), y1: y, y2: y, stroke, "stroke-width": 3, opacity: 0.6 }, svg);
        draw("circle", { cx: px(r.lift), cy: y, r: 4.5, fill: r.sure ? stroke : "var(--surface)", stroke, "stroke-width": 1.6 }, svg);
        if (right > 100) draw("text", { x: wide - right + 8, y: y + 4 }, svg, r.text);
      });
    }
    host.append(make("p", "readout", note));
  }
}

// -- tables -------------------------------------------------------------------------------------------------

// what stands in a cell; numbers of one column are written alike
export function cellText(v, numeric, integer) {
  if (v === null) return "";
  if (!numeric) return typeof v === "object" ? JSON.stringify(v) : String(v);
  if (!integer) return digits(v, 4);
  return Math.abs(v) < 1e4 ? whole(v).replaceAll(",", "") : whole(v);
}

// rows in the order of a column's values; what is missing stays at the end, either way
export function sortedRows(order, values, numeric, up) {
  const turn = up ? 1 : -1, missing = (i) => values[i] === null;
  const compare = (a, b) => turn * (numeric ? values[a] - values[b] : String(values[a]).localeCompare(String(values[b])));
  return [...order].sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : compare(a, b)) || a - b);
}

// table: { columns: names, values: one list per column, rows: how many there are in all }
export function showTable(box, table) {
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
        order = sortedRows(order, table.values[c], numeric[c], up);
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
        cell.textContent = cellText(v, numeric[c], integer[c]);
      });
    }
    more.textContent = `show all ${whole(n)} rows`;
    more.hidden = all || n <= 50;
  };
  fill();
  box.append(scroll, more);
  if (table.rows > n) box.append(make("p", "file", `The first ${whole(n)} of ${whole(table.rows)} rows; the file above has all.`));
}
