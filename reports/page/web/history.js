const MAX_SERIES = 200; // that are drawn

async function main() {
  const { metric, versions, series } = JSON.parse(await unpack("data"));
  await loadPlotly();
  const host = document.getElementById("series");
  const plots = series.slice(0, MAX_SERIES).map((one) => {
    const plot = element("div", { class: "plot" });
    host.append(element("figure", {}, element("figcaption", {}, one.case), plot));
    return [one, plot];
  });
  if (series.length > MAX_SERIES) host.after(element("p", { class: "note" }, `and ${series.length - MAX_SERIES} more, in the table`));
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const draw = () => {
    document.documentElement.classList.toggle("dark", scheme.matches);
    plots.forEach(([one, plot]) => drawSeries(one, versions, metric, plot));
  };
  draw();
  scheme.addEventListener("change", draw);
  document.documentElement.dataset.ready = "yes";
}

// Medians by version, steps as dotted lines with their change, failures as crosses on the axis.
function drawSeries(one, versions, metric, plot) {
  const at = versions.map((_, i) => i);
  const known = at.filter((i) => one.medians[i] !== null);
  const failed = at.filter((i) => one.medians[i] === null && !["ok", "missing"].includes(one.statuses[i]));
  const text = (i) => `${escaped(versions[i])}<br>${digits(one.medians[i])} (${digits(one.lows[i])} to ${digits(one.highs[i])}), launches: ${one.launches[i]}`;
  const traces = [
    {
      type: "scatter", mode: "lines+markers", x: known, y: known.map((i) => one.medians[i]), line: { color: colour("link"), width: 1.5 }, marker: { size: 8 },
      error_y: { type: "data", symmetric: false, array: known.map((i) => one.highs[i] - one.medians[i]), arrayminus: known.map((i) => one.medians[i] - one.lows[i]), color: colour("dim"), thickness: 1.2, width: 3 },
      hoverinfo: "text", hovertext: known.map(text),
    },
    { type: "scatter", mode: "markers", x: failed, y: failed.map(() => 0), marker: { symbol: "x", size: 9, color: colour("bad") }, hoverinfo: "text", hovertext: failed.map((i) => `${escaped(versions[i])}<br>${escaped(one.statuses[i])}`), cliponaxis: false },
  ];
  const top = Math.max(...known.map((i) => one.highs[i]), 0) * 1.15 || 1;
  const shapes = one.steps.map(({ at, slower }) => ({ type: "line", x0: at - 0.5, x1: at - 0.5, yref: "paper", y0: 0, y1: 1, line: { dash: "dot", width: 1.5, color: colour(slower ? "bad" : "good") } }));
  const annotations = one.steps.map(({ at, text, slower }) => ({ x: at - 0.5, yref: "paper", y: 1, text, showarrow: false, xanchor: at > versions.length / 2 ? "right" : "left", yanchor: "top", font: { color: colour(slower ? "bad" : "good") } }));
  Plotly.react(plot, traces, layout({
    shapes, annotations, margin: { l: 52, r: 16, t: 8, b: 76 },
    xaxis: { tickvals: at, ticktext: versions.map(escaped), range: [-0.4, versions.length - 0.6], tickangle: -40, tickfont: { size: 10 } },
    yaxis: { title: { text: escaped(metric) }, range: [0, top] },
  }), CONFIG);
}

await main();
