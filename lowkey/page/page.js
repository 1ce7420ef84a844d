"use strict";
const options = { responsive: true, displayModeBar: false };
const dark = matchMedia("(prefers-color-scheme: dark)");
const figures = JSON.parse(document.getElementById("data").textContent);

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

Promise.all(
  figures.map(({ name, data, layout }) =>
    Plotly.newPlot(name, data, { ...layout, template: template() }, options),
  ),
).then(() => (document.body.dataset.drawn = figures.length));

dark.addEventListener("change", () => {
  for (const { name } of figures) Plotly.relayout(name, { template: template() });
});
