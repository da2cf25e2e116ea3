// Files on their way into a collection: dropped or picked, each with its progress.

import { upload } from "../core/api.js";
import { h } from "../core/dom.js";
import { inWords, reasonOf } from "../core/failures.js";
import { bytes, count, percent, t } from "../core/i18n.js";
import { store } from "../core/store.js";
import { dropZone } from "./dropzone.js";
import { icon } from "./icons.js";

const KINDS = ".txt,.md,.markdown,.html,.htm,.pdf,.docx";
const AT_ONCE = 2;

// Sending goes on while another view or language is shown; the view there now hears of it.
let hooks = null;

/** The place to drop files on, and the list of those dropped. `done`: after each batch. */
export function uploads(callbacks) {
  hooks = callbacks;
  const state = store.documents;
  const list = h("ul.uploads", { "aria-label": t("uploads.list") });
  const files = h("input.visually-hidden", { type: "file", id: "files", multiple: true, accept: KINDS, onchange: picked });
  const folder = h("input.visually-hidden", { type: "file", id: "folder", webkitdirectory: true, onchange: picked });
  const clear = h("button.small", { type: "button", hidden: true, onclick: () => {
    state.uploads = state.uploads.filter((one) => !one.finished);
    draw();
  } }, t("uploads.clear"));
  const zone = dropZone(
    "div.drop",
    async (transfer) => add(await dropped(transfer)),
    icon("add"),
    h("p", null, t("uploads.drop")),
    h(
      "div.row.centre",
      null,
      files,
      h("label.button", { for: "files" }, t("uploads.pick")),
      folder,
      h("label.button", { for: "folder" }, t("uploads.folder")),
    ),
    h("p.hint", null, t("uploads.kinds")),
  );

  function picked(event) {
    const input = event.target;
    add([...input.files].map((file) => [file.webkitRelativePath || file.name, file]));
    input.value = "";
  }

  function add(found) {
    const collection = state.collection;
    for (const [name, file] of found) {
      state.uploads.push({ name, file, collection, state: "waiting", share: 0, detail: "", finished: false });
    }
    draw();
    if (found.length) run();
  }

  function draw() {
    list.replaceChildren(
      ...state.uploads.map((one) => {
        one.bar = h("progress", { max: 1, value: one.share, "aria-label": one.name });
        one.said = h("span.upload-state");
        one.row = h("li", null, h("span.upload-name", { title: one.name }, one.name, h("span.soft", null, ` ${bytes(one.file.size)}`)), one.bar, one.said);
        tell(one);
        return one.row;
      }),
    );
    list.hidden = !state.uploads.length;
    clear.hidden = !state.uploads.some((one) => one.finished);
  }

  function tell(one) {
    if (!one.row) return;
    one.row.dataset.state = one.state;
    one.bar.value = one.share;
    one.bar.hidden = one.finished;
    const share = one.state === "sending" ? ` ${percent(one.share)}` : "";
    one.said.textContent = t(`uploads.state.${one.state}`) + share + (one.detail ? `: ${one.detail}` : "");
  }

  async function send(one) {
    one.state = "sending";
    tell(one);
    const form = new FormData();
    form.append("collection", one.collection);
    form.append("file", one.file, one.name);
    const progress = (share) => {
      one.share = share;
      if (share === 1) one.state = "reading";
      tell(one);
    };
    try {
      const { documents, skipped } = await upload("v1/documents", form, { progress });
      one.state = documents.length ? documents[0].outcome : "skipped";
      if (skipped.length) one.detail = reasonOf(skipped[0].reason);
    } catch (error) {
      const { message, details } = inWords(error);
      one.state = "failed";
      one.detail = [message, ...details].join(" ");
    }
    one.finished = true;
    tell(one);
    hooks.redraw();
  }

  async function run() {
    if (state.running) return;
    state.running = true;
    const batch = [];
    try {
      const worker = async () => {
        for (;;) {
          const one = state.uploads.find((each) => each.state === "waiting");
          if (!one) return;
          batch.push(one);
          await send(one);
        }
      };
      await Promise.all(Array.from({ length: AT_ONCE }, worker));
    } finally {
      state.running = false;
    }
    const good = batch.filter((one) => ["added", "replaced", "unchanged"].includes(one.state)).length;
    hooks.announce([count("uploads.good", good), batch.length > good ? count("uploads.bad", batch.length - good) : ""].filter(Boolean).join(" "));
    hooks.done();
  }

  hooks.redraw = () => {
    clear.hidden = !state.uploads.some((one) => one.finished);
  };

  draw();
  return h("section", { "aria-label": t("uploads.title") }, zone, list, clear);
}

/** [[path, file]] of what was dropped, folders with all that is in them. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => [file.name, file]);
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      found.push([entry.fullPath.replace(/^\//, ""), file]);
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      // Browsers give a folder's entries in portions, an empty one at the end.
      const portion = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!portion.length) return;
      for (const child of portion) await walk(child);
    }
  };
  for (const entry of entries) await walk(entry);
  return found;
}
