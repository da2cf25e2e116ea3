// One document with its text; a citation's characters are marked in it.

import { call } from "../core/api.js";
import { h } from "../core/dom.js";
import { failureBox } from "../core/failures.js";
import { bytes, count, date, t } from "../core/i18n.js";
import { fileName, marked } from "../parts/source.js";

/** Shows the document `id`; `query`: collection, start and end of what is cited. */
export function document(root, { id, query, signal }) {
  const collection = query.get("collection") || "default";
  const body = h("div", null, h("p.soft", { role: "status" }, t("loading")));
  root.append(
    h("p.links", null, h("a", { href: `#/documents?${new URLSearchParams({ collection })}` }, t("documents.back"))),
    body,
  );
  const path = `v1/documents/${encodeURIComponent(id)}?${new URLSearchParams({ collection })}`;
  const load = () =>
    call(path, { signal }).then(
      (found) => {
        const start = Number(query.get("start"));
        const end = Number(query.get("end"));
        const ranges = end > start ? [{ start, end, best: true }] : [];
        body.replaceChildren(
          h("h1", null, found.title || fileName(found.source)),
          h(
            "p.soft",
            null,
            [found.source, bytes(found.bytes), count("ask.characters", found.characters), date(new Date(found.added_at))].join(" · "),
          ),
          h("div.card.tall", null, marked(found.text, ranges, t("documents.text"))),
          h(
            "p.links",
            null,
            h("a.button", { href: `#/ask?${new URLSearchParams({ collection })}` }, t("documents.ask")),
          ),
        );
      },
      (error) => {
        if (error.name !== "AbortError") body.replaceChildren(h("h1", null, t("documents.title")), failureBox(error, load));
      },
    );
  load();
}
