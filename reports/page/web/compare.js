const VERDICT_COLOURS = { SLOWER: "bad", FAILS: "bad", MISSING: "bad", FASTER: "good", WORKS: "good", UNCLEAR: "warn" };
const MAX_SHOWN = 40; // cases in the chart

async function main() {
  const comparisons = JSON.parse(await unpack("data"));
  await loadPlotly();
  const { jQuery: $ } = await loadTables();
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const applyScheme = () => {
    document.documentElement.classList.toggle("dark", scheme.matches);
    comparisons.forEach((comparison, i) => forestPlot(comparison, document.getElementById(`forest-${i}`)));
  };
  applyScheme();
  scheme.addEventListener("change", applyScheme);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; applyScheme(); } });
  comparisons.forEach(({ columns, rows }, i) => {
    const show = (value, type) => (type === "display" ? escaped(value) : value);
    const verdict = (value, type) => (type === "display" ? `<b style="color:var(--${VERDICT_COLOURS[value] ?? "dim"})">${escaped(value)}</b>` : value);
    const number = (value, type) => (type === "sort" ? (Number.isNaN(parseFloat(value)) ? -Infinity : parseFloat(value.replaceAll(",", ""))) : show(value, type));
    const numeric = ["base ms", "new ms", "change", "memory"];
    $(`#table-${i}`).DataTable({
      data: rows, order: [], autoWidth: false, pageLength: 50, deferRender: true,
      columns: columns.map((title) => ({ title, render: title === "verdict" ? verdict : numeric.includes(title) ? number : show, className: numeric.includes(title) ? "dt-right" : title === "case" ? "broad" : "" })),
    });
  });
  document.documentElement.dataset.ready = "yes";
}

// The ratio of each case with its interval, most severe verdicts on top.
function forestPlot({ ratios, floor }, plot) {
  const cases = ratios.slice(0, MAX_SHOWN).reverse();
  if (!cases.length) { plot.hidden = true; return; }
  plot.style.height = `${Math.max(160, 70 + 19 * cases.length)}px`;
  const letters = Math.max(12, Math.floor(plot.clientWidth / 3 / 5.6)); // a third of the width, at 10 px
  const label = (text) => (text.length <= letters ? text : `${text.slice(0, Math.ceil(letters * 0.6) - 1)}…${text.slice(-Math.floor(letters * 0.4))}`);
  const percent = (ratio) => (ratio - 1) * 100;
  const trace = {
    type: "scatter", mode: "markers", x: cases.map((r) => percent(r.ratio)), y: cases.map((_, i) => i),
    error_x: { type: "data", symmetric: false, array: cases.map((r) => percent(r.high) - percent(r.ratio)), arrayminus: cases.map((r) => percent(r.ratio) - percent(r.low)), color: colour("dim"), thickness: 1.3, width: 3 },
    marker: { size: 9, color: cases.map((r) => colour(VERDICT_COLOURS[r.verdict] ?? "dim")), symbol: cases.map((r) => ({ SLOWER: "triangle-right", FASTER: "triangle-left", UNCLEAR: "circle-open" })[r.verdict] ?? "circle") },
    hoverinfo: "text", hovertext: cases.map((r) => `${escaped(r.case)}<br>${r.verdict} ${digits(percent(r.ratio), 2)} % (${digits(percent(r.low), 2)} to ${digits(percent(r.high), 2)})`),
  };
  const band = { type: "rect", yref: "paper", y0: 0, y1: 1, x0: percent(1 / (1 + floor)), x1: percent(1 + floor), fillcolor: colour("line"), opacity: 0.5, line: { width: 0 }, layer: "below" };
  Plotly.react(plot, [trace], layout({
    shapes: [band], margin: { l: 10, r: 20, t: 8, b: 44 },
    xaxis: { title: { text: "change of time, %; shaded: below the floor" }, zeroline: true },
    yaxis: { tickvals: cases.map((_, i) => i), ticktext: cases.map((r) => escaped(label(r.case))), automargin: true, tickfont: { size: 10 } },
  }), CONFIG);
}

await main();
