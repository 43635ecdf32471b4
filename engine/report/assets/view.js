"use strict";
/* Which images are shown, in which order: search, filters and sorting, kept in the address so that a view can be shared. */
(function (Report) {
  const { data, count } = Report;
  const view = { query: "", sort: Report.firstOrder, descending: false, filters: [], shown: new Int32Array(0), selected: -1 };
  const collator = new Intl.Collator(undefined, { numeric: true });
  let haystack = null;

  const TESTS = {
    text: { has: "contains", hasNot: "does not contain", is: "is", empty: "is empty" },
    number: { between: "is between", empty: "is unknown" },
  };

  function texts() {
    haystack ??= Array.from({ length: count }, (_, i) => [
      data.ids[i], ...data.captions.map((captions) => captions[i] ?? ""), ...(data.references ? data.references[i] : []),
    ].join("\n").toLowerCase());
    return haystack;
  }

  function passes(filter, values, i) {
    const value = values[i];
    if (filter.test === "empty") return value === null || value === "";
    if (filter.test === "between") return value !== null && value >= filter.low && value <= filter.high;
    const text = (value ?? "").toLowerCase();
    if (filter.test === "is") return (value ?? "") === filter.text;
    return text.includes(filter.text.toLowerCase()) === (filter.test === "has");
  }

  function order(column, descending) {
    const { values } = column, sign = descending ? -1 : 1;
    const unknown = (value) => value === null || value === "";
    return (i, j) => {
      const a = values[i], b = values[j];
      if (unknown(a) || unknown(b)) return unknown(a) - unknown(b) || i - j; // unknown values come last in both orders
      return sign * (column.kind === "number" ? a - b : collator.compare(a, b)) || i - j;
    };
  }

  function compute() {
    const wanted = view.query.toLowerCase().split(/\s+/).filter(Boolean);
    const tests = view.filters.map((filter) => [filter, Report.column(filter.key).values]);
    const found = [];
    for (let i = 0; i < count; i++) {
      if (wanted.length && !wanted.every((word) => texts()[i].includes(word))) continue;
      if (tests.every(([filter, values]) => passes(filter, values, i))) found.push(i);
    }
    if (view.sort !== "order" || view.descending) found.sort(order(Report.column(view.sort), view.descending));
    view.shown = Int32Array.from(found);
    return view.shown;
  }

  function describe(filter) {
    const column = Report.column(filter.key);
    if (filter.test === "between") {
      const low = filter.low === -Infinity, high = filter.high === Infinity;
      if (low) return `${column.label} ≤ ${Report.format({ ...column, signed: false }, filter.high)}`;
      if (high) return `${column.label} ≥ ${Report.format({ ...column, signed: false }, filter.low)}`;
      return `${column.label} ${Report.format(column, filter.low)} to ${Report.format(column, filter.high)}`;
    }
    const name = TESTS[column.kind][filter.test];
    return filter.test === "empty" ? `${column.label} ${name}` : `${column.label} ${name} “${filter.text}”`;
  }

  /* Columns with few values get a choice instead of a text field. */
  function choices(column, most = 40) {
    const counts = new Map();
    for (const value of column.values) {
      if (value === null || value === "") continue;
      counts.set(value, (counts.get(value) || 0) + 1);
      if (counts.size > most) return null;
    }
    return [...counts].sort((a, b) => collator.compare(a[0], b[0]));
  }

  function toAddress() {
    const parts = new URLSearchParams();
    if (view.query) parts.set("q", view.query);
    if (view.sort !== Report.firstOrder || view.descending) parts.set("sort", (view.descending ? "-" : "") + view.sort);
    for (const f of view.filters) parts.append("f", JSON.stringify([f.key, f.test, f.text ?? null, finite(f.low), finite(f.high)]));
    if (view.selected >= 0) parts.set("id", data.ids[view.selected]);
    return `#${parts}`;
  }

  const finite = (number) => (Number.isFinite(number) ? number : null);

  function fromAddress(hash) {
    const parts = new URLSearchParams(hash.replace(/^#/, ""));
    const sort = parts.get("sort") || Report.firstOrder;
    view.query = parts.get("q") || "";
    view.descending = sort.startsWith("-");
    view.sort = Report.column(sort.replace(/^-/, "")) ? sort.replace(/^-/, "") : "order";
    view.filters = [];
    for (const text of parts.getAll("f")) {
      try {
        const [key, test, words, low, high] = JSON.parse(text);
        const column = Report.column(key);
        if (!column || !Object.hasOwn(TESTS[column.kind], test)) continue;
        view.filters.push({ key, test, text: String(words ?? ""), low: low ?? -Infinity, high: high ?? Infinity });
      } catch { /* ignore an invalid filter in an edited address */ }
    }
    const selected = parts.has("id") ? data.ids.indexOf(parts.get("id")) : -1;
    return selected;
  }

  Object.assign(view, { compute, describe, choices, toAddress, fromAddress, TESTS });
  Report.view = view;
})(window.Report);
