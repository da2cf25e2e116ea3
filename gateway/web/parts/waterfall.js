// One request's trace: its spans below one another, each where its time lies.

import { call } from "../core/api.js";
import { h, heads } from "../core/dom.js";
import { failureBox } from "../core/failures.js";
import { ms, t } from "../core/i18n.js";

// Spans come a moment after the answer.
const TRIES = 6;
const BETWEEN = 700;

const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

/** The trace as an element that fills itself. */
export function trace(id, { signal }) {
  const box = h("div", null, h("p.soft", { role: "status" }, t("loading")));
  const load = async () => {
    for (let attempt = 1; ; attempt += 1) {
      try {
        box.replaceChildren(waterfall(await call(`v1/traces/${encodeURIComponent(id)}`, { signal })));
        return;
      } catch (error) {
        if (error.name === "AbortError") return;
        if (error.status === 404 && attempt < TRIES) {
          await pause(BETWEEN);
          if (signal.aborted) return;
          continue;
        }
        box.replaceChildren(
          error.status === 404 ? h("p.soft", null, t("trace.gone")) : failureBox(error, load),
        );
        return;
      }
    }
  };
  load();
  return box;
}

/** Spans in the order of the tree, with their depth. */
function inOrder(spans) {
  const ids = new Set(spans.map((span) => span.span_id));
  const children = new Map();
  for (const span of spans) {
    const parent = ids.has(span.parent_id) ? span.parent_id : null;
    if (!children.has(parent)) children.set(parent, []);
    children.get(parent).push(span);
  }
  const found = [];
  const walk = (parent, depth) => {
    const below = children.get(parent) || [];
    below.sort((a, b) => a.start_milliseconds - b.start_milliseconds);
    for (const span of below) {
      found.push({ ...span, depth });
      walk(span.span_id, depth + 1);
    }
  };
  walk(null, 0);
  return found;
}

const kindOf = (service) => ["gateway", "tokenizer", "shard"].find((name) => service.includes(name)) || "other";

function waterfall({ milliseconds, spans }) {
  const whole = Math.max(milliseconds, 0.001);
  const share = (part) => `${Math.max(0, Math.min(100, (100 * part) / whole))}%`;
  return h(
    "div.scroll",
    { tabindex: 0, role: "region", "aria-label": t("trace.caption", { n: spans.length, time: ms(milliseconds) }) },
    h(
      "table.waterfall",
      null,
      h("caption.soft", null, t("trace.caption", { n: spans.length, time: ms(milliseconds) })),
      heads(
        t("trace.span"),
        t("trace.service"),
        ["n", t("trace.time")],
        ["line", t("trace.line")],
      ),
      h(
        "tbody",
        null,
        inOrder(spans).map((span) =>
          h(
            "tr",
            null,
            h("th", { scope: "row", vars: { depth: Math.min(span.depth, 8) } }, name(span)),
            h("td", null, span.service.replace(/^miaotui-/, "")),
            h("td.n", null, ms(span.milliseconds)),
            h(
              "td.line",
              null,
              h(
                "div.track",
                { "aria-hidden": "true" },
                h(`span.${kindOf(span.service)}${span.error ? ".failed" : ""}`, {
                  vars: { from: share(span.start_milliseconds), length: share(span.milliseconds) },
                }),
              ),
            ),
          ),
        ),
      ),
    ),
  );
}

function name(span) {
  const label = [span.error ? h("strong.bad", null, t("trace.failed"), " ") : null, span.name];
  const entries = Object.entries(span.attributes || {});
  if (!entries.length) return h("span.span-name", null, label);
  return h(
    "details.span-name",
    null,
    h("summary", null, label),
    h("dl", null, entries.map(([key, value]) => h("div", null, h("dt", null, key), h("dd", null, String(value))))),
  );
}
