"use strict";
/* The top of the page: title, scores of the run, wins and losses, and the sources of the data. */
(function (Report) {
  const { data, view, format, rows: { make, sign } } = Report;
  const FOR_WIDE = ["95 % of A − B", "p"];
  const count = (number) => number.toLocaleString("en");
  const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

  function titles(showDiffering) {
    const title = data.labels.join(" against ");
    document.title = `${title} · report`;
    document.getElementById("title").textContent = title;
    const facts = [counted(Report.count, "image")];
    const distinct = new Set(data.captions[0]).size;
    facts.push(counted(distinct, "distinct caption"));
    const empty = data.captions[0].filter((text) => !text.trim()).length;
    if (empty) facts.push(`${count(empty)} empty`);
    const place = document.getElementById("subtitle");
    place.textContent = facts.join(" · ");
    if (!Report.many) return;
    place.append(" · ");
    const button = make("button", "link", place);
    button.type = "button";
    const differing = Report.column("differs").values.filter((value) => value === "differ").length;
    button.textContent = `${counted(differing, "caption")} ${differing === 1 ? "differs" : "differ"}`;
    button.addEventListener("click", showDiffering);
  }

  function notes() {
    const place = document.getElementById("notes");
    place.hidden = !data.notes.length;
    for (const note of data.notes) make("p", "", place).textContent = note;
  }

  function cell(line, text, tag = "td") {
    const element = make(tag, "", line);
    if (tag === "th") element.scope = "row";
    element.textContent = text;
    return element;
  }

  function range(one) {
    const column = { kind: "number" };
    return `${format(column, one.low)} to ${format(column, one.high)}`;
  }

  /* A bar of wins, ties and losses whose parts are filters. */
  function outcome(line, pair, choose) {
    const box = make("div", "outcome", make("td", "", line));
    const { wins, losses, ties } = pair.total.found;
    const parts = [[wins, data.labels[0], "won", "A better"], [ties, "equal", "tie", "equal"], [losses, data.labels[1], "lost", "B better"]];
    for (const [number, value, name, text] of parts) {
      const button = make("button", name, box);
      button.type = "button";
      button.style.flexGrow = number;
      button.disabled = !number;
      button.textContent = count(number);
      button.setAttribute("aria-label", `${pair.first.name}: ${counted(number, "image")} ${text}, show them`);
      button.title = text;
      button.addEventListener("click", () => choose(pair, value));
    }
  }

  function scores(choose) {
    const place = document.getElementById("scores");
    if (!Report.scores.length) return;
    place.hidden = false;
    const scroll = make("div", "scroll", place);
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Scores");
    const table = make("table", "scores", scroll);
    const head = make("tr", "", make("thead", "", table));
    const heads = Report.pairs.length
      ? ["Metric", `A · ${data.labels[0]}`, `B · ${data.labels[1]}`, "A − B", "95 % of A − B", "p", "Images: A better, equal, B better"]
      : ["Metric", "Value", "95 % interval"];
    for (const text of heads) {
      const element = make("th", "", head);
      element.scope = "col";
      element.textContent = text;
      if (FOR_WIDE.includes(text)) element.className = "wide";
    }
    if (Report.pairs.length) head.lastElementChild.className = "outcomes";
    const body = make("tbody", "", table);
    const plain = { kind: "number" };
    for (const column of Report.ours) {
      const line = make("tr", "", body);
      cell(line, column.name, "th").title = column.how;
      const pair = Report.pairs.find((one) => one.first === column);
      if (!Report.pairs.length) {
        cell(line, format(plain, column.total.value)).className = "main";
        cell(line, range(column.total));
      } else if (!pair?.total) {
        cell(line, format(plain, column.total.value)).className = "main";
        for (let k = 0; k < 5; k++) cell(line, "–").className = k === 2 || k === 3 ? "wide" : "";
      } else {
        const { total } = pair, { found } = total;
        cell(line, format(plain, total.first)).className = "main";
        cell(line, format(plain, total.second));
        sign(cell(line, format({ kind: "number", signed: true }, found.difference)), found.low > 0 ? 1 : found.high < 0 ? -1 : 0);
        cell(line, range(found)).className = "wide";
        cell(line, found.p.toFixed(3)).className = "wide";
        outcome(line, pair, choose);
      }
    }
    if (Report.pairs.length) {
      make("p", "hint", place).textContent = "A − B with the interval and p of the paired bootstrap, over the images both runs have; a coloured difference is one whose interval leaves out 0.";
    }
  }

  function about() {
    document.getElementById("signature").textContent = data.signature;
    const place = document.getElementById("about");
    const list = make("dl", "", place);
    const line = (name, text) => {
      make("dt", "", list).textContent = name;
      make("dd", "", list).textContent = text;
    };
    for (const source of data.sources) line(source.role, `${source.name} · ${source.sha256 ? `sha256 ${source.sha256}` : "a folder"}`);
    for (const score of data.scores) line(`score${Report.many ? ` of ${score.run ? "B" : "A"}` : ""}`, `${score.name}@${score.how}`);
    data.signatures.forEach((text, k) => line(`signature ${k + 1}`, text));
  }

  function showCount() {
    const text = view.shown.length === Report.count ? count(Report.count) : `${count(view.shown.length)} of ${count(Report.count)}`;
    document.getElementById("count").textContent = `${text} ${Report.count === 1 ? "image" : "images"}`;
  }

  Report.summary = { showCount, build: (choose, showDiffering) => { titles(showDiffering); notes(); scores(choose); about(); } };
})(window.Report);
