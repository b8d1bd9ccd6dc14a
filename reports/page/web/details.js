// Details of a case, or of the mask seeds of one: values, samples, the command that repeats it, environment.
const VALUES = [
  ["time_ms", "time, ms"], ["low_ms", "interval, lower end, ms"], ["high_ms", "interval, upper end, ms"], ["fwd_ms", "forward, ms"], ["bwd_ms", "backward, ms"],
  ["launches", "launches"], ["iterations", "iterations"], ["density", "density"], ["imbalance", "imbalance"],
  ["peak_mb", "peak memory, MB"], ["inputs_mb", "inputs, MB"], ["sent_mb", "sent, MB"], ["allgather_mb", "an all-gather of all keys would send, MB"], ["across_mb", "across nodes, MB"], ["compute_ms", "without communication, ms"], ["transfer_ms", "communication alone, ms"], ["exposed_ms", "exposed communication, ms"], ["plan_ms", "planning, ms"], ["rope_ms", "rotation (RoPE), ms"],
  ["first_call_ms", "first call, ms"], ["worst_error", "largest error"], ["flags", "caveats"], ["notes", "notes"], ["machine", "machine"], ["clock", "clock"], ["run", "run"], ["writer", "writer"], ["log", "log"],
];

class Details {
  constructor(data, samplesOf) {
    this.data = data;
    this.samplesOf = samplesOf;
    this.dialog = document.getElementById("details");
    this.dialog.addEventListener("close", () => { const plot = this.dialog.querySelector(".plot"); if (plot) Plotly.purge(plot); });
  }

  async open(rows, index = 0) {
    const { data, dialog } = this;
    const row = rows[index];
    const title = `${data.text("method", row)}: ${data.text("mask", row)}, ${tokens(data.number("seq_len", row))} tokens, ${data.text("dtype", row)} ${data.text("direction", row)}`;
    dialog.querySelector("h2").replaceChildren(title);
    const body = dialog.querySelector(".body");
    const facts = element("dl", { class: "facts" });
    const status = data.text("status", row);
    facts.append(element("dt", {}, "status"), element("dd", { class: `s-${status}` }, status + (data.text("reason", row) ? `: ${data.text("reason", row)}` : "")));
    for (const [column, name] of VALUES) {
      const value = data.cell(column, row);
      if (value !== "") facts.append(element("dt", {}, name), element("dd", {}, typeof value === "number" ? digits(value, 4) : value));
    }
    const rate = data.number("tflops_per_rank", row);
    if (rate !== null) facts.append(element("dt", {}, `${data.rate.unit} per rank`), element("dd", {}, digits(rate * data.rate.scale, 4)));
    const plot = element("div", { class: "plot" });
    const seeds = element("p");
    if (rows.length > 1) {
      seeds.append("Mask seeds: ", ...rows.flatMap((other, i) => [i === index ? element("b", {}, data.text("mask", other)) : element("a", { href: "#", onclick: (event) => { event.preventDefault(); this.open(rows, i); } }, data.text("mask", other)), "  "]));
    }
    body.replaceChildren(seeds, plot, facts, element("h3", {}, "Command"), element("pre", {}, this.command(row)), ...this.environment(row));
    if (!dialog.open) dialog.showModal();
    await this.drawSamples(plot, row);
  }

  async drawSamples(plot, row) {
    let launches;
    try {
      launches = (await this.samplesOf(row)).filter((samples) => samples.length);
    } catch (error) {
      plot.replaceWith(element("p", { class: "note" }, error.message));
      return;
    }
    if (!launches.length) { plot.remove(); return; }
    const middle = this.data.number("time_ms", row);
    let offset = 0;
    const traces = launches.map((samples, i) => {
      const x = samples.map((_, j) => offset + j + 1);
      offset += samples.length;
      return { type: "scatter", mode: "markers", x, y: samples.map((us) => us / 1e3), marker: { size: 6, symbol: i % 2 ? "circle-open" : "circle" }, hoverinfo: "text", hovertext: samples.map((us, j) => `launch ${i + 1}, iteration ${j + 1}: ${digits(us / 1e3, 4)} ms`) };
    });
    const line = (y, dash) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { dash, width: 1.2, color: colour("dim") } });
    const shapes = [[middle, "solid"], [this.data.number("low_ms", row), "dot"], [this.data.number("high_ms", row), "dot"]].filter(([y]) => y !== null).map(([y, dash]) => line(y, dash));
    await Plotly.newPlot(plot, traces, layout({ shapes, xaxis: { title: { text: launches.length > 1 ? `iteration, of ${launches.length} launches` : "iteration" } }, yaxis: { title: { text: "ms, slowest rank" } } }), CONFIG);
  }

  command(row) {
    const { data } = this;
    const words = ["cpbench", "bench"];
    const add = (name, value) => words.push(`--${name}`, /^[\w@%+=:,./[\]-]+$/.test(value) ? value : `'${value.replaceAll("'", `'"'"'`)}'`);
    for (const name of ["operator", "mask", "dtype", "direction"]) add(name, data.text(name, row));
    for (const name of ["seq_len", "batch", "num_heads_q", "num_heads_kv", "head_dim"]) add(name.replaceAll("_", "-"), String(data.number(name, row)));
    for (const name of ["head_dim_v", "queries"]) if (data.number(name, row)) add(name.replaceAll("_", "-"), String(data.number(name, row)));
    if (data.text("inputs", row) !== "normal") add("inputs", data.text("inputs", row));
    if (data.number("seed", row)) add("seed", String(data.number("seed", row)));
    if (data.number("world_size", row) > 1 || data.text("strategy", row) !== "single") {
      for (const name of ["strategy", "layout"]) add(name, data.text(name, row));
      add("world-size", String(data.number("world_size", row)));
      if (data.number("ranks_per_node", row)) add("ranks-per-node", String(data.number("ranks_per_node", row)));
      if (data.text("placement", row)) add("placement", data.text("placement", row));
    }
    return words.join(" ");
  }

  environment(row) {
    const environment = this.data.environments[this.data.text("environment", row)];
    if (!environment) return [];
    const list = element("dl", { class: "facts" });
    for (const [name, value] of Object.entries(environment)) list.append(element("dt", {}, name), element("dd", {}, value));
    return [element("h3", {}, "Environment"), list];
  }
}
