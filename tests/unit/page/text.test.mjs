// Which colour a token of a text has, and what is said of it.
import assert from "node:assert/strict";
import { test } from "node:test";

import { painted, tokenSaid } from "../../../moetrace/report/templates/text.mjs";

// one layer: tokens of experts [id, weight]
const partOf = (rows, more = {}) => ({
  pieces: rows.map((_, i) => `t${i}`), positions: rows.map((_, i) => i), generated: rows.map(() => false), k: 2,
  expert: (i, j) => rows[i][j]?.[0] ?? -1, weight: (i, j) => rows[i][j]?.[1] ?? NaN, ...more,
});

test("a token has the colour of the expert with the most weight, whatever the order", () => {
  const { tokens, legend, known } = painted(partOf([[[4, 0.2], [9, 0.8]], [[9, 0.6], [4, 0.4]], [[4, 0.9], [9, 0.1]], []]), null);
  assert.equal(tokens[0].paint, tokens[1].paint);
  assert.notEqual(tokens[0].paint, tokens[2].paint);
  assert.deepEqual([tokens[3].paint, tokens[3].missing], [null, true]);
  assert.deepEqual(legend.map(({ expert, share }) => [expert, share]), [[9, 2 / 3], [4, 1 / 3]]);
  assert.equal(known, 3);
});

test("without weights the router's first counts", () => {
  const { legend } = painted(partOf([[[4], [9]], [[4], [7]]]), null);
  assert.deepEqual(legend.map(({ expert }) => expert), [4]);
});

test("a chosen expert marks its tokens alone, the stronger the more weight", () => {
  const { tokens, used, legend } = painted(partOf([[[4, 0.2], [9, 0.8]], [[9, 0.4], [4, 0.6]], [[3, 0.9], [4, 0.1]], []]), 9);
  assert.deepEqual(tokens.map(({ paint }) => paint !== null), [true, true, false, false]);
  const green = ({ paint }) => Number(paint.match(/\d+/g)[1]);
  assert.ok(green(tokens[0]) < green(tokens[1])); // nearer to white
  assert.deepEqual([used, legend[0].expert], [2, 9]);
});

test("more experts than colours: the least used have none", () => {
  const rows = Array.from({ length: 15 }, (_, e) => [[e, 1]]);
  const { tokens, legend } = painted(partOf([...rows, ...rows.slice(0, 12)]), null);
  assert.equal(legend.length, 12);
  assert.deepEqual(tokens.slice(12, 15).map(({ paint }) => paint), [null, null, null]);
});

test("gaps, and where the answer begins", () => {
  const { tokens } = painted(partOf([[[1, 1]], [[1, 1]], [[1, 1]]], { positions: [3, 4, 9], generated: [false, true, true] }), null);
  assert.deepEqual(tokens.map(({ gap }) => gap), [3, 0, 4]);
  assert.deepEqual(tokens.map(({ begins }) => begins), [false, true, false]);
});

test("what is said of a token", () => {
  const part = partOf([[[4, 0.2], [9, 0.8]], []], { pieces: ["<b>\n", "x"] });
  assert.equal(tokenSaid(part, 0), 'position 0, prompt: "<b>\\n" · experts 9 (0.800), 4 (0.200)');
  assert.match(tokenSaid(part, 1), /not computed/);
  assert.match(tokenSaid(partOf([[[4], [9]]]), 0), /experts 4, 9$/);
});
