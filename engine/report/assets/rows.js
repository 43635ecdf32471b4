"use strict";
/* The list is virtual: only the rows in view exist, with the fixed height of the style sheet, and elements are reused. */
(function (Report) {
  const { data, view, words } = Report;
  const MOST_SCORES = 4;
  const grid = document.getElementById("grid");
  const body = document.getElementById("rows");
  const head = document.getElementById("head");
  const living = new Map(); // place in the view -> element
  let height = 0, onSelect = () => {}, numbers = [];

  function make(tag, name, parent, role) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (role) element.setAttribute("role", role);
    if (parent) parent.append(element);
    return element;
  }

  /* The thumbnail of an image, or a box with the reason why it is missing. */
  function picture(i, alt) {
    const name = data.pictures[i];
    if (name === null) {
      const box = make("span", "no-picture");
      box.textContent = data.unreadable[i] === undefined ? "no image" : "cannot be read";
      return box;
    }
    const image = make("img");
    image.alt = alt;
    image.decoding = "async";
    image.src = `${data.thumbnails}/${name}`;
    return image;
  }

  /* The numbers that fit into a row: the first scores, and always the column that sorts the list. */
  function chosen() {
    const found = [...Report.ours, Report.column("words:0")].slice(0, MOST_SCORES);
    const sorted = Report.column(view.sort);
    const isThere = sorted.kind !== "number" || sorted.hidden || found.some((c) => c === sorted || partners(c).includes(sorted));
    if (!isThere) found.splice(MOST_SCORES - 1, 1, sorted);
    return found;
  }

  /* The second line of a number: the value of the other run, and the gain. */
  function partners(column) {
    const pair = Report.pairs.find((one) => one.first === column);
    if (pair) return [pair.second, pair.gain];
    return column.key === "words:0" && Report.many ? [Report.column("words:1")] : [];
  }

  function blank() {
    const row = make("div", "row", null, "row");
    row.parts = { picture: make("div", "cell picture", row, "gridcell"), text: make("div", "cell text", row, "gridcell") };
    row.parts.id = make("p", "id", row.parts.text);
    row.parts.captions = data.captions.map((_, run) => {
      const line = make("p", `caption line-${run}`, row.parts.text);
      for (const badge of Report.many ? [run, 1].slice(run) : []) make("span", `run run-${badge}`, line).textContent = badge ? "B" : "A";
      return make("span", "words", line);
    });
    if (data.references) row.parts.reference = make("p", "", make("div", "cell reference", row, "gridcell"));
    row.parts.numbers = numbers.map((column) => {
      const cell = make("div", "cell number", row, "gridcell");
      make("span", "name", cell).textContent = column.name || column.label;
      return [column, ...partners(column)].map((one, k) => ({ column: one, element: make("span", ["value own", "value other", "value gain"][k], cell) }));
    });
    return row;
  }

  /* Captions with the words that differ: from the nearest reference, or, without one, from the other run. */
  function fillTexts(parts, i) {
    const references = data.references ? data.references[i] : [];
    const [first, second] = data.captions.map((captions) => captions[i]);
    parts.text.classList.toggle("same", first === second);
    data.captions.forEach((captions, run) => {
      const target = parts.captions[run], caption = captions[i];
      target.classList.toggle("absent", !caption);
      const found = caption && (words.nearest(caption, references)?.compared || (Report.many && second && first && words.compare(caption, run ? first : second)));
      if (!caption) target.textContent = caption === null ? "not in this run" : "empty";
      else if (found) words.fill(target, found.a, found.aAlone, "extra");
      else target.textContent = caption;
      if (run) return;
      if (!parts.reference) return;
      parts.reference.classList.toggle("absent", !references.length);
      if (!references.length) parts.reference.textContent = "no reference";
      else if (found) {
        words.fill(parts.reference, found.b, found.bAlone, "lacking");
        if (references.length > 1) make("span", "more", parts.reference).textContent = `+${references.length - 1} more`;
      } else parts.reference.textContent = references[0];
    });
  }

  function sign(element, value) {
    element.classList.toggle("won", value > 0);
    element.classList.toggle("lost", value < 0);
  }

  function fill(row, place) {
    const i = view.shown[place];
    row.place = place;
    row.id = `row-${i}`;
    row.style.transform = `translateY(${place * height}px)`;
    row.setAttribute("aria-rowindex", place + 2);
    row.parts.picture.replaceChildren(picture(i, ""));
    row.parts.id.textContent = data.ids[i];
    fillTexts(row.parts, i);
    for (const cell of row.parts.numbers) {
      for (const { column, element } of cell) {
        const value = column.values[i];
        element.textContent = column.group === "gain" && value === 0 ? "=" : Report.format(column, value);
        if (column.group === "gain") sign(element, value);
      }
    }
    mark(row);
  }

  function mark(row) {
    const isSelected = view.shown[row.place] === view.selected;
    row.classList.toggle("selected", isSelected);
    row.setAttribute("aria-selected", isSelected);
  }

  /* Create the rows in view, and one screen above and below them. */
  function update() {
    const box = body.getBoundingClientRect(), screen = window.innerHeight;
    const first = Math.max(0, Math.floor((-box.top - screen * 0.75) / height));
    const last = Math.min(view.shown.length, Math.ceil((-box.top + screen * 1.75) / height));
    const free = [];
    for (const [place, row] of living) {
      if (place < first || place >= last) {
        living.delete(place);
        free.push(row);
      }
    }
    for (let place = first; place < last; place++) {
      if (living.has(place)) continue;
      const row = free.pop() || body.appendChild(blank());
      fill(row, place);
      living.set(place, row);
    }
    for (const row of free) row.remove();
    activate();
  }

  function activate() {
    const row = view.selected < 0 ? null : document.getElementById(`row-${view.selected}`);
    if (row) grid.setAttribute("aria-activedescendant", row.id);
    else grid.removeAttribute("aria-activedescendant");
  }

  function drawHead(sortBy) {
    head.textContent = "";
    const title = (text, name) => {
      const cell = make("div", `cell ${name}`, head, "columnheader");
      cell.textContent = text;
      return cell;
    };
    title("Image", "picture");
    const legend = (cell, name, text) => {
      make("mark", name, cell).textContent = text;
    };
    const captions = title("", "text");
    if (Report.many) data.labels.forEach((label, run) => {
      make("span", `run run-${run}`, captions).textContent = run ? "B" : "A";
      captions.append(`${label} `);
    });
    else captions.append("Caption ");
    if (data.references) {
      legend(captions, "extra", "not in the reference");
      const reference = title("Reference ", "reference");
      legend(reference, "lacking", Report.many ? "not in A" : "not in the caption");
    } else if (Report.many) legend(captions, "extra", "not in the other");
    for (const column of numbers) {
      const cell = title("", "number");
      const button = make("button", "", cell);
      const isSorted = view.sort === column.key;
      button.type = "button";
      button.textContent = `${column.name || column.label}${isSorted ? (view.descending ? " ↓" : " ↑") : ""}`;
      cell.setAttribute("aria-sort", isSorted ? (view.descending ? "descending" : "ascending") : "none");
      button.addEventListener("click", () => sortBy(column.key));
    }
  }

  /* Redraw the list from its start, after a change of images, order or numbers. */
  function draw(sortBy) {
    numbers = chosen();
    grid.style.setProperty("--numbers", numbers.length);
    grid.style.setProperty("--span", 12 / numbers.length); // of the 12 columns a phone's row is laid out in
    grid.classList.toggle("with-reference", Boolean(data.references));
    grid.classList.toggle("with-other", Report.many);
    grid.setAttribute("aria-rowcount", view.shown.length + 1);
    grid.setAttribute("aria-colcount", 2 + Boolean(data.references) + numbers.length);
    drawHead(sortBy);
    body.replaceChildren();
    living.clear();
    measure();
  }

  function measure() {
    height = parseFloat(getComputedStyle(grid).getPropertyValue("--row-height"));
    body.style.height = `${view.shown.length * height}px`;
    for (const row of living.values()) row.style.transform = `translateY(${row.place * height}px)`;
    update();
  }

  /* Scroll a row of the view below the sticky bar. */
  function reveal(place, { atTop = false } = {}) {
    const top = document.querySelector(".bar").offsetHeight + (head.offsetParent ? head.offsetHeight : 0);
    const start = body.getBoundingClientRect().top + place * height;
    const room = window.innerHeight;
    if (atTop || start < top) window.scrollBy(0, start - top);
    else if (start + height > room) window.scrollBy(0, start + height - room);
    update();
  }

  function refreshSelection() {
    for (const row of living.values()) mark(row);
    activate();
  }

  body.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) onSelect(row.place);
  });
  window.addEventListener("scroll", update, { passive: true });
  window.addEventListener("resize", measure);

  Report.rows = {
    draw, reveal, refreshSelection, picture, make, sign, grid,
    perScreen: () => Math.max(1, Math.floor((window.innerHeight - document.querySelector(".bar").offsetHeight) / height) - 1),
    whenSelected: (act) => { onSelect = act; },
  };
})(window.Report);
