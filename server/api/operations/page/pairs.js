// How a variant differs from its baseline on the same text: what can be said, and each figure with its interval.

import { svg } from "./charts.js";
import { el } from "./dom.js";
import * as format from "./format.js";

// As the server has it (`MIN_PAIRS` of server/hub/window.py): fewer pairs get no interval.
const ENOUGH = 30;

const FIGURES = [
  {
    name: "kl",
    label: "Distance of predictions (KL)",
    unit: "nats per token",
    text: format.small,
    same: 0,
    means: () => "0 would be the same prediction for every token. It is never below 0.",
  },
  {
    name: "top1_agreement",
    label: "Same most likely token",
    unit: "of tokens",
    text: format.percent,
    same: 1,
    means: () => "How often both would choose the same next token if they always took the most likely one.",
  },
  {
    name: "prompt_nll_difference",
    label: "Loss on users' prompts",
    unit: "nats per token",
    text: (value) => signed(value, format.small),
    same: 0,
    means: (found, { variant }) => `Above 0: ${variant} finds what users wrote less likely.${found ? ` This much is ${signed(Math.expm1(found.mean) * 100, (v) => v.toFixed(1))} % of perplexity.` : ""}`,
  },
  {
    name: "speed_ratio",
    label: "Speed",
    unit: "of the baseline's tokens per second",
    text: format.ratio,
    same: 1,
    means: () => "From timed comparisons only, one variant at a time. Above 1×: faster.",
  },
  {
    name: "ttft_difference_s",
    label: "Wait for the first token",
    unit: "beyond the baseline's",
    text: (value) => signed(value, format.seconds),
    same: 0,
    means: () => "From timed comparisons only. Below 0: it begins sooner.",
  },
];

export function pairCard(pair, colour) {
  const counts = Object.entries(pair.pairs).map(([source, count]) => `${count.toLocaleString("en")} from ${source === "shadow" ? "shadow traffic" : "comparisons"}`);
  return el(
    "article",
    { class: `pair ${colour}`, "data-pair": `${pair.variant}/${pair.baseline}` },
    el("h3", {}, pair.variant, el("small", {}, ` against ${pair.baseline}, ${counts.join(", ")}`)),
    el("p", { class: "lead" }, said(pair)),
    el("div", { class: "estimates" }, ...FIGURES.map((figure) => estimateOf(figure, pair))),
  );
}

// The verdict for somebody who knows no statistics.
function said({ variant, baseline, kl, top1_agreement: agreement, prompt_nll_difference: nll, speed_ratio: speed }) {
  const pairs = kl?.pairs ?? 0;
  if (pairs < ENOUGH) return `Too early to say: ${pairs} different texts were compared, and ${ENOUGH} are needed.`;
  const words = [];
  if (nll?.low == null) words.push("Too few prompts are longer than a token to say which variant knows them better");
  else if (nll.low > 0) words.push(`${variant} is measurably worse than ${baseline} at predicting your prompts`);
  else if (nll.high < 0) words.push(`${variant} is measurably better than ${baseline} at predicting your prompts`);
  else words.push(`By how well they predict your prompts, ${variant} and ${baseline} can't be told apart so far`);
  words.push(`they choose the same token ${format.percent(agreement.mean)} of the time`);
  if (speed?.low == null) words.push(`on speed there is too little data (${speed?.pairs ?? 0} timed comparisons of ${ENOUGH})`);
  else if (speed.low > 1) words.push(`${variant} is faster`);
  else if (speed.high < 1) words.push(`${variant} is slower`);
  else words.push("neither is measurably faster");
  return `${words.join("; ")}.`;
}

function estimateOf({ name, label, unit, text, same, means }, pair) {
  const found = pair[name];
  const known = found?.low != null;
  const has = found?.pairs ?? 0;
  return el(
    "div",
    { class: "figure estimate", "data-figure": name },
    el("span", { class: "label" }, label),
    el("span", { class: known ? "value" : "value unknown" }, known ? text(found.mean) : "not enough data"),
    el("span", { class: "unit" }, known ? `${unit}; 95 % interval ${text(found.low)} to ${text(found.high)}` : `${has} of ${ENOUGH} pairs that tell it`),
    known ? whisker(found, same) : waiting(has / ENOUGH),
    el("p", { class: "hint" }, means(known ? found : null, pair)),
  );
}

function waiting(share) {
  return svg("svg", { class: "whisker", viewBox: "0 0 200 24", "aria-hidden": "true" }, [
    svg("rect", { x: 0, y: 6, width: 200, height: 4, rx: 2, class: "track" }),
    svg("rect", { x: 0, y: 6, width: 200 * share, height: 4, rx: 2, class: "bar" }),
  ]);
}

// The mean as a dot, its interval as a line, and where "no difference" is.
function whisker({ mean, low, high }, same) {
  const room = (Math.max(high, same) - Math.min(low, same)) * 0.06 || 1;
  const [first, last] = [Math.min(low, same) - room, Math.max(high, same) + room];
  const x = (value) => (200 * (value - first)) / (last - first);
  const at = x(same);
  return svg("svg", { class: "whisker", viewBox: "0 0 200 24", "aria-hidden": "true" }, [
    svg("line", { x1: 0, x2: 200, y1: 8, y2: 8, class: "axis" }),
    svg("line", { x1: at, x2: at, y1: 1, y2: 15, class: "same" }),
    svg("text", { x: at, y: 22, class: "tick", "text-anchor": at < 40 ? "start" : at > 160 ? "end" : "middle" }, ["no difference"]),
    svg("line", { x1: x(low), x2: x(high), y1: 8, y2: 8, class: "range" }),
    svg("circle", { cx: x(mean), cy: 8, r: 4, class: "dot" }),
  ]);
}

function signed(value, text) {
  return `${value < 0 ? "−" : "+"}${text(Math.abs(value))}`;
}
