// What this server's memory goes to now.

import { svg } from "./charts.js";
import { el } from "./dom.js";
import * as format from "./format.js";
import { colourOf } from "./models.js";
import { requestsNow } from "./plan.js";
import { counted, whole } from "./words.js";

const PARTS = {
  weights: "weights: the model itself",
  workspace: "workspace: what the largest steps need for a moment",
  graphs: "graphs: recorded decode steps",
  reserved: "reserved: CUDA itself and what it loads",
  states: "states: a slot for each request, and one more that pads batches",
  pages: "pages: keys and values of softmax attention",
};

// The parts of each variant's memory, and how many requests of `tokens` tokens it has room for.
export function nowOf(models, tokens) {
  const largest = Math.max(...models.map(({ lowkey }) => lowkey.planning?.budget ?? total(lowkey.memory ?? {})), 1);
  const nodes = models.map(({ id, lowkey }) => {
    if (!lowkey.planning) return el("div", { class: "variant-now" }, el("h3", {}, id), el("p", { class: "hint" }, lowkey.status === "loading" ? "is loading" : "has not said what it takes"));
    const parts = Object.entries(lowkey.memory).filter(([, bytes]) => bytes > 0);
    const { budget } = lowkey.planning;
    const unused = budget == null ? 0 : Math.max(budget - total(lowkey.memory), 0);
    const pages = lowkey.pages ? ` and ${whole(lowkey.pages)} pages of 64 tokens` : "";
    const now = requestsNow(lowkey, tokens);
    const fits = tokens > lowkey.context_length ? `none of ${whole(tokens)} tokens: at most ${whole(lowkey.context_length)} in one` : `${counted(now)} of ${whole(tokens)} tokens at once`;
    return el(
      "div",
      { class: `variant-now ${colourOf(id)}`, "data-variant": id },
      el("h3", {}, id, el("small", {}, ` on ${lowkey.device}, states in ${lowkey.state_dtype}`)),
      el("p", {}, `Room for ${fits} (${counted(lowkey.slots, "slot")}${pages}). ${budget == null ? `Takes ${format.bytes(total(lowkey.memory))} in all.` : `May take ${format.bytes(budget)} of the card.`}`),
      stacked(parts, largest),
      el("dl", { class: "parts" }, ...[...parts, ...(unused ? [["unused", unused]] : [])].flatMap(([name, bytes]) => [el("dt", { title: PARTS[name] ?? "" }, el("i", { class: `swatch part-${name}`, "aria-hidden": "true" }), name), el("dd", {}, format.bytes(bytes))])),
    );
  });
  const used = [...new Set(models.flatMap(({ lowkey }) => Object.entries(lowkey.memory ?? {}).filter(([, bytes]) => bytes > 0).map(([name]) => name)))];
  const legend = el("p", { class: "hint" }, used.map((name) => PARTS[name] ?? name).join("; "), ".");
  return [...nodes, legend];
}

function stacked(parts, largest) {
  let x = 0;
  const rects = parts.map(([name, bytes]) => {
    const w = (100 * bytes) / largest;
    const rect = svg("rect", { x: x.toFixed(3), y: 0, width: w.toFixed(3), height: 10, class: `part-${name}` });
    x += w;
    return rect;
  });
  return svg("svg", { class: "stacked", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" }, [svg("rect", { x: 0, y: 0, width: 100, height: 10, class: "track" }), ...rects]);
}

function total(memory) {
  return Object.values(memory).reduce((sum, bytes) => sum + bytes, 0);
}
