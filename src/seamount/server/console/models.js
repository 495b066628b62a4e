// Which models the server has: fills the choice in the top bar, and says so when the server does not answer.

import { $, h, icon } from "./dom.js";
import { t } from "./i18n.js";
import { listModels } from "./api.js";
import { hasKey } from "./credential.js";

const RETRY_MS = 4000;

export class Models {
  #settings;
  #ids = [];
  #failed = false;
  #timer = null;

  /** Why the server does not know who asks: "" where it wants a key and got none; null where it does know. */
  refusal = null;

  constructor(settings) {
    this.#settings = settings;
    $("model").addEventListener("change", () => settings.set("model", $("model").value));
  }

  /** Asks the server; on failure shows the banner and asks again by itself. */
  async load() {
    clearTimeout(this.#timer);
    this.refusal = null;
    try {
      this.#ids = (await listModels()).map(({ id }) => id);
      this.#failed = false;
      // A model that was kept from another day may be gone.
      if (!this.#ids.includes(this.#settings.model)) this.#settings.set("model", this.#ids[0] ?? "");
    } catch (error) {
      // Whatever the reason (unreachable, starting, not JSON): the banner says it. But for a key it is tried again.
      this.#failed = true;
      if (error.status === 401) this.refusal = error.code === "missing_api_key" ? "" : error.message;
      else this.#timer = setTimeout(() => this.load(), RETRY_MS);
    }
    this.show();
  }

  show() {
    const ids = this.#ids.length ? this.#ids : [""];
    $("model").replaceChildren(...ids.map((id) => h("option", { value: id }, id || t("noModel"))));
    $("model").value = this.#ids.length ? this.#settings.model : "";
    $("model").disabled = this.#ids.length < 2;
    $("banner").hidden = !this.#failed;
    $("key-row").hidden = this.refusal === null && !hasKey();
    if (!this.#failed) return;
    if (this.refusal !== null) {
      const enter = h("button", { type: "button", class: "button", "data-action": "key" }, t("keyEnter"));
      $("banner").replaceChildren(icon("key"), h("span", {}, this.refusal || t("keyNeeded")), enter);
      return;
    }
    const again = h("button", { type: "button", class: "button", onclick: () => this.load() }, t("tryAgain"));
    $("banner").replaceChildren(icon("warn"), h("span", {}, t("modelsFailed")), again);
  }
}
