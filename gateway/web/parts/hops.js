// Where the time of an answer went: one bar of all hops, and the figures.

import { h, heads } from "../core/dom.js";
import { fine, hopName, percent, t } from "../core/i18n.js";

const KINDS = ["cache", "tokenizer", "queue", "links", "read", "retrieval"];
const kind = (hop) => (hop.startsWith("stage") || hop === "generate" ? "stage" : KINDS.includes(hop) ? hop : "other");

/** `timings` of an answer: [{hop, milliseconds}], "total" among them. */
export function hops(timings, { open = false } = {}) {
  const total = totalOf(timings);
  const parts = timings.filter((hop) => hop.hop !== "total");
  const whole = Math.max(total, parts.reduce((sum, hop) => sum + hop.milliseconds, 0), 0.001);
  return h(
    "details.hops",
    { open },
    h("summary", null, t("hops.title")),
    h(
      "div.stack",
      { "aria-hidden": "true" },
      parts.map((hop) =>
        h(`span.hop.${kind(hop.hop)}`, {
          vars: { share: `${(100 * hop.milliseconds) / whole}%` },
          title: `${hopName(hop.hop)}: ${fine(hop.milliseconds)} ms`,
        }),
      ),
    ),
    h(
      "table",
      null,
      heads(
        t("hops.step"),
        ["n", t("hops.ms")],
        ["n", t("hops.share")],
      ),
      h(
        "tbody",
        null,
        timings.map((hop) =>
          h(
            "tr",
            null,
            h(
              "th",
              { scope: "row" },
              h(`span.swatch.${hop.hop === "total" ? "none" : kind(hop.hop)}`, {
                "aria-hidden": "true",
              }),
              hopName(hop.hop),
            ),
            h("td.n", null, fine(hop.milliseconds)),
            h("td.n", null, percent(hop.milliseconds / whole)),
          ),
        ),
      ),
    ),
  );
}

/** The whole time of an answer in milliseconds. */
export function totalOf(timings) {
  const total = timings.find((hop) => hop.hop === "total");
  return total ? total.milliseconds : timings.reduce((sum, hop) => sum + hop.milliseconds, 0);
}
