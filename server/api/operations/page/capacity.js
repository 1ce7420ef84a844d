// A chart of how many requests fit, by how long they are; both axes are logarithmic.

import { svg } from "./charts.js";

const EDGES = { left: 52, right: 14, top: 10, bottom: 26 };
const HIGH = 240;
const SHORTEST = 64;

// `lines`: {colour, dashed, longest, at(tokens) -> requests} each; `tokens` is marked.
export function drawCapacity(node, lines, tokens, longest) {
  const w = node.clientWidth || 600;
  const right = w - EDGES.right;
  const bottom = HIGH - EDGES.bottom;
  const counts = lines.flatMap((line) => [line.at(SHORTEST), line.at(Math.min(line.longest, longest))]).filter((count) => count > 0);
  const ticks = counts.length ? ticksOf(Math.min(...counts), Math.max(...counts)) : [1, 10];
  const [least, most] = [ticks[0], ticks.at(-1)];
  const x = (t) => EDGES.left + (Math.log2(t / SHORTEST) / Math.log2(longest / SHORTEST)) * (right - EDGES.left);
  const y = (n) => bottom - (Math.log(Math.max(n, least) / least) / Math.log(most / least)) * (bottom - EDGES.top);
  node.dataset.longest = String(longest);
  node.setAttribute("viewBox", `0 0 ${w} ${HIGH}`);
  node.setAttribute("aria-label", `Requests that fit by their length; the table above has the numbers at ${tokens} tokens`);
  const marks = [];
  for (const count of ticks) {
    marks.push(svg("line", { x1: EDGES.left, x2: right, y1: y(count), y2: y(count), class: "grid" }), label(EDGES.left - 6, y(count) + 4, short(count), "end"));
  }
  const each = Math.ceil(Math.log2(longest / SHORTEST) / Math.max(2, Math.floor((right - EDGES.left) / 64)));
  for (let t = SHORTEST; t <= longest; t *= 2 ** each) marks.push(label(x(t), HIGH - 8, short(t, 1024), "middle"));
  const drawn = lines.map((line) => {
    const points = [];
    for (let at = x(SHORTEST); at <= x(Math.min(line.longest, longest)) + 0.01; at += 2) {
      const count = line.at(lengthAt(at, w, longest));
      if (count) points.push(`${at.toFixed(1)},${y(count).toFixed(1)}`);
    }
    return svg("polyline", { points: points.join(" "), class: `line ${line.colour}${line.dashed ? " dashed" : ""}` });
  });
  const at = x(Math.max(tokens, SHORTEST)).toFixed(1);
  const dots = lines
    .filter((line) => tokens <= line.longest && line.at(tokens))
    .map((line) => svg("circle", { cx: at, cy: y(line.at(tokens)).toFixed(1), r: 3.5, class: `dot ${line.colour}` }));
  node.replaceChildren(...marks, svg("line", { x1: at, x2: at, y1: EDGES.top, y2: bottom, class: "mark-line" }), ...drawn, ...dots);
}

// Numbers of an axis from `low` or less to `high` or more: 1, 2, 5, 10, 20 ..., or of many decades 1, 10, 100 ...
function ticksOf(low, high) {
  const steps = high / low > 1000 ? [1] : [1, 2, 5];
  const all = [];
  for (let unit = 1; unit < 1e15; unit *= 10) all.push(...steps.map((step) => step * unit));
  const first = all.findLastIndex((value) => value <= low);
  const last = all.findIndex((value) => value >= high);
  return all.slice(first, Math.max(last, first + 1) + 1);
}

// The length under a point of the window.
export function tokensAt(node, clientX) {
  const box = node.getBoundingClientRect();
  return lengthAt(clientX - box.left, box.width, Number(node.dataset.longest));
}

function lengthAt(x, w, longest) {
  const share = Math.min(Math.max((x - EDGES.left) / (w - EDGES.right - EDGES.left), 0), 1);
  return Math.round(SHORTEST * 2 ** (share * Math.log2(longest / SHORTEST)));
}

function label(x, y, text, anchor) {
  return svg("text", { x: x.toFixed(1), y: y.toFixed(1), "text-anchor": anchor, class: "tick" }, [text]);
}

function short(value, thousand = 1000) {
  for (const unit of ["", "k", "M"]) {
    if (value < thousand) return `${value}${unit}`;
    value /= thousand;
  }
  return `${value}G`;
}
