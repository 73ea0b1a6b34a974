// What of the charts is arithmetic; what they draw is looked at in a browser (tests/integration/test_report_page.py).
import assert from "node:assert/strict";
import { test } from "node:test";

import { cellText, ramp, scaleOf, sortedRows, ticks } from "../../../moetrace/report/templates/charts.mjs";

test("ticks are round, within the axis, and not too many", () => {
  assert.deepEqual(ticks(0, 1, 5), [0, 0.2, 0.4, 0.6000000000000001, 0.8, 1]);
  assert.deepEqual(ticks(0, 4, 4), [0, 1, 2, 3, 4]);
  for (const [low, high] of [[0, 1e-9], [-0.3, 0.7], [0, 12345], [5, 5], [-7, -2]]) {
    const found = ticks(low, high, 5);
    assert.ok(found.length >= 1 && found.length <= 7, `${low} to ${high}: ${found}`);
    assert.ok(found.every((v) => v >= low - 1e-9 && v <= high + (high - low || 1) * 1e-5));
  }
});

test("colours: a value beyond the end has the end's, and ratios are even around 1", () => {
  const share = scaleOf(["linear", 0.5], false);
  assert.equal(share.color(0), share.table[0]);
  assert.equal(share.color(0.25), share.table[128]);
  for (const v of [0.5, 0.9]) assert.equal(share.color(v), share.table[255]);
  const ratio = scaleOf(["ratio"], false);
  assert.deepEqual([0, 0.25, 1, 4, 9].map((v) => ratio.table.indexOf(ratio.color(v))), [0, 0, 128, 255, 255]);
  assert.notDeepEqual(scaleOf(["ratio"], true).table, ratio.table);
  assert.equal(scaleOf(["linear", 0], false).color(0), share.table[0]);
  assert.deepEqual([ramp("000000ffffff")[0], ramp("000000ffffff")[255]], ["rgb(0,0,0)", "rgb(255,255,255)"]);
});

test("a table's cell says its value, nothing where it is missing, and numbers of a column alike", () => {
  assert.equal(cellText(null, true, true), "");
  assert.deepEqual([7, 1234, 12345, -98765].map((v) => cellText(v, true, true)), ["7", "1234", "12,345", "-98,765"]);
  assert.deepEqual([7, 0.123456].map((v) => cellText(v, true, false)), ["7.000", "0.1235"]);
  assert.equal(cellText([1, 2], false, false), "[1,2]");
  assert.equal(cellText(false, false, false), "false");
});

test("what is missing stays last whichever way a column is sorted, and equal rows keep their order", () => {
  const rows = [0, 1, 2, 3, 4];
  assert.deepEqual(sortedRows(rows, [3, null, 1, 3, 2], true, true), [2, 4, 0, 3, 1]);
  assert.deepEqual(sortedRows(rows, [3, null, 1, 3, 2], true, false), [0, 3, 4, 2, 1]);
  assert.deepEqual(sortedRows(rows, ["b", null, "a", "B", "10"], false, true).at(-1), 1);
  assert.deepEqual(rows, [0, 1, 2, 3, 4]);
});

test("every module is loaded without a page", async () => {
  await import("../../../moetrace/report/templates/page.mjs");
});
