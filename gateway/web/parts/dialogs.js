// Modal dialogs: a question with two answers, and the field for an API key.

import { key, setKey } from "../core/api.js";
import { field, h, uid } from "../core/dom.js";
import { t } from "../core/i18n.js";

function open(title, content, buttons) {
  return new Promise((resolve) => {
    const id = uid("dialog");
    const before = document.activeElement;
    const dialog = h(
      "dialog",
      { "aria-labelledby": id },
      h("form", { method: "dialog" }, h("h2", { id }, title), content, h("div.row.end", null, buttons)),
    );
    dialog.addEventListener("close", () => {
      const chosen = dialog.returnValue;
      dialog.remove();
      before?.focus?.();
      resolve(chosen);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** A button that closes the dialog with a value; only the main one is what Enter presses. */
function closing(value, words) {
  const button = h("button", { type: "button", onclick: () => button.closest("dialog").close(value) }, words);
  return button;
}

const cancel = () => closing("", t("dialog.cancel"));

/** Whether the person is sure. */
export async function confirm(title, text, yes) {
  const chosen = await open(title, h("p", null, text), [
    cancel(),
    h("button.danger", { type: "submit", value: "yes" }, yes),
  ]);
  return chosen === "yes";
}

/** Asks for the API key; whether one was given. `wrong`: the one known was refused. */
export async function askKey(wrong) {
  const input = h("input", {
    type: "password",
    id: "api-key",
    autocomplete: "off",
    spellcheck: "false",
    autofocus: true,
  });
  const chosen = await open(
    t("key.title"),
    [
      h("p", null, t(wrong ? "key.wrong" : "key.text")),
      field(t("key.label"), input, t("key.hint")),
    ],
    [
      cancel(),
      key() ? closing("forget", t("key.forget")) : null,
      h("button.main", { type: "submit", value: "use" }, t("key.use")),
    ],
  );
  if (chosen === "forget") setKey("");
  if (chosen !== "use" || !input.value.trim()) return false;
  setKey(input.value.trim());
  return true;
}
