// The page: its controls and figures, theme, contents and tables. The last part of the script, and the one that
// begins.

import { $, $$, make, showTable, showTip } from "./charts.mjs";
import { Cells, unpack } from "./data.mjs";
import { addressOf, addressParts, changedState, choicesOf, initialState, stateFromAddress, WIDGETS } from "./widgets.mjs";

let report;

const clipped = (text) => (text.length > 60 ? `${text.slice(0, 29)}…${text.slice(-30)}` : text);

// One state, the controls that set it, and the figures that draw it.
class Report {
  constructor(data) {
    this.data = data;
    this.cells = new Cells(data);
    this.choices = choicesOf(data);
    this.state = initialState(data);
    this.read();
    this.figures = {};
    for (const box of $$(".widget")) {
      const name = box.dataset.widget, { needs, chart } = WIDGETS[name];
      if (!(needs in data.arrays) || (name === "layer" && !data.domains.length)) continue;
      box.hidden = false;
      this.figures[name] = new chart($(".plot", box));
    }
    this.fill();
    this.show(true);
    addEventListener("hashchange", () => { if (location.hash.includes("=")) { this.read(); this.show(true); } });
  }

  read() {
    this.state = stateFromAddress(location.hash, this.data, this.state);
    const theme = addressParts(location.hash).get("theme");
    if (THEMES.includes(theme)) wearTheme(theme);
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
        option(box, 0, many ? "all prompts" : "all prompts (no labels)");
        this.data.domains.forEach((text, i) => option(box, i + 1, clipped(text)));
      } else if (name === "text") (this.data.texts ?? []).forEach((one, i) => option(box, i, clipped(one.name)));
      else this.choices[name].forEach(([value, text]) => option(box, value, text));
      const value = () => (/layer|domain|text/.test(name) ? Number(box.value) : box.value);
      box.addEventListener(name === "layer" ? "input" : "change", () => this.set({ [name]: value() }));
    }
  }

  set(change) {
    this.state = changedState(this.state, change, this.data);
    history.replaceState(null, "", addressOf(this.state, this.data));
    this.show();
  }

  // linked: the address names an expert, and its cell is to be marked
  show(linked = false) {
    const state = this.state, layer = this.data.layers[state.layer];
    for (const box of $$("[data-bind]")) {
      box.value = state[box.dataset.bind];
      if (box.nextElementSibling?.tagName === "OUTPUT") box.nextElementSibling.value = layer;
      if (box.dataset.bind === "layer") box.setAttribute("aria-valuetext", `layer ${layer}`);
    }
    for (const box of $$('[data-show="layer"]')) box.value = layer;
    for (const [name, figure] of Object.entries(this.figures))
      figure.show(WIDGETS[name].spec(this.cells, state, (change) => this.set(change), linked));
  }
}

// -- theme --------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
const KEPT = "moetrace-theme";

function wearTheme(name) {
  document.documentElement.dataset.theme = name;
  $("#theme span").textContent = name;
}

function startTheme() {
  const root = document.documentElement, button = $("#theme");
  let kept = null, worn = null;
  try { kept = localStorage.getItem(KEPT); } catch { /* a page from a file may have no storage */ }
  wearTheme(THEMES.includes(kept) ? kept : root.dataset.theme);
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
    wearTheme(next);
    try { localStorage.setItem(KEPT, next); } catch { /* the same */ }
    report?.show();
  });
  // on paper nothing can be opened
  let closed = [];
  addEventListener("beforeprint", () => {
    worn = root.dataset.theme; root.dataset.theme = "light"; report?.show();
    closed = $$("details.basis").filter((box) => !box.open);
    closed.forEach((box) => { box.open = true; });
  });
  addEventListener("afterprint", () => {
    root.dataset.theme = worn; report?.show();
    closed.forEach((box) => { box.open = false; });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => report?.show());
}

// -- contents and tables ------------------------------------------------------------------------------------

function startContents() {
  if (innerWidth <= 1000) $("nav details").open = false;
  const links = new Map($$("nav ol a").map((a) => [a.hash.slice(1), a]));
  const watcher = new IntersectionObserver((seen) => {
    for (const entry of seen) if (entry.isIntersecting) {
      links.forEach((a) => a.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  $$("main section").forEach((section) => watcher.observe(section));
}

// what a link leads to must be seen
function startLinks() {
  const open = () => document.getElementById(location.hash.slice(1))?.closest("details.basis")?.setAttribute("open", "");
  addEventListener("hashchange", open);
  open();
}

// a table is built when it is opened
function startTables(tables) {
  for (const box of $$("[data-table]"))
    box.addEventListener("toggle", () => {
      if (box.dataset.open || !box.open) return;
      box.dataset.open = "1";
      showTable(box, tables[box.dataset.table]);
    });
}

function start() {
  const root = document.documentElement;
  startTheme();
  addEventListener("keydown", (e) => { if (e.key === "Escape") showTip(""); });
  startContents();
  startLinks();
  // the other page shows the same layer and domain
  $$(".phases a").forEach((a) => a.addEventListener("click", () => { a.hash = location.hash.includes("=") ? location.hash : ""; }));
  unpack($("#data").textContent).then((data) => {
    report = new Report(data);
    startTables(data.tables);
    root.dataset.ready = "1";
  }, (error) => {
    const said = $("#broken");
    said.textContent = `The interactive figures could not be unpacked (${error.message}). A browser of 2023 or later can; all figures are in figures/, all tables in tables/.`;
    said.hidden = false;
    root.dataset.ready = "broken";
  });
}

// node reads the modules, too, and has no page
if (typeof document !== "undefined") start();
