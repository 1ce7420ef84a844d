// The strip under an answer: KL from the baseline at each token, to be read with a pointer or the arrow keys.

import { drawHeat, HEAT_CELL, heatLegend, moveCursor, svg } from "./charts.js";
import { el } from "./dom.js";
import * as format from "./format.js";

// Nodes for one variant against the baseline's result `base`; `pixels` is the width that there is.
export function heatStrip(variant, base, difference, pixels) {
  const count = difference.kl.length;
  const columns = Math.max(1, Math.floor(pixels / HEAT_CELL));
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
  const rest = `Mean ${format.small(difference.mean_kl)}; point at a cell for its token. A dot: another top token`;
  const readout = el("p", { class: "readout" }, rest);
  strip.setAttribute("aria-valuetext", rest);
  let at = -1;
  const show = (i) => {
    at = Math.max(0, Math.min(count - 1, i));
    moveCursor(strip, at, columns);
    const token = JSON.stringify(base.tokens[at] ?? "");
    const top = difference.agree[at] ? "same" : "another";
    const words = `token ${at + 1} ${token}: KL ${format.small(difference.kl[at])} nats, ${top} top token`;
    strip.setAttribute("aria-valuenow", String(at + 1));
    strip.setAttribute("aria-valuetext", words);
    readout.textContent = words;
  };
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
  const label = el("span", { class: "label" }, `KL at each token of ${base.variant}'s answer, in nats`);
  return [el("div", { class: "heat-head" }, label, heatLegend()), strip, readout];
}
