// Unpacks embedded data: gzip in base64, in script elements that do not run.
async function unpack(id) {
  return inflate(document.getElementById(id).textContent.trim());
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function codeUrl(text) {
  return URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
}

async function loadPlotly() {
  const script = document.createElement("script");
  script.src = codeUrl(await unpack("plotly"));
  await new Promise((resolve, reject) => {
    script.onload = resolve;
    script.onerror = () => reject(new Error("Plotly does not load"));
    document.head.append(script);
  });
}

async function loadTables() {
  const url = codeUrl(await unpack("datatables"));
  return import(url);
}

// Plotly renders some HTML in texts, DataTables all of it.
function escaped(text) {
  return String(text).replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
}

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function layout(extra = {}) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("dim") };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("fore") },
    margin: { l: 58, r: 12, t: 8, b: 44 }, showlegend: false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("dim"), activecolor: colour("fore") },
    hoverlabel: { bgcolor: colour("soft"), bordercolor: colour("line"), font: { color: colour("fore") }, align: "left" },
    ...extra,
    xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
  };
}

const CONFIG = {
  responsive: true, displaylogo: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

function tokens(count) {
  if (count >= 1 << 20 && count % (1 << 20) === 0) return `${count >> 20}m`;
  return count >= 1024 && count % 1024 === 0 ? `${count / 1024}k` : String(count);
}

function digits(value, count = 3) {
  if (value === null || value === undefined || value === "") return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const places = Math.max(0, count - 1 - Math.floor(Math.log10(Math.abs(value))));
  if (places > 8) return value.toExponential(count - 1);
  return value.toLocaleString("en", { minimumFractionDigits: Math.min(places, 8), maximumFractionDigits: Math.min(places, 8) });
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
