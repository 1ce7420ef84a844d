// What is on the page: the cards of a run, its figures, and the history. No requests here.

import { drawBar, drawHeat, drawProgress, HEAT_EDGES, moveCursor, svg } from "./charts.js";
import * as format from "./format.js";
import { meansOf, speedRatio } from "./timing.js";

export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

// Index of the first character at which two texts differ, or -1 while neither contradicts the other.
function divergence(a, b) {
  const shared = Math.min(a.length, b.length);
  for (let i = 0; i < shared; i += 1) if (a[i] !== b[i]) return i;
  return -1;
}

function figure(label, unit, chart) {
  const value = el("span", { class: "value" }, "–");
  const of = el("span", { class: "unit" }, unit);
  const node = el("div", { class: "figure" }, el("span", { class: "label" }, label), value, of, chart);
  return { node, set: (text, its = unit) => { value.textContent = text; of.textContent = its; } };
}

// One variant's answer, live.
export class Card {
  constructor(variant, index, isBaseline) {
    this.variant = variant;
    this.text = "";
    this.points = [];
    this.stateBytes = null;
    this.ended = false;
    this.started = null;
    this.ttftS = null;
    const chart = (kind, what) => svg("svg", { class: kind, role: "img", "aria-label": `${what} of ${variant}` });
    this.progress = chart("progress", "Tokens over time");
    this.wait = chart("bar-chart", "Time to the first token");
    this.memory = chart("bar-chart", "State memory");
    this.speed = figure("Speed", "tokens/s", this.progress);
    this.ttft = figure("First token", "", this.wait);
    this.state = figure("State", "", this.memory);
    this.note = el("span", { class: "note" }, "waiting");
    this.basis = el("p", { class: "basis" });
    this.body = el("div", { class: "text", tabindex: "0", role: "region", "aria-label": `Answer of ${variant}` });
    this.below = el("div", { class: "below" });
    this.node = el(
      "article",
      { class: `panel card v${index % 6}`, "data-variant": variant },
      el(
        "header",
        {},
        el("h2", {}, variant),
        isBaseline ? el("span", { class: "tag" }, "baseline") : "",
        this.note,
      ),
      el("div", { class: "figures" }, this.speed.node, this.ttft.node, this.state.node),
      this.basis,
      this.body,
      this.below,
    );
  }

  take(event, now) {
    this.started ??= now;
    if (event.object === "compare.chunk") this.text += event.text;
    this.points.push([(event.lowkey.ttft_s ?? 0) + (event.lowkey.decode_s ?? 0), event.usage.completion_tokens]);
    this.ended = event.object === "compare.end";
    this.note.textContent = this.ended ? ending(event) : tokens(event);
    this.figures(event.lowkey);
    this.basis.textContent = SIDE_BY_SIDE;
  }

  // The figures of a later, timed run of the same prompt; the text stays.
  retime(event) {
    if (event.usage.completion_tokens <= 1 || this.retimed !== event.id) this.points = [];
    this.retimed = event.id;
    this.points.push([(event.lowkey.ttft_s ?? 0) + (event.lowkey.decode_s ?? 0), event.usage.completion_tokens]);
    this.note.textContent = event.object === "compare.end" ? ending(event) : `timing: ${tokens(event)}`;
    this.figures(event.lowkey);
    this.basis.textContent = basisOf(1);
  }

  figures(lowkey) {
    this.ttftS = lowkey.ttft_s;
    this.stateBytes = lowkey.state_bytes;
    this.speed.set(format.speed(lowkey.tokens_per_second));
    this.ttft.set(format.seconds(lowkey.ttft_s));
    this.state.set(format.bytes(lowkey.state_bytes), format.stateKind(lowkey));
  }

  // Charts on the scale that all cards share.
  draw(scale) {
    drawProgress(this.progress, this.points, scale.seconds, scale.tokens);
    drawBar(this.wait, this.ttftS ?? 0, scale.ttft);
    drawBar(this.memory, this.stateBytes ?? 0, scale.bytes);
  }

  // The text, marked from the character on at which it leaves the baseline's; -1: it doesn't.
  showText(at) {
    const stick = this.body.scrollHeight - this.body.scrollTop - this.body.clientHeight < 24;
    if (at < 0) this.body.replaceChildren(this.text);
    else {
      const mark = el("span", { class: "split", role: "img", "aria-label": "here the answers part" });
      this.body.replaceChildren(this.text.slice(0, at), mark, el("span", { class: "after" }, this.text.slice(at)));
    }
    if (!this.ended) this.body.append(el("span", { class: "caret", "aria-hidden": "true" }));
    if (stick) this.body.scrollTop = this.body.scrollHeight;
  }

  fail() {
    this.ended = true;
    this.note.textContent = "stopped";
    this.body.querySelector(".caret")?.remove();
  }

  // Speed and first token over all timed runs; without any they stay those of the run side by side.
  time(timings) {
    this.basis.textContent = basisOf(timings.length);
    if (!timings.length) return;
    const { speed, ttftS } = meansOf(timings, this.variant);
    this.ttftS = ttftS;
    this.ttft.set(format.seconds(ttftS));
    this.speed.set(format.speed(speed));
    if (speed == null) this.basis.textContent += "; the answer is too short to time";
  }

  // The final word: texts by token, KL per token.
  finish(result, base, at) {
    this.text = result.text;
    this.ended = true;
    this.note.textContent = ending(result);
    this.figures(result.lowkey);
    this.showText(at);
    const split = this.body.querySelector(".split");
    this.body.scrollTop = split ? split.offsetTop - this.body.clientHeight / 2 : 0;
    const difference = result.against_baseline;
    this.below.replaceChildren(...(difference ? heatStrip(result.variant, base, difference, this.body.clientWidth) : []));
  }
}

const SIDE_BY_SIDE = "Speed and first token: side by side, where variants slow each other";

// What the speed and the first token of a card are of.
function basisOf(timedRuns) {
  if (!timedRuns) return SIDE_BY_SIDE;
  return `Speed and first token: ${timedRuns === 1 ? "one timed run" : `means of ${timedRuns} timed runs`}`;
}

function tokens(event) {
  const count = event.usage.completion_tokens;
  return count === 1 ? "1 token" : `${count} tokens`;
}

function ending(event) {
  const reason = event.finish_reason === "stop" ? "ended by itself" : "token limit";
  return `${tokens(event)}, ${reason}`;
}

export function divergenceOf(base, texts) {
  const points = texts.map((text) => divergence(base, text)).filter((at) => at >= 0);
  return points.length ? Math.min(...points) : -1;
}

// Character offset of a token in its text; a stop string may have cut the text before it.
export function offsetOf(tokens, index, text) {
  return index == null ? -1 : Math.min(tokens.slice(0, index).join("").length, text.length);
}

function heatStrip(variant, base, difference, pixels) {
  const count = difference.kl.length;
  const columns = Math.max(1, Math.floor(pixels / 9));
  const strip = svg("svg", {
    class: "heat",
    tabindex: "0",
    role: "slider",
    "aria-label": `KL of ${variant} from ${base.variant} at each token; arrow keys move along`,
    "aria-valuemin": "1",
    "aria-valuemax": String(count),
    "aria-valuenow": "1",
  });
  drawHeat(strip, difference.kl, difference.agree, columns);
  const readout = el("p", { class: "readout" });
  let at = -1;
  const show = (i) => {
    at = Math.max(0, Math.min(count - 1, i));
    moveCursor(strip, at, columns);
    const token = JSON.stringify(base.tokens[at] ?? "");
    const words = `token ${at + 1} ${token}: KL ${format.small(difference.kl[at])} nats, ${difference.agree[at] ? "same" : "another"} top token`;
    strip.setAttribute("aria-valuenow", String(at + 1));
    strip.setAttribute("aria-valuetext", words);
    readout.textContent = words;
  };
  const rest = () => {
    readout.textContent = `mean ${format.small(difference.mean_kl)} nats; point at a cell for its token. A dot: another top token`;
  };
  rest();
  strip.addEventListener("pointermove", (event) => {
    const cell = event.target.closest?.("[data-i]");
    if (cell) show(Number(cell.dataset.i));
  });
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -count, End: count }[event.key];
    if (!step) return;
    event.preventDefault();
    show(at + step);
  });
  const legend = el("div", { class: "legend", "aria-hidden": "true" }, "0");
  const swatches = svg("svg", { viewBox: "0 0 88 10", class: "swatches" });
  swatches.append(...[...HEAT_EDGES, 0].map((_, i) => svg("rect", { x: 11 * i, width: 10, height: 10, rx: 2, class: `heat-${i}` })));
  legend.append(swatches, "3 nats");
  return [el("div", { class: "heat-head" }, el("span", { class: "label" }, `KL per token of ${base.variant}'s answer`), legend), strip, readout];
}

// The figures of each variant against the baseline, in one row each.
export function verdict(answer, timings) {
  const [base, ...others] = answer.results;
  return others.map((result, i) => {
    const d = result.against_baseline;
    const item = (label, value, hint) => el("div", { class: "figure", title: hint }, el("span", { class: "label" }, label), el("span", { class: "value" }, value));
    const speed = speedRatio(timings, result.variant);
    const ratio = item("Tokens/s", speed.value, "geometric mean of the timed runs' ratios and its 95 % interval: a t interval of their logarithms");
    ratio.classList.toggle("unknown", !speed.known);
    ratio.append(el("span", { class: "unit" }, speed.basis));
    return el(
      "div",
      { class: `panel strip v${(i + 1) % 6}` },
      el("h2", {}, result.variant, el("small", {}, ` against ${base.variant}`)),
      item("State", format.ratio(d.state_bytes_ratio), `${format.state(result.lowkey)} of ${format.state(base.lowkey)} per request`),
      ratio,
      item("Mean KL", format.small(d.mean_kl), "nats per token, on the baseline's answer"),
      item("Same top token", format.percent(d.top1_agreement), "on the baseline's answer"),
      item("Answers part at", d.first_divergence == null ? "never" : `token ${d.first_divergence + 1}`, "the first generated token that differs"),
      item("Prompt perplexity", `${format.small(result.prompt_perplexity)} / ${format.small(base.prompt_perplexity)}`, `${result.variant} / ${base.variant}`),
    );
  });
}

export function historyRows({ answer, body, timings }, show) {
  const [, ...others] = answer.results;
  return others.map((result, i) => {
    const d = result.against_baseline;
    const cell = (text) => el("td", { class: "num" }, text);
    const speed = speedRatio(timings, result.variant);
    const button = el("button", { type: "button", class: "link" }, body.prompt.trim().slice(0, 60) || "(blank)");
    button.addEventListener("click", show);
    return el(
      "tr",
      {},
      el("td", { class: "prompt" }, i ? "" : button),
      el("td", {}, result.variant),
      cell(format.small(d.mean_kl)),
      cell(format.percent(d.top1_agreement)),
      cell(speed.known ? `${speed.value} ${speed.basis}` : speed.value),
      cell(format.ratio(d.state_bytes_ratio)),
    );
  });
}

export function fleet(models) {
  return models.map((model, i) => {
    const { status, d_k: dK } = model.lowkey;
    const detail = dK == null ? status : `d_k ${format.width(dK)} · ${format.capacity(model.lowkey)}${status === "up" ? "" : ` · ${status}`}`;
    return el("li", { class: `v${i % 6} ${status}` }, el("span", { class: "lamp", "aria-hidden": "true" }), el("b", {}, model.id), ` ${detail}`);
  });
}
