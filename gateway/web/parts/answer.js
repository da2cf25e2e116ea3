// An answer: its text, how sure and how fast, where it stands, and what else might be it.

import { h } from "../core/dom.js";
import { has, ms, percent, t } from "../core/i18n.js";
import { isChinese } from "../core/text.js";
import { hops, totalOf } from "./hops.js";
import { icon } from "./icons.js";
import { citation, fileName, marked } from "./source.js";

/** The text that answers, or "" where there is none. */
export function textOf(body) {
  if (!body.answerable) return "";
  return body.answer ?? body.answers[0]?.text ?? "";
}

/** One sentence that says the outcome, for screen readers. */
export function spoken(body) {
  const text = textOf(body);
  if (!text) return t(body.collection ? "answer.noneInDocuments" : "answer.none");
  const score = body.answers[0] && body.answer == null;
  const time = ms(totalOf(body.timings));
  return score
    ? t("answer.spoken", { text, score: percent(body.answers[0].score), time })
    : t("answer.spokenSentence", { text, time });
}

export function facts(body) {
  const best = body.answers[0];
  const parts = [];
  if (best && body.answerable && body.answer == null) {
    parts.push(
      h("span.fact", null, h("span.soft", null, t("answer.confidence")), " ", bar(best.score), percent(best.score)),
    );
  }
  parts.push(
    h("span.fact", null, h("span.soft", null, t("answer.time")), " ", ms(totalOf(body.timings))),
    h("span.fact", { "data-cache": body.cache }, t(`cache.${body.cache}`)),
    h("span.fact.soft", null, body.model),
  );
  return h("p.facts", null, parts);
}

function bar(share) {
  return h("span.bar", { "aria-hidden": "true", vars: { share: `${100 * share}%` } }, h("span"));
}

/** Warnings about the input: [{kind, message, score}]. */
export function warnings(list) {
  if (!list?.length) return null;
  return h(
    "div.notice.warn",
    { role: "note" },
    h("p", null, icon("warning"), h("strong", null, t("warning.title"))),
    h(
      "ul",
      null,
      list.map((warning) => {
        const kind = String(warning.kind || "");
        const translated = has(`warning.kind.${kind}`);
        const text = translated ? t(`warning.kind.${kind}`) : warning.message;
        const share = typeof warning.score === "number" ? ` (${percent(warning.score)})` : "";
        return h("li", { lang: translated ? null : "en" }, text, h("span.soft", null, share));
      }),
    ),
  );
}

/** The whole answer. `asked`: {from, request, body}. `again`: asks without the cache. */
export function answerView({ request, body }) {
  const text = textOf(body);
  const head = h(
    "div.card.answer",
    null,
    h("h2.label", { id: "answer-title", tabindex: -1 }, t("answer.title")),
    text
      ? h(`p.answer-text${text.length > 120 ? ".long" : ""}`, { dir: "auto", lang: isChinese(text) ? "zh" : null }, text)
      : h("p.answer-text.none", null, t(body.collection ? "answer.noneInDocuments" : "answer.none")),
    facts(body),
    warnings(body.warnings),
    h(
      "p.links",
      null,
      body.answer == null && body.answers.length ? h("a.button", { href: "#/why" }, t("answer.why")) : null,
      body.trace_id && h("a", { href: `#/trace/${body.trace_id}` }, t("answer.trace")),
    ),
  );
  const place = h("div.card");
  let chosen = 0;
  const show = () => place.replaceChildren(...(body.collection ? inDocuments(body, chosen) : inPassage(request.context, body, chosen)));
  show();
  const others = candidates(body, (index) => {
    chosen = index;
    show();
  });
  return h(
    "section.result",
    { "aria-labelledby": "answer-title" },
    head,
    body.answers.length || body.citations?.length || !body.collection ? place : null,
    others,
    h("div.card", null, hops(body.timings)),
  );
}

function inPassage(context, body, chosen) {
  const spans = body.answer == null ? body.answers : body.citations;
  const shown = body.answerable || chosen > 0 ? spans : [];
  const ranges =
    body.answer == null
      ? shown.slice(chosen, chosen + 1).map((span) => ({ ...span, best: true }))
      : shown.map((span) => ({ ...span, best: true }));
  return [
    h("h3.label", null, t(body.answer == null ? "source.inPassage" : "source.restsOn")),
    marked(context, ranges, t("source.inPassage")),
  ];
}

function inDocuments(body, chosen) {
  const places = body.answer == null ? body.answers.slice(chosen, chosen + 1) : body.citations;
  if (!places.length) return [h("h3.label", null, t("source.inDocuments")), h("p.soft", null, t("source.noCitation"))];
  return [
    h("h3.label", null, t(body.answer == null ? "source.inDocuments" : "source.restsOn")),
    places.map((place) => {
      const passage = body.passages[place.passage];
      const range = { start: place.start - passage.start, end: place.end - passage.start, best: true };
      return h(
        "div.cited",
        null,
        citation(place, body.collection),
        marked(passage.text, [range], fileName(place.source)),
      );
    }),
  ].flat();
}

function candidates(body, choose) {
  if (body.answer != null || body.answers.length < 2) return null;
  const buttons = body.answers.map((answer, index) =>
    h(
      "li",
      null,
      h(
        "button.candidate",
        {
          type: "button",
          "aria-pressed": String(index === 0),
          onclick: (event) => {
            for (const { firstChild } of buttons) firstChild.setAttribute("aria-pressed", "false");
            event.currentTarget.setAttribute("aria-pressed", "true");
            choose(index);
          },
        },
        h(
          "span.candidate-text",
          { dir: "auto" },
          answer.text,
          answer.source ? h("span.soft", null, ` ${fileName(answer.source)}`) : null,
        ),
        bar(answer.score),
        h("span.n", null, percent(answer.score)),
      ),
    ),
  );
  return h(
    "div.card",
    null,
    h("h3.label", null, t("answer.others")),
    h("p.hint", null, t("answer.othersHint")),
    h("ol.candidates", null, buttons),
  );
}
