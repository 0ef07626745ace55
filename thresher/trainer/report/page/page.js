// Draws FIGURES into the places made for them, in the page's own colours, and again when these change.
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function look() {
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--muted"), size: 12, family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif" },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    xaxis: { ...axis, showgrid: false, separatethousands: true },
    yaxis: { ...axis, nticks: 6 },
  };
}

function draw() {
  const base = look();
  for (const place of document.querySelectorAll("[data-chart]")) {
    const { data, layout } = FIGURES[place.dataset.chart];
    const whole = { ...base, ...layout, xaxis: { ...base.xaxis, ...layout.xaxis }, yaxis: { ...base.yaxis, ...layout.yaxis } };
    Plotly.react(place, data, whole, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
