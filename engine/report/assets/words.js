"use strict";
/* Find the words in which two texts differ: longest common subsequence of words, ignoring case and punctuation. */
(function (Report) {
  const MOST_CELLS = 1 << 20;
  const EDGES = /[\p{P}\p{S}]/gu;

  const split = (text) => (text.trim() ? text.trim().split(/\s+/) : []);
  const plain = (word) => word.toLowerCase().replace(EDGES, "") || word;

  /* Return which words of each side have no partner, and the similarity of the texts, 0 to 1. */
  function compare(first, second) {
    const a = split(first), b = split(second);
    const x = a.map(plain), y = b.map(plain);
    const aAlone = a.map(() => true), bAlone = b.map(() => true);
    const width = y.length + 1;
    if ((x.length + 1) * width > MOST_CELLS) return { a, b, aAlone: a.map(() => false), bAlone: b.map(() => false), alike: 0 };
    const best = new Uint32Array((x.length + 1) * width);
    for (let i = x.length - 1; i >= 0; i--) {
      for (let j = y.length - 1; j >= 0; j--) {
        best[i * width + j] = x[i] === y[j]
          ? best[(i + 1) * width + j + 1] + 1
          : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
      }
    }
    for (let i = 0, j = 0; i < x.length && j < y.length;) {
      if (x[i] === y[j]) aAlone[i++] = bAlone[j++] = false;
      else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i++;
      else j++;
    }
    return { a, b, aAlone, bAlone, alike: a.length + b.length ? (2 * best[0]) / (a.length + b.length) : 1 };
  }

  /* Fill an element with words as text; runs of words without a partner are inside <mark>. */
  function fill(element, words, alone, name) {
    element.textContent = "";
    for (let i = 0; i < words.length;) {
      let end = i + 1;
      while (end < words.length && alone[end] === alone[i]) end++;
      const text = words.slice(i, end).join(" ");
      if (i) element.append(" ");
      if (alone[i]) {
        const mark = document.createElement("mark");
        mark.className = name;
        mark.textContent = text;
        element.append(mark);
      } else {
        element.append(text);
      }
      i = end;
    }
  }

  /* Return the runs of words without a partner, without trailing punctuation. */
  function alone(words, marks) {
    const runs = [];
    words.forEach((word, i) => {
      if (!marks[i]) return;
      if (i && marks[i - 1]) runs.push(`${runs.pop()} ${word}`);
      else runs.push(word);
    });
    return runs.map((run) => run.replace(/[.,;:!?]+$/, "") || run);
  }

  /* Return the reference most similar to a caption; the words are compared with that one. */
  function nearest(caption, references) {
    let found = null;
    for (const [place, reference] of references.entries()) {
      const compared = compare(caption, reference);
      if (!found || compared.alike > found.compared.alike) found = { place, compared };
    }
    return found;
  }

  Report.words = { compare, fill, nearest, alone };
})(window.Report);
