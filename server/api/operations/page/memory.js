// The memory tab: how many requests fit, dense against reduced, in each dtype of the state, and what this server's memory
// goes to now.

import { svg } from "./charts.js";
import { drawCapacity, tokensAt } from "./capacity.js";
import { capital, el } from "./dom.js";
import * as format from "./format.js";
import { colourOf, onModels, variantsOf } from "./models.js";
import { nowOf } from "./now.js";
import { GPU_SHARE, leftOfGpu, parseBytes, planned, requestBytes, requestsThatFit } from "./plan.js";
import { counted, whole } from "./words.js";

const SHORTEST = 64;
const STEPS_PER_DOUBLING = 4;
// What buttons fill in, by their labels; such a card has 78 GiB (pruning/capacity.py).
const SIZES = { "1 GiB": "1 GiB", "16 GiB": "16 GiB", "80 GB card": "78 GiB" };
let built = null; // the nodes of the tab
let unsubscribe = null;
let models = [];
const chosen = { tokens: null, memory: null, whole: false };

export function show(root) {
  built ??= build(root);
  addEventListener("resize", drawAll);
  unsubscribe = onModels((listed) => {
    const before = JSON.stringify(models);
    models = variantsOf(listed);
    if (JSON.stringify(models) !== before) draw();
  });
  drawAll();
}

export function hide() {
  unsubscribe?.();
  unsubscribe = null;
  removeEventListener("resize", drawAll);
}

// ---- what is always there ----

function build(root) {
  const tokens = el("input", { id: "plan-tokens", type: "range", min: "0", max: "20", step: "1", "aria-describedby": "plan-tokens-hint" });
  const exact = el("input", { id: "plan-exact", type: "number", min: "1", step: "1", inputmode: "numeric", "aria-label": "Tokens of one request, exactly" });
  const memory = el("input", { id: "plan-memory", type: "text", spellcheck: "false", autocomplete: "off", "aria-describedby": "plan-memory-hint", size: "10" });
  const kinds = [["requests", "for requests alone"], ["gpu", "a whole GPU"]].map(([value, label]) =>
    el("label", { class: "check" }, el("input", { type: "radio", name: "plan-kind", value, checked: value === "requests" }), label),
  );
  const presets = el("div", { class: "presets" });
  const nodes = {
    tokens,
    exact,
    memory,
    presets,
    tokensHint: el("p", { class: "hint", id: "plan-tokens-hint" }),
    memoryHint: el("p", { class: "hint", id: "plan-memory-hint", role: "status" }),
    sentence: el("p", { class: "lead", role: "status" }),
    rows: el("div", { class: "scroll" }),
    chart: svg("svg", { class: "capacity", role: "img" }),
    chartHint: el("p", { class: "hint" }),
    legend: el("div", { class: "capacity-legend" }),
    chartBox: el("section", { class: "panel block", hidden: true }),
    now: el("div", { class: "now" }),
    empty: el("p", { class: "panel block" }, "No variant has loaded yet. This fills in by itself once one has."),
    body: el("div", { class: "stack", hidden: true }),
  };
  nodes.chartBox.append(
    el("h2", {}, "At every length"),
    nodes.chartHint,
    nodes.legend,
    nodes.chart,
  );
  nodes.body.append(
    el(
      "form",
      { class: "panel block plan-form", autocomplete: "off" },
      el("div", { class: "plan-field wide" }, el("label", { for: "plan-tokens", class: "label" }, "Tokens of one request, prompt and answer"), el("div", { class: "slide" }, tokens, exact), nodes.tokensHint),
      el(
        "div",
        { class: "plan-field" },
        el("label", { for: "plan-memory", class: "label" }, "Memory"),
        el("div", { class: "row tight" }, memory, presets),
        el("fieldset", { class: "kinds" }, el("legend", { class: "hidden-legend" }, "What the memory is"), ...kinds),
        nodes.memoryHint,
      ),
    ),
    el("section", { class: "panel block" }, el("h2", {}, "What fits"), nodes.sentence, nodes.rows, el("p", { class: "hint" }, "For a model that is not served here: ", el("code", {}, "lowkey-prune inspect config.json"), " says what its requests hold and how many fit. It needs no weights.")),
    nodes.chartBox,
    el("section", { class: "panel block" }, el("h2", {}, "This server now"), nodes.now),
  );
  tokens.addEventListener("input", () => setTokens(lengthAt(Number(tokens.value))));
  exact.addEventListener("change", () => setTokens(Number(exact.value)));
  memory.addEventListener("input", () => {
    const size = parseBytes(memory.value);
    memory.setAttribute("aria-invalid", String(!size));
    if (size) chosen.memory = size;
    drawAll();
  });
  for (const radio of kinds.map((kind) => kind.querySelector("input"))) {
    radio.addEventListener("change", () => {
      chosen.whole = radio.value === "gpu";
      drawAll();
    });
  }
  const drag = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    setTokens(tokensAt(nodes.chart, event.clientX));
  };
  for (const kind of ["pointerdown", "pointermove"]) nodes.chart.addEventListener(kind, drag);
  nodes.body.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  root.replaceChildren(
    el(
      "div",
      { class: "stack" },
      el(
        "div",
        { class: "intro" },
        el("h2", {}, "How many requests fit into memory"),
        el("p", {}, "While a model answers, it keeps what it has read so far in a state, and the state stays in memory until the answer ends. So memory limits how many requests run at the same time. A reduced model has a smaller state than the dense one it was made from: fewer key channels per head (d_k). A narrower number format (dtype) makes either smaller again."),
      ),
      nodes.empty,
      nodes.body,
    ),
  );
  return nodes;
}

// ---- lengths ----

function longest() {
  return Math.max(SHORTEST, ...models.map((model) => model.lowkey.planning?.context_length ?? 0));
}

function lengthAt(step) {
  return Math.min(Math.round(2 ** (step / STEPS_PER_DOUBLING) * SHORTEST), longest());
}

function setTokens(tokens) {
  if (Number.isFinite(tokens) && tokens >= 1) chosen.tokens = Math.min(Math.floor(tokens), longest());
  drawAll();
}

// ---- drawing ----

function draw() {
  const rows = planned(models);
  built.empty.hidden = rows.length > 0;
  built.body.hidden = !rows.length;
  if (!rows.length) return;
  if (chosen.tokens == null) {
    chosen.tokens = Math.max(...models.map((model) => model.lowkey.planning?.context_tokens ?? 0));
    chosen.memory = largestPool();
    built.memory.value = format.bytes(chosen.memory);
  }
  drawAll();
}

// Bytes of the largest variant's slots and pages.
function largestPool() {
  return Math.max(...models.map(({ lowkey }) => (lowkey.memory?.states ?? 0) + (lowkey.memory?.pages ?? 0)));
}

function drawAll() {
  const rows = planned(models);
  if (!rows.length || built.body.hidden) return;
  const grows = rows.some((row) => Object.values(row.here.state_dtypes).some((bytes) => bytes.kv_bytes_per_page));
  drawControls(rows, grows);
  const fits = rows.map((row) => ({ ...row, cells: cellsOf(row) }));
  drawSentence(fits);
  built.rows.replaceChildren(tableOf(fits));
  built.chartBox.hidden = !grows;
  if (grows) {
    const dtypes = Object.keys(sizesOf(rows[0]));
    built.chartHint.textContent = `How many requests fit if all of them are so long. Solid: states in ${dtypes[0]}${dtypes.length > 1 ? `, dashed: in ${dtypes.at(-1)}` : ""}. Drag in the chart to change the length.`;
    built.legend.replaceChildren(...fits.map((row) => el("span", { class: colour(row) }, el("i", { class: "lamp", "aria-hidden": "true" }), title(row))));
    drawCapacity(built.chart, fits.flatMap(linesOf), chosen.tokens, longest());
  }
  built.now.replaceChildren(...nowOf(models, chosen.tokens));
}

function drawControls(rows, grows) {
  const steps = Math.ceil(Math.log2(longest() / SHORTEST) * STEPS_PER_DOUBLING);
  const step = Math.round(Math.log2(chosen.tokens / SHORTEST) * STEPS_PER_DOUBLING);
  built.tokens.max = String(steps);
  built.tokens.value = String(Math.min(Math.max(step, 0), steps));
  built.tokens.setAttribute("aria-valuetext", `${whole(chosen.tokens)} tokens`);
  built.exact.max = String(longest());
  if (document.activeElement !== built.exact) built.exact.value = String(chosen.tokens);
  built.tokensHint.textContent = grows
    ? `Softmax attention keeps keys and values of every token, so longer requests take more. ${most(rows)}`
    : `Requests of these models take the same memory however long they get: linear attention has nothing that grows. ${most(rows)}`;
  const here = largestPool();
  if (built.presets.dataset.here !== String(here)) {
    built.presets.dataset.here = String(here);
    const fixed = Object.entries(SIZES).map(([label, size]) => preset(label, size, parseBytes(size)));
    built.presets.replaceChildren(preset("as here", format.bytes(here), here), ...fixed);
  }
  const valid = parseBytes(built.memory.value) != null;
  built.memoryHint.classList.toggle("bad", !valid);
  built.memoryHint.replaceChildren(...(valid ? memoryWords(rows) : [`“${built.memory.value}” is no size. Type a number and a unit, such as 1 GiB or 80 GB.`]));
}

function most(rows) {
  const lengths = [...new Set(rows.map((row) => row.context))];
  return `The longest that ${lengths.length > 1 ? "any of them" : rows.length > 1 ? "they" : "it"} can take: ${whole(Math.max(...lengths))} tokens.`;
}

// A button that fills in a size, which it shows as `text`: of an exact number of bytes that is a rounded one.
function preset(label, text, bytes) {
  const button = el("button", { type: "button", class: "small" }, label);
  button.addEventListener("click", () => {
    built.memory.value = text;
    built.memory.setAttribute("aria-invalid", "false");
    chosen.memory = bytes;
    drawAll();
  });
  return button;
}

function memoryWords(rows) {
  const exactly = `${whole(chosen.memory)} bytes`;
  if (!chosen.whole) return [`${exactly}, all of it for states, keys and values: what `, el("code", {}, "--state-memory"), " gives each variant."];
  const other = rows[0].gpu.other_bytes;
  const measured = models.some(({ lowkey }) => lowkey.planning?.budget != null);
  const work = measured ? "weights, workspace and graphs as measured here" : "weights in bfloat16 and 1 GiB for CUDA; what the largest steps need comes on top and is measured on a GPU only, so a bit less will fit";
  return [`${exactly}, ${100 * GPU_SHARE} % of it for one variant, less ${format.bytes(other)}: ${work}.`];
}

// ---- what fits ----

function memoryOf(row) {
  return chosen.whole ? leftOfGpu(chosen.memory, row.gpu) : chosen.memory;
}

function sizesOf(row) {
  return (chosen.whole ? row.gpu : row.here).state_dtypes;
}

function cellsOf(row) {
  const tooLong = chosen.tokens > row.context;
  return Object.entries(sizesOf(row)).map(([dtype, bytes]) => ({
    dtype,
    names: row.names[dtype] ?? [],
    each: requestBytes(bytes, chosen.tokens),
    state: bytes.state_bytes,
    requests: tooLong ? null : requestsThatFit(memoryOf(row), bytes, chosen.tokens),
  }));
}

function linesOf(row) {
  const sizes = Object.values(sizesOf(row));
  const ends = sizes.length > 1 ? [sizes[0], sizes.at(-1)] : sizes;
  return ends.map((bytes, i) => ({
    colour: colour(row),
    dashed: i > 0,
    longest: row.context,
    at: (tokens) => requestsThatFit(memoryOf(row), bytes, tokens),
  }));
}

function allNames(row) {
  return Object.values(row.names).flat();
}

function title(row) {
  const names = allNames(row);
  return names.length ? names.join(", ") : `the dense original of ${row.of}`;
}

// What to call one dtype of a row in a sentence.
function nameOf(row, cell) {
  return cell.names[0] ?? allNames(row)[0] ?? title(row);
}

function colour(row) {
  const [name] = allNames(row);
  return name ? colourOf(name) : "v5";
}

function drawSentence(fits) {
  const base = fits[0].cells[0];
  const typed = built.memory.value.trim();
  const memory = typed.length < 9 && parseBytes(typed) === chosen.memory ? typed : format.bytes(chosen.memory);
  const size = chosen.whole ? `a GPU of ${memory}` : memory;
  if (!base.requests) {
    const left = memoryOf(fits[0]);
    built.sentence.textContent = base.requests == null
      ? `${title(fits[0])} takes at most ${whole(fits[0].context)} tokens in one request.`
      : capital(`${size} is too little for ${left > 0 ? `even one request of ${whole(chosen.tokens)} tokens` : "the weights"} of ${title(fits[0])}.`);
    return;
  }
  const words = [`${chosen.whole ? "On" : "In"} ${size}, ${nameOf(fits[0], base)} runs ${counted(base.requests)} of ${whole(chosen.tokens)} tokens at once, with ${base.dtype} states`];
  const other = fits.find((row) => row.reduced && row.cells[0].requests);
  if (other) {
    const [wide] = other.cells;
    const narrow = other.cells.at(-1);
    words.push(`${nameOf(other, wide)} runs ${whole(wide.requests)}, ${times(wide, base)} as many`);
    if (narrow !== wide) words.push(`with ${narrow.dtype} states as well it runs ${whole(narrow.requests)}, ${times(narrow, base)} as many`);
  }
  built.sentence.textContent = `${words.join("; ")}.`;
}

function tableOf(fits) {
  const base = fits[0].cells[0];
  const largest = Math.max(...fits.flatMap((row) => row.cells.map((cell) => cell.requests ?? 0)), 1);
  const heads = [["State in"], ["Requests at once", "num"], ["", "bar-cell"], ["Against the first row", "num"], ["One request holds", "num"]];
  const body = fits.map((row) =>
    el(
      "tbody",
      { class: colour(row) },
      el("tr", { class: "group" }, el("th", { colspan: "5", scope: "rowgroup" }, el("i", { class: "lamp", "aria-hidden": "true" }), el("b", {}, title(row)), ` ${row.reduced ? "a reduced model" : "a dense model"}, d_k ${width(row.dK)}`)),
      ...row.cells.map((cell) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, cell.dtype, cell.names.length ? el("span", { class: "tag" }, allNames(row).length > 1 ? `served as ${cell.names.join(", ")}` : "served here") : ""),
          el("td", { class: "num strong" }, cell.requests == null ? `over ${whole(row.context)} tokens` : whole(cell.requests)),
          el("td", { class: "bar-cell" }, bar((cell.requests ?? 0) / largest)),
          el("td", { class: "num" }, cell.requests && base.requests ? times(cell, base) : "–"),
          el("td", { class: "num" }, format.bytes(cell.each), cell.each > cell.state ? el("small", {}, ` ${format.percent(cell.state / cell.each)} state`) : ""),
        ),
      ),
    ),
  );
  return el("table", { class: "fits" }, el("thead", {}, el("tr", {}, ...heads.map(([text, kind]) => (text ? el("th", { scope: "col", class: kind }, text) : el("td", { class: kind }))))), ...body);
}

function bar(share) {
  return svg("svg", { class: "bar-chart", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" }, [
    svg("rect", { x: 0, y: 1, width: 100, height: 6, class: "track" }),
    svg("rect", { x: 0, y: 1, width: (100 * share).toFixed(2), height: 6, class: "bar" }),
  ]);
}

// ---- words ----

function times(cell, base) {
  return `${(cell.requests / base.requests).toFixed(2)}×`;
}

function width(dK) {
  return Array.isArray(dK) && new Set(dK).size === 1 ? String(dK[0]) : format.width(dK);
}
