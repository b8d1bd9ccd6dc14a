// Small multiples: each kind of chart returns its panels for the filtered rows.
const GLYPHS = { circle: "●", square: "■", "triangle-up": "▲", diamond: "◆", "triangle-down": "▼", cross: "✚", x: "✖", "triangle-left": "◀", "triangle-right": "▶", pentagon: "⬟", star: "★" };
const HOLLOW_GLYPHS = { circle: "○", square: "□", "triangle-up": "△", diamond: "◇", "triangle-down": "▽", cross: "✛", x: "✕", "triangle-left": "◁", "triangle-right": "▷", pentagon: "⬠", star: "☆" };
const glyphOf = ({ symbol, hollow }) => (hollow ? HOLLOW_GLYPHS[symbol.replace("-open", "")] : GLYPHS[symbol]);

class Charts {
  constructor(data, filters, open) {
    this.data = data;
    this.filters = filters;
    this.open = open;
    this.observer = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) this.draw(entry.target);
    }, { rootMargin: "300px" });
    this.panels = new Map();
    this.legend = element("div", { class: "legend" });
    filters.form.after(this.legend);
  }

  refresh() {
    const names = new Set();
    for (const section of document.querySelectorAll(".chart")) {
      const box = section.querySelector(".multiples");
      for (const plot of box.querySelectorAll(".plot")) { this.observer.unobserve(plot); Plotly.purge(plot); }
      box.replaceChildren();
      const panels = this[section.dataset.kind]();
      section.hidden = panels.length === 0;
      for (const panel of panels) {
        const caption = element("figcaption");
        const picture = this.data.masks[panel.mask];
        if (picture) caption.append(element("img", { class: "mask", src: picture, alt: "" }));
        caption.append(panel.caption);
        const plot = element("div", { class: "plot" });
        box.append(element("figure", {}, caption, plot));
        this.panels.set(plot, panel);
        this.observer.observe(plot);
        for (const row of panel.rows) names.add(this.data.text("method", row));
      }
    }
    this.showLegend(names);
  }

  showLegend(names) {
    const { hidden } = this.filters;
    const isOnly = (name) => [...names].every((other) => other === name || hidden.has(other));
    const press = (name, only) => {
      if (only && isOnly(name)) hidden.clear();
      else if (only) { hidden.clear(); for (const other of names) if (other !== name) hidden.add(other); }
      else if (hidden.has(name)) hidden.delete(name);
      else hidden.add(name);
      this.refresh();
    };
    this.legend.replaceChildren(...[...new Set([...names, ...hidden])].sort().map((name) => {
      const style = this.data.styles[name];
      const glyph = element("span", { "aria-hidden": "true", style: `color:${style.colour}` }, glyphOf(style));
      return element("button", { type: "button", "aria-pressed": String(!hidden.has(name)), onclick: () => press(name, false), ondblclick: () => press(name, true) }, glyph, name);
    }));
  }

  draw(plot) {
    const panel = this.panels.get(plot);
    if (!panel || plot.dataset.drawn) return;
    plot.dataset.drawn = "yes";
    const { traces, axes } = panel.make();
    Plotly.newPlot(plot, traces, layout(axes), CONFIG);
    plot.on("plotly_click", (event) => {
      const rows = event.points[0].customdata;
      if (rows) this.open(rows);
    });
  }

  drawAll() {
    for (const plot of document.querySelectorAll(".chart .plot")) this.draw(plot);
  }

  visible(rows) {
    return rows.filter((row) => !this.filters.hidden.has(this.data.text("method", row)));
  }

  // One panel for each value of a column, if its rows have something to show.
  panelsBy(rows, column, caption, make, hasPoints = (group) => group.length > 0) {
    const panels = [];
    for (const [value, group] of this.data.groups(column, this.visible(rows))) {
      if (hasPoints(group)) panels.push({ rows: group, mask: column === "mask_family" ? value : "", caption: caption(value, group), make: () => make(group) });
    }
    return panels;
  }

  // Points of each method: at each x the median over mask seeds, with an interval.
  series(rows, xOf, y, low = null, high = null) {
    const { data } = this;
    const series = [];
    for (const [name, ownRows] of data.groups("method", rows)) {
      const pairsByX = new Map();
      for (const row of ownRows) {
        const value = typeof y === "function" ? y(row) : data.number(y, row);
        const x = xOf(row);
        if (data.text("status", row) !== "ok" || typeof value !== "number" || x === null) continue;
        if (!pairsByX.has(x)) pairsByX.set(x, []);
        pairsByX.get(x).push([value, row]);
      }
      const points = [...pairsByX].sort(([a], [b]) => a - b).map(([x, pairs]) => {
        const values = pairs.map(([value]) => value);
        const [first] = pairs;
        const single = pairs.length === 1;
        const ends = single ? [low && low(first[1]), high && high(first[1])] : [Math.min(...values), Math.max(...values)];
        return { x, y: median(values), low: ends[0], high: ends[1], rows: pairs.map(([, row]) => row) };
      });
      if (points.length) series.push({ name, points });
    }
    return series;
  }

  lines(series, unit, more = () => "") {
    return series.map(({ name, points }) => {
      const style = this.data.styles[name];
      const ends = points.map((p) => [p.low ?? p.y, p.high ?? p.y]);
      return {
        type: "scatter", mode: "lines+markers", name: escaped(name), x: points.map((p) => p.x), y: points.map((p) => p.y),
        customdata: points.map((p) => p.rows),
        line: { color: style.colour, dash: style.plotly_dash, width: 1.8 }, marker: { color: style.colour, symbol: style.symbol, size: 7 },
        error_y: { type: "data", symmetric: false, thickness: 1, width: 3, array: points.map((p, i) => ends[i][1] - p.y), arrayminus: points.map((p, i) => p.y - ends[i][0]) },
        hoverinfo: "text", hovertext: points.map((p, i) => this.hover(name, p, ends[i], unit) + more(p)),
      };
    });
  }

  hover(name, point, [low, high], unit) {
    const { data } = this;
    const row = point.rows[0];
    const seeds = point.rows.length > 1 ? `<br>median of ${point.rows.length} mask seeds` : "";
    const range = low !== high ? ` (${digits(low)} to ${digits(high)})` : "";
    const flags = [...new Set(point.rows.flatMap((r) => data.text("flags", r).split(" ")))].filter(Boolean).join(", ");
    return `<b>${escaped(name)}</b><br>${tokens(data.number("seq_len", row))} tokens, world size ${data.number("world_size", row)}` +
      `<br>${digits(point.y)} ${unit}${range}${seeds}` + (flags ? `<br>${escaped(flags)}` : "");
  }

  // Crosses where a method failed, at the given height.
  crosses(rows, xOf, height) {
    const { data } = this;
    const failed = rows.filter((row) => !["ok", "unsupported"].includes(data.text("status", row)));
    if (!failed.length) return [];
    return [{
      type: "scatter", mode: "markers", name: "failed", x: failed.map(xOf), y: failed.map(() => height), customdata: failed.map((row) => [row]),
      marker: { symbol: "x-thin", size: 11, line: { width: 2.5, color: failed.map((row) => data.styles[data.text("method", row)].colour) } },
      hoverinfo: "text", cliponaxis: false,
      hovertext: failed.map((row) => `<b>${escaped(data.text("method", row))}</b><br>${escaped(data.text("status", row))}: ${escaped(data.text("reason", row)).slice(0, 300)}`),
    }];
  }

  lengthAxis(rows) {
    const ticks = this.data.distinct("seq_len", rows);
    return { type: "log", title: { text: "tokens" }, tickvals: ticks, ticktext: ticks.map(tokens) };
  }

  rankAxis(rows) {
    const ticks = this.data.distinct("world_size", rows);
    return { type: "log", title: { text: "ranks" }, tickvals: ticks, ticktext: ticks.map(String) };
  }

  // For each mask its rates, and beside them its times.
  throughput() {
    const [rates, times] = [this.byLength(false), this.byLength(true)];
    return rates.flatMap((panel, i) => [panel, times[i]]);
  }

  byLength(asTime) {
    const { data, filters } = this;
    const [ms, low, high] = ["ms", "low_ms", "high_ms"].map((name) => filters.column(name));
    const rate = filters.column("tflops_per_rank");
    const unit = asTime ? "ms" : data.rate.unit;
    const scaled = (row) => (asTime ? data.number(ms, row) : data.number(rate, row) === null ? null : data.number(rate, row) * data.rate.scale);
    // A rate is inverse to its time: the ends of the interval change places.
    const end = (column) => (row) => {
      const value = data.number(column, row);
      if (value === null) return null;
      return asTime ? value : (data.number(rate, row) * data.rate.scale * data.number(ms, row)) / value;
    };
    const x = (row) => data.number("seq_len", row);
    return this.panelsBy(filters.rows({ world_size: true }), "mask_family", (mask) => `${mask}, world size ${filters.state.world_size}${asTime ? ": time" : ""}`, (rows) => {
      const series = this.series(rows, x, scaled, end(asTime ? low : high), end(asTime ? high : low));
      const lowest = Math.min(...series.flatMap(({ points }) => points.map((p) => p.low ?? p.y)));
      const yaxis = asTime ? { type: "log", title: { text: "ms" }, dtick: "D2" } : { title: { text: `${unit} per rank` }, rangemode: "tozero" };
      return { traces: [...this.lines(series, unit), ...this.crosses(rows, x, asTime ? lowest : 0)], axes: { xaxis: this.lengthAxis(rows), yaxis } };
    }, (rows) => rows.some((row) => data.number(ms, row) !== null));
  }

  memory() {
    const { data, filters } = this;
    const x = (row) => data.number("seq_len", row);
    return this.panelsBy(filters.rows({ world_size: true }), "mask_family", (mask) => `${mask}, world size ${filters.state.world_size}`, (rows) => {
      const series = this.series(rows, x, "peak_mb");
      const largest = Math.max(...series.flatMap(({ points }) => points.map((p) => p.y)), 1e-9);
      const limits = rows.map((row) => data.number("limit_mb", row)).filter((value) => value !== null);
      const limit = limits.length ? Math.min(...limits) : null;
      const oom = this.crosses(rows.filter((row) => data.text("status", row) === "oom"), x, limit ?? largest);
      const axes = { xaxis: this.lengthAxis(rows), yaxis: { type: "log", title: { text: "peak MB, max per rank" } }, shapes: [], annotations: [] };
      if (limit !== null) {
        axes.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: limit, y1: limit, line: { dash: "dash", width: 1.2, color: colour("bad") } });
        axes.annotations.push({ xref: "paper", x: 0, xanchor: "left", y: Math.log10(limit), yanchor: "bottom", showarrow: false, text: `device limit ${digits(limit / 1e3)} GB`, font: { size: 11, color: colour("bad") } });
        const ys = series.flatMap(({ points }) => points.map((p) => p.y));
        axes.yaxis.range = [Math.floor(Math.log10(Math.min(...ys, limit))), Math.log10(Math.max(limit, largest)) + 0.35];
        if (axes.yaxis.range[1] - axes.yaxis.range[0] > 2) axes.yaxis.dtick = 1;
      }
      return { traces: [...this.lines(series, "MB"), ...oom], axes };
    }, (rows) => rows.some((row) => data.number("peak_mb", row) !== null || data.text("status", row) === "oom"));
  }

  // Efficiency of a row: rate per rank over that of one rank with the same operator, or of the method on the fewest ranks.
  efficiencies(rows, sizeOf) {
    const { data, filters } = this;
    const ms = filters.column("ms"), rate = filters.column("tflops_per_rank");
    const singleRank = new Map();
    const keyOf = (row) => `${data.text("mask", row)}|${sizeOf(row)}`;
    for (const row of rows) {
      if (data.number("world_size", row) === 1 && data.number(rate, row) && !data.text("disqualified", row)) singleRank.set(`${keyOf(row)}|${data.text("operator", row)}`, row);
    }
    const fewestRanks = new Map();
    for (const row of rows) {
      if (!data.number(rate, row)) continue;
      const key = `${keyOf(row)}|${data.text("method", row)}`;
      const fewest = fewestRanks.get(key);
      if (fewest === undefined || data.number("world_size", row) < data.number("world_size", fewest)) fewestRanks.set(key, row);
    }
    return (row) => {
      if (!data.number(rate, row) || !data.number(ms, row)) return null;
      const single = singleRank.get(`${keyOf(row)}|${data.text("operator", row)}`);
      const base = single ?? fewestRanks.get(`${keyOf(row)}|${data.text("method", row)}`);
      return { share: data.number(rate, row) / data.number(rate, base), ranks: data.number("world_size", base) };
    };
  }

  scaling(rows, caption, sizeOf, column) {
    const { data } = this;
    const x = (row) => data.number("world_size", row);
    const hasScaling = (group) => new Set(group.filter((row) => data.text("status", row) === "ok").map(x)).size > 1;
    return this.panelsBy(rows, column, caption, (group) => {
      const efficiencyOf = this.efficiencies(group, sizeOf);
      const series = this.series(group, x, (row) => { const e = efficiencyOf(row); return e && e.share * 100; });
      const more = (point) => `<br>relative to ${efficiencyOf(point.rows[0]).ranks} rank${efficiencyOf(point.rows[0]).ranks > 1 ? "s" : ""}, ${digits(data.number(this.filters.column("ms"), point.rows[0]))} ms`;
      const axes = { xaxis: this.rankAxis(group), yaxis: { title: { text: "efficiency, %" }, rangemode: "tozero" }, shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 100, y1: 100, line: { dash: "dot", width: 1, color: colour("dim") } }] };
      return { traces: this.lines(series, "%", more), axes };
    }, hasScaling);
  }

  strong() {
    const { data, filters } = this;
    const rows = filters.rows({ seq_len: true });
    return this.scaling(rows, (mask) => `${mask}, ${tokens(filters.state.seq_len)} tokens`, (row) => data.number("seq_len", row), "mask_family");
  }

  weak() {
    const { data, filters } = this;
    const share = (row) => data.number("seq_len", row) / data.number("world_size", row);
    const rows = filters.rows();
    const sizes = new Map();
    for (const row of rows) {
      if (!sizes.has(share(row))) sizes.set(share(row), []);
      sizes.get(share(row)).push(row);
    }
    return [...sizes].sort(([a], [b]) => a - b).flatMap(([size, group]) =>
      this.scaling(group, (mask) => `${mask}, ${tokens(size)} tokens per rank`, () => size, "mask_family"));
  }

  bars(rows, parts, unit, from = 0) {
    const { data } = this;
    const names = data.distinct("method", rows);
    return parts.map(({ column, name, pattern, shade }) => {
      const values = names.map((method) => {
        const ownRows = rows.filter((row) => data.text("method", row) === method);
        const known = ownRows.map((row) => data.number(column, row)).filter((value) => value !== null);
        return { y: known.length ? median(known) : null, rows: ownRows };
      });
      return {
        type: "bar", orientation: "h", name, y: names.map(escaped), x: values.map((value) => value.y), customdata: values.map((value) => value.rows),
        marker: { color: names.map((method) => data.styles[method].colour), opacity: shade, pattern: { shape: pattern } },
        hoverinfo: "text", textposition: "none", text: values.map((value, i) => `<b>${escaped(names[i])}</b><br>${name}: ${digits(value.y)} ${unit}`),
      };
    });
  }

  communication() {
    const { data, filters } = this;
    return this.panelsBy(filters.rows({ seq_len: true, world_size: true }), "mask_family", (mask) => `${mask}, ${tokens(filters.state.seq_len)} tokens, world size ${filters.state.world_size}: plain inside a node, hatched across`, (rows) => {
      const sent = rows.filter((row) => data.number("sent_mb", row) !== null);
      const traces = this.bars(sent, [{ column: "inside_mb", name: "inside a node", pattern: "", shade: 1 }, { column: "across_mb", name: "across nodes", pattern: "/", shade: 1 }], "MB");
      return { traces, axes: { barmode: "stack", margin: { l: 150, r: 12, t: 8, b: 44 }, xaxis: { title: { text: "MB sent, max per rank" } }, yaxis: { automargin: true, type: "category" } } };
    }, (rows) => rows.some((row) => data.number("sent_mb", row) > 0));
  }

  exposure() {
    const { data, filters } = this;
    return this.panelsBy(filters.rows({ seq_len: true, world_size: true }), "mask_family", (mask) => `${mask}, ${tokens(filters.state.seq_len)} tokens, world size ${filters.state.world_size}: plain without communication, hatched exposed communication`, (rows) => {
      const known = rows.filter((row) => data.number("compute_ms", row) !== null);
      const traces = this.bars(known, [{ column: "compute_ms", name: "without communication", pattern: "", shade: 1 }, { column: "exposed_ms", name: "exposed communication", pattern: "/", shade: 1 }], "ms");
      return { traces, axes: { barmode: "stack", margin: { l: 150, r: 12, t: 8, b: 44 }, xaxis: { title: { text: "ms of the slowest rank" } }, yaxis: { automargin: true, type: "category" } } };
    }, (rows) => rows.some((row) => data.number("compute_ms", row) !== null));
  }

  imbalance() {
    const { data, filters } = this;
    return this.panelsBy(filters.rows({ seq_len: true, world_size: true }), "mask_family", (mask) => `${mask}, ${tokens(filters.state.seq_len)} tokens, world size ${filters.state.world_size}`, (rows) => {
      const known = rows.filter((row) => data.number("imbalance", row) !== null);
      const largest = Math.max(...known.map((row) => data.number("imbalance", row)), 1.1);
      return { traces: this.bars(known, [{ column: "imbalance", name: "load imbalance", pattern: "", shade: 1 }], ""), axes: { margin: { l: 150, r: 12, t: 8, b: 44 }, xaxis: { title: { text: "load imbalance, max/mean work per rank" }, range: [0, largest * 1.05] }, yaxis: { automargin: true, type: "category" }, shapes: [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: 1, x1: 1, line: { dash: "dot", width: 1.5, color: colour("dim") } }] } };
    }, (rows) => filters.state.world_size > 1 && rows.some((row) => data.number("imbalance", row) !== null));
  }

  pareto() {
    const { data, filters } = this;
    const ms = filters.column("ms");
    return this.tradeOff((row) => data.number(ms, row), (row) => data.number("peak_mb", row), "MB", [""], false, { title: { text: "ms" }, rangemode: "tozero" }, { title: { text: "peak MB, max per rank" }, rangemode: "tozero" });
  }

  quality() {
    const { data, filters } = this;
    if (filters.phase || !filters.rows({}).some((row) => data.number("recovered", row) !== null)) return [];
    const approximate = (row) => data.text("flags", row).split(" ").includes("approximate");
    const ok = (row) => data.text("status", row) === "ok";
    const recall = (row) => (!ok(row) ? null : !approximate(row) ? 100 : data.number("recovered", row) === null ? null : data.number("recovered", row) * 100);
    return this.tradeOff((row) => data.number("time_ms", row), recall, "% recall", ["", "approximate"], true, { type: "log", title: { text: "ms" } }, { title: { text: "attention recall, %" }, range: [0, 106] });
  }

  // One panel for each mask: methods by two quantities, and the Pareto front of those whose disqualification is one of
  // the eligible ("" for none); larger says whether larger y is better.
  tradeOff(xOf, yOf, unit, eligible, larger, xaxis, yaxis) {
    const { data, filters } = this;
    const known = (row) => xOf(row) !== null && yOf(row) !== null;
    return this.panelsBy(filters.rows({ seq_len: true, world_size: true }), "mask_family", (mask) => `${mask}, ${tokens(filters.state.seq_len)} tokens, world size ${filters.state.world_size}`, (rows) => {
      const points = [...data.groups("method", rows)].map(([name, ownRows]) => {
        const both = ownRows.filter(known);
        return { name, rows: both, x: median(both.map(xOf)), y: median(both.map(yOf)) };
      }).filter((point) => point.rows.length);
      const front = [];
      const sign = larger ? -1 : 1;
      const contenders = points.filter((point) => point.rows.every((row) => eligible.includes(data.text("disqualified", row))));
      for (const point of contenders.sort((a, b) => a.x - b.x || sign * (a.y - b.y))) {
        if (!front.length || sign * point.y < sign * front.at(-1).y) front.push(point);
      }
      const line = { type: "scatter", mode: "lines", x: front.map((p) => p.x), y: front.map((p) => p.y), line: { shape: "hv", width: 1.2, dash: "dot", color: colour("dim") }, hoverinfo: "skip" };
      const dots = points.map((point) => ({
        type: "scatter", mode: "markers", x: [point.x], y: [point.y], customdata: [point.rows], marker: { size: 11, color: data.styles[point.name].colour, symbol: data.styles[point.name].symbol },
        hoverinfo: "text", hovertext: [`<b>${escaped(point.name)}</b><br>${digits(point.x)} ms, ${digits(point.y)} ${unit}${front.includes(point) ? "<br>on the Pareto front" : ""}`],
      }));
      return { traces: [line, ...dots], axes: { xaxis, yaxis } };
    }, (rows) => new Set(rows.filter(known).map((row) => data.text("method", row))).size > 1);
  }

  roofline() {
    const { data, filters } = this;
    if (filters.phase) return [];
    const rows = this.visible(filters.rows({ world_size: true })).filter((row) => data.number("intensity", row) !== null && data.number("tflops_per_rank", row) !== null && data.number("gemm_tflops", row) !== null);
    if (!rows.length) return [];
    const make = () => {
      const { unit, scale } = data.rate;
      const peak = median(rows.map((row) => data.number("gemm_tflops", row))) * scale;
      const bandwidth = median(rows.map((row) => data.number("copy_gb_s", row)));
      const xs = rows.map((row) => data.number("intensity", row));
      const slope = (bandwidth / 1e3) * scale;
      const ridge = peak / slope;
      const [left, right] = [Math.min(...xs, ridge) / 2, Math.max(...xs, ridge) * 2];
      const roof = { type: "scatter", mode: "lines", x: [left, ridge, right], y: [left * slope, peak, peak], line: { color: colour("dim"), width: 1.5 }, hoverinfo: "text", hovertext: ["", `matrix product ${digits(peak)} ${unit}, copy ${digits(bandwidth)} GB/s`, ""] };
      const dots = [...data.groups("method", rows)].map(([name, ownRows]) => ({
        type: "scatter", mode: "markers", x: ownRows.map((row) => data.number("intensity", row)), y: ownRows.map((row) => data.number("tflops_per_rank", row) * scale), customdata: ownRows.map((row) => [row]),
        marker: { color: data.styles[name].colour, symbol: data.styles[name].symbol, size: 7 }, hoverinfo: "text",
        hovertext: ownRows.map((row) => `<b>${escaped(name)}</b><br>${escaped(data.text("mask", row))}, ${tokens(data.number("seq_len", row))} tokens<br>${digits(data.number("tflops_per_rank", row) * scale)} ${unit}, ${digits((data.number("tflops_per_rank", row) / data.number("gemm_tflops", row)) * 100)} % of the matrix product`),
      }));
      return { traces: [roof, ...dots], axes: { xaxis: { type: "log", title: { text: "FLOPs per byte of inputs and results" } }, yaxis: { type: "log", title: { text: `${unit} per rank` } } } };
    };
    return [{ rows, mask: "", caption: `all masks and lengths, world size ${filters.state.world_size}; measured peaks`, make }];
  }
}
