const TABLE_COLUMNS = ["status", "method", "mask", "seq_len", "world_size", "direction", "dtype", "time_ms", "noise", "tflops_per_rank", "peak_mb", "sent_mb", "exposed", "imbalance", "flags", "reason"];
const HEADINGS = { seq_len: "tokens", world_size: "ranks", time_ms: "ms", noise: "± %", peak_mb: "peak MB", sent_mb: "sent MB", exposed: "exposed %" };

async function main() {
  const data = new Data(JSON.parse(await unpack("data")));
  await loadPlotly();
  const inline = document.getElementById("samples");
  const samples = inline && inline.textContent.trim() ? JSON.parse(await unpack("samples")) : null;
  const details = new Details(data, samples ? async (row) => samples[row] : loadSamples);
  const open = (rows) => details.open(rows);
  let table = null;
  const filters = new Filters(data, () => { charts.refresh(); table?.draw(); });
  const charts = new Charts(data, filters, open);
  document.getElementById("charts").hidden = false;
  charts.refresh();
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const applyScheme = () => document.documentElement.classList.toggle("dark", scheme.matches);
  applyScheme();
  scheme.addEventListener("change", () => { applyScheme(); charts.refresh(); });
  addEventListener("beforeprint", () => charts.drawAll());
  table = await caseTable(data, filters, open);
  document.documentElement.dataset.ready = "yes";
}

async function caseTable(data, filters, open) {
  const { jQuery: $ } = await loadTables();
  document.getElementById("cases").hidden = false;
  let matching = null;
  $.fn.dataTable.ext.search.push((settings, _, index, row) => {
    matching ??= new Set(filters.rows());
    return matching.has(row[0]);
  });
  const scaled = { noise: 100, exposed: 100, tflops_per_rank: data.rate.scale };
  const number = (column) => (value, type) => (type === "display" ? escaped(column === "seq_len" ? tokens(value) : digits(value === "" ? null : value * (scaled[column] ?? 1))) : value === "" ? -1 : value);
  const columns = [{ visible: false, searchable: false }, ...TABLE_COLUMNS.map((name) => ({
    title: name === "tflops_per_rank" ? data.rate.unit : HEADINGS[name] ?? name.replaceAll("_", " "),
    render: name in data.texts ? (value, type) => (type === "display" ? escaped(value) : value) : number(name),
    className: ["method", "mask", "reason"].includes(name) ? "broad" : name in data.texts ? "" : "dt-right",
  }))];
  const rows = Array.from({ length: data.rows }, (_, row) => [row, ...TABLE_COLUMNS.map((name) => data.cell(name, row))]);
  const table = $("#table").DataTable({ data: rows, columns, deferRender: true, pageLength: 25, order: [], autoWidth: false });
  $("#table tbody").on("click", "tr", function () {
    const row = table.row(this).data();
    if (row) open([row[0]]);
  });
  return { draw: () => { matching = null; table.draw(); } };
}

// With many samples, these are in files beside the page, some hundred cases each.
const waiting = new Map();
globalThis.cpbenchSamples = (chunk, text) => waiting.get(chunk)?.(text);

async function loadSamples(row) {
  const { folder, size } = document.getElementById("samples").dataset;
  if (!folder) return [];
  const chunk = Math.floor(row / Number(size));
  const script = element("script", { src: `${folder}/${chunk}.js` });
  const text = await new Promise((resolve, reject) => {
    waiting.set(chunk, resolve);
    script.onerror = () => reject(new Error(`Cannot load the samples: ${folder}/${chunk}.js must be beside this page.`));
    document.head.append(script);
  });
  script.remove();
  return JSON.parse(await inflate(text))[row % Number(size)];
}

await main();
