// Data as a page has it: two domains, layers 3 and 5 of 4 and 3 experts, top-2; of math layer 5 has no token.

export function array(values) {
  const shape = [];
  for (let inner = values; Array.isArray(inner); inner = inner[0]) shape.push(inner.length);
  const flat = values.flat(Infinity);
  return { shape, at: (...where) => flat[where.reduce((sum, x, i) => sum * shape[i] + x, 0)] };
}

export function dataOf() {
  return {
    domains: ["code", "math"], names: ["code", "math"], layers: [3, 5], start: 1, n_expert: [4, 3], k: [2, 2], lags: [1, 2, 4],
    // two texts, of two tokens and of one
    texts: [{ number: 7, name: "a · code", n: 2, of: 5 }, { number: 9, name: "b · math", n: 1, of: 1 }],
    pieces: ["def", " f", "1"],
    arrays: {
      text_expert: array([[[0, 2], [1, 0]], [[2, 1], [65535, 65535]], [[3, 0], [2, 1]]]),
      text_weight: array([[[0.25, 0.75], [0.5, 0.5]], [[0.9, 0.1], [NaN, NaN]], [[0.6, 0.4], [0.7, 0.3]]]),
      text_position: array([0, 4, 3]),
      text_generated: array([0, 1, 0]),
      count: array([
        [[9, 6, 9, 0], [6, 4, 2, 0]],
        [[4, 5, 3, 0], [6, 4, 2, 0]],
        [[5, 1, 6, 0], [0, 0, 0, 0]],
      ]),
      tokens: array([[12, 6], [6, 6], [6, 0]]),
      low: array([[[0.6, 1.2, 0.5, NaN], [NaN, NaN, NaN, NaN]], [[0.7, 0.1, 1.1, NaN], [NaN, NaN, NaN, NaN]]]),
      high: array([[[1.1, 2, 0.9, NaN], [NaN, NaN, NaN, NaN]], [[1.4, 0.8, 1.9, NaN], [NaN, NaN, NaN, NaN]]]),
      p: array([[[0.9, 0.04, 0.8, NaN], [NaN, NaN, NaN, NaN]], [[0.9, 0.03, 0.2, NaN], [NaN, NaN, NaN, NaN]]]),
      separation: array([[0.2, 0.1], [0.05, NaN], [0.15, NaN], [0.1, NaN], [0.2, NaN], [0.01, NaN]]),
      persistence: array(Array.from({ length: 10 }, (_, i) => [[i + 1, i + 2, i + 3], [NaN, NaN, NaN]].map((row) => row.map((v) => v / 10)))),
      steps: array([[[30, 10], [1, 4]], [[0, 0], [0, 0]]]),
      steps_lift: array([[[1.5, 0.5], [NaN, NaN]], [[NaN, NaN], [NaN, NaN]]]),
      steps_expert: array([[0, 2], [0, 1]]),
      steps_from: array([[40, 3, 5, 0], [0, 0, 0, 0]]),
    },
  };
}
