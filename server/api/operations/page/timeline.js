// Charts of a window of time, one below the other, with one cursor for all.

import { svg } from "./charts.js";
import { el } from "./dom.js";
import * as format from "./format.js";
import { colourOf } from "./models.js";
import { counted } from "./words.js";

const HIGH = 120;
const EDGES = { left: 46, right: 8, top: 8, bottom: 20 };

// `of` says whose figure it is: each variant's, or each pair's. Of pairs there are dots, the mean of each part, and a line
// in a band: what was known by then, with its interval. `same`: the value at which variants do not differ, 0, or 1 for
// ratios.
const CHARTS = [
  { name: "Requests", unit: "that ended", of: "variants", field: "requests", text: (v) => v.toLocaleString("en"), whole: true },
  { name: "Tokens per second", unit: "of all tokens together", of: "variants", field: "tokens_per_second", text: format.speed },
  { name: "Wait for the first token", unit: "mean", of: "variants", field: "ttft_s", text: format.seconds },
  { name: "Distance of predictions (KL)", unit: "nats per token", of: "pairs", field: "kl", text: format.small },
  { name: "Loss on users' prompts", unit: "nats per token beyond the baseline's", of: "pairs", field: "prompt_nll_difference", text: signed, same: 0 },
  { name: "Speed against the baseline", unit: "ratio of tokens per second", of: "pairs", field: "speed_ratio", text: format.ratio, same: 1, ratio: true },
];

export class Timeline {
  constructor() {
    this.series = null;
    this.at = null; // the part under the cursor; null: none
    this.charts = CHARTS.map((chart) => this.#build(chart));
    this.empty = el("p", {}, "Nothing has happened in this time. Charts appear with the first request, and those of differences with the first comparison.");
    this.part = el("p", { class: "hint" });
    this.node = el("div", { class: "timeline" }, this.empty, this.part, ...this.charts.map((chart) => chart.node));
  }

  show(series) {
    this.series = series;
    const some = {
      variants: Object.values(series.variants).some(({ requests }) => requests.some((count) => count)),
      pairs: series.pairs.length > 0,
    };
    for (const { node, of } of this.charts) node.hidden = !some[of];
    this.empty.hidden = some.variants || some.pairs;
    this.part.hidden = !this.empty.hidden;
    this.part.textContent = `A part is ${lengthOf(series.step_s)} long.`;
    this.draw();
  }

  draw() {
    if (this.series) for (const chart of this.charts) this.#draw(chart);
  }

  #build(chart) {
    const plot = svg("svg", { class: "time-chart", tabindex: "0", role: "slider", "aria-label": `${chart.name} over time; arrow keys move along`, "aria-valuemin": "1" });
    const readout = el("p", { class: "readout" });
    const built = { ...chart, plot, readout, node: el("figure", {}, el("figcaption", {}, el("b", {}, chart.name), ` ${chart.unit}`), plot, readout) };
    const point = (event) => {
      const box = plot.getBoundingClientRect();
      const share = (event.clientX - box.left - EDGES.left) / (box.width - EDGES.left - EDGES.right);
      this.#move(Math.floor(share * this.#count()));
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", () => document.activeElement !== plot && this.#move(null));
    plot.addEventListener("blur", () => this.#move(null));
    plot.addEventListener("focus", () => this.at ?? this.#move(this.#count() - 1));
    plot.addEventListener("keydown", (event) => {
      const last = this.#count() - 1;
      const to = { ArrowRight: (this.at ?? last) + 1, ArrowLeft: (this.at ?? last) - 1, Home: 0, End: last }[event.key];
      if (to == null) return;
      event.preventDefault();
      this.#move(to);
    });
    return built;
  }

  #count() {
    return this.series?.starts.length ?? 1;
  }

  #move(at) {
    this.at = at == null ? null : Math.min(Math.max(at, 0), this.#count() - 1);
    this.draw();
  }

  // Lines of a chart: a name, a colour, and by part a value, and where it is of a pair what was known then.
  #lines({ of, field }) {
    if (of === "variants") {
      return Object.entries(this.series.variants).map(([name, figures]) => ({ name, colour: colourOf(name), parts: figures[field] }));
    }
    return this.series.pairs.map((pair) => ({
      name: pair.variant,
      against: pair.baseline,
      colour: colourOf(pair.variant),
      parts: pair.parts[field],
      soFar: pair.so_far[field],
    }));
  }

  #draw(chart) {
    const { plot, text, same } = chart;
    const { starts, step_s: step } = this.series;
    const lines = this.#lines(chart);
    const w = plot.clientWidth || 300;
    const right = w - EDGES.right;
    const bottom = HIGH - EDGES.bottom;
    const parts = lines.flatMap((line) => line.parts).filter((value) => value != null);
    const ends = lines.flatMap(({ soFar = [] }) => soFar.flatMap((found) => (found?.low == null ? [] : [found.low, found.high])));
    const some = parts.some((value) => value !== 0);
    const { low, high, middle } = ends.length ? scaleOf(ends, chart, 2) : scaleOf(parts, chart);
    const x = (i) => EDGES.left + ((i + 0.5) / starts.length) * (right - EDGES.left);
    const along = chart.ratio ? Math.log : Number;
    const y = (value) => bottom - ((along(Math.min(Math.max(value, low), high)) - along(low)) / (along(high) - along(low))) * (bottom - EDGES.top);
    const drawn = (some ? [low, middle, high] : [low]).map((value) => svg("line", { x1: EDGES.left, x2: right, y1: y(value), y2: y(value), class: value === same ? "grid same" : "grid" }));
    if (some) for (const value of [low, middle, high]) if (!chart.whole || Number.isInteger(value)) drawn.push(tick(EDGES.left - 6, y(value) + 4, value === 0 ? "0" : text(value), "end"));
    const long = step * starts.length > 2 * 86400;
    for (const [i, anchor] of [[0, "start"], [Math.floor(starts.length / 2), "middle"], [starts.length - 1, "end"]]) {
      const edge = anchor === "start" ? EDGES.left : anchor === "end" ? right : x(i);
      drawn.push(tick(edge, HIGH - 4, anchor === "end" ? "now" : moment(starts[i], long), anchor));
    }
    if (this.at != null) drawn.push(svg("line", { x1: x(this.at), x2: x(this.at), y1: EDGES.top, y2: bottom, class: "mark-line" }));
    for (const line of lines) drawn.push(svg("g", { class: line.colour }, line.soFar ? known(line, x, y) : connected(line.parts, x, y)));
    if (!some) drawn.push(svg("text", { x: (EDGES.left + right) / 2, y: HIGH / 2 - 4, "text-anchor": "middle", class: "tick" }, ["nothing in this time"]));
    plot.setAttribute("viewBox", `0 0 ${w} ${HIGH}`);
    plot.replaceChildren(...drawn);
    this.#read(chart, lines, long);
  }

  #read({ plot, readout, text }, lines, long) {
    const { starts, step_s: step } = this.series;
    const at = this.at ?? starts.length - 1;
    plot.setAttribute("aria-valuemax", String(starts.length));
    plot.setAttribute("aria-valuenow", String(at + 1));
    const exact = step < 60;
    const when = `${moment(starts[at], long, exact)} to ${at === starts.length - 1 ? "now" : moment(starts[at] + step, long, exact)}`;
    const parts = lines.map(({ name, parts: values, soFar }) => `${name} ${values[at] == null ? "–" : text(values[at])}${soFar ? soFarOf(soFar[at], text) : ""}`);
    plot.setAttribute("aria-valuetext", `${when}: ${parts.join(", ")}`);
    if (this.at == null) {
      const names = lines.map(({ name, against, colour }) => el("span", { class: colour }, el("i", { class: "lamp", "aria-hidden": "true" }), against ? `${name} against ${against}` : name));
      readout.replaceChildren(...names);
    } else {
      readout.replaceChildren(`${when}: `, ...lines.map(({ colour }, i) => el("span", { class: colour }, el("i", { class: "lamp", "aria-hidden": "true" }), parts[i])));
    }
  }
}

function soFarOf(found, text) {
  if (!found) return "";
  const interval = found.low == null ? "too few for an interval" : `95 % interval ${text(found.low)} to ${text(found.high)}`;
  return `; so far ${text(found.mean)} from ${found.pairs} pair${found.pairs === 1 ? "" : "s"}, ${interval}`;
}

// Values of neighbouring parts, in a line with a dot for each.
function connected(values, x, y) {
  return runs(values, (value) => value != null).flatMap((run) => [
    svg("polyline", { points: run.map((i) => `${x(i).toFixed(1)},${y(values[i]).toFixed(1)}`).join(" "), class: "line" }),
    ...run.map((i) => svg("circle", { cx: x(i).toFixed(1), cy: y(values[i]).toFixed(1), r: 1.6, class: "dot" })),
  ]);
}

// What was known by the end of each part, and a faint dot for each part by itself.
function known({ parts, soFar }, x, y) {
  const at = (i, value) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`;
  return [
    ...parts.flatMap((value, i) => (value == null ? [] : [svg("circle", { cx: x(i).toFixed(1), cy: y(value).toFixed(1), r: 1.8, class: "dot faint" })])),
    ...runs(soFar, (found) => found?.low != null).flatMap((run) => [
      svg("polygon", { points: [...run.map((i) => at(i, soFar[i].low)), ...run.toReversed().map((i) => at(i, soFar[i].high))].join(" "), class: "band" }),
      svg("polyline", { points: run.map((i) => at(i, soFar[i].mean)).join(" "), class: "line" }),
    ]),
  ];
}

// Indices of neighbours that are so, run by run.
function runs(values, so) {
  const found = [];
  values.forEach((value, i) => {
    if (!so(value)) return;
    if (i && so(values[i - 1])) found.at(-1).push(i);
    else found.push([i]);
  });
  return found;
}

function tick(x, y, text, anchor) {
  return svg("text", { x, y, "text-anchor": anchor, class: "tick" }, [text]);
}

// The ends and the middle of an axis: from 0 on, or, where there is a value at which variants do not differ, around it.
// Of ratios both ends are as many times away from it. There is `room` times as much as the values need.
function scaleOf(values, { same, whole, ratio }, room = 1) {
  if (same == null) {
    const high = nice(room * Math.max(0, ...values), whole);
    return { low: 0, middle: high / 2, high };
  }
  if (ratio) {
    const high = 1 + nice(room * Math.max(0, ...values.map((value) => Math.max(value, 1 / value) - 1)), false);
    return { low: 1 / high, middle: 1, high };
  }
  const half = nice(room * Math.max(0, ...values.map(Math.abs)), false);
  return { low: -half, middle: 0, high: half };
}

// The least of 1, 2, 5, 10, 20 ... that is no smaller.
function nice(value, whole) {
  if (!value) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  const found = [1, 2, 5, 10].find((step) => step * unit >= value * (1 - 1e-9)) * unit;
  return whole ? Math.max(found, 1) : found;
}

function signed(value) {
  return `${value < 0 ? "−" : value > 0 ? "+" : ""}${format.small(Math.abs(value))}`;
}

// A time in its largest unit of which it has one.
function lengthOf(seconds) {
  const [size, unit] = [[3600, "hour"], [60, "minute"], [1, "second"]].find(([size]) => seconds >= size) ?? [1, "second"];
  return counted(Number((seconds / size).toPrecision(2)), unit);
}

function moment(seconds, long, exact = false) {
  const date = new Date(seconds * 1000);
  const time = format.clock(date, exact);
  return long ? `${date.toLocaleDateString("en-GB", { month: "short", day: "numeric" })} ${time}` : time;
}
