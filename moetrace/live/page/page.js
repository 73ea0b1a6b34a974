// What the service tells each second, drawn. Names come from others: they are set as text, never as markup.

import { TextView } from "./text.mjs";

const at = (id) => document.getElementById(id);
const HISTORY = 120;
const LISTED = 8;
const LIST_MS = 3000; // how often requests are asked for
const MOST = 4; // multiples of an even share at which the scale ends
let now = null;
let paused = false;
const rates = [];

const number = (n) => n.toLocaleString("en");

// dark blue (nothing) over grey (an even share) to orange
function colour(multiple) {
  if (multiple === null) return [128, 128, 128, 60];
  const from = [28, 52, 98], even = [214, 214, 206], to = [214, 92, 0];
  const [a, b, t] = multiple <= 1 ? [from, even, multiple] : [even, to, Math.min((multiple - 1) / (MOST - 1), 1)];
  return [...a.map((x, i) => Math.round(x + (b[i] - x) * t)), 255];
}

// multiples of an even share: layers x experts, null where a layer got nothing
function multiples() {
  const counts = now[document.querySelector("input[name=window]:checked").value];
  return counts.map((row, i) => {
    const n = now.n_expert[i];
    const total = row.slice(0, n).reduce((a, b) => a + b, 0);
    return row.map((c, e) => (e >= n || !total ? null : (c * n) / total));
  });
}

function drawMap(values) {
  const canvas = at("map");
  const rows = values.length, columns = values[0].length;
  canvas.width = columns;
  canvas.height = rows;
  canvas.style.height = `${Math.max(120, Math.min(18 * rows, 560))}px`;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  values.forEach((row, i) => row.forEach((v, e) => image.data.set(colour(v), 4 * (i * columns + e))));
  context.putImageData(image, 0, 0);
}

function fill(id, rows) {
  at(id).replaceChildren(...rows.map((cells) => {
    const tr = document.createElement("tr");
    for (const cell of cells) {
      const td = document.createElement("td");
      td.textContent = cell;
      tr.append(td);
    }
    return tr;
  }));
}

function drawHistory() {
  const canvas = at("history"), context = canvas.getContext("2d");
  const most = Math.max(1, ...rates);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.strokeStyle = getComputedStyle(document.body).color;
  context.beginPath();
  rates.forEach((r, i) => {
    const x = (i * canvas.width) / (HISTORY - 1), y = canvas.height - 2 - (r / most) * (canvas.height - 4);
    if (i) context.lineTo(x, y); else context.moveTo(x, y);
  });
  context.stroke();
}

function draw() {
  if (!now) return;
  const values = multiples();
  drawMap(values);
  const flat = values.flatMap((row, i) => row.map((v, e) => [v, now.layers[i], e])).filter(([v]) => v !== null);
  flat.sort((a, b) => b[0] - a[0]);
  fill("hottest", flat.slice(0, LISTED).map(([v, layer, e]) => [layer, e, v.toFixed(1)]));
  fill("contexts", now.contexts.map((c) => [c.name, c.state, number(c.lost + c.events_lost), c.intervention || "none"]));
  fill("active", now.active.map((r) => [r.slot, r.name || `number ${r.request}`, r.phase, number(r.tokens)]));
  at("served").textContent = now.served === null ? "–" : `${Math.round(100 * now.served)} %`;
  const domains = Object.entries(now.by_domain).sort((a, b) => b[1] - a[1]).slice(0, LISTED);
  fill("domains", domains.map(([label, n]) => [label || "(no label)", number(n)]));
  const total = Object.values(now.tokens).reduce((a, b) => a + b, 0);
  at("total").textContent = number(total);
  at("rate").textContent = rates.length ? rates[rates.length - 1].toFixed(1) : "–";
  const lost = now.entries.lost + now.contexts.reduce((a, c) => a + c.lost, 0);
  at("lost").textContent = number(lost);
  at("lost").classList.toggle("bad", lost > 0);
  const fills = now.contexts.map((c) => c.ring_fill).filter((f) => f !== null);
  at("ring").textContent = fills.length ? `${(100 * Math.max(...fills)).toFixed(0)} %` : "–";
  at("state").textContent = now.live ? `recording, ${now.layers.length} layers` : "the recording has ended";
  drawHistory();
}

function point(event) {
  if (!now) return;
  const canvas = at("map"), box = canvas.getBoundingClientRect();
  const e = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
  const i = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
  const row = multiples()[i];
  if (!row || e < 0 || e >= row.length) return;
  const v = row[e];
  at("hover").textContent = `Layer ${now.layers[i]}, expert ${e}: ${v === null ? "no tokens" : `${v.toFixed(2)} × an even share`}`;
}

function scale() {
  const canvas = at("colours"), context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    const [r, g, b] = colour((MOST * x) / canvas.width);
    context.fillStyle = `rgb(${r} ${g} ${b})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}

// -- a request's text

const view = new TextView(at("text"));
let part = null, chosen = null, listed = "";

// where the page's own address gives a token, so do these
const asked = async (path, more = {}) => {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(more)) query.set(name, value);
  const answer = await fetch(`${path}?${query}`);
  return answer.ok ? answer.json() : null;
};

function options(select, rows) {
  const kept = select.value;
  select.replaceChildren(...rows.map(([value, text]) => Object.assign(document.createElement("option"), { value, textContent: text })));
  if (rows.some(([value]) => String(value) === kept)) select.value = kept;
}

// nothing is asked for until somebody wants to see it
async function listRequests() {
  if (!at("texts").open) return;
  const rows = await asked("/requests");
  if (!rows) return;
  const named = rows.slice(0, 100).map((r) => [r.request, `${r.id ?? `request ${r.request}`}${r.label ? ` · ${r.label}` : ""}: ${number(r.n_prefill + r.n_decode)} tokens`]);
  const said = JSON.stringify([named, now?.layers]);
  if (said === listed || document.activeElement === at("request")) return;
  listed = said;
  options(at("request"), named);
  if (now && at("layer").options.length !== now.layers.length) {
    options(at("layer"), now.layers.map((layer) => [layer, layer]));
    at("layer").selectedIndex = now.layers.length >> 1;
  }
  await readText();
}

async function readText() {
  if (!at("request").value) return;
  const text = await asked(`/requests/${at("request").value}/text`, { layer: at("layer").value });
  if (!text) return;
  part = {
    label: `request ${text.number}, layer ${text.layer}`,
    pieces: text.pieces, positions: text.positions, generated: text.generated, k: text.experts[0]?.length ?? 0,
    expert: (i, j) => text.experts[i][j], weight: (i, j) => text.weights?.[i][j] ?? NaN,
  };
  showText();
}

function showText() {
  if (part) view.show({ part, chosen, label: part.label, note: "", pick: (expert) => { chosen = expert; showText(); } });
}

scale();
at("request").addEventListener("change", readText);
at("layer").addEventListener("change", readText);
at("texts").addEventListener("toggle", listRequests);
setInterval(() => { if (!paused && !document.hidden) listRequests(); }, LIST_MS);
at("map").addEventListener("mousemove", point);
at("map").addEventListener("click", point);
at("window").addEventListener("change", draw);
at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").textContent = paused ? "Go on" : "Pause";
  at("pause").setAttribute("aria-pressed", String(paused));
});
const source = new EventSource(`/events${location.search}`);
source.onmessage = (message) => {
  const said = JSON.parse(message.data);
  at("state").classList.remove("bad");
  if (said.waiting) {
    at("state").textContent = said.waiting;
    return;
  }
  rates.push(Object.values(said.per_second).reduce((a, b) => a + b, 0));
  if (rates.length > HISTORY) rates.shift();
  if (paused) return;
  // nothing is new in a recording that has ended
  if (!now && !said.live) document.querySelector("input[name=window][value=all]").checked = true;
  now = said;
  draw();
};
source.onerror = () => {
  at("state").textContent = "the service does not answer";
  at("state").classList.add("bad");
};
