// The numbers behind the interactive figures, as report/explorer.py packs them, and how numbers are written.

export const known = (x) => x !== null && x !== undefined && !Number.isNaN(x);
export const whole = (x) => x.toLocaleString("en");
export const digits = (x, n = 3) => {
  if (!known(x)) return "?";
  if (x === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(x)));
  return size < -4 || size > 6 ? x.toExponential(n - 1) : x.toFixed(Math.max(0, Math.min(6, n - 1 - size)));
};
export const percent = (x) => (known(x) ? `${x > 0 && x < 0.0005 ? "<0.1" : (100 * x).toFixed(1)} %` : "?");
export const pvalue = (p) => (p < 0.001 ? "p < 0.001" : `p = ${digits(p, 2)}`);

// -- unpacking ----------------------------------------------------------------------------------------------

const KINDS = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array, f8: Float64Array, f2: Uint16Array,
};

export function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, rest = bits & 1023;
  if (exponent === 31) return rest ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + rest / 1024) : sign * 2 ** -24 * rest;
}

let halves; // the number of each of the 65536 halves

// base64 of what explorer.pack gave -> its header, and arrays: name -> { shape, at(i, j, …) }
export async function unpack(text) {
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
    if (dtype === "f2") {
      halves ??= Float32Array.from({ length: 65536 }, (_, bits) => half(bits));
      values = new Float32Array(size);
      const bits = new Uint16Array(bytes.buffer);
      for (let i = 0; i < size; i++) values[i] = halves[bits[i]];
    }
    const [, second = 1, third = 1] = shape; // none has more than three
    arrays[name] = { shape, at: (i, j = 0, k = 0) => values[(i * second + j) * third + k] };
  }
  return { ...head, arrays };
}

// -- the use of an expert -----------------------------------------------------------------------------------

// Numbers of a cell: domain d (0: all prompts), layer l, expert e; indices, not names.
export class Cells {
  constructor(data) {
    this.data = data;
  }

  get experts() { return this.data.arrays.count.shape[2]; }

  get ids() { return Array.from({ length: this.experts }, (_, e) => e); }

  // NaN where no token was recorded
  share(d, l, e) {
    const tokens = this.data.arrays.tokens.at(d, l);
    return tokens ? this.data.arrays.count.at(d, l, e) / tokens : NaN;
  }

  // over the mean of all domains; NaN where none used it
  lift(d, l, e) {
    const n = this.data.domains.length, sum = this.sums(l)[e];
    return sum > 0 ? (this.share(d, l, e) * n) / sum : NaN;
  }

  // the domains' shares of each of a layer's experts, added up
  sums(l) {
    this.added ??= [];
    return (this.added[l] ??= Float64Array.from(this.ids, (e) => {
      let sum = 0;
      for (let d = 1; d <= this.data.domains.length; d++) sum += this.share(d, l, e);
      return sum;
    }));
  }

  // undefined where the layer has no such expert
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
        const within = known(low) ? ` (${digits(low)} to ${digits(high)})` : "";
        lines.push(`lift ${digits(lift)}${within}${known(p) ? `, ${pvalue(p)}` : ""}`);
      }
    }
    return lines.join("\n");
  }

  // the largest share, and the one that 0.1 % exceed: what the colours reach to
  get top() { return this.sorted.at(-1) || 0; }

  get high() {
    const values = this.sorted;
    return values.length ? values[Math.ceil(0.999 * (values.length - 1))] || values.at(-1) : 1;
  }

  get sorted() {
    if (!this.kept) {
      const [n, l, e] = this.data.arrays.count.shape, values = new Float32Array(n * l * e);
      let filled = 0;
      for (let d = 0; d < n; d++) for (let i = 0; i < l; i++) for (let j = 0; j < e; j++) {
        const v = this.share(d, i, j);
        if (known(v)) values[filled++] = v;
      }
      this.kept = values.subarray(0, filled).sort();
    }
    return this.kept;
  }

  // experts of a layer, most used first; unknown ones and those that are not there at the end
  ranked(d, l) {
    const v = (e) => { const x = this.cell("share", d, l, e); return x === undefined ? -2 : Number.isNaN(x) ? -1 : x; };
    return this.ids.sort((a, b) => v(b) - v(a) || a - b);
  }
}
