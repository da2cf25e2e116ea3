// The page's two languages. Words are looked up by dotted keys; {name} is filled in.

import { en } from "../words/en.js";
import { zh } from "../words/zh.js";

const WORDS = { en, zh };
const KEPT = "miaotui.language";

let language = document.documentElement.lang.startsWith("zh") ? "zh" : "en";
let numbers = make();

function make() {
  const locale = language === "zh" ? "zh-CN" : "en-GB";
  return {
    locale,
    plain: new Intl.NumberFormat(locale, { maximumFractionDigits: 1 }),
    fine: new Intl.NumberFormat(locale, { minimumFractionDigits: 2, maximumFractionDigits: 2 }),
    percent: new Intl.NumberFormat(locale, { style: "percent", maximumFractionDigits: 1 }),
    date: new Intl.DateTimeFormat(locale, { dateStyle: "medium", timeStyle: "short" }),
    clock: new Intl.DateTimeFormat(locale, { timeStyle: "medium" }),
  };
}

export const current = () => language;

/** Changes the language, and remembers it where the browser lets us. */
export function speak(chosen) {
  language = chosen;
  numbers = make();
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
  try {
    localStorage.setItem(KEPT, chosen);
  } catch {
    // A browser that keeps nothing shows its own language next time.
  }
}

function find(words, key) {
  return key.split(".").reduce((level, part) => (level ? level[part] : undefined), words);
}

/** Whether there are words for a key. */
export const has = (key) => typeof find(WORDS[language], key) === "string";

/** The words for a key. */
export function t(key, values = {}) {
  const words = find(WORDS[language], key) ?? find(en, key) ?? key;
  return words.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
}

/** "1 document", "2 documents": keys end in .one and .many. */
export const count = (key, n) => t(`${key}.${n === 1 ? "one" : "many"}`, { n: number(n) });

/** A number as it is shown: with a minus that is one, and without any where only zeros are left. */
function shown(format, value) {
  const text = format.format(value);
  return text.replace("-", /[1-9]/.test(text) ? "−" : "");
}

export const number = (value) => shown(numbers.plain, value);
export const fine = (value) => shown(numbers.fine, value);
export const percent = (value) => shown(numbers.percent, value);

/** The same as `fine`, with a plus before what is more than nothing. */
export function signed(value) {
  const text = fine(value);
  return value > 0 && /[1-9]/.test(text) ? `+${text}` : text;
}

export const date = (value) => numbers.date.format(value);
export const clock = (value) => numbers.clock.format(value);

/** A time given in milliseconds. */
export function ms(value) {
  if (value >= 1000) return t("unit.s", { n: number(value / 1000) });
  if (value > 0 && value < 1) return t("unit.ms", { n: fine(value) });
  return t("unit.ms", { n: number(value >= 100 ? Math.round(value) : value) });
}

/** 1,234,567 → "1.2 MB". */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = value;
  let unit = 0;
  while (size >= 1000 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${number(size)} ${units[unit]}`;
}

/** The name of a hop of an answer's timings. */
export function hopName(hop) {
  const explaining = /^explain: (.*)$/.exec(hop);
  if (explaining) return t("why.path.explaining", { hop: hopName(explaining[1]) });
  const stage = /^stage (\d+)$/.exec(hop);
  if (stage) return t("hop.stage", { n: stage[1] });
  return has(`hop.${hop}`) ? t(`hop.${hop}`) : hop;
}
