// One variant's answer, live, with its figures.

import { drawBar, drawSpeed, svg } from "./charts.js";
import { el } from "./dom.js";
import * as format from "./format.js";
import { heatStrip } from "./heat.js";
import { colourOf } from "./models.js";
import { speedCurve } from "./speed.js";
import { answerStart, thoughtSpan } from "./text.js";
import { meansOf } from "./timing.js";

function figure(label, unit, ...below) {
  const value = el("span", { class: "value" }, "–");
  const of = el("span", { class: "unit" }, unit);
  const node = el("div", { class: "figure" }, el("span", { class: "label" }, label), value, of, ...below);
  return { node, set: (text, its = unit) => { value.textContent = text; of.textContent = its; } };
}

const SIDE_BY_SIDE = "Speed and first token: side by side, where variants slow each other";

// What the speed and the first token of a card are of.
function basisOf(timedRuns) {
  if (!timedRuns) return SIDE_BY_SIDE;
  if (timedRuns === 1) return "Speed and first token: one timed run";
  return `Speed and first token: means of ${timedRuns} timed runs; curve: the first run`;
}

function tokens(event) {
  const count = event.usage.completion_tokens;
  return count === 1 ? "1 token" : `${count} tokens`;
}

function ending(event) {
  return `${tokens(event)}, ${event.finish_reason === "stop" ? "ended by itself" : "token limit"}`;
}

export class Card {
  // `index`: its place among the cards, which gives a colour to a variant that this server does not know. `thinks`: the
  // prompt ended within the model's thinking.
  constructor(variant, index, isBaseline, thinks = false) {
    this.variant = variant;
    this.thinks = thinks;
    this.text = "";
    this.points = []; // [seconds, tokens so far]
    this.stateBytes = null;
    this.ended = false;
    this.ttftS = null;
    const chart = (kind, what) => svg("svg", { class: kind, role: "img", "aria-label": `${what} of ${variant}` });
    this.curve = chart("speed", "Tokens per second");
    this.wait = chart("bar-chart", "Time to the first token");
    this.memory = chart("bar-chart", "State memory");
    this.interval = el("span", { class: "interval" });
    this.speed = figure("Speed", "tokens/s", this.interval);
    this.ttft = figure("First token", "", this.wait);
    this.state = figure("State", "", this.memory);
    this.note = el("span", { class: "note" }, "waiting");
    this.basis = el("p", { class: "basis" });
    this.thought = el("div");
    this.thinking = el("details", { class: "thinking", hidden: true }, el("summary"), this.thought);
    this.answer = el("div");
    const region = { class: "text", tabindex: "0", role: "region", "aria-label": `Answer of ${variant}` };
    this.body = el("div", region, this.thinking, this.answer);
    this.below = el("div", { class: "below" });
    const tag = isBaseline ? el("span", { class: "tag" }, "baseline") : "";
    this.node = el(
      "article",
      { class: `panel card ${colourOf(variant, index)}`, "data-variant": variant },
      el("header", {}, el("h2", {}, variant), tag, this.note),
      el("div", { class: "figures" }, this.speed.node, this.ttft.node, this.state.node),
      el("div", {}, el("span", { class: "label" }, "Tokens/s over time: higher is faster"), this.curve),
      this.basis,
      this.body,
      this.below,
    );
  }

  take(event) {
    if (event.object === "compare.chunk") this.text += event.text;
    this.point(event);
    this.ended = event.object === "compare.end";
    this.note.textContent = this.ended ? ending(event) : tokens(event);
    this.basis.textContent = SIDE_BY_SIDE;
  }

  // The figures of a later, timed run of the same prompt; the text stays.
  retime(event) {
    if (this.retimed !== event.id) this.points = [];
    this.retimed = event.id;
    this.point(event);
    this.note.textContent = event.object === "compare.end" ? ending(event) : `timing: ${tokens(event)}`;
    this.basis.textContent = basisOf(1);
  }

  point({ lowkey, usage }) {
    this.points.push([(lowkey.ttft_s ?? 0) + (lowkey.decode_s ?? 0), usage.completion_tokens]);
    this.figures(lowkey);
  }

  figures(lowkey) {
    this.ttftS = lowkey.ttft_s;
    this.stateBytes = lowkey.state_bytes;
    this.speed.set(format.speed(lowkey.tokens_per_second));
    this.ttft.set(format.seconds(lowkey.ttft_s));
    this.state.set(format.bytes(lowkey.state_bytes), format.stateKind(lowkey));
  }

  // Charts on the scale that all cards share; `speeds` is the curve of this card's points.
  draw(scale, speeds) {
    drawSpeed(this.curve, speeds, scale);
    drawBar(this.wait, this.ttftS ?? 0, scale.ttft);
    drawBar(this.memory, this.stateBytes ?? 0, scale.bytes);
    const values = speeds.map(([, value]) => value);
    const range = values.length ? `, between ${format.speed(Math.min(...values))} and ${format.speed(Math.max(...values))}` : "";
    this.curve.setAttribute("aria-label", `Tokens per second of ${this.variant} over time${range}`);
  }

  // The curve of what has come so far.
  speeds() {
    return speedCurve(this.points);
  }

  // The text, marked from the character on at which it leaves the baseline's; -1: it doesn't.
  showText(at) {
    const stick = this.body.scrollHeight - this.body.scrollTop - this.body.clientHeight < 24;
    const from = answerStart(this.text, this.thinks);
    const inThought = at >= 0 && at < from;
    this.thinking.hidden = from === 0;
    const still = from === this.text.length && !this.ended;
    this.thinking.firstChild.textContent = `${still ? "Thinking ..." : "What it thought"}${inThought ? "; the answers part in it" : ""}`;
    const [begin, end] = thoughtSpan(this.text, from);
    mark(this.thought, this.text.slice(begin, end), inThought ? Math.max(at - begin, 0) : -1);
    mark(this.answer, this.text.slice(from), at < 0 ? -1 : Math.max(at - from, 0), !inThought);
    if (!this.ended) this.answer.append(el("span", { class: "caret", "aria-hidden": "true" }));
    if (stick) this.body.scrollTop = this.body.scrollHeight;
  }

  // The end of a run that came to none.
  fail(word) {
    this.ended = true;
    this.note.textContent = word;
    this.body.querySelector(".caret")?.remove();
  }

  // Speed and first token over all timed runs; without any they stay those of the run side by side.
  time(timings) {
    this.basis.textContent = basisOf(timings.length);
    this.interval.textContent = "";
    if (!timings.length) return;
    const { speed, ttftS } = meansOf(timings, this.variant);
    this.ttftS = ttftS;
    this.ttft.set(format.seconds(ttftS));
    this.speed.set(format.speed(speed?.mean));
    if (speed?.low != null) this.interval.textContent = `[${format.speed(speed.low)}, ${format.speed(speed.high)}]`;
    if (!speed) this.basis.textContent += "; the answer is too short to time";
  }

  // The final word: texts by token, KL per token. `at`: as of `showText`.
  finish(result, base, at) {
    this.text = result.text;
    this.ended = true;
    this.note.textContent = ending(result);
    this.figures(result.lowkey);
    this.showText(at);
    const split = this.answer.querySelector(".split");
    this.body.scrollTop = split ? split.offsetTop - this.body.clientHeight / 2 : 0;
    const difference = result.against_baseline;
    this.below.replaceChildren(...(difference ? heatStrip(result.variant, base, difference, this.body.clientWidth) : []));
  }
}

// Puts a text into a node, marked from character `at` on unless that is -1. `here`: answers part in this very text.
function mark(node, text, at, here = true) {
  if (at < 0) {
    node.replaceChildren(text);
    return;
  }
  const split = here ? el("span", { class: "split", role: "img", "aria-label": "here the answers part" }) : "";
  node.replaceChildren(text.slice(0, at), split, el("span", { class: "after" }, text.slice(at)));
}
