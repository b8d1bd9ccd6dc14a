// The tidy table by column; rows are referred to by number.
class Data {
  constructor(raw) {
    this.rows = raw.rows;
    this.texts = raw.texts;
    this.numbers = raw.numbers;
    this.styles = raw.styles;
    this.masks = raw.masks;
    this.environments = raw.environments;
    // Rates are in TFLOP/s, and shown in GFLOP/s where all are below 1.
    const largest = Math.max(0, ...["tflops_per_rank", "gemm_tflops"].map((c) => this.numbers[c].reduce((a, b) => Math.max(a, b ?? 0), 0)));
    this.rate = largest >= 1 ? { unit: "TFLOP/s", scale: 1 } : { unit: "GFLOP/s", scale: 1e3 };
  }

  text(column, row) {
    const { values, codes } = this.texts[column];
    return codes[row] < 0 ? "" : values[codes[row]];
  }

  number(column, row) {
    return this.numbers[column][row];
  }

  // A cell of either kind; "" for nothing.
  cell(column, row) {
    return column in this.texts ? this.text(column, row) : this.number(column, row) ?? "";
  }

  // The distinct values of a column over the given rows, in order.
  distinct(column, rows) {
    const values = new Set();
    for (const row of rows) values.add(this.cell(column, row));
    const order = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
    return [...values].sort(order);
  }

  groups(column, rows) {
    const groups = new Map();
    for (const row of rows) {
      const key = this.cell(column, row);
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(row);
    }
    return new Map([...groups].sort(([a], [b]) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b)))));
  }
}

// State of the filters.  A pass is a direction, or one phase of cases that time both.
class Filters {
  constructor(data, changed) {
    this.data = data;
    this.changed = changed;
    this.all = Array.from({ length: data.rows }, (_, row) => row);
    this.state = {};
    this.hidden = new Set();
    this.form = document.getElementById("filters");
    this.build();
  }

  build() {
    const { data } = this;
    const passes = [];
    for (const direction of data.distinct("direction", this.all)) {
      passes.push([direction, { fwd: "forward", bwd: "backward", fwd_bwd: "forward + backward" }[direction] ?? direction]);
      if (direction === "fwd_bwd") passes.push(["fwd_bwd/fwd", "forward phase"], ["fwd_bwd/bwd", "backward phase"]);
    }
    this.add("mask_family", "mask", [["", "all"], ...data.distinct("mask_family", this.all).map((v) => [v, v])], "");
    this.add("pass", "pass", passes, this.mostFrequent("direction"));
    for (const [column, name] of [["dtype", "dtype"], ["shape", "problem"], ["machine", "machine"], ["clock", "clock"]]) {
      const values = data.distinct(column, this.all);
      if (values.length > 1) this.add(column, name, values.map((v) => [v, v || "unknown"]), this.mostFrequent(column));
    }
    for (const [column, name, show] of [["seq_len", "tokens", tokens], ["world_size", "ranks", String]]) {
      const timed = this.all.filter((row) => data.text("status", row) === "ok");
      const values = data.distinct(column, timed.length ? timed : this.all);
      if (values.length) this.add(column, name, values.map((v) => [v, show(v)]), column === "seq_len" ? values.at(-1) : values[0]);
    }
  }

  mostFrequent(column) {
    const sizes = [...this.data.groups(column, this.all)].map(([key, rows]) => [rows.length, key]);
    return sizes.sort(([a], [b]) => b - a)[0]?.[1] ?? "";
  }

  add(key, name, options, selected) {
    this.state[key] = selected;
    const select = element("select", { name: key });
    options.forEach(([value, text], i) => {
      const option = element("option", { value: i }, text);
      option.selected = value === selected;
      select.append(option);
    });
    select.addEventListener("change", () => {
      this.state[key] = options[Number(select.value)][0];
      this.changed();
    });
    const label = element("label", {}, name, select);
    if (options.length === 1) label.hidden = true;
    this.form.append(label);
  }

  get direction() { return this.state.pass.split("/")[0]; }
  get phase() { return this.state.pass.split("/")[1] ?? ""; }

  // Columns of time and rate for the pass.
  column(name) { return this.phase ? `${this.phase}_${name}` : { ms: "time_ms" }[name] ?? name; }

  // Rows that match all filters; those of tokens and ranks only on request.
  rows({ seq_len = false, world_size = false } = {}) {
    const filtered = ["mask_family", "dtype", "shape", "machine", "clock"].filter((key) => this.state[key] && this.data.texts[key]);
    const { data, state } = this;
    return this.all.filter((row) =>
      data.text("direction", row) === this.direction &&
      filtered.every((key) => data.text(key, row) === state[key] || (key === "clock" && !data.text(key, row)) || (key === "machine" && data.text("status", row) !== "ok" && data.text(key, row) === "unknown")) &&
      (!seq_len || data.number("seq_len", row) === state.seq_len) &&
      (!world_size || data.number("world_size", row) === state.world_size));
  }
}
