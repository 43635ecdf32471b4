"use strict";
/* The panel of the selected image, with all its data. */
(function (Report) {
  const { data, view, words, rows } = Report;
  const panel = document.getElementById("detail");
  const { make } = rows;

  function heading(text, parent) {
    make("h3", "", parent).textContent = text;
  }

  function top(i, place, step, close) {
    const bar = make("div", "detail-bar", panel);
    const button = (text, label, act, name) => {
      const element = make("button", name || "", bar);
      element.type = "button";
      element.textContent = text;
      element.setAttribute("aria-label", label);
      element.addEventListener("click", act);
      return element;
    };
    button("←", "Previous image", () => step(-1)).disabled = place <= 0;
    button("→", "Next image", () => step(1)).disabled = place < 0 || place >= view.shown.length - 1;
    make("span", "position", bar).textContent = place < 0 ? "not in this view" : `${(place + 1).toLocaleString("en")} of ${view.shown.length.toLocaleString("en")}`;
    button("×", "Close", close, "close");
    const title = make("h2", "id", panel);
    title.textContent = data.ids[i];
    const frame = make("figure", "frame", panel);
    frame.append(rows.picture(i, `Image ${data.ids[i]}`));
    const reason = data.unreadable[i];
    const file = reason === undefined ? data.files[i] : `${data.files[i]}: ${reason}`;
    make("figcaption", "", frame).textContent = file || "no image of this id in the folder";
    return frame;
  }

  function list(label, found, parent) {
    if (!found.length) return;
    const line = make("p", "alone", parent);
    make("span", "label", line).textContent = label;
    line.append(` ${found.join(" · ")}`);
  }

  function texts(i, frame) {
    const references = data.references ? data.references[i] : [];
    data.captions.forEach((captions, run) => {
      const block = make("section", "text-block", panel);
      heading(Report.many ? `${run ? "B" : "A"} · ${data.labels[run]}` : "Caption", block);
      const line = make("p", `said run-${run}`, block), caption = captions[i];
      if (run === 0 && data.attention?.images[i]) Report.attention.add(i, frame, make("section", "text-block", panel));
      if (!caption) {
        line.classList.add("absent");
        line.textContent = caption === null ? "not in this run" : "empty";
        return;
      }
      const other = Report.many && data.captions[1 - run][i];
      const found = words.nearest(caption, references)?.compared || (other && words.compare(caption, other));
      if (!found) {
        line.textContent = caption;
        return;
      }
      words.fill(line, found.a, found.aAlone, "extra");
      list(references.length ? "Not in the reference:" : "Not in the other run:", words.alone(found.a, found.aAlone), block);
      if (references.length) list("The reference has also:", words.alone(found.b, found.bAlone), block);
    });
    references.forEach((reference, k) => {
      const block = make("section", "text-block", panel);
      heading(references.length > 1 ? `Reference ${k + 1} of ${references.length}` : "Reference", block);
      const found = words.compare(data.captions[0][i] || "", reference);
      words.fill(make("p", "said", block), found.b, found.bAlone, "lacking");
    });
    if (data.references && !references.length) {
      const block = make("section", "text-block", panel);
      heading("Reference", block);
      make("p", "absent", block).textContent = "none";
    }
  }

  function candidates(i) {
    const several = data.candidates ? data.candidates[i] : [];
    if (!data.candidates) return;
    const block = make("section", "text-block", panel);
    heading(`Candidates (${several.length})`, block);
    if (!several.length) {
      make("p", "absent", block).textContent = "none in the n-best file";
      return;
    }
    make("p", "hint", block).textContent = "With their share of the probability of all candidates; marked is what the first has not.";
    const items = make("ol", "candidates", block);
    for (const [text, share] of several) {
      const item = make("li", "", items);
      const line = make("span", "share", item);
      make("span", "percent", line).textContent = `${(100 * share).toFixed(1)} %`;
      const bar = make("span", "fill", make("span", "track", line));
      bar.style.width = `${100 * share}%`;
      const found = words.compare(text, several[0][0]);
      words.fill(make("p", "said", item), found.a, found.aAlone, "changed");
    }
  }

  function table(title, heads, lines) {
    if (!lines.length) return;
    const block = make("section", "text-block", panel);
    heading(title, block);
    const element = make("table", "", block);
    const first = make("tr", "", make("thead", "", element));
    for (const text of heads) {
      const cell = make("th", "", first);
      cell.scope = "col";
      cell.textContent = text;
    }
    const body = make("tbody", "", element);
    for (const [name, ...cells] of lines) {
      const line = make("tr", "", body);
      const cell = make("th", "", line);
      cell.scope = "row";
      cell.textContent = name;
      for (const { text, gain } of cells) {
        const value = make("td", "", line);
        value.textContent = text;
        if (gain !== undefined) rows.sign(value, gain);
      }
    }
  }

  function scores(i) {
    const value = (column) => ({ text: Report.format(column, column.values[i]) });
    const lines = Report.ours.map((column) => {
      const pair = Report.pairs.find((one) => one.first === column);
      if (!Report.pairs.length) return [column.name, value(column)];
      if (!pair) return [column.name, value(column), { text: "–" }, { text: "–" }];
      return [column.name, value(column), value(pair.second), { ...value(pair.gain), gain: pair.gain.values[i] }];
    });
    table("Scores", Report.pairs.length ? ["Metric", "A", "B", "A − B"] : ["Metric", "Value"], lines);
    const further = Report.columns.filter((column) => ["length", "table"].includes(column.group));
    table("More", ["Column", "Value"], further.map((column) => [column.label, value(column)]));
  }

  function show(step, close) {
    const i = view.selected;
    panel.replaceChildren();
    document.body.classList.toggle("with-detail", i >= 0);
    if (i < 0) return;
    texts(i, top(i, view.shown.indexOf(i), step, close));
    scores(i);
    candidates(i);
    panel.scrollTop = 0;
  }

  Report.detail = { show, panel };
})(window.Report);
