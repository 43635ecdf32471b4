"use strict";
/* Wires the parts together: controls, keyboard, selection, theme. */
(function (Report) {
  const { data, view, rows, detail, charts, summary } = Report;
  const by = (id) => document.getElementById(id);
  const narrow = window.matchMedia("(max-width: 899px)");
  let letters = true, drawingCharts = 0, keepingAddress = 0;

  function remember(key, value) {
    try { localStorage.setItem(key, value); } catch { /* some browsers store nothing for pages from disk */ }
  }

  function recall(key) {
    try { return localStorage.getItem(key); } catch { return null; }
  }

  /* Delayed, because browsers limit how often the address may change, for example while a key is held down. */
  function keepAddress() {
    clearTimeout(keepingAddress);
    keepingAddress = setTimeout(() => {
      try { history.replaceState(null, "", view.toAddress()); } catch { /* some browsers do not change the address of a file */ }
    }, 200);
  }

  /* Update everything that depends on the query, order or filters. */
  function refresh({ sameImages = false } = {}) {
    view.compute();
    rows.draw(sortBy);
    by("nothing").hidden = view.shown.length > 0;
    by("direction").textContent = view.descending ? "↓" : "↑";
    by("direction").setAttribute("aria-label", `${view.descending ? "Descending" : "Ascending"} order, reverse`);
    by("sort").value = view.sort;
    drawChips();
    summary.showCount();
    if (view.selected >= 0) showDetail();
    if (!sameImages) {
      cancelAnimationFrame(drawingCharts);
      drawingCharts = requestAnimationFrame(charts.draw);
    }
    keepAddress();
  }

  /* On a phone the image covers everything else, so the rest is made inert for keyboard and screen reader as well. */
  function showDetail() {
    detail.show(step, close);
    const covers = narrow.matches && view.selected >= 0;
    for (const part of document.querySelectorAll(".skip, .top, .overview, .bar, .list")) part.inert = covers;
  }

  function sortBy(key) {
    if (view.sort === key) view.descending = !view.descending;
    else [view.sort, view.descending] = [key, false];
    toStart(() => refresh({ sameImages: true }));
    const sorted = rows.grid.querySelector('[aria-sort="ascending"] button, [aria-sort="descending"] button');
    sorted?.focus({ preventScroll: true });
  }

  /* After a change of order, scroll back to the start of the list if it is above the window. */
  function toStart(change) {
    change();
    const start = document.querySelector(".split").getBoundingClientRect().top;
    if (start < by("chips").parentElement.offsetHeight) rows.reveal(0, { atTop: true });
  }

  function select(place, { open = true } = {}) {
    if (!view.shown.length) return;
    const bounded = Math.max(0, Math.min(view.shown.length - 1, place));
    const wasOpen = view.selected >= 0;
    view.selected = view.shown[bounded];
    if (open || wasOpen) showDetail();
    rows.reveal(bounded);
    rows.refreshSelection();
    keepAddress();
  }

  function step(by_, page = 1) {
    const place = view.shown.indexOf(view.selected);
    const hadFocus = document.activeElement?.closest?.("#detail") ? document.activeElement.getAttribute("aria-label") : null;
    select(place < 0 ? 0 : place + by_ * page);
    if (hadFocus !== null) {
      const again = [...detail.panel.querySelectorAll("button")].find((b) => b.getAttribute("aria-label") === hadFocus && !b.disabled);
      (again || detail.panel).focus({ preventScroll: true });
    }
  }

  function close() {
    const place = view.shown.indexOf(view.selected);
    view.selected = -1;
    showDetail();
    rows.refreshSelection();
    rows.grid.focus({ preventScroll: true });
    if (place >= 0) rows.reveal(place);
    keepAddress();
  }

  function addFilter(filter) {
    const known = JSON.stringify(filter);
    if (!view.filters.some((one) => JSON.stringify(one) === known)) view.filters.push(filter);
    toStart(refresh);
  }

  function drawChips() {
    const list = by("chips");
    list.replaceChildren();
    list.hidden = !view.filters.length;
    for (const filter of view.filters) {
      const chip = rows.make("li", "chip", list);
      const text = view.describe(filter);
      chip.append(text);
      const button = rows.make("button", "", chip);
      button.type = "button";
      button.textContent = "×";
      button.setAttribute("aria-label", `Remove the filter ${text}`);
      button.addEventListener("click", () => {
        view.filters = view.filters.filter((one) => one !== filter);
        refresh();
        (by("chips").querySelector("button") || by("filter-open")).focus();
      });
    }
  }

  /* The fields of the filter form depend on the column: two numbers, a choice of values, or text. */
  function drawForm() {
    const column = Report.column(by("filter-column").value), test = by("filter-test"), place = by("filter-values");
    const tests = view.TESTS[column.kind], before = test.value;
    const few = column.kind === "text" ? view.choices(column) : null;
    test.replaceChildren(...Object.entries(tests).map(([key, label]) => new Option(label, key)));
    test.value = Object.hasOwn(tests, before) ? before : few ? "is" : Object.keys(tests)[0];
    drawValues(column, few, test.value, place);
  }

  function drawValues(column, few, test, place) {
    place.replaceChildren();
    const field = (id, text, element) => {
      const label = rows.make("label", "", place);
      label.append(text, " ");
      element.id = id;
      label.append(element);
      return element;
    };
    if (test === "empty") return;
    if (test === "between") {
      for (const [id, text] of [["filter-low", "from"], ["filter-high", "to"]]) {
        const input = field(id, text, document.createElement("input"));
        input.type = "number";
        input.step = "any";
      }
    } else if (few && test === "is") {
      const choice = field("filter-text", "value", document.createElement("select"));
      for (const [value, times] of few) choice.add(new Option(`${value} (${times})`, value));
    } else {
      field("filter-text", "text", document.createElement("input")).type = "text";
    }
  }

  function submitFilter(event) {
    event.preventDefault();
    const key = by("filter-column").value, test = by("filter-test").value;
    if (test === "between" && !by("filter-low").value && !by("filter-high").value) {
      by("filter-low").focus();
      return;
    }
    const bound = (id, otherwise) => (by(id)?.value ? Number(by(id).value) : otherwise);
    addFilter({ key, test, text: by("filter-text")?.value ?? "", low: bound("filter-low", -Infinity), high: bound("filter-high", Infinity) });
  }

  function toggleFilter() {
    const isHidden = !by("filter").hidden;
    by("filter").hidden = isHidden;
    by("filter-open").setAttribute("aria-expanded", String(!isHidden));
    if (!isHidden) {
      drawForm();
      by("filter-column").focus();
    }
  }

  function showOutcome(pair, value) {
    view.filters = view.filters.filter((one) => one.key !== pair.outcome.key);
    view.filters.push({ key: pair.outcome.key, test: "is", text: value, low: -Infinity, high: Infinity });
    [view.sort, view.descending] = [pair.gain.key, value === data.labels[0]];
    refresh();
    document.querySelector(".bar").scrollIntoView();
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || by("help").open) return;
    const { target, key } = event;
    if (key === "Escape") {
      if (target.matches("#search") && target.value) return;
      if (view.selected >= 0) close();
      return;
    }
    if (target.matches("input, select, textarea")) return;
    const inGrid = target === rows.grid || target === document.body;
    const act = {
      ...(letters && { j: () => step(1), k: () => step(-1), "/": () => by("search").focus(), r: () => by("direction").click(), "?": () => by("help").showModal() }),
      ...((inGrid || target.closest("#detail")) && !target.matches("summary") && { ArrowRight: target.closest("#detail") ? () => step(1) : undefined, ArrowLeft: target.closest("#detail") ? () => step(-1) : undefined }),
      ...(inGrid && {
        ArrowDown: () => step(1), ArrowUp: () => step(-1), PageDown: () => step(1, rows.perScreen()), PageUp: () => step(-1, rows.perScreen()),
      }),
      ...(target === rows.grid && {
        Home: () => select(0), End: () => select(view.shown.length - 1),
        Enter: () => { if (view.selected < 0) select(0); detail.panel.focus({ preventScroll: true }); },
      }),
    }[key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  function theme(wanted) {
    if (wanted) document.documentElement.dataset.theme = wanted;
    else delete document.documentElement.dataset.theme;
    by("theme").textContent = `Theme: ${wanted || "auto"}`;
    remember("theme", wanted || "");
    charts.draw();
  }

  function build() {
    for (const column of Report.columns) by("sort").add(new Option(column.label, column.key));
    for (const column of Report.columns) if (!column.hidden) by("filter-column").add(new Option(column.label, column.key));
    const first = Report.ours[0];
    if (first) by("filter-column").value = first.key;
    summary.build(showOutcome, () => {
      view.sort = Report.change.key; // the most changed first
      view.descending = true;
      by("sort").value = view.sort;
      addFilter({ key: "differs", test: "is", text: "differ", low: -Infinity, high: Infinity });
      document.querySelector(".bar").scrollIntoView();
    });
    charts.build((key, low, high) => addFilter({ key, test: "between", text: "", low, high }));
    by("search").addEventListener("input", () => { view.query = by("search").value; refresh(); });
    by("sort").addEventListener("change", () => { view.sort = by("sort").value; toStart(() => refresh({ sameImages: true })); });
    by("direction").addEventListener("click", () => { view.descending = !view.descending; toStart(() => refresh({ sameImages: true })); });
    by("filter-open").addEventListener("click", toggleFilter);
    by("filter-column").addEventListener("change", drawForm);
    by("filter-test").addEventListener("change", drawForm);
    by("filter").addEventListener("submit", submitFilter);
    by("reset").addEventListener("click", () => { [view.query, view.filters, by("search").value] = ["", [], ""]; refresh(); by("search").focus(); });
    by("help-open").addEventListener("click", () => by("help").showModal());
    by("letters").addEventListener("change", () => { letters = by("letters").checked; remember("letters", letters ? "" : "off"); });
    by("theme").addEventListener("click", () => theme({ light: "dark", dark: "" }[document.documentElement.dataset.theme] ?? "light"));
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", charts.draw);
    const bar = document.querySelector(".bar"); // the sticky elements below it are placed by its height
    new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${bar.offsetHeight}px`)).observe(bar);
    narrow.addEventListener("change", showDetail);
    document.addEventListener("keydown", onKey);
    rows.whenSelected((place) => { select(place); if (narrow.matches) detail.panel.focus({ preventScroll: true }); else rows.grid.focus({ preventScroll: true }); });
  }

  function start() {
    letters = by("letters").checked = recall("letters") !== "off";
    const wanted = recall("theme");
    const selected = view.fromAddress(location.hash);
    build();
    by("search").value = view.query;
    if (wanted === "light" || wanted === "dark") document.documentElement.dataset.theme = wanted;
    refresh();
    theme(document.documentElement.dataset.theme);
    if (selected >= 0 && view.shown.includes(selected)) select(view.shown.indexOf(selected));
    document.documentElement.dataset.ready = "yes";
  }

  start();
})(window.Report);
