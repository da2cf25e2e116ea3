// Question and passage with each word's part in the answer: by attribution, by the rollout of all
// attention, or by one layer's and head's. The sign shows in the line below a word, too: solid
// for, dashed against.

import { choice, field, h, heads, hidden } from "../core/dom.js";
import { fine, number, percent, signed, t } from "../core/i18n.js";
import { cut } from "../core/text.js";

const CLASSES = 5;
const MOST_ROWS = 20;

/** `why`: an explanation; `asked`: the request that it explains. */
export function heatmap(why, asked) {
  const state = { by: "attribution", layer: why.attention.layers - 1, head: "mean" };
  const texts = { question: asked.question, context: asked.context };
  const picker = h("div.row");
  const words = h("div.heat");
  const table = h("div");

  function weights() {
    if (state.by === "attribution") return why.words.map((word) => ({ ...word, weight: word.attribution }));
    const values = state.by === "rollout" ? why.tokens.map((token) => token.rollout) : attention(why, state);
    return why.tokens
      .map((token, index) => ({ ...token, weight: values[index] }))
      .filter((token) => token.part !== "special" && token.start !== null && token.start !== undefined);
  }

  function special() {
    if (state.by === "attribution") return null;
    const values = state.by === "rollout" ? why.tokens.map((token) => token.rollout) : attention(why, state);
    const share = why.tokens.reduce((sum, token, index) => sum + (token.part === "special" ? values[index] : 0), 0);
    return h("p.hint", null, t("heat.special", { share: percent(share) }));
  }

  function draw() {
    const all = weights();
    const most = Math.max(...all.map((one) => Math.abs(one.weight)), 1e-9);
    const part = (name) => {
      const ranges = all.filter((one) => one.part === name).map((one) => ({ ...one, level: level(one.weight / most) }));
      return [
        h("h3.label", null, t(`heat.${name}`)),
        h(
          "p.heat-text",
          { dir: "auto" },
          framed(cut(texts[name], [...ranges, ...answerRange(why, name)])),
        ),
      ];
    };
    words.replaceChildren(...part("question"), ...part("context"));
    table.replaceChildren(top(all, state.by), special() || "");
    picker.replaceChildren(...(state.by === "attention" ? pickers() : []));
  }

  function pickers() {
    const layer = h(
      "select",
      {
        onchange: () => {
          state.layer = Number(layer.value);
          draw();
          picker.querySelector("select").focus();
        },
      },
      Array.from({ length: why.attention.layers }, (_, index) => h("option", { value: index }, number(index + 1))),
    );
    layer.value = state.layer;
    const head = h(
      "select",
      {
        onchange: () => {
          state.head = head.value === "mean" ? "mean" : Number(head.value);
          draw();
          picker.querySelectorAll("select")[1].focus();
        },
      },
      h("option", { value: "mean" }, t("heat.allHeads")),
      Array.from({ length: why.attention.heads }, (_, index) => h("option", { value: index }, number(index + 1))),
    );
    head.value = state.head;
    return [field(t("heat.layer"), layer), field(t("heat.head"), head)];
  }

  draw();
  return h(
    "section.card",
    { "aria-labelledby": "heat-title" },
    h("h2.label", { id: "heat-title" }, t("heat.title")),
    choice(
      t("heat.by"),
      [
        ["attribution", t("heat.attribution")],
        ["rollout", t("heat.rollout")],
        ["attention", t("heat.attention")],
      ],
      state.by,
      (by) => {
        state.by = by;
        draw();
      },
      { quiet: true },
    ),
    picker,
    words,
    legend(),
    table,
  );
}

function legend() {
  return h(
    "p.legend",
    null,
    h("span", null, h("span.w.l4.for", null, t("heat.for")), " ", t("heat.forText")),
    h("span", null, h("span.w.l4.against", null, t("heat.against")), " ", t("heat.againstText")),
    h("span", null, h("span.is-answer", null, t("heat.answer")), " ", t("heat.answerText")),
  );
}

function answerRange(why, part) {
  return part === "context" ? [{ start: why.answer.start, end: why.answer.end, answer: true }] : [];
}

/** The pieces of a text as elements, those of the answer together in a frame. */
function framed(pieces) {
  const made = [];
  let frame = null;
  for (const piece of pieces) {
    const answer = piece.ranges.some((range) => range.answer);
    if (answer && !frame) {
      frame = h("span.is-answer");
      made.push(frame);
    } else if (!answer) frame = null;
    const word = wordOf(piece);
    if (frame) frame.append(word);
    else made.push(word);
  }
  return made;
}

function wordOf({ text, ranges }) {
  const found = ranges.find((range) => range.level !== undefined);
  if (!found) return text;
  const sign = found.level > 0 ? ".for" : found.level < 0 ? ".against" : "";
  return h(
    `span.w.l${Math.abs(found.level)}${sign}`,
    { title: `${found.text}: ${fine(found.weight)}` },
    text,
  );
}

/** −5 … 5 of a weight between −1 and 1. */
function level(share) {
  const size = Math.min(CLASSES, Math.ceil(Math.abs(share) * CLASSES - 0.15));
  return Math.sign(share) * Math.max(0, size);
}

/** Attention by token of a layer, of one head or of the mean of them. */
function attention(why, { layer, head }) {
  const heads = why.attention.rows[layer];
  if (head !== "mean") return heads[head];
  return heads[0].map((_, token) => heads.reduce((sum, row) => sum + row[token], 0) / heads.length);
}

function top(all, by) {
  const sorted = [...all].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, MOST_ROWS);
  return h(
    "details",
    null,
    h("summary", null, t("heat.table")),
    h(
      "table",
      null,
      h("caption.visually-hidden", null, t("heat.table")),
      heads(
        t("heat.word"),
        t("heat.where"),
        ["n", t("heat.weight")],
      ),
      h(
        "tbody",
        null,
        sorted.map((one) =>
          h(
            "tr",
            null,
            h("td", { dir: "auto" }, one.text),
            h("td", null, t(`heat.${one.part}`)),
            h("td.n", null, by === "attribution" ? signed(one.weight) : fine(one.weight), hidden(by === "attribution" ? ` ${t(one.weight < 0 ? "heat.against" : "heat.for")}` : "")),
          ),
        ),
      ),
    ),
  );
}
