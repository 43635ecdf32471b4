"use strict";
/* Where each word of a caption looks: a button per word, and its map over the image while the word is pointed at,
   focused or chosen. */
(function (Report) {
  const { data, rows } = Report;
  const { make } = rows;
  const PLACES = ["top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"];

  /* Draw map k of the strip, in which the maps of all words follow each other downwards, over the image. */
  function draw(canvas, image, strip, k, count, [left, top, right, bottom]) {
    const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
    const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale]; // as object-fit: contain places it
    canvas.style.left = `${image.offsetLeft + (image.clientWidth - width) / 2}px`;
    canvas.style.top = `${image.offsetTop + (image.clientHeight - height) / 2}px`;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    [canvas.width, canvas.height] = [width, height].map((size) => Math.max(1, Math.round(size * devicePixelRatio)));
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    const rowsOfMap = strip.naturalHeight / count;
    pen.drawImage(strip, 0, k * rowsOfMap, strip.naturalWidth, rowsOfMap,
      left * canvas.width, top * canvas.height, (right - left) * canvas.width, (bottom - top) * canvas.height);
  }

  /* Add the words of image i to `block`, with maps over the picture in `frame`. */
  function add(i, frame, block) {
    const found = data.attention?.images[i];
    const image = frame.querySelector("img");
    if (!found || !image) return;
    const { file, words, box, places } = found;
    const strip = new Image();
    const canvas = make("canvas", "map", frame);
    canvas.setAttribute("aria-hidden", "true");
    canvas.hidden = true;
    let pinned = -1, wanted = -1;

    async function show(k) {
      wanted = k;
      buttons.forEach((button, word) => {
        button.classList.toggle("shown", word === k);
        button.setAttribute("aria-pressed", String(word === pinned));
      });
      if (k < 0) {
        canvas.hidden = true;
        return;
      }
      if (!strip.src) strip.src = `${data.attention.folder}/${file}`; // only when it is needed
      await Promise.all([strip.decode(), image.decode()]);
      if (wanted !== k || !canvas.isConnected) return;
      canvas.hidden = false;
      draw(canvas, image, strip, k, words.length, box);
    }

    make("h3", "", block).textContent = "Where each word looks";
    const line = make("p", "look", block);
    line.setAttribute("role", "group");
    line.setAttribute("aria-label", "Words, each with its map over the image");
    const buttons = words.map((word, k) => {
      const button = make("button", "", line);
      button.type = "button";
      button.textContent = word;
      make("span", "hidden", button).textContent = `, looks most at the ${PLACES[places[k]]}`;
      button.addEventListener("pointerenter", () => show(k));
      button.addEventListener("pointerleave", () => show(pinned));
      button.addEventListener("focus", () => show(k));
      button.addEventListener("blur", () => show(pinned));
      button.addEventListener("click", () => { pinned = pinned === k ? -1 : k; show(pinned); });
      return button;
    });
    make("p", "hint", block).textContent = "Point at a word, or choose it to keep its map. Dark red is the word's highest weight. A map shows what the decoder read while it chose the word, not why.";
    new ResizeObserver(() => { if (!canvas.hidden) show(wanted); }).observe(image);
    show(-1);
  }

  Report.attention = { add };
})(window.Report);
