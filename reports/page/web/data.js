// The tidy table, by column; a row is its number.
class Data {
  constructor(raw) {
    this.rows = raw.rows;
    this.texts = raw.texts;
    this.numbers = raw.numbers;
    this.looks = raw.looks;
    this.masks = raw.masks;
    this.environments = raw.environments;
    // Rates are in TFLOP/s, and shown in GFLOP/s where all are below 1.
    const most = Math.max(0, ...["tflops_per_rank", "gemm_tflops"].map((c) => this.numbers[c].reduce((a, b) => Math.max(a, b ?? 0), 0)));
    this.rate = most >= 1 ? { unit: "TFLOP/s", scale: 1 } : { unit: "GFLOP/s", scale: 1e3 };
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

  // The different values of a column over some rows, in order.
  different(column, rows) {
    const found = new Set();
    for (const row of rows) found.add(this.cell(column, row));
    const order = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
    return [...found].sort(order);
  }

  groups(column, rows) {
    const found = new Map();
    for (const row of rows) {
      const key = this.cell(column, row);
      if (!found.has(key)) found.set(key, []);
      found.get(key).push(row);
    }
    return new Map([...found].sort(([a], [b]) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b)))));
  }
}

// What the filters ask for.  A pass is a direction, or one phase of cases that time both.
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
    for (const direction of data.different("direction", this.all)) {
      passes.push([direction, { fwd: "forward", bwd: "backward", fwd_bwd: "forward + backward" }[direction] ?? direction]);
      if (direction === "fwd_bwd") passes.push(["fwd_bwd/fwd", "its forward part"], ["fwd_bwd/bwd", "its backward part"]);
    }
    this.add("mask_family", "mask", [["", "all"], ...data.different("mask_family", this.all).map((v) => [v, v])], "");
    this.add("pass", "pass", passes, this.frequent("direction"));
    for (const [column, name] of [["dtype", "dtype"], ["shape", "problem"], ["machine", "machine"], ["clock", "clock"]]) {
      const values = data.different(column, this.all);
      if (values.length > 1) this.add(column, name, values.map((v) => [v, v || "unknown"]), this.frequent(column));
    }
    for (const [column, name, show] of [["seq_len", "tokens", tokens], ["world_size", "ranks", String]]) {
      const timed = this.all.filter((row) => data.text("status", row) === "ok");
      const values = data.different(column, timed.length ? timed : this.all);
      if (values.length) this.add(column, name, values.map((v) => [v, show(v)]), column === "seq_len" ? values.at(-1) : values[0]);
    }
    this.add("what", "throughput as", [["rate", `${data.rate.unit} of a rank`], ["time", "time"]], "rate");
  }

  frequent(column) {
    const sizes = [...this.data.groups(column, this.all)].map(([key, rows]) => [rows.length, key]);
    return sizes.sort(([a], [b]) => b - a)[0]?.[1] ?? "";
  }

  add(key, name, options, chosen) {
    this.state[key] = chosen;
    const select = element("select", { name: key });
    options.forEach(([value, text], i) => {
      const option = element("option", { value: i }, text);
      option.selected = value === chosen;
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

  // Rows that meet every filter; tokens and ranks only where asked for.
  rows({ seq_len = false, world_size = false } = {}) {
    const wanted = ["mask_family", "dtype", "shape", "machine", "clock"].filter((key) => this.state[key] && this.data.texts[key]);
    const { data, state } = this;
    return this.all.filter((row) =>
      data.text("direction", row) === this.direction &&
      wanted.every((key) => data.text(key, row) === state[key] || (key === "clock" && !data.text(key, row)) || (key === "machine" && data.text("status", row) !== "ok" && data.text(key, row) === "unknown")) &&
      (!seq_len || data.number("seq_len", row) === state.seq_len) &&
      (!world_size || data.number("world_size", row) === state.world_size));
  }
}
