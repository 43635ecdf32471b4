"use strict";
/* Histograms of the images in view; dragging across a range adds a filter. */
(function (Report) {
  const { view, format, rows: { make } } = Report;
  const place = document.getElementById("charts");
  const BINS = 30;
  const charts = [];

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /* The columns of one chart: a number of the run, and that of the other run. */
  function partner(column) {
    const pair = Report.pairs.find((one) => one.first === column);
    if (pair) return pair.second;
    return column.key === "words:0" ? Report.column("words:1") : undefined;
  }

  function offered() {
    const second = new Set(Report.numbers.map(partner).filter(Boolean));
    return Report.numbers.filter((column) => !second.has(column));
  }

  function defaults() {
    const [first, another] = Report.ours;
    const third = Report.latency || Report.pairs[0]?.gain || another || Report.column("share");
    return [...new Set([first, Report.column("words:0"), third])].filter(Boolean);
  }

  function known(column) {
    const found = [];
    for (const i of view.shown) {
      const value = column.values[i];
      if (value !== null) found.push(value);
    }
    return Float64Array.from(found).sort();
  }

  /* Bins over all images, so that they do not move when the view changes. */
  function edges(columns) {
    let low = Infinity, high = -Infinity;
    for (const column of columns) {
      for (const value of column.values) {
        if (value === null) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    if (low > high) return null;
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    let width = (high - low) / BINS;
    if (columns.every((column) => column.whole)) {
      width = Math.max(1, Math.ceil(width));
      low -= 0.5;
    }
    const bins = Math.max(1, Math.ceil((high - low) / width + 1e-9));
    return { low, width, bins };
  }

  function counted(values, { low, width, bins }) {
    const counts = new Array(bins).fill(0);
    for (const value of values) counts[Math.min(bins - 1, Math.max(0, Math.floor((value - low) / width)))]++;
    return counts;
  }

  const quantile = (values, share) => values[Math.min(values.length - 1, Math.floor(share * values.length))];

  function summary(column, values) {
    if (!values.length) return "no values in view";
    const q = (share) => format(column, quantile(values, share));
    return `median ${q(0.5)}, 5 % below ${q(0.05)}, 5 % above ${q(0.95)}`;
  }

  function line(colour, fill, label) {
    return { label, stroke: css(colour), fill: fill ? css(fill) : undefined, width: fill ? 1 : 2, points: { show: false }, paths: uPlot.paths.stepped({ align: 1 }) };
  }

  const axes = () => ({ stroke: css("--quiet"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" });

  function options(chart, columns, bins) {
    const axis = axes();
    const digits = (value) => (Math.abs(value) >= 100 || Number.isInteger(value) ? String(value) : String(+value.toPrecision(4)));
    return {
      width: chart.canvas.clientWidth, height: 150, legend: { show: false }, padding: [8, 20, 0, 0], // room for half of the last label
      cursor: { y: false, drag: { x: true, y: false, setScale: false }, points: { show: false } },
      scales: { x: { time: false, range: [bins.low, bins.low + bins.bins * bins.width] }, y: { range: (_, __, most) => [0, Math.max(1, most * 1.05)] } },
      axes: [{ ...axis, grid: { show: false }, values: (_, ticks) => ticks.map(digits), size: 28 }, { ...axis, size: 46, values: (_, ticks) => ticks.map((t) => (Number.isInteger(t) ? t : "")) }],
      series: [{}, ...columns.map((_, k) => (k ? line("--run-1", null, "B") : line("--run-0", "--run-0-fill", "A")))],
      hooks: {
        setSelect: [(plot) => {
          if (plot.select.width < 3) return;
          const [low, high] = [plot.select.left, plot.select.left + plot.select.width].map((x) => plot.posToVal(x, "x"));
          plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          const unit = 10 ** Math.floor(Math.log10((bins.bins * bins.width) / 1000)); // rounded outwards, to include all of the dragged range
          chart.choose(columns[0].key, +(Math.floor(low / unit) * unit).toPrecision(12), +(Math.ceil(high / unit) * unit).toPrecision(12));
        }],
      },
    };
  }

  function draw(chart) {
    const column = Report.column(chart.select.value);
    const columns = [column, partner(column)].filter(Boolean);
    const bins = edges(columns);
    chart.plot?.destroy();
    chart.plot = null;
    if (!bins) {
      chart.note.textContent = "no values";
      return;
    }
    const values = columns.map(known);
    const starts = Array.from({ length: bins.bins + 1 }, (_, k) => bins.low + k * bins.width);
    const heights = values.map((one) => [...counted(one, bins), 0]);
    chart.plot = new uPlot(options(chart, columns, bins), [starts, ...heights], chart.canvas);
    chart.note.replaceChildren();
    columns.forEach((one, k) => {
      const line = make("p", "", chart.note);
      if (columns.length > 1) make("span", `run run-${k}`, line).textContent = k ? "B" : "A";
      line.append(summary(one, values[k]));
    });
    chart.canvas.setAttribute("aria-label", `Histogram of ${columns.map((one) => one.label).join(" and ")} over ${view.shown.length} images: ${columns.map((one, k) => summary(one, values[k])).join("; ")}`);
  }

  /* The mean score of the surest captions by their share, with the band of its 95 % interval, over all images. */
  function drawCurve(chart) {
    const curve = Report.data.curves[chart.select.value], axis = axes(), none = { show: false };
    chart.plot?.destroy();
    const band = { stroke: css("--run-0"), width: 0.5, points: none };
    chart.plot = new uPlot({
      width: chart.canvas.clientWidth, height: 150, legend: none, padding: [8, 20, 0, 0], cursor: none,
      scales: { x: { time: false, range: [0, 100] } },
      axes: [{ ...axis, values: (_, ticks) => ticks.map((t) => `${t} %`), size: 28 }, { ...axis, size: 46 }],
      series: [{}, { stroke: css("--run-0"), width: 2, points: none }, band, band],
      bands: [{ series: [3, 2], fill: css("--run-0-fill") }],
    }, [curve.shares.map((share) => Math.round(100 * share)), curve.values, curve.low, curve.high], chart.canvas);
    const at = (share) => {
      const k = curve.shares.indexOf(share), text = (value) => format({ kind: "number" }, value);
      return `${text(curve.values[k])} (95 % ${text(curve.low[k])} to ${text(curve.high[k])})`;
    };
    chart.note.textContent = `surest 50 %: ${at(0.5)}; surest 80 %: ${at(0.8)}; all: ${at(1)}`;
    chart.canvas.setAttribute("aria-label", `Mean ${curve.name} of the surest captions by their share of all images: ${chart.note.textContent}`);
  }

  function add(title, choices, first, drawIt, more) {
    const figure = document.createElement("figure");
    figure.className = "card chart";
    const label = document.createElement("label");
    label.append(title);
    const select = document.createElement("select");
    for (const [text, value] of choices) select.add(new Option(text, value));
    select.value = first;
    label.append(select);
    const canvas = document.createElement("div");
    canvas.className = "canvas";
    canvas.setAttribute("role", "img");
    const note = document.createElement("figcaption");
    figure.append(label, canvas, note);
    place.append(figure);
    const chart = { select, canvas, note, plot: null, draw: () => drawIt(chart), ...more };
    select.addEventListener("change", chart.draw);
    charts.push(chart);
    return chart;
  }

  function build(choose) {
    const choices = offered().map((column) => [partner(column) ? column.name : column.label, column.key]);
    for (const first of defaults()) {
      const { canvas } = add("Distribution of ", choices, first.key, draw, { choose });
      canvas.title = "Drag across a range to show only its images";
    }
    if (Report.data.curves.length) add("Surest captions: ", Report.data.curves.map((curve, k) => [curve.name, k]), 0, drawCurve);
    new ResizeObserver(() => charts.forEach((chart) => chart.plot?.setSize({ width: chart.canvas.clientWidth, height: 150 }))).observe(place);
  }

  Report.charts = { build, draw: () => charts.forEach((chart) => chart.draw()) };
})(window.Report);
