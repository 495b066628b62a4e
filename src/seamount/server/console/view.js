// Shows the messages of one conversation. Builds one MessageView per message and lets it grow as the answer streams.
// app.js passes what the buttons do; nothing here changes a conversation.

import { composing, fitHeight, h, icon, iconButton } from "./dom.js";
import { number, t } from "./i18n.js";
import { render } from "./markdown.js";
import { path, versions } from "./conversation.js";
import { drafts } from "./store.js";

/** Rebuilds the whole branch. Returns the views by message id. */
export function showBranch(container, conversation, actions) {
  const shown = conversation ? path(conversation) : [];
  const views = new Map(shown.map((message) => [message.id, new MessageView(conversation, message, actions)]));
  container.replaceChildren(...[...views.values()].map((view) => view.node));
  return views;
}

class MessageView {
  #conversation;
  #message;
  #actions;
  #foot = h("footer", { class: "message-foot" });

  constructor(conversation, message, actions) {
    this.#conversation = conversation;
    this.#message = message;
    this.#actions = actions;
    this.node = h("article", { class: `message ${message.role}`, "data-id": message.id, "aria-label": this.#who() });
    if (message.role === "user") this.#showQuestion();
    else this.#buildAnswer();
  }

  #who() {
    const { role, model } = this.#message;
    return role === "user" ? t("you") : model || t("assistant");
  }

  #showQuestion() {
    const { content } = this.#message;
    const edit = iconButton("edit", t("edit"), () => this.startEdit(), { "data-action": "edit" });
    this.#foot.replaceChildren(this.#versionNav(), h("span", { class: "actions" }, this.#copyButton(), edit));
    this.node.replaceChildren(h("div", { class: "bubble" }, content), this.#foot);
  }

  /** Turns a sent message into a text box. What is typed there is kept as a draft until it is sent or given up. */
  startEdit() {
    const place = `${this.#conversation.id}:${this.#message.id}`;
    const area = h("textarea", { class: "edit-area", "aria-label": t("editLabel") });
    area.value = drafts.get(place) || this.#message.content;
    const close = () => {
      drafts.set(place, "");
      this.#showQuestion();
      this.node.querySelector("[data-action=edit]").focus();
    };
    const save = () => {
      const text = area.value.trim();
      if (!text || !this.#actions.edit(this.#message, text)) return;
      drafts.set(place, "");
    };
    area.addEventListener("input", () => {
      drafts.set(place, area.value);
      fitHeight(area);
    });
    area.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        save();
      }
    });
    const cancel = h("button", { type: "button", class: "button", onclick: close }, t("cancel"));
    const send = h("button", { type: "button", class: "button primary", "data-action": "save-edit", onclick: save }, t("saveEdit"));
    this.node.replaceChildren(h("div", { class: "bubble editing" }, area, h("div", { class: "edit-row" }, cancel, send)));
    fitHeight(area);
    area.focus();
  }

  #buildAnswer() {
    this.thoughts = h("div", { class: "prose" });
    this.summary = h("span", {});
    const summary = h("summary", { onclick: () => (this.touched = true) }, icon("depth"), this.summary, icon("right"));
    this.reasoning = h("details", { class: "reasoning", hidden: true }, summary, this.thoughts);
    this.content = h("div", { class: "prose content" });
    this.notice = h("div", { class: "notice", hidden: true });
    const who = h("header", { class: "message-head" }, h("img", { src: "/console/mark.svg", alt: "", width: 18, height: 18 }), this.#who());
    this.node.append(who, this.reasoning, this.content, this.notice, this.#foot);
    this.update();
  }

  /** Shows what the answer has become. Cheap enough to be called once per frame while it streams. */
  update() {
    const message = this.#message;
    const streaming = message.state === "streaming";
    const labels = { copyCode: t("copyCode"), code: t("code") };
    this.node.classList.toggle("streaming", streaming);
    this.node.setAttribute("aria-busy", String(streaming));
    this.#updateReasoning(message, streaming && !message.content, labels);
    render(this.content, message.content, labels);
    this.#updateNotice(message, streaming);
    if (streaming) {
      const waiting = !message.content && !message.reasoning;
      this.#foot.replaceChildren(...(waiting ? [h("span", { class: "waiting" }, t("waiting"))] : []));
    } else {
      const retry = iconButton("retry", t("retry"), () => this.#actions.retry(message), { "data-action": "retry" });
      this.#foot.replaceChildren(this.#versionNav(), h("span", { class: "actions" }, message.content ? this.#copyButton() : "", retry), statsLine(message));
    }
  }

  #updateReasoning(message, thinkingNow, labels) {
    this.reasoning.hidden = !message.reasoning;
    if (!message.reasoning) return;
    const seconds = Math.round(message.stats?.thoughtS ?? 0);
    this.summary.textContent = thinkingNow ? t("thinkingNow") : seconds < 1 ? t("thoughtBriefly") : t("thoughtFor", { seconds: number(seconds) });
    render(this.thoughts, message.reasoning.trim(), labels);
    // Open until the answer begins, then closed, unless the user has decided.
    if (!this.touched) this.reasoning.open = !message.content;
  }

  #updateNotice(message, streaming) {
    const text = streaming ? null : noticeText(message);
    this.notice.hidden = !text;
    if (!text) return;
    const failed = message.state === "error";
    this.notice.classList.toggle("error", failed);
    if (failed) this.notice.setAttribute("role", "alert");
    const again = h("button", { type: "button", class: "button", "data-action": "try-again", onclick: () => this.#actions.retry(message) }, t("tryAgain"));
    this.notice.replaceChildren(icon("warn"), h("span", {}, text), again);
  }

  #copyButton() {
    return iconButton("copy", t("copy"), (event) => this.#actions.copy(event.currentTarget, this.#message.content), { "data-action": "copy" });
  }

  #versionNav() {
    const all = versions(this.#conversation, this.#message);
    if (all.length < 2) return "";
    const at = all.findIndex((each) => each.id === this.#message.id);
    const step = (name, label, to) =>
      iconButton(name, label, () => this.#actions.showVersion(all[to].id), { disabled: !all[to] });
    const place = h("span", { "aria-label": t("versionOf", { number: at + 1, total: all.length }) }, `${at + 1} / ${all.length}`);
    return h("span", { class: "versions" }, step("left", t("previousVersion"), at - 1), place, step("right", t("nextVersion"), at + 1));
  }
}

function noticeText(message) {
  if (message.state === "error") return errorText(message.error);
  if (message.state === "stopped") return t("stopped");
  if (message.state === "interrupted") return t("interrupted");
  if (message.finish === "length") return t("lengthReached");
  if (message.finish === "abort") return t("abortedByServer");
  return message.content ? null : t("emptyAnswer");
}

function errorText({ kind, message, status, retryAfterS }) {
  if (kind === "network") return t("errorNetwork");
  if (kind === "cut") return t("errorCut");
  if (kind === "stream") return t("errorStream", { message });
  const text = t(status >= 500 ? "errorServer" : "errorHttp", { status, message });
  return retryAfterS ? `${text} ${t("retryAfter", { seconds: number(retryAfterS) })}` : text;
}

function statsLine({ stats }) {
  if (!stats) return "";
  const { tokensPerS, firstTokenS, numAnswerTokens, numPromptTokens, exact } = stats;
  const parts = [
    tokensPerS === null ? null : t("rate", { rate: number(tokensPerS, tokensPerS < 100 ? 1 : 0) }),
    t("firstToken", { seconds: number(firstTokenS, 2) }),
    t(exact ? "answerTokens" : "aboutTokens", { count: number(numAnswerTokens) }),
    numPromptTokens === null ? null : t("promptTokens", { count: number(numPromptTokens) }),
  ];
  return h("span", { class: "stats" }, parts.filter(Boolean).join(" · "));
}
