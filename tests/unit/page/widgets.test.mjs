// The state behind the figures, the address that says it, and what each figure is to show.
import assert from "node:assert/strict";
import { test } from "node:test";

import { Cells } from "../../../moetrace/report/templates/data.mjs";
import * as widgets from "../../../moetrace/report/templates/widgets.mjs";
import { dataOf } from "./world.mjs";

const nothing = () => assert.fail("nothing was chosen");
const stateOf = (data, change) => ({ ...widgets.initialState(data), ...change });

test("every figure's chart and array are named, and its spec can be made of every state", () => {
  const data = dataOf(), cells = new Cells(data), choices = widgets.choicesOf(data);
  for (const [name, { needs, chart, spec }] of Object.entries(widgets.WIDGETS)) {
    assert.ok(needs in data.arrays, name);
    assert.equal(typeof chart.prototype.show, "function", name);
    for (const layer of [0, 1]) for (const domain of [0, 1, 2]) for (const [key, some] of Object.entries(choices))
      for (const [value] of some) {
        const made = spec(cells, stateOf(data, { layer, domain, [key]: value }), nothing);
        assert.ok(made.label, name);
        for (let r = 0; made.columns && r < made.rows; r++) for (let c = 0; c < made.columns; c++) {
          const v = made.value(r, c);
          assert.ok(v === undefined || typeof v === "number", name);
          assert.match(made.text(r, c), /^layer \d/);
          assert.doesNotMatch(made.text(r, c), /NaN|undefined|null/);
        }
        assert.doesNotMatch(JSON.stringify([made.label, made.ends, made.unit, made.columnTitle, made.note]), /NaN|undefined/);
      }
  }
});

test("an address gives back the state that made it", () => {
  const data = dataOf(), start = widgets.initialState(data);
  for (const change of [
    {}, { layer: 0 }, { domain: 2 }, { expert: 3, layer: 0 }, { domain: 1, measure: "lift" }, { order: "each" },
    { family: "top1", steps: "lift", measure: "even" },
  ]) {
    const state = stateOf(data, change);
    assert.deepEqual(widgets.stateFromAddress(widgets.addressOf(state, data), data, start), state);
  }
  assert.equal(widgets.addressOf(start, data), "#layer=5");
});

test("an address that makes no sense changes nothing", () => {
  const data = dataOf(), start = widgets.initialState(data);
  for (const hash of [
    "", "#captured", "#layer=99", "#layer=", "#layer=x", "#domain=nobody", "#expert=4", "#expert=-1", "#expert=1.5", "#expert=x",
    "#measure=what&order=no&family=&steps=__proto__",
  ])
    assert.deepEqual(widgets.stateFromAddress(hash, data, start), start, hash);
});

test("lift needs a domain", () => {
  const data = dataOf(), start = widgets.initialState(data);
  assert.equal(widgets.changedState(start, { measure: "lift" }, data).domain, 1);
  assert.equal(widgets.changedState({ ...start, domain: 2 }, { measure: "lift" }, data).domain, 2);
  assert.equal(widgets.changedState({ ...start, domain: 2, measure: "lift" }, { domain: 0 }, data).measure, "share");
  assert.equal(widgets.stateFromAddress("#measure=lift", data, start).domain, 1);
  data.domains = ["code"];
  assert.ok(!widgets.choicesOf(data).measure.some(([name]) => name === "lift"));
  assert.equal(widgets.stateFromAddress("#measure=lift", data, start).measure, "share");
});

test("of many experts the map shows multiples of even use, and all of them in the window unless columns are to be wide", () => {
  const data = dataOf();
  assert.equal(widgets.initialState(data).measure, "share");
  data.arrays.count = { ...data.arrays.count, shape: [3, 2, 512] };
  const start = widgets.initialState(data);
  assert.equal(start.measure, "even");
  assert.equal(widgets.choicesOf(data).measure[0][0], "even");
  assert.equal(widgets.changedState({ ...start, domain: 2, measure: "lift" }, { domain: 0 }, data).measure, "even");
  const cells = new Cells(dataOf());
  assert.equal(widgets.usage(cells, stateOf(cells.data), nothing, false).least, 1);
  assert.ok(widgets.usage(cells, stateOf(cells.data, { zoom: "wide" }), nothing, false).least > 8);
});

test("the cell that is shown is the expert that its column names, in every order", () => {
  const data = dataOf(), cells = new Cells(data);
  for (const order of ["id", "layer", "each"]) {
    const chosen = [];
    const spec = widgets.usage(cells, stateOf(data, { layer: 0, order, expert: 2 }), (change) => chosen.push(change), true);
    for (let c = 0; c < 4; c++) {
      spec.pick(0, c);
      const { layer, expert } = chosen.at(-1);
      assert.equal(layer, 0);
      assert.equal(spec.value(0, c), cells.share(0, 0, expert));
      assert.ok(spec.text(0, c).startsWith(`layer 3, expert ${expert},`));
      if (order !== "each") assert.equal(spec.columnName(c), String(expert));
    }
    assert.deepEqual(new Set(chosen.map(({ expert }) => expert)), new Set([0, 1, 2, 3]));
    assert.match(spec.text(...spec.at), /expert 2,/);
    assert.equal(widgets.usage(cells, stateOf(data, { order, expert: 2 }), nothing, false).at, null);
  }
  const ranked = widgets.usage(cells, stateOf(data, { layer: 0, order: "layer" }), nothing);
  assert.deepEqual([0, 1, 2, 3].map((c) => ranked.columnName(c)), ["0", "2", "1", "3"]);
});

test("points are full where q is at most 0.05, hollow above, and said apart where nothing was tested", () => {
  const data = dataOf(), cells = new Cells(data);
  const [ground, corrected, sure, untested] = widgets.separation(cells, stateOf(data), nothing).series;
  assert.ok(ground.ground);
  assert.deepEqual(corrected.y, [0.15, NaN]);
  assert.deepEqual([sure.name, sure.y, sure.hollow], ["measured, q ≤ 0.05", [0.2, NaN], undefined]);
  assert.deepEqual([untested.name, untested.y, untested.hollow], ["measured, cannot be tested", [NaN, 0.1], true]);
});

test("an interval over the shuffle stands where the shuffle is", () => {
  const data = dataOf(), cells = new Cells(data);
  const near = (a, b) => a.forEach((v, i) => assert.ok(Math.abs(v - b[i]) < 1e-12, `${a} is not ${b}`));
  const sets = widgets.persistence(cells, stateOf(data, { layer: 0 })).series;
  near(sets[0].y, [0.1, 0.2, 0.3]);
  near(sets[0].low, [0.4 + 0.2, 0.5 + 0.3, 0.6 + 0.4]);
  near(sets[1].y, [0.2, 0.3, 0.4]);
  const first = widgets.persistence(cells, stateOf(data, { layer: 0, family: "top1" })).series;
  near(first[0].y, [0.6, 0.7, 0.8]);
});

test("transitions are shares of all steps, and rare ones do not set the colours' end", () => {
  const data = dataOf(), cells = new Cells(data), spec = widgets.transitions(cells, stateOf(data, { layer: 0 }));
  assert.deepEqual([spec.value(0, 0), spec.value(0, 1), spec.value(1, 1)], [0.75, 0.25, 0.8]);
  assert.deepEqual(spec.scale, ["linear", 0.75]);
  assert.match(spec.text(1, 0), /^layer 3: expert 2 → expert 0\n1 of 5 times: 20.0 %\ntoo few for a lift$/);
  assert.match(spec.columnTitle, /the 2 most used/);
  const lift = widgets.transitions(cells, stateOf(data, { layer: 0, steps: "lift" }));
  assert.deepEqual([lift.value(0, 0), lift.scale], [1.5, ["ratio"]]);
  const empty = widgets.transitions(cells, stateOf(data, { layer: 1 }));
  assert.ok(Number.isNaN(empty.value(0, 0)));
  assert.match(empty.text(0, 0), /never first before another token/);
});

test("intervals of lift: the largest lower bound first, sure where p is small and the lift above 1", () => {
  const data = dataOf(), cells = new Cells(data), rows = widgets.forest(cells, stateOf(data, { layer: 0 })).rows;
  assert.deepEqual(rows.map((r) => r.low), [1.2, 1.1, 0.7, 0.6, 0.5, 0.1]);
  assert.deepEqual(rows.filter((r) => r.sure).map((r) => r.name), ["expert 1 · code"]);
  assert.equal(rows[0].text, "1.67, p = 0.040");
  const math = widgets.forest(cells, stateOf(data, { layer: 0, domain: 2 })).rows;
  assert.ok(math.length === 3 && math.every((r) => r.name.endsWith("math")));
  const none = widgets.forest(cells, stateOf(data, { layer: 1 }));
  assert.deepEqual(none.rows, []);
  assert.match(none.note, /no interval is known/);
});

test("a text's tokens are its own, and the address says which", () => {
  const data = dataOf(), cells = new Cells(data), state = stateOf(data, { layer: 0, text: 1 });
  const { part, label, note } = widgets.text(cells, state, nothing);
  assert.deepEqual([part.pieces, part.positions, part.generated, part.k], [["1"], [3], [false], 2]);
  assert.deepEqual([part.expert(0, 0), part.weight(0, 1), label, note], [3, 0.4, "b · math, layer 3", ""]);
  const first = widgets.text(cells, stateOf(data, { layer: 1 }), nothing);
  assert.equal(first.note, "The first 2 of 5 computed tokens.");
  assert.equal(first.part.expert(1, 0), -1);
  assert.equal(widgets.addressOf(state, data), "#layer=3&text=9");
  assert.equal(widgets.stateFromAddress("#text=9", data, stateOf(data)).text, 1);
  assert.equal(widgets.stateFromAddress("#text=8", data, stateOf(data)).text, 0);
  delete data.arrays.text_weight;
  assert.ok(Number.isNaN(widgets.text(cells, state, nothing).part.weight(0, 0)));
});
