// The A/B tab: who gets which traffic, how each variant does, how far they are apart, and how all of it went over time.
// What it shows is GET /v1/ab/summary, asked for again while the tab is open and seen.

import { get } from "./api.js";
import { el } from "./dom.js";
import * as format from "./format.js";
import { withKey } from "./key.js";
import { colourOf } from "./models.js";
import { pairCard } from "./pairs.js";
import { snippet } from "./snippet.js";
import { Timeline } from "./timeline.js";
import { counted, whole } from "./words.js";

const REFRESH_MS = 10000;
const POINTS = 60;
const WINDOWS = [[900, "15 minutes"], [3600, "hour"], [6 * 3600, "6 hours"], [86400, "day"], [7 * 86400, "week"]];
const TAKEN = "A server that was started with --config lowkey.toml takes it over when it is sent SIGHUP, and drops no request.";

let built = null; // the nodes of the tab
let timer = 0;
let asked = 0; // counts questions: an answer to an old one is thrown away
let shown = false;
let seconds = 3600;

export function show(root) {
  built ??= build(root);
  shown = true;
  addEventListener("resize", redraw);
  document.addEventListener("visibilitychange", wake);
  refresh(true);
}

export function hide() {
  shown = false;
  asked += 1;
  clearTimeout(timer);
  removeEventListener("resize", redraw);
  document.removeEventListener("visibilitychange", wake);
}

function wake() {
  if (!document.hidden) refresh(false);
}

function redraw() {
  built.timeline.draw();
}

// ---- what is always there ----

function build(root) {
  const select = el("select", { id: "ab-window" }, ...WINDOWS.map(([value, name]) => el("option", { value: String(value), selected: value === seconds }, `the last ${name}`)));
  select.addEventListener("change", () => {
    seconds = Number(select.value);
    refresh(true);
  });
  const nodes = {
    error: el("p", { class: "error", role: "alert", hidden: true }),
    stamp: el("p", { class: "hint stamp" }, "Asking the server ..."),
    pairs: el("div", { class: "stack" }),
    split: el("div", { class: "stack" }),
    shadow: el("div", { class: "stack" }),
    variants: el("div", { class: "scroll" }),
    timeline: new Timeline(),
    body: el("div", { class: "stack", hidden: true }),
  };
  const section = (name, hint, ...content) => el("section", { class: "panel block" }, el("h2", {}, name), el("p", { class: "hint" }, hint), ...content);
  nodes.body.append(
    section("How far they are apart", "Measured on the same text, so traffic that differs plays no part: both variants read a prompt and the baseline's answer and say how likely each token is.", nodes.pairs),
    section("Who answers", "An alias is a model name that clients ask for, split over variants by weight. A client that says who it is stays with its variant.", nodes.split),
    section("Shadow traffic", "A part of one variant's requests is read by another one too, in the background, once the user has the answer. It costs users nothing, and fills the comparison above.", nodes.shadow),
    section("What each one did", "Requests of completions and chat that ended in this time; comparisons do not count. Two variants had different prompts and users, so compare with care.", nodes.variants),
    section("Over time", "Point at a chart, or use the arrow keys on it, to read a part of the time; the last part is still going on. Where two variants are compared, a dot is one part by itself, at the edge if it is beyond the scale, and the line is what was known by then, in the band of its 95 % interval.", nodes.timeline.node),
  );
  root.replaceChildren(
    el(
      "div",
      { class: "stack" },
      el(
        "div",
        { class: "intro" },
        el("h2", {}, "Variants under your traffic"),
        el("p", {}, "Several variants of one model answer real requests here. This page says which one got how many, how fast each was, and whether their answers can be told apart, with the uncertainty of each figure."),
        el("div", { class: "row tight" }, el("label", { class: "label", for: "ab-window" }, "Figures of"), select, nodes.stamp),
      ),
      nodes.error,
      nodes.body,
    ),
  );
  return nodes;
}

// ---- asking ----

async function refresh(ask) {
  clearTimeout(timer);
  asked += 1;
  const mine = asked;
  const question = () => get(`v1/ab/summary?window=${seconds}&points=${POINTS}`);
  try {
    const summary = await (ask ? withKey(question) : question());
    if (mine !== asked) return;
    built.error.hidden = true;
    built.stamp.textContent = `as of ${format.clock(new Date())}`;
    draw(summary);
  } catch (error) {
    if (mine !== asked) return;
    const old = built.body.hidden ? "" : " What you see is older.";
    built.error.textContent = `The figures could not be read: ${error.message}.${old}`.replace(/[.?!]\./, (two) => two[0]);
    built.error.hidden = false;
  }
  if (shown) timer = setTimeout(tick, REFRESH_MS);
}

function tick() {
  if (document.hidden || document.querySelector("dialog[open]")) timer = setTimeout(tick, REFRESH_MS);
  else refresh(false);
}

// ---- drawing ----

// Makes a part anew only if what it shows has changed: what is focused or selected in it stays.
function fill(node, shows, make) {
  const key = JSON.stringify(shows);
  if (node.dataset.shows === key) return;
  node.dataset.shows = key;
  node.replaceChildren(...make());
}

function draw(summary) {
  const { variants, aliases, shadow, pairs, series } = summary;
  built.body.hidden = false;
  fill(built.pairs, [pairs, Object.keys(variants)], () => (pairs.length ? pairs.map((pair) => pairCard(pair, colourOf(pair.variant))) : noPairs(variants)));
  fill(built.split, [aliases, requestsOf(variants)], () => splitOf(aliases, variants));
  fill(built.shadow, [shadow, Object.keys(variants)], () => (shadow.length ? shadow.map(shadowOf) : noShadow(variants)));
  fill(built.variants, variants, () => [variantTable(variants)]);
  built.timeline.show(series);
}

function requestsOf(variants) {
  return Object.entries(variants).map(([name, { requests }]) => [name, requests]);
}

function noPairs(variants) {
  const names = Object.keys(variants);
  if (names.length < 2) return onlyOne(names);
  return [
    el("p", {}, "Nothing was compared in this time, so nothing can be said of quality. Let shadow traffic do it (below), run comparisons on the Compare page, or send one from a terminal:"),
    snippet(`curl -s ${location.origin}/v1/compare -H 'content-type: application/json' -d '${JSON.stringify({ prompt: "import os\n", max_tokens: 32, baseline: names[0] })}'`, "the command"),
  ];
}

function onlyOne([name]) {
  const other = name === "reduced" ? "dense" : "reduced";
  return [
    el("p", {}, "This server has one variant only. Start it with two to have something to compare:"),
    snippet(`lowkey-serve ${name}=PATH ${other}=PATH_OF_THE_OTHER`, "the command"),
  ];
}

function splitOf(aliases, variants) {
  const requests = Object.fromEntries(requestsOf(variants));
  const all = Object.values(requests).reduce((sum, count) => sum + count, 0);
  const names = Object.keys(variants);
  const got = shareBar("All requests that ended", Object.fromEntries(names.map((name) => [name, all ? requests[name] / all : 0])), (name) => counted(requests[name]), all ? "" : "none yet");
  const configured = Object.entries(aliases).map(([alias, shares]) => shareBar(el("code", {}, alias), shares, () => "", ""));
  if (configured.length) return [...configured, got];
  if (names.length < 2) return [got];
  return [
    el("p", {}, "No alias is set: clients choose a variant by its name. To split one name over both, put this into lowkey.toml. " + TAKEN),
    snippet(`[aliases.split]\n${toml(names[0])} = 0.9\n${toml(names[1])} = 0.1\n`, "the configuration"),
    got,
  ];
}

function shareBar(title, shares, detail, nothing) {
  const parts = Object.entries(shares);
  return el(
    "div",
    { class: "share" },
    el("h3", {}, title),
    el("div", { class: "share-bar", "aria-hidden": "true" }, ...parts.map(([name, share]) => grow(el("span", { class: colourOf(name) }), share))),
    nothing
      ? el("p", { class: "hint" }, nothing)
      : el("ul", { class: "share-names" }, ...parts.map(([name, share]) => el("li", { class: colourOf(name) }, el("i", { class: "lamp", "aria-hidden": "true" }), el("b", {}, name), ` ${percent(share)}`, detail(name) ? el("small", {}, ` ${detail(name)}`) : ""))),
  );
}

function grow(node, share) {
  node.style.flexGrow = String(share);
  return node;
}

function shadowOf({ variant, baseline, fraction, scored, dropped, failed }) {
  const drawn = scored + dropped + failed;
  const what = drawn
    ? [el("b", {}, whole(scored)), " measured, ", el("b", {}, whole(dropped)), " dropped because requests of users came first, ", el("b", {}, whole(failed)), failed ? " failed (the log says why)." : " failed."]
    : [`None was drawn in this time. It takes requests that ${baseline} answers.`];
  return el("p", { class: colourOf(variant) }, el("i", { class: "lamp", "aria-hidden": "true" }), el("b", {}, variant), ` reads ${percent(fraction)} of what `, el("b", {}, baseline), " answered: ", ...what);
}

function noShadow(variants) {
  const [from, to] = Object.keys(variants);
  if (!to) return [el("p", {}, "It needs a second variant.")];
  return [
    el("p", {}, "No rule is set. To measure a part of the traffic, put this into lowkey.toml. " + TAKEN),
    snippet(`[[shadow]]\nfrom = ${JSON.stringify(from)}\nto = ${JSON.stringify(to)}\nfraction = 0.05\n`, "the configuration"),
  ];
}

function toml(name) {
  return /^[A-Za-z0-9_-]+$/.test(name) ? name : JSON.stringify(name);
}

// Rows of the table; those without a label say more of the one above.
const ROWS = [
  ["Requests", "", (v) => whole(v.requests)],
  ["Failed in the engine", "", (v) => whole(v.errors)],
  ["Tokens generated", "", (v) => whole(v.completion_tokens)],
  ["Tokens per second", "of all tokens together", (v) => format.speed(v.tokens_per_second?.mean)],
  ["", "half of the requests: at least", (v) => format.speed(v.tokens_per_second?.p50)],
  ["Wait for the first token", "half of the requests: at most", (v) => format.seconds(v.ttft_s?.p50)],
  ["", "19 of 20: at most", (v) => format.seconds(v.ttft_s?.p95)],
  ["Gap between tokens", "half of them: at most", (v) => format.seconds(v.itl_s?.p50)],
  ["", "99 of 100: at most", (v) => format.seconds(v.itl_s?.p99)],
  ["State of one request", "whatever its length", (v) => (v.state_bytes == null ? "–" : `${format.bytes(v.state_bytes)} ${v.state_dtype}`)],
  ["", "keys and values, for each token", (v) => (v.kv_bytes_per_token == null ? "–" : v.kv_bytes_per_token ? format.bytes(v.kv_bytes_per_token) : "none")],
];

function variantTable(variants) {
  const entries = Object.entries(variants);
  const forgotten = entries.filter(([, v]) => !v.complete).map(([name]) => name);
  const table = el(
    "table",
    { class: "did" },
    el("thead", {}, el("tr", {}, el("td", {}), ...entries.map(([name]) => el("th", { scope: "col", class: `num ${colourOf(name)}` }, el("i", { class: "lamp", "aria-hidden": "true" }), name)))),
    el("tbody", {}, ...ROWS.map(([label, hint, value]) => el("tr", { class: label ? "" : "more-of" }, el("th", { scope: "row" }, label, hint ? el("small", {}, ` ${hint}`) : ""), ...entries.map(([, v]) => el("td", { class: "num" }, value(v)))))),
  );
  if (!forgotten.length) return table;
  return el("div", {}, table, el("p", { class: "hint" }, `The server remembers fewer requests of ${forgotten.join(" and ")} than ended in this time (ab_samples), so these are of the latest ones.`));
}

function percent(share) {
  return `${Number((100 * share).toPrecision(3))} %`;
}
