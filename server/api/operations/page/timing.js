// What timed runs of one prompt say of speed: geometric means, and how far the machine's noise lets them be trusted.

// Fewer timed runs give no interval.
export const ENOUGH = 5;
export const REPEATS = 5;

const Z = 1.959963984540054;

// The 97.5 % quantile of Student's t, by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5); off by less than
// 0.001 from 4 degrees of freedom on.
function quantile(freedom) {
  const terms = [
    (Z ** 3 + Z) / 4,
    (5 * Z ** 5 + 16 * Z ** 3 + 3 * Z) / 96,
    (3 * Z ** 7 + 19 * Z ** 5 + 17 * Z ** 3 - 15 * Z) / 384,
    (79 * Z ** 9 + 776 * Z ** 7 + 1482 * Z ** 5 - 1920 * Z ** 3 - 945 * Z) / 92160,
  ];
  return terms.reduce((sum, term, i) => sum + term / freedom ** (i + 1), Z);
}

// The geometric mean of positive values, as in the server's A/B summary, with the 95 % t interval of their logarithms.
// The summary's bootstrap is for 30 pairs and more: of 5 values its interval covers the truth 4 times in 5 only.
export function estimate(values) {
  const runs = values.length;
  if (!runs) return null;
  const logs = values.map(Math.log);
  const mean = average(logs);
  if (runs < ENOUGH) return { mean: Math.exp(mean), low: null, high: null, runs };
  const variance = logs.reduce((sum, log) => sum + (log - mean) ** 2, 0) / (runs - 1);
  const half = quantile(runs - 1) * Math.sqrt(variance / runs);
  return { mean: Math.exp(mean), low: Math.exp(mean - half), high: Math.exp(mean + half), runs };
}

function average(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

// What is kept of a comparison that ran its variants one after the other: by variant, numbers or null.
export function timingOf(answer) {
  return Object.fromEntries(
    answer.results.map(({ variant, lowkey, against_baseline: difference }) => [
      variant,
      { speed: lowkey.tokens_per_second, ttftS: lowkey.ttft_s, ratio: difference?.tokens_per_second_ratio ?? null },
    ]),
  );
}

function known(timings, variant, name) {
  return timings.map((timing) => timing[variant][name]).filter((value) => value != null);
}

// Speed, as `estimate` gives it, and time to the first token of one variant over its timed runs; null where no run has
// any.
export function meansOf(timings, variant) {
  const waits = known(timings, variant, "ttftS");
  return {
    speed: estimate(known(timings, variant, "speed")),
    ttftS: waits.length ? average(waits) : null,
  };
}

// A variant's tokens/s over the baseline's in two strings: the ratio, or why there is none, and what it rests on. `even`:
// the interval holds 1.
export function speedRatio(timings, variant) {
  const found = estimate(known(timings, variant, "ratio"));
  if (!found && timings.length) return { known: false, value: "too short to time", basis: "an answer of few tokens" };
  if (!found || found.low == null) {
    return { known: false, value: "not enough data", basis: `timed runs: ${found?.runs ?? 0} of at least ${ENOUGH}` };
  }
  const value = `${found.mean.toFixed(2)}×`;
  const even = found.low <= 1 && found.high >= 1;
  return { known: true, even, value, basis: `[${found.low.toFixed(2)}, ${found.high.toFixed(2)}], ${found.runs} runs` };
}
