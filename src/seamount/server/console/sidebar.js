// The list of conversations: open, rename, export, delete. app.js passes what each does.

import { h, iconButton, composing } from "./dom.js";
import { t } from "./i18n.js";

const DAY_MS = 24 * 3600 * 1000;

/** Shows the list in `container`, newest first, under headings by age. */
export function showList(container, conversations, currentId, actions) {
  // Another conversation may change while a title is being typed: the list waits.
  if (container.querySelector(".rename")) return;
  const sorted = [...conversations].sort((a, b) => b.updated - a.updated);
  const focused = container.contains(document.activeElement) ? document.activeElement.closest("li")?.dataset.id : null;
  const groups = new Map();
  for (const each of sorted) {
    const name = ageName(each.updated);
    groups.set(name, [...(groups.get(name) ?? []), each]);
  }
  const parts = [...groups].map(([name, members]) =>
    h("section", {}, h("h2", {}, t(name)), h("ul", {}, ...members.map((each) => item(each, each.id === currentId, actions)))),
  );
  container.replaceChildren(...(parts.length ? parts : [h("p", { class: "hint" }, t("noConversations"))]));
  if (focused) container.querySelector(`li[data-id="${focused}"] .open`)?.focus();
}

function ageName(updatedMs) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (updatedMs >= midnight) return "today";
  return updatedMs >= midnight - 6 * DAY_MS ? "thisWeek" : "older";
}

function item(conversation, isCurrent, actions) {
  const open = h(
    "button",
    { type: "button", class: "open", title: conversation.title, "aria-current": isCurrent && "true", onclick: () => actions.open(conversation.id) },
    conversation.title,
  );
  const row = h(
    "li",
    { "data-id": conversation.id, class: isCurrent ? "current" : null },
    open,
    h(
      "span",
      { class: "item-actions" },
      iconButton("edit", t("rename"), () => startRename(row, conversation, actions)),
      iconButton("download", t("exportOne"), () => actions.export(conversation)),
      iconButton("trash", t("remove"), () => actions.remove(conversation)),
    ),
  );
  return row;
}

function startRename(row, conversation, actions) {
  const input = h("input", { class: "rename", "aria-label": t("renameTitle"), maxlength: 200 });
  input.value = conversation.title;
  let settled = false;
  const finish = (keep) => {
    if (settled) return;
    settled = true;
    input.remove();
    actions.rename(conversation, (keep && input.value.trim()) || conversation.title);
  };
  input.addEventListener("keydown", (event) => {
    if (composing(event)) return;
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") {
      event.stopPropagation();
      finish(false);
    }
  });
  input.addEventListener("blur", () => finish(true));
  row.replaceChildren(input);
  input.focus();
  input.select();
}
