// Compare: the same question to two models, or to this gateway and another one.

import { Failure, call } from "../core/api.js";
import { field, h } from "../core/dom.js";
import { failureBox } from "../core/failures.js";
import { ms, number, percent, t } from "../core/i18n.js";
import { lookAtModels, store } from "../core/store.js";
import { EXAMPLES } from "../examples.js";
import { textOf } from "../parts/answer.js";
import { hops, totalOf } from "../parts/hops.js";
import { marked } from "../parts/source.js";

export const title = () => t("nav.compare");

const label = (model) => `${model.name} · ${t(`kind.${model.kind}`)}`;

/** What can answer: [{id, name, mode, base, bearer}]. */
function choices() {
  const here = (store.models || []).map((model) => ({
    id: `here/${model.kind}`,
    name: label(model),
    mode: model.kind,
  }));
  const there = store.compare.others.flatMap((other) =>
    other.models.map((model) => ({
      id: `${other.url}/${model.kind}`,
      name: `${label(model)} · ${new URL(other.url).host}`,
      mode: model.kind,
      base: other.url,
      bearer: other.key,
    })),
  );
  return [...here, ...there];
}

export function render(root, { signal, announce }) {
  const state = store.compare;
  const setup = h("div");
  const outcome = h("div", { class: "outcome" });
  root.append(h("h1", null, t("compare.title")), h("p.lead", null, t("compare.lead")), setup, outcome);

  function draw() {
    const found = choices();
    const ids = found.map((one) => one.id);
    if (!ids.includes(state.left)) state.left = ids[0] || "";
    if (!ids.includes(state.right) || state.right === state.left) {
      state.right = ids.find((id) => id !== state.left) || "";
    }
    setup.replaceChildren(
      store.models && found.length < 2
        ? h("div.notice", null, h("p", null, found.length ? t("compare.one", { name: found[0].name }) : t("compare.nothing")))
        : "",
      found.length > 1 ? form(found) : "",
      other(),
    );
    show();
  }

  function form(found) {
    const pick = (side) => {
      const select = h(
        "select",
        { id: `compare-${side}`, onchange: () => (state[side] = select.value) },
        found.map((one) => h("option", { value: one.id }, one.name)),
      );
      select.value = state[side];
      return field(t(`compare.${side}`), select);
    };
    const question = h("input", { type: "text", id: "question", autocomplete: "off", value: state.question, oninput: () => (state.question = question.value) });
    const context = h("textarea", { id: "context", rows: 6, value: state.context, oninput: () => (state.context = context.value) });
    const submit = h("button.main", { type: "submit" }, t("compare.submit"));
    return h(
      "form.card.form",
      {
        novalidate: true,
        onsubmit: (event) => {
          event.preventDefault();
          for (const control of [question, context]) {
            if (control.value.trim()) continue;
            outcome.replaceChildren(h("div.notice.bad", { role: "alert" }, h("p", null, t(control === question ? "ask.emptyQuestion" : "ask.emptyContext"))));
            control.focus();
            return;
          }
          run(submit, found);
        },
      },
      h("div.grid2", null, pick("left"), pick("right")),
      field(t("ask.question"), question),
      field(t("ask.passage"), context),
      h(
        "div.row",
        null,
        submit,
        ["en", "zh"].map((language) =>
          h(
            "button.link",
            {
              type: "button",
              lang: language,
              onclick: () => {
                [question.value, context.value] = [state.question, state.context] = EXAMPLES[language];
              },
            },
            language === "en" ? "Example in English" : "中文示例",
          ),
        ),
      ),
    );
  }

  async function run(submit, found) {
    submit.disabled = true;
    outcome.setAttribute("aria-busy", "true");
    announce(t("ask.working"));
    state.results = [];
    // One after the other: at once, they would take each other's time.
    for (const side of ["left", "right"]) {
      const chosen = found.find((one) => one.id === state[side]);
      const request = { question: state.question, context: state.context, mode: chosen.mode, no_cache: true };
      const begun = performance.now();
      try {
        const body = await call("v1/qa", { method: "POST", body: request, signal, base: chosen.base, bearer: chosen.bearer });
        state.results.push({ name: chosen.name, request, body, seen: performance.now() - begun });
      } catch (error) {
        if (error.name === "AbortError") return;
        state.results.push({ name: chosen.name, error });
      }
      show();
    }
    submit.disabled = false;
    outcome.removeAttribute("aria-busy");
    announce(verdict(state.results));
  }

  function show() {
    const results = state.results || [];
    if (!results.length) return outcome.replaceChildren();
    outcome.replaceChildren(
      h("div.columns.even", null, results.map(result)),
      results.length === 2 ? h("p.verdict", null, verdict(results)) : "",
    );
  }

  function other() {
    const url = h("input", { type: "url", id: "other-url", placeholder: "http://127.0.0.1:8081", autocomplete: "off", spellcheck: "false" });
    const secret = h("input", { type: "password", id: "other-key", autocomplete: "off" });
    const said = h("div");
    const details = h(
      "details.card",
      { open: choices().length < 2 },
      h("summary", null, t("compare.other")),
      h("p.hint", null, t("compare.otherHint", { origin: location.origin })),
      h(
        "form.form",
        {
          novalidate: true,
          onsubmit: async (event) => {
            event.preventDefault();
            said.replaceChildren();
            let base;
            try {
              base = new URL(url.value.trim());
              if (!/^https?:$/.test(base.protocol)) throw new TypeError();
            } catch {
              said.replaceChildren(h("div.notice.bad", { role: "alert" }, h("p", null, t("compare.badUrl"))));
              url.focus();
              return;
            }
            const address = base.origin + base.pathname.replace(/\/$/, "");
            try {
              const { models } = await reach(address, secret.value.trim(), signal);
              state.others = [...state.others.filter((one) => one.url !== address), { url: address, key: secret.value.trim(), models }];
              draw();
              announce(t("compare.added", { n: number(models.length) }));
              document.getElementById("compare-right")?.focus();
            } catch (error) {
              if (error.name !== "AbortError") said.replaceChildren(failureBox(error));
            }
          },
        },
        h("div.grid2", null, field(t("compare.url"), url), field(t("compare.key"), secret)),
        h("div.row", null, h("button", { type: "submit" }, t("compare.add"))),
        said,
      ),
      state.others.map((one) => h("p.soft", null, t("compare.using", { url: one.url }))),
    );
    return details;
  }

  draw();
  const before = JSON.stringify(store.models);
  const changed = () => JSON.stringify(store.models) !== before && draw();
  lookAtModels({ signal }).then(changed, (error) => {
    if (error.name !== "AbortError") setup.replaceChildren(failureBox(error));
  });
}

/** The models of another gateway; says apart whether it is this page that may not ask. */
async function reach(base, bearer, signal) {
  let blocked = false;
  const hear = () => {
    blocked = true;
  };
  document.addEventListener("securitypolicyviolation", hear);
  try {
    return await call("v1/models", { base, bearer, signal });
  } catch (error) {
    // The browser tells of a policy's violation a moment after the call has failed.
    await new Promise((resolve) => setTimeout(resolve, 150));
    throw blocked ? new Failure("other-host") : error;
  } finally {
    document.removeEventListener("securitypolicyviolation", hear);
  }
}

function result({ name, request, body, error, seen }) {
  if (error) return h("section.card", { "aria-label": name }, h("h2.label", null, name), failureBox(error));
  const spans = body.answer == null ? body.answers : body.citations;
  const best = body.answers[0];
  return h(
    "section.card.answer",
    { "aria-label": name },
    h("h2.label", null, name),
    h(`p.answer-text${textOf(body) ? (textOf(body).length > 120 ? ".long" : "") : ".none"}`, { dir: "auto" }, textOf(body) || t("answer.none")),
    h(
      "dl.pairs",
      null,
      best && body.answer == null ? h("div", null, h("dt", null, t("answer.confidence")), h("dd", null, percent(best.score))) : null,
      h("div", null, h("dt", null, t("compare.total")), h("dd", null, ms(totalOf(body.timings)))),
      h("div", null, h("dt", null, t("compare.seen")), h("dd", null, ms(seen))),
    ),
    marked(
      request.context,
      body.answerable ? spans.map((span) => ({ ...span, best: true })) : [],
      `${t("source.inPassage")}: ${name}`,
    ),
    hops(body.timings),
  );
}

function verdict(results) {
  if (results.some((one) => one.error)) return t("compare.incomplete");
  const [left, right] = results;
  const same = textOf(left.body) === textOf(right.body);
  const [fast, slow] = totalOf(left.body.timings) <= totalOf(right.body.timings) ? [left, right] : [right, left];
  const times = number(totalOf(slow.body.timings) / Math.max(totalOf(fast.body.timings), 0.001));
  return `${t(same ? "compare.same" : "compare.different")} ${t("compare.faster", { name: fast.name, times })}`;
}
