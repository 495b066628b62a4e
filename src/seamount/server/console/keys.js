// The page of API keys, for administrators: who has which, a new one, and an end to one. app.js shows and hides it.

import { listKeys, makeKey, revokeKey } from "./api.js";
import { keyId } from "./credential.js";
import { $, h, icon } from "./dom.js";
import { number, t } from "./i18n.js";

const DAY_S = 86_400;
const LIMITS = [
  { name: "requests_per_minute", words: "keysRequests" },
  { name: "tokens_per_minute", words: "keysTokens" },
  { name: "max_concurrent", words: "keysConcurrent" },
];
const PRIORITIES = [
  { value: -1, words: "keysLow" },
  { value: 0, words: "keysUsual" },
  { value: 1, words: "keysHigh" },
];

export class KeysPage {
  #page = $("keys-page");
  #copy;
  #refused;
  #fields = {};
  #problem;
  #made;
  #list;

  /** `copy(button, text)` puts text on the clipboard; `refused()` is called where the server does not know who asks. */
  constructor({ copy, refused }) {
    this.#copy = copy;
    this.#refused = refused;
  }

  get isOpen() {
    return !this.#page.hidden;
  }

  /** Shows the page anew. */
  async open() {
    this.#page.hidden = false;
    this.#problem = h("p", { class: "problem", role: "alert" });
    this.#made = h("div", { role: "status" });
    this.#list = h("div", { class: "table-frame", tabindex: "0", role: "region", "aria-label": t("keysTitle") });
    const back = h("button", { type: "button", class: "button", "data-action": "leave-keys" }, icon("left"), t("keysBack"));
    this.#page.replaceChildren(
      h("div", { class: "keys-head" }, h("h2", { id: "keys-title", tabindex: "-1" }, t("keysTitle")), back),
      this.#problem,
      this.#made,
      this.#form(),
      this.#list,
    );
    $("keys-title").focus();
    await this.#load();
  }

  /** Hides it; a key that was shown is gone with it. */
  close() {
    this.#page.hidden = true;
    this.#page.replaceChildren();
  }

  async #load() {
    await this.#try(async () => this.#list.replaceChildren(this.#table(await listKeys())));
  }

  /** Runs what asks the server; tells its refusal, and returns whether there was none. */
  async #try(work) {
    this.#problem.textContent = "";
    try {
      await work();
      return true;
    } catch (error) {
      this.#problem.textContent = error.kind === "network" ? t("errorNetwork") : error.message;
      if (error.status === 401) this.#refused();
      return false;
    }
  }

  #form() {
    const text = (name, props = {}) => (this.#fields[name] = h("input", { id: `keys-${name}`, autocomplete: "off", maxlength: 200, ...props }));
    const whole = (name) => text(name, { type: "number", min: 1, max: 2 ** 40, step: 1, placeholder: t("keysNoLimit") });
    const admin = (this.#fields.is_admin = h("input", { id: "keys-is_admin", type: "checkbox" }));
    const priority = (this.#fields.priority = h("select", { id: "keys-priority" }));
    priority.append(...PRIORITIES.map(({ value, words }) => h("option", { value, selected: value === 0 }, t(words))));
    const form = h(
      "form",
      { class: "keys-form", "aria-label": t("keysNew") },
      labelled(t("keysTenant"), text("tenant", { required: true, maxlength: 63, pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*" }), t("keysTenantHint")),
      labelled(t("keysLabel"), text("label")),
      labelled(t("keysModels"), text("models", { maxlength: 4000 }), t("keysModelsHint")),
      labelled(t("keysRoutes"), text("routes", { maxlength: 4000, placeholder: "/v1/chat/completions" }), t("keysRoutesHint")),
      labelled(t("keysDays"), text("days", { type: "number", min: 1, max: 36_500, step: 1, placeholder: t("keysNever") })),
      ...LIMITS.map(({ name, words }) => labelled(t(words), whole(name))),
      labelled(t("keysPriority"), priority),
      h("label", { class: "switch-row", for: "keys-is_admin" }, h("span", {}, t("keysAdmin"), h("small", {}, t("keysAdminHint"))), admin),
      h("button", { type: "submit", class: "button primary" }, icon("plus"), t("keysMake")),
    );
    admin.addEventListener("change", () => {
      for (const name of ["models", "routes"]) this.#fields[name].disabled = admin.checked;
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#make(form);
    });
    return h("details", { class: "keys-new" }, h("summary", {}, t("keysNew")), form);
  }

  async #make(form) {
    const field = (name) => this.#fields[name].value.trim();
    const names = (name) => (this.#fields.is_admin.checked || !field(name) ? null : field(name).split(/[\s,]+/).filter(Boolean));
    const whole = (name) => (field(name) ? Number(field(name)) : null);
    const order = {
      tenant: field("tenant"),
      label: field("label"),
      is_admin: this.#fields.is_admin.checked,
      models: names("models"),
      routes: names("routes"),
      expires_in_s: whole("days") && whole("days") * DAY_S,
      priority: Number(field("priority")),
      ...Object.fromEntries(LIMITS.map(({ name }) => [name, whole(name)])),
    };
    let made;
    if (!(await this.#try(async () => (made = await makeKey(order))))) return;
    form.reset();
    for (const name of ["models", "routes"]) this.#fields[name].disabled = false;
    form.closest("details").open = false;
    this.#showMade(made);
    await this.#load();
  }

  #showMade(made) {
    const shown = h("input", { id: "keys-made", readonly: true, "aria-describedby": "keys-once" });
    shown.value = made.key;
    shown.addEventListener("focus", () => shown.select());
    const copy = h("button", { type: "button", class: "icon-button", "aria-label": t("copy"), title: t("copy"), onclick: (event) => this.#copy(event.currentTarget, made.key) }, icon("copy"));
    const label = h("label", { for: "keys-made" }, t("keysMade", { id: made.id, tenant: made.tenant }));
    this.#made.replaceChildren(h("div", { class: "made" }, label, h("div", { class: "made-row" }, shown, copy), h("p", { class: "hint", id: "keys-once" }, t("keysOnce"))));
    shown.focus();
  }

  #table(keys) {
    const headings = ["keysId", "keysTenant", "keysLabel", "keysScope", "keysExpires", "keysState", "keysIn", "keysOut"];
    const head = h("tr", {}, ...headings.map((name) => h("th", { scope: "col" }, t(name))), h("th", { scope: "col" }, h("span", { class: "visually-hidden" }, t("keysRevoke"))));
    return h("table", {}, h("thead", {}, head), h("tbody", {}, ...[...keys].reverse().map((key) => this.#row(key))));
  }

  #row(key) {
    const cells = [
      h("td", {}, h("code", {}, key.id), key.id === keyId() ? ` ${t("keysOwn")}` : ""),
      h("td", {}, key.tenant),
      h("td", {}, key.label),
      h("td", {}, scope(key)),
      h("td", {}, key.expires ? key.expires.slice(0, 10) : t("keysNever")),
      h("td", {}, t({ active: "keysActive", expired: "keysExpired", revoked: "keysRevoked" }[key.state])),
      h("td", { class: "number" }, number(key.usage.prompt_tokens)),
      h("td", { class: "number" }, number(key.usage.generated_tokens)),
      h("td", {}, key.state === "revoked" ? "" : this.#revokeButton(key)),
    ];
    return h("tr", { "data-id": key.id, class: key.state }, ...cells);
  }

  /** The first press asks, the second does it; leaving the button takes the question back. */
  #revokeButton(key) {
    const button = h("button", { type: "button", class: "button danger", "aria-label": t("keysRevokeOne", { id: key.id }) }, t("keysRevoke"));
    let asked = false;
    const show = (next) => {
      asked = next;
      button.textContent = t(asked ? "keysReally" : "keysRevoke");
      button.setAttribute("aria-label", t(asked ? "keysReallyOne" : "keysRevokeOne", { id: key.id }));
    };
    button.addEventListener("blur", () => show(false));
    button.addEventListener("click", async () => {
      if (!asked) return show(true);
      if (await this.#try(() => revokeKey(key.id))) await this.#load();
    });
    return button;
  }
}

function scope(key) {
  if (key.is_admin) return t("keysEverything");
  return [...(key.models ?? [t("keysAllModels")]), ...(key.routes ?? [t("keysAllRoutes")])].join(", ");
}

function labelled(label, control, hint) {
  if (hint) control.setAttribute("aria-describedby", `${control.id}-hint`);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, hint ? h("p", { class: "hint", id: `${control.id}-hint` }, hint) : null);
}
