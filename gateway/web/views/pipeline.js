// Pipeline: the stages of each model as they are now, and the latest requests.

import { call } from "../core/api.js";
import { h, heads, hidden } from "../core/dom.js";
import { failureBox } from "../core/failures.js";
import { bytes, clock, ms, number, percent, t } from "../core/i18n.js";
import { icon } from "../parts/icons.js";
import { sparkline } from "../parts/sparkline.js";

const EVERY = 2000;
const MOST_TRACES = 20;

export const title = () => t("nav.pipeline");

export function render(root, { signal, announce }) {
  const trouble = h("div");
  const figures = h("div");
  const models = h("div");
  const traces = h("div");
  root.append(
    h("h1", null, t("pipeline.title")),
    h("p.lead", null, t("pipeline.lead")),
    trouble,
    models,
    h("section", { "aria-label": t("pipeline.figures") }, figures),
    h(
      "section.card",
      { "aria-labelledby": "traces-title" },
      h("h2.label", { id: "traces-title" }, t("pipeline.traces")),
      traces,
    ),
  );
  const states = new Map();
  let timer = 0;
  let down = false;

  async function look() {
    clearTimeout(timer);
    if (signal.aborted || document.hidden) return;
    try {
      // Asked by a clock, not by a person: no dialog for a key opens twice.
      const live = await call("v1/live", { signal, quiet: states.size > 0 || down });
      const recent = await call("v1/traces", { signal, quiet: true }).catch((error) => {
        if (error.name === "AbortError") throw error;
        return null;
      });
      down = false;
      trouble.replaceChildren();
      tell(live.models);
      models.replaceChildren(...live.models.map(model));
      figures.replaceChildren(gateway(live));
      list(recent?.traces);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!down) trouble.replaceChildren(failureBox(error));
      down = true;
    }
    timer = setTimeout(look, EVERY);
  }

  /** Says aloud which stages have gone or come back. */
  function tell(found) {
    for (const { name, stages } of found) {
      for (const stage of stages) {
        const key = `${name} ${stage.index} ${stage.replica}`;
        const before = states.get(key);
        if (before && before !== stage.state) {
          announce(t(`pipeline.change.${stage.state}`, { model: name, n: stage.index }));
        }
        states.set(key, stage.state);
      }
    }
  }

  let shown = "";
  function list(found) {
    const next = JSON.stringify(found ?? null);
    // Left alone while nothing changes, so that focus stays where it is.
    if (next === shown) return;
    shown = next;
    const focused = traces.contains(document.activeElement) ? document.activeElement.hash : null;
    traces.replaceChildren(traceList(found));
    if (focused) traces.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  }

  document.addEventListener("visibilitychange", look, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  look();
}

function gateway({ gateway: now, history }) {
  const rate = (value) => t("unit.perSecond", { n: number(value) });
  const time = (value) => (value === null || value === undefined ? "–" : ms(value));
  const tile = (name, value) => h("div.tile", null, h("dt", null, name), h("dd", null, value));
  return h(
    "div.card",
    null,
    h("h2.label", null, t("pipeline.gateway")),
    h(
      "div.sparks",
      null,
      sparkline(t("pipeline.rate"), history.map((one) => ({ time: one.time, value: one.requests_per_second })), rate),
      sparkline(t("pipeline.p50"), history.map((one) => ({ time: one.time, value: one.p50_milliseconds })), ms),
    ),
    h(
      "dl.tiles",
      null,
      tile(t("pipeline.p99"), time(now.p99_milliseconds)),
      tile(t("pipeline.errors"), rate(now.errors_per_second)),
      tile(t("pipeline.inFlight"), number(now.in_flight)),
      tile(t("pipeline.hits"), now.cache_hit_rate === null ? "–" : percent(now.cache_hit_rate)),
    ),
  );
}

function model({ name, kind, ready, reason, stages, generation }) {
  const groups = Map.groupBy(stages, (stage) => stage.index);
  const flow = [...groups.entries()].sort(([a], [b]) => a - b);
  return h(
    "section.card.model",
    { "aria-label": name },
    h(
      "div.model-head",
      null,
      h("h2", null, name),
      h("span.soft", null, t(`kind.${kind}`)),
      chip(ready ? "serving" : "unreachable", t(ready ? "pipeline.ready" : "pipeline.notReady")),
    ),
    !ready && reason ? h("p.notice.bad", null, h("span", { lang: "en" }, reason)) : null,
    h(
      "ol.flow",
      null,
      flow.map(([index, replicas], place) => {
        const link = replicas.map((one) => one.link_milliseconds).find((value) => value !== null && value !== undefined);
        return h(
          "li",
          null,
          h("div.replicas", null, replicas.map((one) => stage(one, replicas.length))),
          place < flow.length - 1 || flow.length > 1
            ? h(
                `p.link${place === flow.length - 1 ? ".back" : ""}`,
                null,
                h("span.arrow", { "aria-hidden": "true" }),
                h(
                  "span.soft.small",
                  null,
                  hidden(place === flow.length - 1 ? t("pipeline.linkBack") : t("pipeline.linkTo", { n: index + 1 })),
                  link === undefined ? "–" : ms(link),
                ),
              )
            : null,
        );
      }),
    ),
    generation
      ? h(
          "dl.tiles",
          null,
          h("div.tile", null, h("dt", null, t("pipeline.tokens")), h("dd", null, t("unit.perSecond", { n: number(generation.tokens_per_second ?? 0) }))),
          h("div.tile", null, h("dt", null, t("pipeline.kv")), h("dd", null, percent(generation.kv_use ?? 0))),
          h("div.tile", null, h("dt", null, t("pipeline.running")), h("dd", null, number(generation.running ?? 0))),
          h("div.tile", null, h("dt", null, t("pipeline.waiting")), h("dd", null, number(generation.waiting ?? 0))),
        )
      : null,
  );
}

function chip(state, text) {
  return h(`span.chip.${state}`, null, icon(state), text);
}

function stage(one, replicas) {
  const known = (value) => value !== null && value !== undefined;
  const [first, end] = one.layers;
  const name = replicas > 1 ? t("pipeline.replica", { n: one.index, replica: one.replica }) : t("pipeline.stage", { n: one.index });
  const layers =
    end > first + 1 ? t("pipeline.layers", { first: first + 1, last: end }) : t("pipeline.layer", { n: first + 1 });
  const rows = [
    [t("pipeline.memory"), known(one.memory_bytes) ? bytes(one.memory_bytes) : null],
    [t("pipeline.queue"), known(one.queue) ? number(one.queue) : null],
    [t("pipeline.batch"), known(one.batch_size) ? number(one.batch_size) : null],
    [t("pipeline.batches"), known(one.batches_per_second) ? t("unit.perSecond", { n: number(one.batches_per_second) }) : null],
    [t("pipeline.tokensRate"), known(one.tokens_per_second) ? t("unit.perSecond", { n: number(one.tokens_per_second) }) : null],
  ].filter(([, value]) => value !== null);
  return h(
    `div.stage.${one.state}`,
    { "data-stage": `${one.index}.${one.replica}` },
    h("div.stage-head", null, h("h3", null, name), chip(one.state, t(`pipeline.state.${one.state}`))),
    h("p.soft.small", null, layers, h("span.path", null, one.address)),
    rows.length ? h("dl.pairs", null, rows.map(([key, value]) => h("div", null, h("dt", null, key), h("dd", null, value)))) : null,
    known(one.busy)
      ? h(
          "p.busy",
          null,
          h("span.soft.small", null, t("pipeline.busy")),
          h("span.bar", { "aria-hidden": "true", vars: { share: `${100 * Math.min(1, one.busy)}%` } }, h("span")),
          h("span.small.n", null, percent(Math.min(1, one.busy))),
        )
      : null,
  );
}

function traceList(found) {
  if (!found) return h("p.soft", null, t("pipeline.tracesGone"));
  if (!found.length) return h("p.soft", null, t("pipeline.noTraces"));
  return h(
    "table.list",
    null,
    h("caption.visually-hidden", null, t("pipeline.traces")),
    heads(
      t("pipeline.traceName"),
      t("pipeline.traceTime"),
      ["n", t("pipeline.traceSpans")],
      ["n", t("trace.time")],
    ),
    h(
      "tbody",
      null,
      found.slice(0, MOST_TRACES).map((one) =>
        h(
          "tr",
          null,
          h("th", { scope: "row" }, h("a", { href: `#/trace/${one.trace_id}` }, one.name.replace(/\{[^}]*\}/g, "…")), one.error ? h("strong.bad", null, ` ${t("trace.failed")}`) : null),
          h("td", { "data-label": t("pipeline.traceTime") }, clock(new Date(one.time * 1000))),
          h("td.n", { "data-label": t("pipeline.traceSpans") }, number(one.spans)),
          h("td.n", { "data-label": t("trace.time") }, ms(one.milliseconds)),
        ),
      ),
    ),
  );
}
