// Documents: collections, files dropped or picked, what is there, and taking it away.

import { call } from "../core/api.js";
import { field, h, heads, hidden } from "../core/dom.js";
import { failureBox } from "../core/failures.js";
import { bytes, count, date, number, percent, t } from "../core/i18n.js";
import { store } from "../core/store.js";
import { confirm } from "../parts/dialogs.js";
import { fileName } from "../parts/source.js";
import { uploads } from "../parts/uploads.js";
import { document as one } from "./document.js";

// Encoding goes on in the background after an upload; so often its progress is looked at.
const EVERY = 2000;

export const title = () => t("nav.documents");

export function render(root, { path, query, signal, announce }) {
  const state = store.documents;
  if (query.has("collection")) state.collection = query.get("collection");
  if (path[0]) {
    one(root, { id: path[0], query, signal });
    return;
  }

  const summary = h("p.soft", { id: "summary" });
  const encoding = h("div.encoding");
  const list = h("div");
  const select = h("select", { id: "collection", onchange: () => choose(select.value) });
  const name = h("input", { type: "text", id: "new-collection", maxlength: 64, autocomplete: "off" });
  const known = new Map();
  let encoder = "none";
  let timer = 0;
  // The collection whose passages were seen to wait for their vectors.
  let followed = null;
  let said = 0;

  function choose(chosen) {
    state.collection = chosen;
    fill();
    load();
  }

  function fill() {
    const names = [...new Set(["default", ...known.keys(), state.collection])];
    // Left alone while nothing changes: a list that is open would close.
    if (names.join("/") !== [...select.options].map((one) => one.value).join("/")) {
      select.replaceChildren(
        ...names.map((one) => h("option", { value: one }, one === "default" ? t("documents.default") : one)),
      );
    }
    select.value = state.collection;
    const counts = known.get(state.collection);
    summary.textContent = counts
      ? [
          count("documents.count", counts.documents),
          count("documents.passages", counts.passages),
          counts.vectors ? t("documents.vectors", { n: number(counts.vectors) }) : "",
        ]
          .filter(Boolean)
          .join(" · ")
      : t("documents.newCollection");
    showEncoding(counts);
  }

  /** What is still found by words only, while the encoder is at it. */
  function showEncoding(counts) {
    if (!counts?.waiting || encoder === "none") {
      encoding.replaceChildren();
      if (counts && followed === counts.name && encoder !== "none") announce(t("documents.encoded"));
      followed = null;
      return;
    }
    const whole = counts.vectors + counts.waiting;
    // Said aloud by quarters, and not at every look.
    const quarter = Math.floor((4 * counts.vectors) / whole);
    if (followed === counts.name && quarter > said) announce(t("documents.encodingShare", { share: percent(quarter / 4) }));
    said = quarter;
    followed = counts.name;
    const bar = encoding.querySelector("progress") || h("progress", { "aria-label": t("documents.encodingBar") });
    const text = encoding.querySelector("p") || h("p.hint");
    // Kept from look to look, so that whoever reads there is not thrown out.
    if (!bar.isConnected) encoding.replaceChildren(bar, text);
    bar.max = whole;
    bar.value = counts.vectors;
    text.textContent = count(`documents.encoding.${encoder}`, counts.waiting);
  }

  async function look(options) {
    const found = await call("v1/collections", { signal, ...options });
    encoder = found.encoder;
    known.clear();
    for (const each of found.collections) known.set(each.name, each);
    fill();
    follow();
  }

  /** Looks again after a while, for as long as passages wait for their vectors. */
  function follow() {
    clearTimeout(timer);
    if (signal.aborted || document.hidden || !followed) return;
    // Asked by a clock, not by a person: no dialog for a key opens.
    timer = setTimeout(() => look({ quiet: true }).catch(follow), EVERY);
  }

  async function load(after = "") {
    if (!after) list.replaceChildren();
    const query = new URLSearchParams({ collection: state.collection, limit: 100 });
    if (after) query.set("after", after);
    try {
      await look();
      if (!known.has(state.collection)) {
        list.replaceChildren(h("div.empty", null, h("p", null, t("documents.none"))));
        return;
      }
      const { documents, next } = await call(`v1/documents?${query}`, { signal });
      if (!after) list.replaceChildren(documents.length ? table() : h("div.empty", null, h("p", null, t("documents.none"))));
      list.querySelector("tbody")?.append(...documents.map(row));
      list.querySelector(".more")?.remove();
      if (next) {
        list.append(h("button.more", { type: "button", onclick: () => load(next) }, t("documents.more")));
      }
    } catch (error) {
      if (error.name !== "AbortError") list.replaceChildren(failureBox(error, () => load()));
    }
  }

  function row(found) {
    const shown = found.title || fileName(found.source);
    const made = h(
      "tr",
      null,
      h(
        "th",
        { scope: "row" },
        h("a", { href: `#/documents/${found.id}?${new URLSearchParams({ collection: state.collection })}` }, shown),
        h("span.path", { title: found.source }, found.source),
      ),
      h("td.n", { "data-label": t("documents.size") }, bytes(found.bytes)),
      h("td.n", { "data-label": t("documents.pieces") }, number(found.passages)),
      h("td", { "data-label": t("documents.added") }, h("time", { datetime: found.added_at }, date(new Date(found.added_at)))),
      h(
        "td.end",
        null,
        h("button.small", { type: "button", onclick: remove }, t("documents.delete"), hidden(` ${shown}`)),
      ),
    );
    async function remove() {
      const sure = await confirm(t("documents.deleteTitle"), t("documents.deleteText", { name: shown }), t("documents.delete"));
      if (!sure) return;
      try {
        await call(`v1/documents/${found.id}?${new URLSearchParams({ collection: state.collection })}`, { method: "DELETE", signal });
        announce(t("documents.deleted", { name: shown }));
        await load();
        heading.focus();
      } catch (error) {
        if (error.name !== "AbortError") list.prepend(failureBox(error));
      }
    }
    return made;
  }

  const heading = h("h2", { id: "list-title", tabindex: -1 }, t("documents.list"));
  root.append(
    h("h1", null, t("documents.title")),
    h("p.lead", null, t("documents.lead")),
    h(
      "div.card",
      null,
      h(
        "div.grid2",
        null,
        field(t("documents.collection"), select),
        h(
          "form",
          {
            novalidate: true,
            onsubmit: (event) => {
              event.preventDefault();
              const wanted = name.value.trim();
              if (!wanted) return name.focus();
              name.value = "";
              choose(wanted);
              announce(t("documents.chosen", { name: wanted }));
            },
          },
          h(
            "div.field",
            null,
            h("label", { for: "new-collection" }, t("documents.create")),
            h("div.row.tight", null, name, h("button", { type: "submit" }, t("documents.createButton"))),
          ),
        ),
      ),
      summary,
      encoding,
    ),
    uploads({ announce, done: () => !signal.aborted && load() }),
    h("section", { "aria-labelledby": "list-title" }, heading, list),
  );
  document.addEventListener("visibilitychange", follow, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  fill();
  load();
}

function table() {
  return h(
    "div.card.flush",
    null,
    h(
      "table.list",
      null,
      h("caption.visually-hidden", null, t("documents.list")),
      heads(
        t("documents.name"),
        ["n", t("documents.size")],
        ["n", t("documents.pieces")],
        t("documents.added"),
        hidden(t("documents.actions")),
      ),
      h("tbody"),
    ),
  );
}
