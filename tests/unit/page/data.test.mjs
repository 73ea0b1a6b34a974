// Unpacking what report/explorer.py packs, and how numbers are written.
import assert from "node:assert/strict";
import { test } from "node:test";
import { deflateSync } from "node:zlib";

import { Cells, digits, half, percent, pvalue, unpack } from "../../../moetrace/report/templates/data.mjs";
import { dataOf } from "./world.mjs";

test("numbers are written with as many digits as they have, and not at all where they are not known", () => {
  const written = [0, 0.123456, 1.5, 12.345, 1234.5, 1e7, 0.00001, -0.25, 999999].map((x) => digits(x));
  assert.deepEqual(written, ["0", "0.123", "1.50", "12.3", "1235", "1.00e+7", "1.00e-5", "-0.250", "999999"]);
  for (const missing of [NaN, null, undefined]) assert.equal(digits(missing), "?");
  assert.deepEqual([0, 0.0004, 0.0005, 0.5, 1, NaN].map(percent), ["0.0 %", "<0.1 %", "0.1 %", "50.0 %", "100.0 %", "?"]);
  assert.deepEqual([0.0005, 0.001, 0.05].map(pvalue), ["p < 0.001", "p = 0.0010", "p = 0.050"]);
});

test("half floats are those of IEEE 754", () => {
  const bits = [0x0000, 0x3c00, 0xc000, 0x7bff, 0x0001, 0x03ff, 0x7c00, 0xfc00];
  const values = [0, 1, -2, 65504, 2 ** -24, 1023 * 2 ** -24, Infinity, -Infinity];
  assert.deepEqual(bits.map(half), values);
  assert.ok(Number.isNaN(half(0x7e00)));
});

test("arrays come out of their planes of bytes", async () => {
  const head = {
    domains: ["</script>"],
    arrays: { a: { dtype: "u2", shape: [2, 2], offset: 0 }, b: { dtype: "f4", shape: [2], offset: 8 } },
  };
  const a = Buffer.from(Uint16Array.of(1, 256, 65535, 770).buffer), b = Buffer.from(Float32Array.of(1.5, NaN).buffer);
  const planes = (bytes, width) => Buffer.concat(Array.from({ length: width }, (_, i) => bytes.filter((_, at) => at % width === i)));
  const text = Buffer.from(JSON.stringify(head)), size = Buffer.alloc(4);
  size.writeUInt32LE(text.length);
  const packed = deflateSync(Buffer.concat([size, text, planes(a, 2), planes(b, 4)]));
  const data = await unpack(`\n${packed.toString("base64")}\n`);
  assert.deepEqual(data.domains, ["</script>"]);
  assert.deepEqual([[0, 0], [0, 1], [1, 0], [1, 1]].map((i) => data.arrays.a.at(...i)), [1, 256, 65535, 770]);
  assert.equal(data.arrays.b.at(0), 1.5);
  assert.ok(Number.isNaN(data.arrays.b.at(1)));
  await assert.rejects(unpack(Buffer.from("not packed").toString("base64")));
});

test("a cell's numbers follow from its counts", () => {
  const cells = new Cells(dataOf());
  assert.equal(cells.share(0, 0, 1), 6 / 12);
  assert.equal(cells.cell("even", 0, 0, 1), (6 / 12) * 4 / 2);
  assert.equal(cells.lift(1, 0, 1), (5 / 6) / ((5 / 6 + 1 / 6) / 2));
  assert.deepEqual(cells.ranked(1, 0), [1, 0, 2, 3]);
  assert.equal(cells.top, 1);
});

test("missing is missing: no token, no such expert, no domain that used it", () => {
  const cells = new Cells(dataOf());
  assert.ok(Number.isNaN(cells.share(2, 1, 0)));
  assert.equal(cells.describe(2, 1, 0), "layer 5, expert 0, math\nmissing: no token recorded");
  assert.equal(cells.cell("share", 0, 1, 3), undefined);
  assert.equal(cells.describe(0, 1, 3), "layer 5, expert 3, all prompts\nthis layer has 3 experts");
  assert.ok(Number.isNaN(cells.lift(1, 0, 3)));
  assert.equal(cells.describe(1, 0, 3), "layer 3, expert 3, code\n0 of 6 tokens: 0.0 %\n0 times even use\nno domain used it");
  // what is not known stands behind what was not used, and what is not there behind both
  assert.deepEqual(cells.ranked(2, 1), [0, 1, 2, 3]);
});

test("a lift is said with its interval where one is known", () => {
  const data = dataOf(), cells = new Cells(data);
  assert.equal(cells.describe(1, 0, 1).split("\n").at(-1), "lift 1.67 (1.20 to 2.00), p = 0.040");
  delete data.arrays.low;
  delete data.arrays.p;
  assert.equal(cells.describe(1, 0, 1).split("\n").at(-1), "lift 1.67");
  assert.equal(cells.describe(0, 0, 1).split("\n").length, 3);
});
