// One request's trace, at an address of its own.

import { h } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { trace } from "../parts/waterfall.js";

export const title = () => t("trace.title");

export function render(root, { path, signal }) {
  const id = path[0] || "";
  root.append(
    h("p.links", null, h("a", { href: "#/pipeline" }, t("trace.back"))),
    h("h1", null, t("trace.title")),
    h("p.lead", null, t("trace.lead")),
    h("p.soft", null, t("trace.id"), " ", h("code", null, id)),
    h("div.card", null, trace(id, { signal })),
  );
}
