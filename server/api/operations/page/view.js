// The figures of a comparison, the history, and the list of variants. No requests here.

import { settingsOf } from "./composer.js";
import { el } from "./dom.js";
import * as format from "./format.js";
import { colourOf } from "./models.js";
import { speedRatio } from "./timing.js";

function item(label, value, hint, known = true) {
  return el(
    "div",
    { class: known ? "figure" : "figure unknown" },
    el("span", { class: "label" }, label),
    el("span", { class: "value" }, value),
    el("span", { class: "unit" }, hint),
  );
}

const LABELS = ["State per request", "Tokens/s", "Mean KL", "Same top token", "Answers part at", "Prompt perplexity"];

// The figures of each variant against the baseline, in one panel each.
export function verdict(answer, timings) {
  const [base, ...others] = answer.results;
  return others.map((result, i) => {
    const d = result.against_baseline;
    const speed = speedRatio(timings, result.variant);
    const values = [
      [format.ratio(d.state_bytes_ratio), stateOf(result.lowkey, base.lowkey)],
      [speed.value, speed.even ? `${speed.basis}: no difference shown` : speed.basis, speed.known],
      [format.small(d.mean_kl), "nats per token; 0: no difference"],
      [format.percent(d.top1_agreement), `of ${d.agree.length} tokens`],
      [d.first_divergence == null ? "never" : `token ${d.first_divergence + 1}`, `of ${base.usage.completion_tokens} in ${base.variant}'s answer`],
      [format.small(result.prompt_perplexity), `${base.variant} has ${format.small(base.prompt_perplexity)}; lower is better`],
    ];
    return panel(base.variant, result.variant, i + 1, values);
  });
}

// What one request holds of what the baseline's does; what kind it is stands once if it is one.
function stateOf(lowkey, base) {
  if (format.stateKind(lowkey) !== format.stateKind(base)) return `${format.state(lowkey)} of ${format.state(base)}`;
  return `${format.bytes(lowkey.state_bytes)} of ${format.state(base)}`;
}

// The same panels before there are figures.
export function emptyVerdict([base, ...others]) {
  return others.map((variant, i) => panel(base, variant, i + 1, LABELS.map(() => ["–", ""])));
}

function panel(base, variant, index, values) {
  return el(
    "div",
    { class: `panel strip ${colourOf(variant, index)}`, "data-variant": variant },
    el("h2", {}, variant, el("small", {}, ` against ${base}`)),
    el("div", { class: "items" }, ...LABELS.map((label, i) => item(label, ...values[i]))),
  );
}

// The rows of one run: a row for each variant that was compared with the baseline. `shown`: it is on show now.
export function historyRows({ name, when, input, answer, timings }, shown, show) {
  const [, ...others] = answer.results;
  const rows = others.map((result, i) => {
    const d = result.against_baseline;
    const cell = (label, text, kind) => el("td", { class: kind, "data-label": label }, text);
    const speed = speedRatio(timings, result.variant);
    const figures = [
      cell("Variant", result.variant),
      cell("KL", format.small(d.mean_kl), "num"),
      cell("Same top token", format.percent(d.top1_agreement), "num"),
      cell("Tokens/s", speed.known ? `${speed.value} ${speed.basis}` : speed.value, "num"),
      cell("State", format.ratio(d.state_bytes_ratio), "num"),
    ];
    if (i) return el("tr", { class: "further" }, ...figures);
    const button = el("button", { type: "button", class: "link" }, input.prompt.trim().slice(0, 80) || "(blank)");
    button.addEventListener("click", show);
    const span = others.length;
    return el(
      "tr",
      { "aria-current": shown ? "true" : null },
      el("th", { scope: "row", rowspan: span }, name, el("small", {}, when)),
      el("td", { class: "prompt", rowspan: span }, button, el("small", {}, settingsOf(input))),
      ...figures,
    );
  });
  return rows;
}

export function fleet(models) {
  return models.map((model) => {
    const { status, d_k: dK } = model.lowkey;
    const detail = dK == null ? status : `d_k ${format.width(dK)} · ${format.capacity(model.lowkey)}${status === "up" ? "" : ` · ${status}`}`;
    return el("li", { class: `${colourOf(model.id)} ${status}` }, el("span", { class: "lamp", "aria-hidden": "true" }), el("b", {}, model.id), ` ${detail}`);
  });
}
