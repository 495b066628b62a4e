// Asks for the API key: when the server wants one, says why it refused one, and lets a key be changed or forgotten.

import { $, h } from "./dom.js";
import { hasKey, isKept, isSendable, setKey } from "./credential.js";
import { t } from "./i18n.js";

export class KeyDialog {
  #dialog = $("key-dialog");
  #input;
  #problem;
  #keep;
  #tryIt;
  #asked = false;

  /** `tryIt()` asks the server with the key as it is now, and resolves to what it refused it with, or null. */
  constructor(tryIt) {
    this.#tryIt = tryIt;
    // What was typed does not stay in the page.
    this.#dialog.addEventListener("close", () => this.#dialog.replaceChildren());
  }

  #build() {
    // No name, no autocomplete: the browser shall not offer to remember it.
    this.#input = h("input", { id: "key-input", type: "password", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": "key-problem" });
    this.#keep = h("input", { id: "key-keep", type: "checkbox", checked: isKept() });
    this.#problem = h("p", { id: "key-problem", class: "problem", role: "alert" });
    const forget = h("button", { type: "button", class: "button danger", hidden: !hasKey(), onclick: () => this.#forget() }, t("keyForget"));
    const cancel = h("button", { type: "button", class: "button", onclick: () => this.#dialog.close() }, t("cancel"));
    const use = h("button", { type: "submit", class: "button primary" }, t("keyUse"));
    const form = h(
      "form",
      { method: "dialog", novalidate: true },
      h("h2", { id: "key-title" }, t("keyTitle")),
      h("p", { class: "hint" }, t("keyWhy")),
      h("div", { class: "field" }, h("label", { for: "key-input" }, t("keyLabel")), this.#input, this.#problem),
      h("label", { class: "switch-row", for: "key-keep" }, h("span", {}, t("keyKeep"), h("small", {}, t("keyKeepHint"))), this.#keep),
      h("div", { class: "edit-row" }, forget, cancel, use),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#use();
    });
    this.#dialog.replaceChildren(form);
  }

  get isOpen() {
    return this.#dialog.open;
  }

  /** Opens by itself, once: whoever closes it without a key opens it again by `open`. `refusal` is the server's word. */
  ask(refusal) {
    if (!this.#asked) this.open(refusal);
  }

  open(refusal = "") {
    this.#asked = true;
    if (!this.#dialog.open) {
      this.#build();
      this.#dialog.showModal();
    }
    this.#tell(refusal);
    this.#input.focus();
  }

  async #use() {
    const key = this.#input.value.trim();
    if (!isSendable(key)) return this.#tell(t(key ? "keyUnsendable" : "keyEmpty"));
    setKey(key, this.#keep.checked);
    const refusal = await this.#tryIt();
    if (refusal !== null) {
      setKey("", false);
      this.#tell(refusal);
      this.#input.select();
      return;
    }
    this.#asked = false;
    this.#dialog.close();
  }

  #forget() {
    setKey("", false);
    this.#dialog.close();
    this.#tryIt();
  }

  #tell(text) {
    this.#problem.textContent = text;
    this.#input.setAttribute("aria-invalid", String(Boolean(text)));
  }
}
