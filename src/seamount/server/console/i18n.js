// The page's language: which one, its texts, its numbers. Texts are in words.js.

import { words } from "./words.js";

const TAGS = { en: "en", zh: "zh-CN" };
let current = "en";

/** "zh" for any Chinese tag, else "en". */
export const languageOf = (tag) => (tag.toLowerCase().startsWith("zh") ? "zh" : "en");

export const language = () => current;

/** The text named `key`, with {names} filled in. */
export function t(key, values = {}) {
  return words[current][key].replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

export function number(value, fractionDigits = 0) {
  return value.toLocaleString(TAGS[current], { minimumFractionDigits: fractionDigits, maximumFractionDigits: fractionDigits });
}

/** Sets the language and rewrites every element under `root` that names a text. */
export function setLanguage(next, root = document) {
  current = next;
  document.documentElement.lang = TAGS[next];
  const each = (name, write) => {
    for (const node of root.querySelectorAll(`[data-${name}]`)) write(node, t(node.getAttribute(`data-${name}`)));
  };
  each("i18n", (node, text) => (node.textContent = text));
  each("i18n-label", (node, text) => {
    node.setAttribute("aria-label", text);
    if (node.tagName === "BUTTON") node.title = text;
  });
  each("i18n-title", (node, text) => (node.title = text));
  each("i18n-placeholder", (node, text) => (node.placeholder = text));
}
