// What the interactive figures show: one state (layer, domain, …), the address that says it, and for each figure
// what its chart is to draw (charts.mjs says what these fields are). No element of the page is touched here.

import { digits, known, percent, pvalue, whole } from "./data.mjs";
import { Chart, Forest, Matrix } from "./charts.mjs";
import { TextView } from "./text.mjs";

// -- state --------------------------------------------------------------------------------------------------

const MANY = 64; // experts of whom most are used so little that shares of tokens look alike

const plain = (data) => {
  const two = [["share", "% of tokens"], ["even", "times even use"]];
  return data.arrays.count.shape[2] > MANY ? two.reverse() : two;
};

// name -> [value, text] of each choice, the default first
export const choicesOf = (data) => ({
  measure: [
    ...plain(data),
    ...(data.domains.length > 1 ? [["lift", "lift over other domains"]] : []),
  ],
  order: [["id", "by number"], ["layer", "by use in the chosen layer"], ["each", "by use, each layer for itself"]],
  zoom: [["whole", "the window"], ["wide", "wide columns"]],
  family: [["overlap", "experts shared"], ["top1", "same first expert"]],
  steps: [["probability", "probability"], ["lift", "lift over random order"]],
});

// layer, domain and text are indices, domain 0 is all prompts
export const initialState = (data) => ({
  layer: data.start, domain: 0, text: 0, expert: null, measure: plain(data)[0][0], order: "id", zoom: "whole", family: "overlap", steps: "probability",
});

// Lift compares a domain with others: it needs one, and ends where none is chosen.
export function changedState(state, change, data) {
  const next = { ...state, ...change };
  if (change.measure === "lift" && !state.domain) next.domain = 1;
  if (change.domain === 0 && state.measure === "lift") next.measure = plain(data)[0][0];
  return next;
}

// #layer=3&domain=code&expert=17&measure=lift&order=layer
export const addressParts = (hash) => new URLSearchParams(hash.includes("=") ? hash.slice(1) : "");

// what the address says, as far as it makes sense
export function stateFromAddress(hash, data, state) {
  const said = addressParts(hash), next = { ...state };
  const layer = data.layers.indexOf(Number(said.get("layer"))), expert = Number(said.get("expert"));
  if (said.has("layer") && layer >= 0) next.layer = layer;
  if (said.has("domain")) next.domain = Math.max(0, data.domains.indexOf(said.get("domain")) + 1);
  const text = (data.texts ?? []).findIndex(({ number }) => String(number) === said.get("text"));
  if (text >= 0) next.text = text;
  if (said.get("expert") && Number.isInteger(expert) && expert >= 0 && expert < data.arrays.count.shape[2]) next.expert = expert;
  for (const [name, choices] of Object.entries(choicesOf(data)))
    if (choices.some(([key]) => key === said.get(name))) next[name] = said.get(name);
  if (next.measure === "lift" && !next.domain) next.domain = data.domains.length ? 1 : 0;
  return next;
}

export function addressOf(state, data) {
  const said = new URLSearchParams({ layer: data.layers[state.layer] });
  if (state.domain) said.set("domain", data.domains[state.domain - 1]);
  if (state.text) said.set("text", data.texts[state.text].number);
  if (state.expert !== null) said.set("expert", state.expert);
  for (const [name, choices] of Object.entries(choicesOf(data))) if (state[name] !== choices[0][0]) said.set(name, state[name]);
  return `#${said}`;
}

// -- figures ------------------------------------------------------------------------------------------------

const WIDE = 14; // pixels of a column that can be told from its neighbours

function measured(cells, measure) {
  const { high, top } = cells;
  if (measure === "share") return { scale: ["linear", high], ends: ["0 %", `${high < top ? "≥ " : ""}${percent(high)}`], unit: "of tokens use the expert" };
  return { scale: ["ratio"], ends: ["≤ ¼", "≥ 4"], unit: measure === "even" ? "times even use (middle: 1)" : "times the mean of domains (middle: 1)" };
}

export function usage(cells, state, set, linked) {
  const { data } = cells, d = state.domain;
  const one = state.order === "layer" ? cells.ranked(d, state.layer) : cells.ids;
  const expert = data.layers.map((_, l) => (state.order === "each" ? cells.ranked(d, l) : one));
  return {
    label: `Use of experts by layer, ${d ? data.domains[d - 1] : "all prompts"}`,
    rows: data.layers.length, columns: cells.experts, chosen: state.layer,
    at: linked && state.expert !== null ? [state.layer, expert[state.layer].indexOf(state.expert)] : null,
    value: (r, c) => cells.cell(state.measure, d, r, expert[r][c]),
    text: (r, c) => cells.describe(d, r, expert[r][c]),
    rowName: (r) => String(data.layers[r]), rowTitle: "layer",
    columnName: (c) => String(state.order === "each" ? c + 1 : expert[0][c]),
    columnTitle: {
      id: "expert",
      layer: `expert, most used in layer ${data.layers[state.layer]} first`,
      each: "rank of the expert in its layer",
    }[state.order],
    least: state.zoom === "wide" ? WIDE : 1,
    pick: (r, c) => set({ layer: r, expert: expert[r][c] }),
    ...measured(cells, state.measure),
  };
}

export function layer(cells, state, set) {
  const { data } = cells, order = state.order === "id" ? cells.ids : cells.ranked(state.domain, state.layer);
  return {
    label: `Layer ${data.layers[state.layer]}: use of experts by domain`,
    rows: data.domains.length, columns: cells.experts, chosen: state.domain - 1,
    value: (r, c) => cells.cell(state.measure, r + 1, state.layer, order[c]),
    text: (r, c) => cells.describe(r + 1, state.layer, order[c]),
    rowName: (r) => data.names[r], rowTitle: "",
    columnName: (c) => String(order[c]),
    columnTitle: state.order === "id" ? "expert" : "expert, most used first",
    least: state.zoom === "wide" ? WIDE : 1,
    pick: (r, c) => set({ domain: r + 1, expert: order[c] }),
    ...measured(cells, state.measure),
  };
}

export function separation({ data }, state, set) {
  const row = (i) => data.layers.map((_, l) => data.arrays.separation.at(i, l));
  const [bits, null95, corrected, low, high, q] = [0, 1, 2, 3, 4, 5].map(row);
  const only = (ok) => bits.map((v, l) => (ok(q[l]) ? v : NaN));
  const series = [
    { name: "prompts alone (95 % of permutations)", color: "faint", ground: true, y: null95.map(() => NaN), low: null95.map((v) => (known(v) ? 0 : NaN)), high: null95 },
    { name: "corrected for bias, 95 % interval", color: "c0", y: corrected, low, high },
    { name: "measured, q ≤ 0.05", color: "ink", points: true, y: only((v) => v <= 0.05) },
    { name: "measured, q > 0.05", color: "ink", points: true, hollow: true, y: only((v) => v > 0.05) },
    { name: "measured, cannot be tested", color: "ink", points: true, hollow: true, y: only((v) => !known(v)) },
  ];
  return {
    label: "Separation of domains by layer", x: data.layers, xTitle: "layer", yTitle: "divergence (bits)",
    series: series.filter((s) => (s.ground ? s.high : s.y).some(known)),
    chosen: data.layers[state.layer], pick: (x) => set({ layer: data.layers.indexOf(x) }),
  };
}

export function persistence({ data }, state) {
  const from = state.family === "top1" ? 5 : 0;
  const row = (i) => data.lags.map((_, t) => data.arrays.persistence.at(from + i, state.layer, t));
  const [seen, shuffle, marginal, low, high] = [0, 1, 2, 3, 4].map(row);
  const over = (values) => values.map((v, i) => v + shuffle[i]);
  return {
    label: `Persistence in layer ${data.layers[state.layer]}`, x: data.lags, xTitle: "lag",
    yTitle: state.family === "top1" ? "same first expert" : "experts shared",
    series: [
      { name: "observed, 95 % interval over the shuffle", color: "c0", y: seen, low: over(low), high: over(high) },
      { name: "same prompt, random order", color: "c1", dash: "7 4", y: shuffle },
      { name: "any two tokens", color: "faint", dash: "2 4", y: marginal },
    ],
  };
}

// a probability out of fewer tokens than these does not set the colours' end
const FEW = 20;

export function transitions(cells, state) {
  const { data } = cells, l = state.layer, a = data.arrays, size = a.steps_expert.shape[1];
  const ids = Array.from({ length: size }, (_, i) => a.steps_expert.at(l, i));
  const chance = (r, c) => { const n = a.steps_from.at(l, ids[r]); return n ? a.steps.at(l, r, c) / n : NaN; };
  let high = 0;
  for (let r = 0; r < size; r++) for (let c = 0; c < size; c++)
    if (a.steps_from.at(l, ids[r]) >= FEW && chance(r, c) > high) high = chance(r, c);
  return {
    label: `Transitions in layer ${data.layers[l]}`, rows: size, columns: size, square: true,
    value: state.steps === "lift" ? (r, c) => a.steps_lift.at(l, r, c) : chance,
    text: (r, c) => {
      const n = a.steps_from.at(l, ids[r]), lift = a.steps_lift.at(l, r, c);
      return `layer ${data.layers[l]}: expert ${ids[r]} → expert ${ids[c]}\n` + (n
        ? `${whole(a.steps.at(l, r, c))} of ${whole(n)} times: ${percent(chance(r, c))}\n${known(lift) ? `lift ${digits(lift)} over random order` : "too few for a lift"}`
        : "never first before another token");
    },
    rowName: (r) => String(ids[r]), rowTitle: "first expert of a token", columnName: (c) => String(ids[c]),
    columnTitle: size < cells.experts ? `first expert of the next token (the ${size} most used of the layer)` : "first expert of the next token",
    ...(state.steps === "lift"
      ? { scale: ["ratio"], ends: ["≤ ¼", "≥ 4"], unit: "times random order (middle: 1); hatched where less than 1 is expected" }
      : { scale: ["linear", high || 1], ends: ["0", `≥ ${digits(high || 1, 2)}`], unit: "probability of the next first expert" }),
  };
}

const ROWS = 12;

export function forest(cells, state) {
  const { data } = cells, a = data.arrays, l = state.layer, found = [];
  data.domains.forEach((name, d) => {
    if (state.domain && state.domain !== d + 1) return;
    for (let e = 0; e < data.n_expert[l]; e++) {
      const [low, high, p] = [a.low, a.high, a.p].map((array) => array.at(d, l, e));
      if (!known(low) || !a.count.at(d + 1, l, e)) continue;
      const lift = cells.lift(d + 1, l, e);
      found.push({
        name: `expert ${e} · ${data.names[d]}`, whole: name, lift, low, high, sure: p <= 0.05 && lift > 1,
        text: `${digits(lift)}${known(p) ? `, ${pvalue(p)}` : ""}`,
      });
    }
  });
  const rows = found.sort((x, y) => y.low - x.low || y.lift - x.lift).slice(0, ROWS);
  return {
    label: `Experts of layer ${data.layers[l]} with the largest lower bounds of lift`, xTitle: "lift, 95 % interval", rows,
    note: `Layer ${data.layers[l]}: ` + (rows.length
      ? `the ${rows.length} of largest lower bound. Full points: p ≤ 0.05 over all experts and domains of all layers.`
      : data.sure ? "none." : "no interval is known (one prompt per domain, or no token).")
      + (data.sure ? ` Only those of p ≤ ${data.sure} are on this page, to keep it small; all are in the table.` : ""),
  };
}

const NONE = 65535;

export function text({ data }, state, set) {
  const a = data.arrays, { n, of, name } = data.texts[state.text];
  const from = data.texts.slice(0, state.text).reduce((sum, one) => sum + one.n, 0), l = state.layer;
  const tokens = Array.from({ length: n }, (_, i) => from + i);
  return {
    label: `${name}, layer ${data.layers[l]}`,
    note: n < of ? `The first ${whole(n)} of ${whole(of)} computed tokens.` : "",
    chosen: state.expert,
    pick: (expert) => set({ expert }),
    part: {
      pieces: data.pieces.slice(from, from + n),
      positions: tokens.map((i) => a.text_position.at(i)),
      generated: tokens.map((i) => a.text_generated.at(i) > 0),
      k: a.text_expert.shape[2],
      expert: (i, j) => { const e = a.text_expert.at(from + i, l, j); return e === NONE ? -1 : e; },
      weight: (i, j) => (a.text_weight ? a.text_weight.at(from + i, l, j) : NaN),
    },
  };
}

// data-widget of the page -> the array without which it is not shown, its chart, and what that draws
export const WIDGETS = {
  usage: { needs: "count", chart: Matrix, spec: usage },
  layer: { needs: "count", chart: Matrix, spec: layer },
  separation: { needs: "separation", chart: Chart, spec: separation },
  forest: { needs: "low", chart: Forest, spec: forest },
  persistence: { needs: "persistence", chart: Chart, spec: persistence },
  transitions: { needs: "steps", chart: Matrix, spec: transitions },
  text: { needs: "text_expert", chart: TextView, spec: text },
};
