// Failures in words that a person understands.

import { h } from "./dom.js";
import { current, has, t } from "./i18n.js";
import { Failure } from "./api.js";

// What the gateway says of a field, as patterns; the English is the gateway's own.
const DETAILS = [
  [/must not be empty or blank/, "empty"],
  [/must have at most ([\d,]+) characters/, "longest"],
  [/must not contain the NUL/, "nul"],
  [/valid Unicode/, "unicode"],
  [/a collection's name has/, "collectionName"],
  [/no model that finds spans/, "noExtractive"],
  [/no model that writes text/, "noGenerative"],
  [/there are no documents to answer from/, "noDocuments"],
];

// Why a document could not be taken.
const REASONS = [
  [/files of this kind are not read/, "kind"],
  [/holds no text$/, "empty"],
  [/hold no text \(scans\?\)/, "scans"],
  [/protected by a password|is encrypted; save/, "password"],
  [/damaged|not a Word document|not a PDF|nested too deeply|document type/, "damaged"],
  [/it is not text/, "encoding"],
  [/needs a name of at most/, "name"],
  [/has more than|holds more than|unpacked it has/, "size"],
];

function known(patterns, prefix, text) {
  for (const [pattern, name] of patterns) {
    const found = pattern.exec(text);
    if (found) return t(`${prefix}.${name}`, { n: found[1] });
  }
  return current() === "en" ? text : t(`${prefix}.other`);
}

/** Why a document was skipped. */
export const reasonOf = (text) => known(REASONS, "skipped", text);

function fieldName(pointer) {
  const name = pointer.split(/[/.[]/).filter(Boolean)[0] || "";
  return has(`field.${name}`) ? t(`field.${name}`) : "";
}

/** { message, details, requestId } of whatever was thrown. */
export function inWords(error) {
  if (!(error instanceof Failure)) {
    console.error(error);
    return { message: t("failure.page"), details: [], requestId: "" };
  }
  const message = has(`failure.${error.slug}`) ? t(`failure.${error.slug}`) : t("failure.other");
  const details = error.errors.map(({ pointer, detail }) => {
    const name = fieldName(pointer || "");
    const what = known(DETAILS, "fault", detail || "");
    return name ? t("failure.at", { name, what }) : what;
  });
  if (error.slug === "rate-limited" || error.slug === "overloaded") {
    const n = error.retryAfter;
    if (n) details.push(t(n === 1 ? "failure.waitOne" : "failure.wait", { n }));
  }
  return { message, details: [...new Set(details)], requestId: error.requestId };
}

/** The failure as a box that screen readers announce. `retry`: what its button does. */
export function failureBox(error, retry) {
  const { message, details, requestId } = inWords(error);
  return h(
    "div.notice.bad",
    { role: "alert" },
    h("p", null, h("strong", null, message)),
    details.map((detail) => h("p", null, detail)),
    requestId && h("p.soft", null, t("failure.request"), " ", h("code", null, requestId)),
    retry && h("button", { type: "button", onclick: retry }, t("failure.again")),
  );
}
