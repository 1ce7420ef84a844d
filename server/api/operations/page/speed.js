// From the points of an answer, [seconds, tokens so far], to its speed over time.

const SAMPLES = 60;
const LEAST_TOKENS = 4;
// A window is a sixth of the time that all tokens took: narrower ones show how events were bundled, and not the speed.
const WINDOWS = 6;

// [seconds, tokens/s] from the first token to the last one: the slope of tokens over time, in a window around each
// moment that ends where the answer does. Empty for answers that are too short to have one.
export function speedCurve(points) {
  const known = points.filter(([seconds], i) => i === 0 || seconds > points[i - 1][0]);
  if (known.length < 2) return [];
  const [first, firstTokens] = known[0];
  const [last, lastTokens] = known.at(-1);
  if (lastTokens - firstTokens < LEAST_TOKENS) return [];
  const half = (last - first) / WINDOWS / 2;
  return Array.from({ length: SAMPLES + 1 }, (_, i) => {
    const at = first + ((last - first) * i) / SAMPLES;
    const [begin, end] = [Math.max(first, at - half), Math.min(last, at + half)];
    return [at, (tokensAt(known, end) - tokensAt(known, begin)) / (end - begin)];
  });
}

// Between two points tokens are taken to come evenly.
function tokensAt(points, seconds) {
  let i = 1;
  while (i < points.length - 1 && points[i][0] < seconds) i += 1;
  const [[s0, t0], [s1, t1]] = [points[i - 1], points[i]];
  return t0 + ((t1 - t0) * (seconds - s0)) / (s1 - s0);
}

// The end of an axis from zero on that `value` fits on: 1, 2, 2.5 or 5 times a power of ten.
export function niceEnd(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 2.5, 5, 10].find((step) => step * power >= value * (1 - 1e-9));
}
