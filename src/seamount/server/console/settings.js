// What the user chose: parameters, model, language, theme. Kept in localStorage; the panel is built here too.
// Sampling values that are empty are not sent: the server and the model's own defaults then hold.

import { $, fitHeight, h, icon } from "./dom.js";
import { languageOf, setLanguage, t } from "./i18n.js";
import { readLocal, writeLocal } from "./store.js";

const KEY = "seamount.settings";
const NUMBERS = [
  { name: "temperature", words: "temperature", low: 0, high: 2, step: 0.1 },
  { name: "top_p", words: "topP", low: 0.01, high: 1, step: 0.05 },
  { name: "max_tokens", words: "maxTokens", low: 1, high: 1_000_000, step: 1 },
  { name: "seed", words: "seed", low: 0, high: 4_294_967_295, step: 1 },
];
const DEFAULTS = { system: "", temperature: null, top_p: null, max_tokens: null, seed: null, thinking: true };
const THEMES = ["auto", "light", "dark"];
const darkSystem = matchMedia("(prefers-color-scheme: dark)");

export class Settings {
  #values = { ...DEFAULTS, model: "", theme: "auto", language: languageOf(navigator.language || "en"), ...readLocal(KEY, {}) };

  get model() {
    return this.#values.model;
  }

  get system() {
    return this.#values.system;
  }

  get thinking() {
    return this.#values.thinking;
  }

  /** The fields of a request that the parameters decide. */
  requestFields() {
    const fields = { chat_template_kwargs: { thinking: this.#values.thinking } };
    for (const { name } of NUMBERS) if (this.#values[name] !== null) fields[name] = this.#values[name];
    return fields;
  }

  set(name, value) {
    this.#values[name] = value;
    writeLocal(KEY, this.#values);
  }

  reset() {
    Object.assign(this.#values, DEFAULTS);
    writeLocal(KEY, this.#values);
  }

  nextTheme() {
    this.set("theme", THEMES[(THEMES.indexOf(this.#values.theme) + 1) % THEMES.length]);
    this.applyTheme();
  }

  nextLanguage() {
    this.set("language", this.#values.language === "zh" ? "en" : "zh");
    this.applyLanguage();
  }

  applyTheme() {
    const { theme } = this.#values;
    document.documentElement.dataset.theme = theme === "auto" ? (darkSystem.matches ? "dark" : "light") : theme;
    const name = t(`theme${theme[0].toUpperCase()}${theme.slice(1)}`);
    $("theme").replaceChildren(icon("sun"), name);
    $("theme").setAttribute("aria-label", t("themeLabel", { theme: name }));
    $("theme").title = t("themeLabel", { theme: name });
  }

  applyLanguage() {
    setLanguage(this.#values.language);
    const button = $("language");
    button.replaceChildren(icon("globe"), t("language"));
    button.title = t("languageLabel");
    button.setAttribute("aria-label", t("languageLabel"));
    button.lang = this.#values.language === "zh" ? "en" : "zh-CN";
    this.applyTheme();
  }

  /** Follows the system's theme while the choice is "auto". */
  watchSystemTheme() {
    darkSystem.addEventListener("change", () => this.applyTheme());
  }

  /** Builds the panel's form. `thinkingChanged` is told when its switch moves. */
  showPanel(thinkingChanged) {
    const system = h("textarea", { id: "system", rows: 4, "aria-describedby": "system-hint" });
    system.value = this.#values.system;
    system.addEventListener("input", () => {
      this.set("system", system.value);
      fitHeight(system);
    });
    const thinking = h("input", { id: "thinking-switch", type: "checkbox", role: "switch", checked: this.#values.thinking });
    thinking.addEventListener("change", () => {
      this.set("thinking", thinking.checked);
      thinkingChanged();
    });
    const reset = h("button", { type: "button", class: "button", "data-action": "reset" }, t("reset"));
    $("settings-form").replaceChildren(
      field("system", t("system"), system, t("systemHint")),
      h("label", { class: "switch-row" }, h("span", {}, t("thinking"), h("small", {}, t("thinkingHint"))), thinking),
      ...NUMBERS.map((spec) => this.#numberField(spec)),
      reset,
      h("hr"),
      h("h3", {}, t("data")),
      h("p", { class: "hint" }, t("dataHint")),
      h("button", { type: "button", class: "button", "data-action": "export-all" }, t("exportAll")),
      h("button", { type: "button", class: "button danger", "data-action": "remove-all" }, t("removeAll")),
    );
  }

  #numberField({ name, words, low, high, step }) {
    const whole = step === 1;
    const input = h("input", {
      id: name,
      inputmode: whole ? "numeric" : "decimal",
      autocomplete: "off",
      placeholder: t("byDefault"),
      "aria-describedby": `${name}-hint`,
    });
    input.value = this.#values[name] ?? "";
    const hint = t(`${words}Hint`);
    const node = field(name, t(words), input, hint);
    input.addEventListener("input", () => {
      const text = input.value.trim();
      const value = text === "" ? null : Number(text);
      const valid = value === null || (value >= low && value <= high && (!whole || Number.isInteger(value)));
      input.setAttribute("aria-invalid", String(!valid));
      node.querySelector(".hint").textContent = valid ? hint : t(whole ? "notWhole" : "notValid", { low, high });
      // A value that cannot be sent must not stay in force behind one that is shown.
      this.set(name, valid ? value : null);
    });
    return node;
  }
}

function field(id, label, control, hint) {
  return h("div", { class: "field" }, h("label", { for: id }, label), control, h("p", { class: "hint", id: `${id}-hint` }, hint));
}
