// Charts drawn by hand in SVG: speed over time, bars, and the strip of KL per token.

import * as format from "./format.js";
import { niceEnd } from "./speed.js";

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, children = []) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const HEIGHT = 92;
const [LEFT, RIGHT, TOP, BOTTOM] = [34, 8, 8, 18];

// Tokens/s over the seconds since the request came: higher is faster, and who is faster ends earlier. `curve` holds
// [seconds, tokens/s]; all cards share the axes' ends. While nobody has a speed, there is nothing to name them by.
export function drawSpeed(node, curve, { seconds, speed }) {
  const w = node.clientWidth || 320;
  const [endX, endY] = [seconds || 1, niceEnd(speed)];
  const x = (s) => (LEFT + (s / endX) * (w - LEFT - RIGHT)).toFixed(1);
  const y = (v) => (HEIGHT - BOTTOM - (v / endY) * (HEIGHT - TOP - BOTTOM)).toFixed(1);
  const text = (at, to, anchor, words) => svg("text", { x: at, y: to, "text-anchor": anchor, class: "tick" }, [words]);
  const line = (v) => svg("line", { x1: LEFT, x2: w - RIGHT, y1: y(v), y2: y(v), class: v ? "grid" : "axis" });
  const parts = [line(0)];
  if (speed) {
    const values = [0, endY / 2, endY];
    parts.push(...values.slice(1).map(line), ...values.map((v) => text(LEFT - 5, Number(y(v)) + 3.5, "end", format.tick(v))));
    parts.push(text(LEFT, HEIGHT - 4, "start", "0 s"), text(w - RIGHT, HEIGHT - 4, "end", format.seconds(endX)));
  }
  if (curve.length) {
    const path = curve.map(([s, v]) => `${x(s)},${y(v)}`).join(" ");
    const [first, last] = [curve[0], curve.at(-1)];
    parts.push(
      svg("polygon", { points: `${x(first[0])},${y(0)} ${path} ${x(last[0])},${y(0)}`, class: "area" }),
      svg("polyline", { points: path, class: "line" }),
      svg("circle", { cx: x(last[0]), cy: y(last[1]), r: 3, class: "dot" }),
    );
  }
  node.setAttribute("viewBox", `0 0 ${w} ${HEIGHT}`);
  node.replaceChildren(...parts);
}

// A bar: how much of the largest card's value this one has.
export function drawBar(node, value, largest) {
  const w = node.clientWidth || 160;
  node.setAttribute("viewBox", `0 0 ${w} 8`);
  node.replaceChildren(
    svg("rect", { x: 0, y: 1, width: w, height: 6, rx: 3, class: "track" }),
    svg("rect", { x: 0, y: 1, width: (largest ? (w * value) / largest : 0).toFixed(1), height: 6, rx: 3, class: "bar" }),
  );
}

// Between the shades of KL, in nats: two to a decade, so that each is the same factor, the root of 10, from the next.
export const HEAT_EDGES = [-6, -5, -4, -3, -2, -1, 0].map((halves) => 10 ** (halves / 2));

export function heat(kl) {
  return HEAT_EDGES.filter((edge) => kl >= edge).length;
}

export const HEAT_CELL = 9;
const [GAP, HIGH, ROW] = [1, 16, 19];

// A cell for each token of the baseline's answer, in rows of `columns`.
export function drawHeat(node, kl, agree, columns) {
  const width = HEAT_CELL - GAP;
  node.setAttribute("viewBox", `0 0 ${columns * HEAT_CELL} ${Math.ceil(kl.length / columns) * ROW}`);
  const cells = kl.map((value, i) => {
    const [x, y] = [(i % columns) * HEAT_CELL, Math.floor(i / columns) * ROW];
    const rect = svg("rect", { x, y, width, height: HIGH, rx: 1.5, class: `heat-${heat(value)}`, "data-i": i });
    if (agree[i]) return rect;
    return svg("g", {}, [rect, svg("circle", { cx: x + width / 2, cy: y + HIGH - 4, r: 1.6, class: "disagrees" })]);
  });
  node.replaceChildren(...cells, svg("rect", { class: "cursor", width: width + 2, height: HIGH + 2, rx: 2, x: -99, y: -99 }));
}

export function moveCursor(node, i, columns) {
  const cursor = node.querySelector(".cursor");
  cursor.setAttribute("x", (i % columns) * HEAT_CELL - 1);
  cursor.setAttribute("y", Math.floor(i / columns) * ROW - 1);
}

const SWATCH = 26;

// The shades of KL, with a tick at every edge and a number at every power of ten.
export function heatLegend() {
  const shades = [...HEAT_EDGES, 0].map((_, i) => svg("rect", { x: SWATCH * i, width: SWATCH - 1, height: 10, class: `heat-${i}` }));
  const ticks = HEAT_EDGES.flatMap((edge, i) => {
    const at = SWATCH * (i + 1) - 0.5;
    const whole = i % 2 === 0;
    const line = svg("line", { x1: at, x2: at, y1: 10, y2: whole ? 15 : 13, class: "axis" });
    return whole ? [line, svg("text", { x: at, y: 25, "text-anchor": "middle", class: "tick" }, [format.tick(edge)])] : [line];
  });
  const width = SWATCH * (HEAT_EDGES.length + 1);
  const label = "Shades of KL, from below 0.001 to above 1 nat, on a logarithmic scale";
  return svg("svg", { viewBox: `0 0 ${width} 28`, class: "legend", role: "img", "aria-label": label }, [...shades, ...ticks]);
}
