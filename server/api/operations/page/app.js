// The compare page: runs a comparison side by side, then timed one after the other, as often as wanted, and shows what
// came of it.

import { ApiError, compare, models as fetchModels, setKey } from "./api.js";
import { REPEATS, timingOf } from "./timing.js";
import { Card, divergenceOf, el, fleet, historyRows, offsetOf, verdict } from "./view.js";

const $ = (id) => document.getElementById(id);
const form = $("composer");
const REFRESH_MS = 5000;

let variants = [];
let cards = [];
let running = null;
let frame = 0;
// The run on show: {body, answer, points by card, timings}. Each timed run of the same prompt and settings adds one.
let shown = null;
const past = []; // such runs, the last one first

// ---- key ----

function askForKey(message) {
  const dialog = $("key-dialog");
  $("key-message").textContent = message;
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const used = dialog.returnValue === "use";
        if (used) setKey($("key").value);
        $("key").value = "";
        resolve(used);
      },
      { once: true },
    );
    dialog.returnValue = "cancel";
    if (!dialog.open) dialog.showModal();
  });
}

const KEPT = "It is kept in this page's memory only and is gone when you reload.";

// Runs `work`; while the server wants a key, asks for one and tries again.
async function withKey(work) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 401) throw error;
      if (!(await askForKey(`${capital(error.message)}. ${KEPT}`))) throw error;
    }
  }
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

// ---- words ----

function say(text) {
  $("status").textContent = text;
}

function complain(error) {
  const box = $("error");
  box.hidden = !error;
  box.textContent = error ? capital(error.message) : "";
}

// ---- variants ----

async function refresh(ask) {
  try {
    const listed = await (ask ? withKey(fetchModels) : fetchModels());
    showModels(listed.filter((model) => !model.lowkey.alias));
    return true;
  } catch (error) {
    if (ask) complain(error);
    else if (error.status !== 401) $("fleet").replaceChildren(el("li", { class: "down" }, error.message));
    return false;
  }
}

function showModels(models) {
  $("fleet").replaceChildren(...fleet(models));
  const names = models.map((model) => model.id);
  if (names.join("\n") === variants.join("\n")) return;
  variants = names;
  const boxes = names.map((name, i) =>
    el("label", { class: `chip v${i % 6}` }, el("input", { type: "checkbox", name: "variant", value: name, checked: i < 4 }), el("span", {}, name)),
  );
  $("variants").replaceChildren($("variants").firstElementChild, ...boxes);
  $("baseline").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
}

// ---- a run ----

function readForm() {
  const data = new FormData(form);
  const chosen = data.getAll("variant");
  const baseline = data.get("baseline");
  if (chosen.length < 2) throw new Error("Choose at least two variants to compare.");
  if (!chosen.includes(baseline)) throw new Error(`The baseline, ${baseline}, is not among the chosen variants.`);
  const body = {
    prompt: data.get("prompt"),
    variants: [baseline, ...chosen.filter((name) => name !== baseline)],
    baseline,
    ignore_eos: data.has("ignore_eos"),
    // One seed for both runs, so that they give the same text.
    seed: Math.floor(Math.random() * 2 ** 32),
  };
  for (const name of ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"]) {
    if (data.get(name)) body[name] = Number(data.get(name));
  }
  return { body, timed: data.has("timed") };
}

// While something runs, the button that `stop` names ends it.
function setRunning(controller, stop = "stop") {
  running = controller;
  $("run").disabled = Boolean(controller);
  $("repeat").hidden = Boolean(controller);
  for (const id of ["stop", "stop-repeat"]) $(id).hidden = !controller || id !== stop;
  $("answers").setAttribute("aria-busy", String(Boolean(controller)));
}

async function run(event) {
  event.preventDefault();
  complain(null);
  let input;
  try {
    input = readForm();
  } catch (error) {
    complain(error);
    return;
  }
  setRunning(new AbortController());
  deal(input.body.variants);
  try {
    const answer = await withKey(() => perform(input, running.signal));
    const timings = input.timed ? [timingOf(answer)] : [];
    shown = { body: input.body, answer, points: cards.map((card) => [...card.points]), timings };
    settle(answer);
    showSpeeds(answer, timings);
    past.unshift(shown);
    listPast();
    say(input.timed ? "Done." : "Done; speeds are not comparable without a timed run.");
  } catch (error) {
    cards.forEach((card) => card.fail());
    if (error.name === "AbortError") say("Stopped.");
    else {
      say("");
      complain(error);
    }
  } finally {
    setRunning(null);
    refresh(false);
  }
}

async function perform({ body, timed }, signal) {
  const byName = Object.fromEntries(cards.map((card) => [card.variant, card]));
  say("Side by side ...");
  const answer = await compare({ ...body, parallel: true }, signal, (event) => {
    byName[event.variant].take(event);
    redraw();
  });
  if (!timed) return answer;
  settle(answer);
  showSpeeds(answer, []);
  return compare({ ...body, parallel: false }, signal, (event) => {
    say(`Timing ${event.variant} alone ...`);
    byName[event.variant].retime(event);
    redraw();
  });
}

// Times the run on show again; what was timed before a stop or an error counts.
async function repeat() {
  const { body, answer, timings } = shown;
  complain(null);
  setRunning(new AbortController(), "stop-repeat");
  $("stop-repeat").focus();
  let done = 0;
  try {
    for (; done < REPEATS; done += 1) {
      const place = `Repeat ${done + 1} of ${REPEATS}`;
      note(`${place} ...`);
      const again = await withKey(() =>
        compare({ ...body, parallel: false }, running.signal, (event) => note(`${place}: timing ${event.variant} ...`)),
      );
      timings.push(timingOf(again));
      showSpeeds(answer, timings);
      listPast();
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  } finally {
    const focused = document.activeElement === $("stop-repeat");
    setRunning(null);
    if (focused) $("repeat").focus();
    note(done < REPEATS ? `Stopped after ${done} of ${REPEATS} repeats.` : repeatHint(timings));
    refresh(false);
  }
}

function note(text) {
  if ($("repeat-note").textContent !== text) $("repeat-note").textContent = text;
}

function repeatHint(timings) {
  const times = timings.length === 1 ? "once" : `${timings.length} times`;
  const so = timings.length ? `Timed ${times}, one variant after the other.` : "Not timed yet.";
  return `${so} Speed varies from run to run: a repeat times this prompt with these settings ${REPEATS} more times.`;
}

function deal(names) {
  cancelAnimationFrame(frame);
  frame = 0;
  shown = null;
  cards = names.map((name, i) => new Card(name, variants.indexOf(name) < 0 ? i : variants.indexOf(name), i === 0));
  $("answers").replaceChildren(...cards.map((card) => card.node));
  $("verdict").hidden = true;
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
  const last = cards.map((card) => card.points.at(-1) ?? [0, 0]);
  const scale = {
    seconds: Math.max(...last.map(([s]) => s)),
    tokens: Math.max(...last.map(([, t]) => t)),
    ttft: Math.max(...cards.map((card) => card.ttftS ?? 0)),
    bytes: Math.max(...cards.map((card) => card.stateBytes ?? 0)),
  };
  for (const card of cards) card.draw(scale);
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

function showSpeeds(answer, timings) {
  cards.forEach((card) => card.time(timings));
  drawCharts();
  $("strips").replaceChildren(...verdict(answer, timings));
  note(repeatHint(timings));
  $("verdict").hidden = false;
}

// ---- history ----

function listPast() {
  $("history").hidden = false;
  $("history-rows").replaceChildren(...past.flatMap((each) => historyRows(each, () => showAgain(each))));
}

function showAgain(entry) {
  if (running) return;
  complain(null);
  deal(entry.answer.results.map((result) => result.variant));
  entry.points.forEach((points, i) => {
    cards[i].points = points;
  });
  shown = entry;
  settle(entry.answer);
  showSpeeds(entry.answer, entry.timings);
  say("A run from the history.");
  $("answers").scrollIntoView({ behavior: "smooth", block: "nearest" });
}

// ---- start ----

form.addEventListener("submit", run);
$("repeat").addEventListener("click", repeat);
for (const id of ["stop", "stop-repeat"]) $(id).addEventListener("click", () => running?.abort());
$("key-button").addEventListener("click", async () => {
  if (await askForKey(KEPT)) refresh(true);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
$("repeat").textContent = `Repeat ${REPEATS} times`;
$("prompt").value = "import os\n\ndef find(path, name):\n";
addEventListener("resize", () => cards.length && drawCharts());
refresh(true);
setInterval(() => {
  if (!running && !document.hidden && !$("key-dialog").open) refresh(false);
}, REFRESH_MS);
