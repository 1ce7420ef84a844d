// The compare tab: runs a comparison side by side, then timed one after the other, as often as wanted, and shows what
// came of it. Until there is one, it shows one that was recorded.

import { compare } from "./api.js";
import { Card } from "./card.js";
import { putInput, readInput, reply, requestOf, showVariants, wantsTiming } from "./composer.js";
import { $, complain } from "./dom.js";
import * as format from "./format.js";
import { withKey } from "./key.js";
import { onModels, refreshModels, variantsOf } from "./models.js";
import { answerStart, divergenceOf, offsetOf } from "./text.js";
import { meansOf, REPEATS, timingOf } from "./timing.js";
import { emptyVerdict, historyRows, verdict } from "./view.js";

let cards = [];
let running = null;
let frame = 0;
// The run on show: {name, when, input, body, thinks, answer, points by card, timings}, and `recorded`, in words, of one
// that was not made here. Each timed run of the same prompt and settings adds a timing.
let shown = null;
const past = []; // such runs, the last one first
let count = 0;

function say(text) {
  $("status").textContent = text;
}

function note(text) {
  if ($("repeat-note").textContent !== text) $("repeat-note").textContent = text;
}

// ---- a run ----

// The buttons that begin something, by the ones that end it.
const BEGINS = { stop: "run", "stop-repeat": "repeat" };

// While something runs, the button that `stop` names ends it. It takes the focus from the one that began it, which loses
// it, and gives it back.
function setRunning(controller, stop = "stop") {
  const focused = document.activeElement.id;
  running = controller;
  $("run").disabled = Boolean(controller);
  for (const id of ["stop", "stop-repeat"]) $(id).hidden = !controller || id !== stop;
  $("answers").setAttribute("aria-busy", String(Boolean(controller)));
  showButtons();
  if (controller && focused === BEGINS[stop]) $(stop).focus({ preventScroll: true });
  if (!controller && BEGINS[focused]) $(BEGINS[focused]).focus({ preventScroll: true });
}

// A recorded run can't be timed, and what can be replied to is the answer to a message.
function showButtons() {
  $("repeat").hidden = Boolean(running) || !shown || Boolean(shown.recorded);
  $("reply").hidden = Boolean(running) || !shown?.input.chat;
}

async function run(event) {
  event.preventDefault();
  complain(null);
  let input;
  try {
    input = readInput();
  } catch (error) {
    complain(error);
    return;
  }
  const timed = wantsTiming();
  const before = shown;
  setRunning(new AbortController());
  try {
    const request = await withKey(() => requestOf(input, running.signal));
    deal(input.variants, request.thinks);
    const answer = await withKey(() => perform(request.body, timed, running.signal));
    count += 1;
    const points = cards.map((card) => [...card.points]);
    const when = format.clock(new Date());
    shown = { name: `Run ${count}`, when, input, ...request, answer, points, timings: timed ? [timingOf(answer)] : [] };
    past.unshift(shown);
    settle(answer);
    showFigures();
    say(timed ? "Done." : "Done; speeds are not comparable without a timed run.");
    $("verdict").scrollIntoView({ behavior: motion(), block: "nearest" });
  } catch (error) {
    leave(before, error.name === "AbortError" ? "stopped" : "broke off");
    if (error.name === "AbortError") say("Stopped.");
    else complain(error);
  } finally {
    setRunning(null);
    refreshModels().catch(() => {}); // the next one says what is wrong
  }
}

function motion() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
}

async function perform(body, timed, signal) {
  const byName = Object.fromEntries(cards.map((card) => [card.variant, card]));
  say("Side by side ...");
  const answer = await compare({ ...body, parallel: true }, signal, (event) => {
    byName[event.variant].take(event);
    redraw();
  });
  if (!timed) return answer;
  settle(answer);
  $("strips").replaceChildren(...verdict(answer, []));
  return compare({ ...body, parallel: false }, signal, (event) => {
    say(`Timing ${event.variant} alone ...`);
    byName[event.variant].retime(event);
    redraw();
  });
}

// A run came to nothing. What was written stays, and cards without a word go; if all do, so does the run, and the one on
// show `before` is back, or the last one that there was.
function leave(before, word) {
  cancelAnimationFrame(frame);
  frame = 0;
  const begun = shown ? [] : cards.filter((card) => card.text);
  if (!begun.length) {
    const back = before ?? past[0];
    if (back) open(back);
    else clear();
    say(back ? told(back) : "");
    return;
  }
  draw(); // what a frame would have shown
  for (const card of begun) card.fail(word);
  clear(begun);
  say("");
}

// No figures, and no cards but these.
function clear(left = []) {
  cards = left;
  $("answers").replaceChildren(...cards.map((card) => card.node));
  $("verdict").hidden = true;
}

// Times the run on show again; what was timed before a stop or an error counts.
async function repeat() {
  const { body, timings } = shown;
  complain(null);
  setRunning(new AbortController(), "stop-repeat");
  let done = 0;
  try {
    for (; done < REPEATS; done += 1) {
      const place = `Repeat ${done + 1} of ${REPEATS}`;
      note(`${place} ...`);
      const again = await withKey(() =>
        compare({ ...body, parallel: false }, running.signal, (event) => note(`${place}: timing ${event.variant} ...`)),
      );
      timings.push(timingOf(again));
      showFigures();
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  } finally {
    setRunning(null);
    note(done < REPEATS ? `Stopped after ${done} of ${REPEATS} repeats.` : repeatHint());
    refreshModels().catch(() => {}); // the next one says what is wrong
  }
}

function repeatHint() {
  const { answer, timings, recorded } = shown;
  const times = timings.length === 1 ? "once" : `${timings.length} times`;
  const words = [timings.length ? `Timed ${times}, one variant after the other.` : "Not timed yet."];
  if (answer.results.some(({ variant }) => meansOf(timings, variant).speed?.low != null)) words.push("Brackets hold the 95 % interval.");
  if (!recorded) words.push(`Speed varies from run to run: a repeat times this prompt with these settings ${REPEATS} more times.`);
  return words.join(" ");
}

// ---- what is on show ----

// New cards, and figures to come.
function deal(names, thinks) {
  cancelAnimationFrame(frame);
  frame = 0;
  shown = null;
  cards = names.map((name, i) => new Card(name, i, i === 0, thinks));
  $("answers").replaceChildren(...cards.map((card) => card.node));
  $("strips").replaceChildren(...emptyVerdict(names));
  $("recorded").hidden = true;
  $("verdict").hidden = false;
  note("");
  showButtons();
}

// At most once a frame, however fast tokens come.
function redraw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    draw();
  });
}

function draw() {
  const [base, ...others] = cards;
  const apart = divergenceOf(base.text, others.map((card) => card.text));
  for (const card of cards) card.showText(card === base ? apart : divergenceOf(base.text, [card.text]));
  drawCharts();
}

function drawCharts() {
  const curves = cards.map((card) => card.speeds());
  const scale = {
    seconds: Math.max(...cards.map((card) => card.points.at(-1)?.[0] ?? 0)),
    speed: Math.max(0, ...curves.flat().map(([, speed]) => speed)),
    ttft: Math.max(...cards.map((card) => card.ttftS ?? 0)),
    bytes: Math.max(...cards.map((card) => card.stateBytes ?? 0)),
  };
  cards.forEach((card, i) => card.draw(scale, curves[i]));
}

function settle(answer) {
  cancelAnimationFrame(frame);
  frame = 0;
  const [base, ...others] = answer.results;
  const parts = others.map((result) => result.against_baseline.first_divergence).filter((at) => at != null);
  const first = parts.length ? Math.min(...parts) : null;
  answer.results.forEach((result, i) => {
    const at = i ? result.against_baseline.first_divergence : first;
    cards[i].finish(result, base, offsetOf(result.tokens, at, result.text));
  });
}

function showFigures() {
  const { answer, timings, recorded } = shown;
  cards.forEach((card) => card.time(timings));
  drawCharts();
  $("strips").replaceChildren(...verdict(answer, timings));
  $("recorded").hidden = !recorded;
  $("recorded-words").textContent = recorded ?? "";
  note(repeatHint());
  listPast();
  showButtons();
}

function open(entry) {
  deal(entry.answer.results.map((result) => result.variant), entry.thinks);
  entry.points.forEach((points, i) => {
    cards[i].points = points;
  });
  shown = entry;
  settle(entry.answer);
  showFigures();
}

// ---- history ----

function listPast() {
  $("history").hidden = !past.some((entry) => !entry.recorded);
  $("history-rows").replaceChildren(...past.flatMap((entry) => historyRows(entry, entry === shown, () => showAgain(entry))));
}

function told({ name, recorded }) {
  return recorded ? "" : `${name} is on show.`;
}

function showAgain(entry) {
  if (running) return;
  complain(null);
  open(entry);
  putInput(entry.input);
  say(`${entry.name} is on show; its prompt and settings are in the form again.`);
  $("verdict").scrollIntoView({ behavior: motion(), block: "nearest" });
}

// The comparison that comes with the page, made by demo/record_comparison.py.
async function showRecorded() {
  const response = await fetch(new URL("recorded.json", import.meta.url));
  const entry = await response.json();
  entry.recorded = `Not of this server: made on ${entry.when} with the models of make demo, ${entry.models}, on ${entry.machine}. Run asks this server.`;
  past.push(entry);
  if (!shown && !running) open(entry);
}

// ---- start ----

$("composer").addEventListener("submit", run);
$("repeat").addEventListener("click", repeat);
$("reply").addEventListener("click", () => {
  const [base] = shown.answer.results;
  reply(shown.input, base.text.slice(answerStart(base.text, shown.thinks)));
});
for (const id of ["stop", "stop-repeat"]) $(id).addEventListener("click", () => running?.abort());
$("repeat").textContent = `Repeat ${REPEATS} times`;
$("words").open = matchMedia("(min-width: 1000px)").matches;
addEventListener("resize", () => cards.length && drawCharts());
onModels((models) => showVariants(variantsOf(models)));
showRecorded();

export function show() {
  if (cards.length) drawCharts(); // they may have had no width so far
}

export function hide() {}

export function isRunning() {
  return Boolean(running);
}
