// Why: what of question and passage spoke for the last answer, and how it came about.

import { call } from "../core/api.js";
import { h, heads } from "../core/dom.js";
import { failureBox } from "../core/failures.js";
import { fine, has, hopName, ms, number, percent, t } from "../core/i18n.js";
import { store } from "../core/store.js";
import { facts, textOf } from "../parts/answer.js";
import { heatmap } from "../parts/heatmap.js";
import { trace } from "../parts/waterfall.js";
import { fileName } from "../parts/source.js";

export const title = () => t("nav.why");

/** The question over one passage that explains the last answer. */
function questionOf({ request, body }) {
  if (!body.collection) return { ...request, explain: true };
  const place = body.answers[0];
  return {
    question: request.question,
    context: body.passages[place.passage].text,
    top_k: request.top_k,
    explain: true,
  };
}

export function render(root, { signal, announce }) {
  root.append(h("h1", null, t("why.title")), h("p.lead", null, t("why.lead")));
  const asked = store.ask.result;
  if (!asked || asked.body.answer != null || !asked.body.answers.length) {
    const key = asked?.body.answer != null ? "why.sentence" : asked ? "why.nothing" : "why.first";
    root.append(
      h("div.empty", null, h("p", null, t(key)), h("a.button", { href: "#/ask" }, t("why.ask"))),
    );
    return;
  }
  const { request, body } = asked;
  const place = body.collection ? body.answers[0] : null;
  const rest = h("div", { "aria-live": "polite" });
  root.append(
    h(
      "section.card.answer",
      { "aria-labelledby": "why-answer" },
      h("p.soft", { dir: "auto" }, request.question),
      h("h2.answer-text", { id: "why-answer", dir: "auto" }, textOf(body) || body.answers[0].text),
      facts(body),
      place && h("p.soft", null, t("why.passageOf", { name: fileName(place.source) })),
    ),
    rest,
  );
  const known = store.explained?.id === body.request_id ? store.explained.body : null;
  if (known) show(known);
  else load();

  async function load() {
    rest.replaceChildren(h("p.soft.working", { role: "status" }, t("why.working")));
    const stop = watch(rest);
    try {
      const explained = await call("v1/qa", { method: "POST", body: questionOf(asked), signal });
      store.explained = { id: body.request_id, body: explained };
      show(explained);
      announce(t("why.done"));
    } catch (error) {
      if (error.name !== "AbortError") rest.replaceChildren(failureBox(error, load));
    } finally {
      stop();
    }
  }

  function show(explained) {
    const why = explained.explanation;
    if (!why) {
      rest.replaceChildren(h("div.empty", null, h("p", null, t("why.none"))));
      return;
    }
    const question = questionOf(asked);
    rest.replaceChildren(
      ...[
        heatmap(why, question),
        notes(why.notes),
        h("div.columns.even", null, completeness(why), runnersUp(why)),
        place && retrieval(body, place),
        path(why.path),
        h(
          "section.card",
          { "aria-labelledby": "why-trace" },
          h("h2.label", { id: "why-trace" }, t("trace.title")),
          trace(explained.trace_id, { signal }),
        ),
      ].filter(Boolean),
    );
  }
}

/**
 * Shows after an element how long it has taken so far, until what is returned is called. The bar
 * has no end: how often the model will have to run turns out on the way. It stands outside of the
 * live region, where every second would be read out.
 */
function watch(after) {
  const began = performance.now();
  const time = h("span.soft", { role: "timer" });
  const tick = () => {
    const seconds = Math.floor((performance.now() - began) / 1000);
    time.textContent = t("why.elapsed", { time: t("unit.s", { n: number(seconds) }) });
  };
  const shown = h("div.waiting", null, h("progress", { "aria-label": t("why.progress") }), time);
  after.after(shown);
  tick();
  const timer = setInterval(tick, 1000);
  return () => {
    clearInterval(timer);
    shown.remove();
  };
}

function notes(list) {
  const translated = ["attention", "attribution", "model"].map((name) => t(`why.note.${name}`));
  return h(
    "section.notice",
    { "aria-labelledby": "why-notes" },
    h("h2.label", { id: "why-notes" }, t("why.notes")),
    h("ul", null, translated.map((note) => h("li", null, note))),
    list?.length
      ? h(
          "details",
          null,
          h("summary", null, t("why.notesOfGateway")),
          h("ul", { lang: "en" }, list.map((note) => h("li", null, note))),
        )
      : null,
  );
}

function completeness(why) {
  const { logit, baseline_logit: baseline, sum, gap } = why.completeness;
  const difference = logit - baseline;
  const share = difference ? Math.abs(gap / difference) : 0;
  return h(
    "section.card",
    { "aria-labelledby": "why-complete" },
    h("h2.label", { id: "why-complete" }, t("why.complete.title")),
    h("p.figure", null, percent(Math.max(0, 1 - share))),
    h("p", null, t(share < 0.05 ? "why.complete.good" : "why.complete.bad")),
    h(
      "dl.pairs",
      null,
      pair(t("why.complete.logit"), fine(logit)),
      pair(t("why.complete.baseline"), fine(baseline)),
      pair(t("why.complete.difference"), fine(difference)),
      pair(t("why.complete.sum"), fine(sum)),
      pair(t("why.complete.gap"), fine(gap)),
      pair(t("why.complete.steps"), number(why.steps)),
    ),
  );
}

const pair = (name, value) => h("div", null, h("dt", null, name), h("dd", null, value));

function runnersUp(why) {
  const rows = [{ ...why.answer, margin: 0, chosen: true }, ...why.runners_up];
  return h(
    "section.card",
    { "aria-labelledby": "why-others" },
    h("h2.label", { id: "why-others" }, t("why.others.title")),
    h("p.hint", null, t("why.others.hint")),
    h(
      "table",
      null,
      heads(
        t("why.others.span"),
        ["n", t("why.others.logit")],
        ["n", t("why.others.margin")],
      ),
      h(
        "tbody",
        null,
        rows.map((row) =>
          h(
            "tr",
            null,
            h("td", { dir: "auto" }, row.chosen ? h("strong", null, row.text) : row.text),
            h("td.n", null, fine(row.logit)),
            h("td.n", null, row.chosen ? t("why.others.chosen") : fine(-Math.abs(row.margin))),
          ),
        ),
      ),
    ),
  );
}

function retrieval(body, place) {
  const rank = (value) => (value === null || value === undefined ? "–" : number(value));
  return h(
    "section.card",
    { "aria-labelledby": "why-found" },
    h("h2.label", { id: "why-found" }, t("why.found.title")),
    h("p.hint", null, t("why.found.hint")),
    h(
      "div.scroll",
      { tabindex: 0, role: "region", "aria-labelledby": "why-found" },
      h(
        "table",
        null,
        heads(
          ["n", t("why.found.rank")],
          t("why.found.passage"),
          ["n", t("why.found.lexical")],
          ["n", t("why.found.dense")],
          ["n", t("why.found.score")],
        ),
        h(
          "tbody",
          null,
          body.passages.map((passage, index) =>
            h(
              `tr${index === place.passage ? ".chosen" : ""}`,
              null,
              h("td.n", null, number(passage.retrieval.rank)),
              h(
                "td",
                null,
                h("span", { title: passage.source }, fileName(passage.source)),
                index === place.passage ? h("strong", null, ` ${t("why.found.used")}`) : null,
                h("span.path", { dir: "auto" }, passage.text.slice(0, 90)),
              ),
              h("td.n", null, rank(passage.retrieval.lexical_rank)),
              h("td.n", null, rank(passage.retrieval.dense_rank)),
              h("td.n", null, fine(passage.retrieval.score)),
            ),
          ),
        ),
      ),
    ),
  );
}

/** What a step did: in the reader's language where it is one of the usual steps. */
function did(step) {
  const key = `why.path.did.${step.hop.replace(/ \d+$/, "")}`;
  return has(key) ? h("span", null, t(key)) : h("span", { lang: "en" }, step.did);
}

function path(steps) {
  return h(
    "section.card",
    { "aria-labelledby": "why-path" },
    h("h2.label", { id: "why-path" }, t("why.path.title")),
    h(
      "ol.steps",
      null,
      steps.map((step) =>
        h(
          "li",
          null,
          h("strong", null, hopName(step.hop)),
          did(step),
          h(
            "span.soft",
            null,
            [ms(step.milliseconds), step.cache ? t(`why.path.${step.cache}`) : "", step.shape || ""].filter(Boolean).join(" · "),
          ),
        ),
      ),
    ),
  );
}
