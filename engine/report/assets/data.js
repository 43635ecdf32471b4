"use strict";
/* The data of the page as columns: every value that the page can sort by, filter by or draw. */
window.Report = {};
(function (Report) {
  const data = JSON.parse(document.getElementById("data").textContent);
  const count = data.ids.length;
  const many = data.labels.length > 1;
  const columns = [];
  const byKey = new Map();

  /* Values are computed on first access, so that the page appears before anything is counted. */
  function add(key, label, kind, group, make, more) {
    let values = null;
    const column = { key, label, kind, group, ...more };
    Object.defineProperty(column, "values", { get: () => (values ??= make()) });
    columns.push(column);
    byKey.set(key, column);
    return column;
  }

  const each = (make) => () => Array.from({ length: count }, (_, i) => make(i));
  const said = (run) => (many ? ` (${data.labels[run]})` : "");

  function words(text) {
    const trimmed = text.trim();
    return trimmed ? trimmed.split(/\s+/).length : 0;
  }

  function state(i) {
    if (data.unreadable[i] !== undefined) return "cannot be read";
    return data.pictures[i] === null ? "missing" : "there";
  }

  add("order", "Order of the run", "number", "plain", each((i) => i + 1), { hidden: true });
  add("id", "ID", "text", "plain", () => data.ids);
  data.captions.forEach((captions, run) => {
    add(`caption:${run}`, `Caption${said(run)}`, "text", "plain", () => captions, { run });
  });
  if (data.references) {
    add("reference", "Reference", "text", "plain", each((i) => data.references[i].join(" / ") || null));
  }

  const scores = data.scores.map((score) =>
    add(`score:${score.run}:${score.name}:${score.how}`, `${score.name}${said(score.run)}`, "number", "score", () => score.values, {
      name: score.name, how: score.how, run: score.run, total: score,
    }));
  const ours = scores.filter((column) => column.run === 0);
  const pairs = [];
  for (const first of ours) {
    const second = scores.find((c) => c.run === 1 && c.name === first.name && c.how === first.how);
    if (!second) continue;
    const gain = add(`gain:${first.name}:${first.how}`, `Gain in ${first.name}`, "number", "gain", each((i) => {
      const a = first.values[i], b = second.values[i];
      return a === null || b === null ? null : a - b;
    }), { name: first.name, signed: true });
    const outcome = add(`outcome:${first.name}:${first.how}`, `Better by ${first.name}`, "text", "outcome", each((i) => {
      const value = gain.values[i];
      return value === null ? null : value > 0 ? data.labels[0] : value < 0 ? data.labels[1] : "equal";
    }), { name: first.name });
    pairs.push({ first, second, gain, outcome, total: data.comparisons.find((c) => c.name === first.name && c.how === first.how) });
  }

  data.captions.forEach((captions, run) => {
    add(`words:${run}`, `Words${said(run)}`, "number", "length", each((i) => (captions[i] === null ? null : words(captions[i]))), { run, whole: true, name: "words" });
  });
  if (data.candidates) {
    add("share", "Probability of the first candidate", "number", "candidates", each((i) => {
      const several = data.candidates[i];
      return several.length ? several[0][1] : null;
    }));
  }
  data.columns.forEach((column, k) => {
    const key = many && column.name === "change" && column.source === "both runs" ? "change" : `column:${k}`;
    add(key, `${column.name} (${column.source})`, column.is_number ? "number" : "text", "table", () => column.values, { short: column.name });
  });
  if (many) {
    add("differs", "Captions of the runs", "text", "plain", each((i) => {
      const [a, b] = [data.captions[0][i], data.captions[1][i]];
      return a === null || b === null ? null : a === b ? "the same" : "differ";
    }));
  }
  add("image", "Image", "text", "plain", each(state));

  function format(column, value) {
    if (value === null || value === undefined) return "–";
    if (column.kind !== "number") return value;
    const exact = Number.isInteger(value) || Math.abs(value) >= 1e4; // dates and patient numbers are not rounded
    const text = column.group === "table" ? String(exact ? value : +value.toPrecision(5)) : value.toFixed(column.whole ? 0 : Math.abs(value) >= 100 ? 1 : 3);
    const number = /^-0(\.0*)?$/.test(text) ? text.slice(1) : text.replace("-", "−");
    return (column.signed && value > 0 ? "+" : "") + number;
  }

  const isLatency = (column) => /latenc|second|elapsed|time_s|_ms$|_s$/i.test(column.short || "");

  /* The lowest expected scores come first, unknown ones last. */
  const expected = columns.find((column) => column.group === "table" && column.short === "expected_score");

  Object.assign(Report, {
    change: columns.find((column) => column.group === "table" && column.key === "change"),
    firstOrder: expected?.key ?? "order",
    data, count, many, columns, pairs, format, scores, ours,
    column: (key) => byKey.get(key),
    numbers: columns.filter((column) => column.kind === "number" && !column.hidden),
    latency: columns.find((column) => column.kind === "number" && column.group === "table" && isLatency(column)),
  });
})(window.Report);
