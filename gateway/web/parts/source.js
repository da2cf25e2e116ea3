// A text with the parts that matter marked in it, and where the text is from.

import { h, hidden } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { cut, isChinese } from "../core/text.js";

const language = (text) => (isChinese(text) ? "zh" : null);

/**
 * The text with ranges marked. `ranges`: [{start, end}] in code points of the text; those
 * with `best` stand out and the first of them is scrolled to.
 */
export function marked(text, ranges, label) {
  const box = h(
    "div.source",
    { tabindex: 0, role: "region", "aria-label": label, dir: "auto", lang: language(text) },
    cut(text, ranges).map((part) => {
      if (!part.ranges.length) return part.text;
      const best = part.ranges.some((range) => range.best);
      return h(best ? "mark.best" : "mark", null, part.text);
    }),
  );
  requestAnimationFrame(() => {
    const mark = box.querySelector("mark.best") || box.querySelector("mark");
    if (mark) box.scrollTop = Math.max(0, mark.offsetTop - box.clientHeight / 3);
  });
  return box;
}

/** The last part of a path or URL. */
export const fileName = (source) => source.split("/").filter(Boolean).pop() || source;

/** Where an answer is from: document, page, heading; a link to the place in the document. */
export function citation(place, collection) {
  const query = new URLSearchParams({ collection, start: place.start, end: place.end });
  const where = [
    place.page ? t("source.page", { n: place.page }) : "",
    place.heading ? t("source.heading", { heading: place.heading }) : "",
  ].filter(Boolean);
  return h(
    "p.citation",
    null,
    hidden(t("source.from")),
    h(
      "a",
      { href: `#/documents/${encodeURIComponent(place.document)}?${query}`, title: place.source },
      place.title && place.title !== place.source ? place.title : fileName(place.source),
    ),
    h("span.soft", null, [fileName(place.source), ...where].join(" · ")),
  );
}
