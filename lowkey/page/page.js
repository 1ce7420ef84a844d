"use strict";
const options = { responsive: true, displayModeBar: false };
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");
const figures = JSON.parse(document.getElementById("data").textContent);
const PANEL = 240; // pixels of one of several axes on a narrow screen,
const GAP = 84; // and between two of them, for ticks, a title below and one above

function template() {
  const [text, grid] = dark.matches ? ["#dfe5ec", "#333c48"] : ["#1c2430", "#dfe3e8"];
  const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true };
  return {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: text, size: 12, family: 'system-ui, "DejaVu Sans", sans-serif' },
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0 },
      xaxis: axis,
      yaxis: axis,
    },
  };
}

// On a narrow screen axes that were beside each other stand below each other, so that their texts have room.
function stacked(data, layout) {
  const used = new Set(data.map((trace) => (trace.xaxis ?? "x").replace("x", "xaxis")));
  const panels = Object.keys(layout).filter((key) => used.has(key));
  const entries = data.filter((trace) => trace.name && trace.showlegend !== false).length;
  const legend = { ...layout.legend, maxheight: 0.9 };
  const margin = { ...layout.margin, r: Math.max(layout.margin.r, 30) }; // half of the last tick's label
  if (panels.length < 2) {
    return layout.height ? { ...layout, legend, margin, height: layout.height + 12 * entries } : layout;
  }
  const plot = panels.length * PANEL + (panels.length - 1) * GAP;
  const height = plot + margin.t + margin.b + 22 * entries;
  const result = { ...layout, legend, margin, height, annotations: [] };
  panels.forEach((key, i) => {
    const top = 1 - (i * (PANEL + GAP)) / plot;
    const y = key.replace("x", "y");
    const sameRow = panels.map((other) => layout[other.replace("x", "y")]).filter((other) => other.domain[0] === layout[y].domain[0]);
    const title = layout[y].title ?? sameRow[0].title;
    result[key] = { ...layout[key], domain: [0, 1], showticklabels: true };
    result[y] = { ...layout[y], domain: [Math.max(top - PANEL / plot, 0), top], showticklabels: true, title };
    const name = layout.annotations?.[i];
    if (name) result.annotations.push({ ...name, x: 0.5, y: top });
  });
  return result;
}

function draw({ name, data, layout }) {
  const shown = narrow.matches ? stacked(data, layout) : layout;
  const element = document.getElementById(name);
  if (shown.height) element.style.height = `${shown.height}px`;
  return Plotly.react(element, data, { ...shown, template: template() }, options);
}

Promise.all(figures.map(draw)).then(() => (document.body.dataset.drawn = figures.length));

for (const media of [dark, narrow]) media.addEventListener("change", () => figures.forEach(draw));
