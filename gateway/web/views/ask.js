// Ask: a question to a passage or to a collection, and free writing where a decoder is loaded.

import { call } from "../core/api.js";
import { check, choice, field, h } from "../core/dom.js";
import { failureBox } from "../core/failures.js";
import { count, t } from "../core/i18n.js";
import { lookAtModels, modelOf, store } from "../core/store.js";
import { pointsIn } from "../core/text.js";
import { EXAMPLES } from "../examples.js";
import { answerView, spoken } from "../parts/answer.js";
import { chat } from "../parts/chat.js";

// Models with which there is something to do in the chat.
const CHATTING = ["generative", "captioning", "transcribing"];

export const title = () => t("nav.ask");

export function render(root, { query, signal, announce }) {
  const state = store.ask;
  if (query.has("q")) state.question = query.get("q");
  if (query.has("collection")) {
    state.collection = query.get("collection");
    state.from = "documents";
  }
  if (["passage", "documents", "chat"].includes(query.get("from"))) state.from = query.get("from");

  const switches = h("div");
  const body = h("div");
  root.append(h("h1", null, t("ask.title")), h("p.lead", null, t("ask.lead")), switches, body);

  function draw() {
    const writes = CHATTING.some(modelOf);
    if (store.models && !writes && state.from === "chat") state.from = "passage";
    const options = [
      ["passage", t("ask.from.passage")],
      ["documents", t("ask.from.documents")],
    ];
    if (writes) options.push(["chat", t("ask.from.chat")]);
    switches.replaceChildren(
      choice(t("ask.from.legend"), options, state.from, (from) => {
        state.from = from;
        state.result = state.failure = null;
        drawBody();
      }, { quiet: true }),
    );
    drawBody();
  }

  function drawBody() {
    if (state.from === "chat") body.replaceChildren(chat({ signal, announce }));
    else body.replaceChildren(questions({ signal, announce }));
  }

  draw();
  const kinds = () => ["extractive", ...CHATTING].map((kind) => Boolean(modelOf(kind))).join();
  const before = kinds();
  lookAtModels({ signal }).then(
    () => {
      if (kinds() === before) return;
      // What is being typed in goes on being typed in.
      const { id } = document.activeElement;
      draw();
      if (id) document.getElementById(id)?.focus();
    },
    () => {},
  );
}

function questions({ signal, announce }) {
  const state = store.ask;
  const both = modelOf("generative") && modelOf("extractive");
  if (!both) state.mode = modelOf("generative") ? "generative" : "extractive";
  let running = null;

  const question = h("input", {
    type: "text",
    id: "question",
    autocomplete: "off",
    required: true,
    value: state.question,
    oninput: () => {
      state.question = question.value;
      question.removeAttribute("aria-invalid");
    },
  });
  const outcome = h("div.outcome");
  const submit = h("button.main", { type: "submit" }, t("ask.submit"));
  const stop = h("button", { type: "button", hidden: true, onclick: () => running?.abort() }, t("ask.stop"));
  const form = h(
    "form.card.form",
    {
      novalidate: true,
      onsubmit: (event) => {
        event.preventDefault();
        ask();
      },
    },
    field(t("ask.question"), question),
    state.from === "passage" ? passage() : collections(signal),
    both
      ? choice(
          t("ask.mode.legend"),
          [
            ["extractive", t("ask.mode.extractive")],
            ["generative", t("ask.mode.generative")],
          ],
          state.mode,
          (mode) => {
            state.mode = mode;
          },
        )
      : null,
    h("div.row", null, submit, stop, check(t("ask.fresh"), state.fresh, (fresh) => (state.fresh = fresh))),
    state.from === "passage" ? examples() : null,
  );

  function examples() {
    return h(
      "p.examples",
      null,
      h("span.soft", null, t("ask.examples")),
      ["en", "zh"].map((language) =>
        h(
          "button.link",
          {
            type: "button",
            lang: language,
            onclick: () => {
              const [asked, text] = EXAMPLES[language];
              question.value = state.question = asked;
              form.querySelector("textarea").value = state.context = text;
              form.querySelector("textarea").dispatchEvent(new Event("input"));
              ask();
            },
          },
          language === "en" ? "English" : "中文",
        ),
      ),
    );
  }

  async function ask() {
    const text = form.querySelector("textarea");
    for (const [control, empty] of [
      [question, "ask.emptyQuestion"],
      ...(text ? [[text, "ask.emptyContext"]] : []),
    ]) {
      if (control.value.trim()) continue;
      control.setAttribute("aria-invalid", "true");
      outcome.replaceChildren(h("div.notice.bad", { role: "alert" }, h("p", null, t(empty))));
      control.focus();
      return;
    }
    const request = { question: state.question };
    if (text) request.context = state.context;
    else request.collection = state.collection;
    if (state.mode === "generative") request.mode = "generative";
    else request.top_k = state.candidates;
    if (state.fresh) request.no_cache = true;
    running?.abort();
    const mine = (running = new AbortController());
    signal.addEventListener("abort", () => mine.abort());
    submit.disabled = true;
    stop.hidden = false;
    outcome.setAttribute("aria-busy", "true");
    outcome.classList.add("waiting");
    announce(t("ask.working"));
    try {
      const body = await call("v1/qa", { method: "POST", body: request, signal: mine.signal });
      state.result = { from: state.from, request, body };
      state.failure = null;
    } catch (error) {
      if (error.name === "AbortError") {
        announce(t("ask.stopped"));
        return;
      }
      state.result = null;
      state.failure = error;
    } finally {
      if (mine === running) {
        submit.disabled = false;
        stop.hidden = true;
        outcome.removeAttribute("aria-busy");
        outcome.classList.remove("waiting");
      }
    }
    show();
    if (state.result) announce(spoken(state.result.body));
    // On a phone the answer is below the form.
    if (outcome.getBoundingClientRect().top > window.innerHeight * 0.7) outcome.scrollIntoView();
  }

  function show() {
    if (state.failure) outcome.replaceChildren(failureBox(state.failure, ask));
    else if (state.result) outcome.replaceChildren(answerView(state.result));
    else outcome.replaceChildren(h("div.empty", null, h("p", null, t("ask.empty"))));
  }
  show();
  return h("div.columns", null, form, outcome);
}

function passage() {
  const state = store.ask;
  const size = h("span");
  const tell = () => {
    size.textContent = count("ask.characters", pointsIn(text.value));
  };
  const text = h("textarea", {
    id: "context",
    required: true,
    rows: 10,
    value: state.context,
    oninput: () => {
      state.context = text.value;
      text.removeAttribute("aria-invalid");
      tell();
    },
    onkeydown: (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      text.form.requestSubmit();
    },
  });
  tell();
  return field(t("ask.passage"), text, [size, " · ", t("ask.shortcut")]);
}

function collections(signal) {
  const state = store.ask;
  const select = h("select", {
    id: "collection",
    onchange: () => {
      state.collection = select.value;
    },
  });
  const hint = h("p.hint");
  const fill = (found) => {
    const names = found.map((one) => one.name);
    if (!names.includes(state.collection) && names.length) {
      state.collection = names.includes("default") ? "default" : names[0];
    }
    select.replaceChildren(
      ...found.map((one) =>
        h(
          "option",
          { value: one.name },
          `${one.name === "default" ? t("documents.default") : one.name} (${count("documents.count", one.documents)})`,
        ),
      ),
    );
    select.value = state.collection;
    hint.replaceChildren(
      ...(found.some((one) => one.documents)
        ? [h("a", { href: "#/documents" }, t("ask.manage"))]
        : [t("ask.noDocuments"), " ", h("a", { href: "#/documents" }, t("ask.addDocuments"))]),
    );
  };
  fill([{ name: state.collection, documents: 0 }]);
  hint.replaceChildren();
  call("v1/collections", { signal }).then(
    (body) => fill(body.collections),
    (error) => {
      if (error.name !== "AbortError") hint.replaceChildren(failureBox(error));
    },
  );
  return h("div.with-hint", null, field(t("ask.collection"), select), hint);
}
