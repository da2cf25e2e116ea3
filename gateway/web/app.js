// The frame around the views: addresses, languages, light and dark, and the API key.

import { key, onUnauthorized } from "./core/api.js";
import { h, hidden } from "./core/dom.js";
import { failureBox } from "./core/failures.js";
import { current, speak, t } from "./core/i18n.js";
import { lookAtModels } from "./core/store.js";
import { askKey } from "./parts/dialogs.js";
import { icon } from "./parts/icons.js";
import * as ask from "./views/ask.js";
import * as compare from "./views/compare.js";
import * as documents from "./views/documents.js";
import * as pipeline from "./views/pipeline.js";
import * as trace from "./views/trace.js";
import * as why from "./views/why.js";

const VIEWS = { ask, documents, why, pipeline, compare, trace };
const TABS = ["ask", "documents", "why", "pipeline", "compare"];
const THEMES = ["system", "light", "dark"];

const main = document.querySelector("main");
const status = document.getElementById("status");
let leaving = new AbortController();
let needsKey = Boolean(key());

/** Says something to screen readers. */
function announce(text) {
  status.textContent = "";
  // Equal words twice are two events only where the node was empty in between.
  setTimeout(() => {
    status.textContent = text;
  }, 50);
}

/** #/documents/ID?start=1 → { name, path: ["ID"], query }. */
function place() {
  const [route, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...path] = route.split("/").map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  return { name: VIEWS[name] ? name : "ask", path, query: new URLSearchParams(search) };
}

function show({ focus = false } = {}) {
  leaving.abort();
  leaving = new AbortController();
  const { name, path, query } = place();
  const root = h(`div.view.${name}`);
  main.replaceChildren(root);
  try {
    VIEWS[name].render(root, { path, query, signal: leaving.signal, announce });
  } catch (error) {
    root.replaceChildren(failureBox(error));
  }
  document.title = `${VIEWS[name].title()} · Miaotui 秒推`;
  frame(name);
  if (focus) {
    const heading = root.querySelector("h1");
    heading?.setAttribute("tabindex", "-1");
    heading?.focus();
    window.scrollTo(0, 0);
  }
}

function frame(name) {
  document.querySelector(".skip").textContent = t("frame.skip");
  document.querySelector("header nav").setAttribute("aria-label", t("frame.views"));
  document.querySelector("header nav").replaceChildren(
    ...TABS.map((tab) =>
      h("a", { href: `#/${tab}`, "aria-current": tab === name ? "page" : null }, t(`nav.${tab}`)),
    ),
  );
  document.querySelector(".tools").replaceChildren(
    needsKey
      ? h("button.tool", { type: "button", title: t("key.button"), onclick: changeKey }, icon("key"), hidden(t("key.button")))
      : "",
    h("button.tool", { type: "button", id: "theme", title: t("frame.theme"), onclick: nextTheme }, icon("theme"), h("span", null, t(`theme.${theme()}`)), hidden(t("frame.theme"))),
    h("button.tool", { type: "button", id: "language", lang: current() === "zh" ? "en" : "zh", onclick: otherLanguage }, current() === "zh" ? "English" : "中文"),
  );
  document.querySelector("footer").replaceChildren(
    h("p", null, t("frame.about")),
    h("p", null, h("a", { href: "docs" }, t("frame.docs"))),
  );
}

function otherLanguage() {
  speak(current() === "zh" ? "en" : "zh");
  show();
  document.getElementById("language").focus();
}

const theme = () => document.documentElement.dataset.theme || "system";

function nextTheme() {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("miaotui.theme", next);
  } catch {
    // Forgotten with the page, then.
  }
  frame(place().name);
  document.getElementById("theme").focus();
  announce(`${t("frame.theme")}: ${t(`theme.${next}`)}`);
}

async function changeKey() {
  if (await askKey(false)) show();
}

onUnauthorized(async (wrong) => {
  needsKey = true;
  const given = await askKey(wrong);
  frame(place().name);
  return given;
});

window.addEventListener("hashchange", () => show({ focus: true }));
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
// What is dropped beside the place for it must not replace the page.
for (const kind of ["dragover", "drop"]) {
  window.addEventListener(kind, (event) => event.preventDefault());
}
lookAtModels({ quiet: true }).catch(() => {});
show();
