const PARTS = { attention: ["attention", "#4477aa"], side: ["merges and copies", "#ccbb44"], exposed: ["waiting for communication", "#ee6677"] };
const COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733"];
const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"];
const STEPS = [-2, -1, 0, 1, 2, 3, 4, 5].flatMap((power) => [1, 2, 5].map((m) => Number(`${m}e${power}`)));
const MAX_SHOWN = 24; // methods in the chart

async function main() {
  const { parts, lines } = JSON.parse(await unpack("data"));
  await loadPlotly();
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const draw = () => {
    document.documentElement.classList.toggle("dark", scheme.matches);
    drawParts(parts.slice(0, MAX_SHOWN), document.getElementById("parts"));
    if (document.getElementById("ranks")) drawRanks(lines, document.getElementById("ranks"));
  };
  draw();
  scheme.addEventListener("change", draw);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  document.documentElement.dataset.ready = "yes";
}

const LEGEND = { showlegend: true, legend: { orientation: "h", yanchor: "bottom", y: 1.01, xanchor: "left", x: 0, font: { size: 11 } } };

// Parts of the time as stacked bars, with the interval of the prediction; the fastest on top.
function drawParts(rows, plot) {
  const shown = [...rows].reverse();
  plot.style.height = `${130 + 26 * shown.length}px`;
  const letters = Math.max(14, Math.floor(plot.clientWidth / 2.6 / 5.6));
  const short = (text) => (text.length <= letters ? text : `${text.slice(0, Math.ceil(letters * 0.6) - 1)}…${text.slice(-Math.floor(letters * 0.4))}`);
  const label = (row) => (row.best ? `<b>${escaped(short(row.method))}</b>` : escaped(short(row.method)));
  const hover = (row) => `${escaped(row.method)}<br>${digits(row.seconds * 1e3)} ms (${digits(row.low * 1e3)} to ${digits(row.high * 1e3)})<br>${Object.entries(PARTS).map(([part, [name]]) => `${name} ${digits(row[part] * 1e3)} ms`).join("<br>")}`;
  const traces = Object.entries(PARTS).map(([part, [name, fill]], i) => ({
    type: "bar", orientation: "h", name, x: shown.map((row) => row[part] * 1e3), y: shown.map((_, k) => k), marker: { color: fill },
    hoverinfo: "text", hovertext: shown.map(hover), textposition: "none",
    ...(i === 2 ? { error_x: { type: "data", symmetric: false, array: shown.map((row) => (row.high - row.seconds) * 1e3), arrayminus: shown.map((row) => (row.seconds - row.low) * 1e3), color: colour("dim"), thickness: 1.3, width: 3 } } : {}),
  }));
  Plotly.react(plot, traces, layout({
    ...LEGEND, barmode: "stack", margin: { l: 10, r: 16, t: 40, b: 44 },
    xaxis: { title: { text: "ms" }, rangemode: "tozero" },
    yaxis: { tickvals: shown.map((_, k) => k), ticktext: shown.map(label), automargin: true, tickfont: { size: 11 } },
  }), CONFIG);
}

// The least time of each strategy by number of ranks.
function drawRanks(lines, plot) {
  plot.style.height = "380px";
  const ranks = [...new Set(lines.flatMap((line) => line.ranks))].sort((a, b) => a - b);
  const traces = lines.map((line, i) => ({
    type: "scatter", mode: "lines+markers", name: line.strategy, x: line.ranks, y: line.seconds.map((s) => s * 1e3),
    line: { color: COLOURS[i % COLOURS.length], width: 1.5, dash: i < COLOURS.length ? "solid" : "dash" }, marker: { size: 8, symbol: SYMBOLS[(i + Math.floor(i / COLOURS.length)) % SYMBOLS.length] },
    hoverinfo: "text", hovertext: line.ranks.map((n, k) => `${n} ranks<br>${escaped(line.methods[k])}<br>${digits(line.seconds[k] * 1e3)} ms`),
  }));
  Plotly.react(plot, traces, layout({
    ...LEGEND, margin: { l: 58, r: 16, t: 56, b: 44 },
    xaxis: { type: "log", title: { text: "ranks" }, tickvals: ranks, ticktext: ranks.map(String) },
    yaxis: { type: "log", title: { text: "ms" }, tickvals: STEPS, ticktext: STEPS.map(String) },
  }), CONFIG);
}

await main();
