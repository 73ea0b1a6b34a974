// A request's text, each token on the colour of its expert: of the one with the most weight, or of a chosen one as far
// as it has weight. The report and the live page show it.
//
// What is drawn is one layer of a request, a part: { pieces, positions, generated, k, expert(i, j), weight(i, j) },
// i the token, j one of its k experts; expert -1: there is none; weight NaN: not known.

// black on each is read, and they are told apart in this order
const PAINTS = ["87d7ff", "ffaf5f", "87ff87", "ffafd7", "ffff87", "afafff", "ff875f", "afffd7", "d7afff", "d7af87", "87afd7", "afd787"];
const ONE = "ff9d3d";

const towardsWhite = (hex, strength) => {
  const mixed = [0, 2, 4].map((i) => Math.round(255 + (parseInt(hex.slice(i, i + 2), 16) - 255) * strength));
  return `rgb(${mixed.join()})`;
};

// of a token: its experts, the one with the most weight first
export function expertsOf(part, i) {
  const found = [];
  for (let j = 0; j < part.k; j++) if (part.expert(i, j) >= 0) found.push({ expert: part.expert(i, j), weight: part.weight(i, j) });
  return found.every(({ weight }) => !Number.isNaN(weight)) ? found.sort((a, b) => b.weight - a.weight) : found;
}

// chosen: an expert, or null for the first of each token. Gives for each token its paint (null: none), and a legend.
export function painted(part, chosen) {
  const experts = part.pieces.map((_, i) => expertsOf(part, i));
  const there = experts.filter((found) => found.length), count = new Map();
  for (const [{ expert }] of there) count.set(expert, (count.get(expert) ?? 0) + 1);
  const most = [...count].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, PAINTS.length);
  const paint = new Map(most.map(([expert], i) => [expert, PAINTS[i]]));
  // the strength is the part of the largest weight that the experts could have: of those of this token
  const strength = (found, one) => (Number.isNaN(one.weight) ? 1 : Math.max(0.15, Math.min(1, one.weight / Math.max(...found.map((f) => f.weight)))));
  const tokens = experts.map((found, i) => {
    const gap = part.positions[i] - (i ? part.positions[i - 1] : -1) - 1;
    const begins = part.generated[i] && !(i && part.generated[i - 1]);
    const token = { text: part.pieces[i], gap, begins, missing: !found.length, paint: null };
    const one = chosen === null ? found[0] : found.find(({ expert }) => expert === chosen);
    if (!one) return token;
    const hex = chosen === null ? paint.get(one.expert) : ONE;
    token.paint = hex ? towardsWhite(hex, chosen === null ? 1 : strength(found, one)) : null;
    return token;
  });
  const used = experts.filter((found) => found.some(({ expert }) => expert === chosen)).length;
  const legend = chosen === null
    ? most.map(([expert, n]) => ({ expert, paint: `#${paint.get(expert)}`, share: n / there.length }))
    : [{ expert: chosen, paint: `#${ONE}`, share: there.length ? used / there.length : 0 }];
  return { tokens, legend, known: there.length, used };
}

// what is said of a token
export function tokenSaid(part, i) {
  const found = expertsOf(part, i);
  const list = found.map(({ expert, weight }) => `${expert}${Number.isNaN(weight) ? "" : ` (${weight.toFixed(3)})`}`);
  return `position ${part.positions[i]}, ${part.generated[i] ? "generated" : "prompt"}: ${JSON.stringify(part.pieces[i])} · `
    + (list.length ? `experts ${list.join(", ")}` : "not computed in this layer, or lost");
}

export class TextView {
  constructor(box) {
    const make = (tag, name) => box.appendChild(Object.assign(document.createElement(tag), { className: name }));
    this.text = make("div", "tokens");
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "group");
    this.legend = make("p", "legend");
    this.said = make("p", "readout");
    this.said.setAttribute("aria-live", "polite");
    this.spans = [];
    this.at = -1;
    const spot = (event) => this.point(this.spans.indexOf(event.target.closest("[data-token]")));
    this.text.addEventListener("mousemove", spot);
    this.text.addEventListener("click", spot);
    this.text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.point(Math.max(0, Math.min(this.spans.length - 1, this.at + step)));
    });
  }

  // label: what it is, for those who do not see it; pick(expert or null) is called when one is chosen in the legend
  show({ part, chosen, label, note, pick }) {
    const element = (tag, text, className) => Object.assign(document.createElement(tag), { className: className ?? "", textContent: text });
    const { tokens, legend, known, used } = painted(part, chosen), parts = [];
    this.part = part;
    this.spans = tokens.map((token) => {
      if (token.gap > 0) parts.push(element("i", `[${token.gap.toLocaleString("en")} position${token.gap > 1 ? "s" : ""} not computed or lost]`, "note"));
      if (token.begins) parts.push(element("i", "▸", "note"));
      const span = element("span", token.text, token.missing ? "missing" : "");
      span.dataset.token = "";
      if (token.paint) {
        span.style.background = token.paint;
        span.style.color = "#000";
      }
      parts.push(span);
      return span;
    });
    if (note) parts.push(element("i", ` … ${note}`, "note"));
    this.text.replaceChildren(...parts);
    this.text.setAttribute("aria-label", label);
    const keys = legend.map(({ expert, paint, share }) => {
      const key = element("button", `${expert}`);
      key.type = "button";
      key.style.background = paint;
      key.title = chosen === null ? `mark the tokens of expert ${expert}` : "back to the first expert of each token";
      key.addEventListener("click", () => pick(chosen === null ? expert : null));
      const pair = element("span");
      pair.append(key, element("span", chosen === null ? ` ${(100 * share).toFixed(0)} %` : ` used by ${used.toLocaleString("en")} of ${known.toLocaleString("en")} tokens; the stronger, the nearer its weight is to the token's largest`));
      return pair;
    });
    this.legend.replaceChildren(...keys);
    this.point(Math.min(this.at, this.spans.length - 1));
  }

  point(i) {
    this.spans[this.at]?.classList.remove("at");
    this.at = i;
    this.spans[i]?.classList.add("at");
    this.said.classList.toggle("empty", i < 0);
    this.said.textContent = i < 0 ? "Point at a token, or focus the text and use the arrow keys. ▸ what follows was generated; underlined: not computed in this layer, or lost." : tokenSaid(this.part, i);
  }
}
