// Hand-drawn SVG: progress of decoding, state memory, and the heat strip of KL per token.

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, children = []) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// Tokens over time. `points` are [seconds, tokens]; all cards share `maxSeconds` and `maxTokens`.
export function drawProgress(node, points, maxSeconds, maxTokens) {
  const w = node.clientWidth || 160;
  const h = 34;
  const x = (s) => ((s / Math.max(maxSeconds, 1e-9)) * (w - 6) + 1).toFixed(1);
  const y = (t) => (h - 2 - (t / Math.max(maxTokens, 1)) * (h - 7)).toFixed(1);
  const line = [[0, 0], ...points].map(([s, t]) => `${x(s)},${y(t)}`).join(" ");
  const [lastS, lastT] = points.at(-1) ?? [0, 0];
  node.setAttribute("viewBox", `0 0 ${w} ${h}`);
  node.replaceChildren(
    svg("line", { x1: 1, x2: w - 1, y1: h - 2, y2: h - 2, class: "axis" }),
    svg("polygon", { points: `${x(0)},${h - 2} ${line} ${x(lastS)},${h - 2}`, class: "area" }),
    svg("polyline", { points: line, class: "line" }),
    svg("circle", { cx: x(lastS), cy: y(lastT), r: 2.6, class: "dot" }),
  );
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

export const HEAT_EDGES = [0.001, 0.01, 0.03, 0.1, 0.3, 1, 3];

export function heat(kl) {
  return HEAT_EDGES.filter((edge) => kl >= edge).length;
}

// A cell for each token of the baseline's answer, in rows of `columns`.
export function drawHeat(node, kl, agree, columns) {
  const [cell, gap, high] = [8, 1, 16];
  const rows = Math.ceil(kl.length / columns);
  node.setAttribute("viewBox", `0 0 ${columns * (cell + gap)} ${rows * (high + 3)}`);
  const cells = kl.map((value, i) => {
    const x = (i % columns) * (cell + gap);
    const y = Math.floor(i / columns) * (high + 3);
    const rect = svg("rect", { x, y, width: cell, height: high, rx: 1.5, class: `heat-${heat(value)}`, "data-i": i });
    if (agree[i]) return rect;
    return svg("g", {}, [rect, svg("circle", { cx: x + cell / 2, cy: y + high - 4, r: 1.6, class: "disagrees" })]);
  });
  node.replaceChildren(...cells, svg("rect", { class: "cursor", width: cell + 2, height: high + 2, rx: 2, x: -99, y: -99 }));
}

export function moveCursor(node, i, columns) {
  const cursor = node.querySelector(".cursor");
  cursor.setAttribute("x", (i % columns) * 9 - 1);
  cursor.setAttribute("y", Math.floor(i / columns) * 19 - 1);
}
