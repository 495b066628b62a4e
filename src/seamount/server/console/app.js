// Puts the page together: which conversation is open, what each button and key does.

import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { exportDocument } from "./conversation.js";
import { $, composing, copyText, download, h, icon } from "./dom.js";
import { t } from "./i18n.js";
import { KeyDialog } from "./keydialog.js";
import { KeysPage } from "./keys.js";
import { Models } from "./models.js";
import { dismissPanel, isCovered, isNarrow, restPanels, togglePanel, watchWidth } from "./panels.js";
import { StickyScroll } from "./scroll.js";
import { Settings } from "./settings.js";
import { showList } from "./sidebar.js";
import { memoryStore, openStore } from "./store.js";
import { showBranch } from "./view.js";

const TOAST_MS = 7000;

const settings = new Settings();
const models = new Models(settings);
const scroll = new StickyScroll($("log"), $("jump"));
const composer = new Composer({ send, editLast });
const keyDialog = new KeyDialog(tryKey);
const keysPage = new KeysPage({ copy, refused: loadModels });
let chat;
let currentId = null;
let views = new Map();
const stale = new Set();

const current = () => chat.conversations.get(currentId);

// --- what is shown ---

function showCurrent() {
  const conversation = current();
  views = showBranch($("messages"), conversation, messageActions);
  $("welcome").hidden = Boolean(conversation);
  $("title").textContent = conversation?.title || t("newChat");
  document.title = conversation ? `${conversation.title} · Seamount` : "Seamount";
  composer.setRunning(chat.running(currentId));
  scroll.follow();
}

function showSidebar() {
  showList($("conversation-list"), chat.conversations.values(), currentId, listActions);
}

function changed(kind, conversation, message) {
  const here = conversation.id === currentId;
  if (kind === "list") showSidebar();
  if (here && kind === "list" && current()) $("title").textContent = conversation.title;
  if (here && kind === "list" && !current()) open(null);
  if (here && kind === "branch") showCurrent();
  if (here && kind === "message") refresh(message);
  if (kind === "run") showRun(conversation, message, here);
}

/** Redraws a growing answer once per frame, however many chunks came in between. */
function refresh(message) {
  if (!stale.size) {
    requestAnimationFrame(() => {
      for (const id of stale) views.get(id)?.update();
      stale.clear();
      scroll.follow();
    });
  }
  stale.add(message.id);
}

function showRun(conversation, message, here) {
  const state = { streaming: "statusWorking", done: "statusDone", stopped: "statusStopped" }[message.state];
  if (here) composer.setRunning(chat.running(conversation.id));
  // The server may be gone, or serve another model by now: the top bar finds out.
  if (message.state === "error") loadModels();
  // An error speaks for itself (role=alert).
  if (here && state) $("status").textContent = t(state);
}

function showTexts() {
  settings.applyLanguage();
  settings.showPanel(showThinking);
  models.show();
  if (keysPage.isOpen) keysPage.open();
  const examples = ["compute", "extract", "mask", "ask"].map((name) =>
    h("button", { type: "button", class: "example", onclick: () => useExample(t(`${name}Example`)) }, h("b", {}, t(name)), t(`${name}Example`)),
  );
  $("examples").replaceChildren(...examples);
  showThinking();
}

function showThinking() {
  $("think").setAttribute("aria-pressed", String(settings.thinking));
}

function toast(text, undo) {
  const button = undo && h("button", { type: "button", class: "button", onclick: () => (undo(), ($("toast").hidden = true)) }, t("undo"));
  $("toast").replaceChildren(h("span", {}, text), ...(button ? [button] : []));
  $("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => ($("toast").hidden = true), TOAST_MS);
}

// --- who asks ---

/** Asks for the models, and for a key where the server wants one. */
async function loadModels() {
  await models.load();
  if (models.refusal !== null) keyDialog.ask(models.refusal);
}

/** Asks with the key as it is now; the server's word where it refuses it, else null. */
async function tryKey() {
  await models.load();
  if (models.refusal === null && keysPage.isOpen) keysPage.open();
  return models.refusal;
}

/** Shows the keys, or the conversation again. */
function showKeys(shown) {
  $("log").hidden = $("dock").hidden = shown;
  if (!shown) return keysPage.close();
  $("title").textContent = t("keysTitle");
  document.title = `${t("keysTitle")} · Seamount`;
  keysPage.open();
}

// --- what the user does ---

/** Opens a conversation, or a new one for null. The address keeps it, so that a reload comes back here. */
function open(id) {
  showKeys(false);
  currentId = chat.conversations.has(id) ? id : null;
  const hash = currentId ? `#c=${currentId}` : "";
  if (location.hash !== hash) history.pushState(null, "", hash || location.pathname);
  composer.open(currentId);
  showCurrent();
  showSidebar();
  if (currentId) scroll.toEnd();
  else scroll.rest();
  // On a phone the focus would bring up the keyboard, over what was asked for.
  if (isNarrow()) restPanels();
  else composer.focus();
}

function send(text) {
  const before = currentId;
  const conversation = chat.send(currentId, text);
  if (before !== conversation.id) open(conversation.id);
  scroll.toEnd();
}

function editLast() {
  const last = [...views.values()].reverse().find((view) => view.node.classList.contains("user"));
  if (!last || chat.running(currentId)) return false;
  last.startEdit();
  return true;
}

function useExample(text) {
  composer.setText(text);
  composer.focus();
}

async function copy(button, text) {
  if (!(await copyText(text))) return toast(t("copyFailed"));
  button.replaceChildren(icon("check"));
  $("status").textContent = t("copied");
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

const messageActions = {
  copy,
  retry: (message) => chat.running(currentId) || (chat.retry(current(), message), scroll.toEnd()),
  showVersion: (id) => chat.running(currentId) || chat.showVersion(current(), id),
  edit(message, text) {
    if (chat.running(currentId)) return false;
    chat.edit(current(), message, text);
    scroll.toEnd();
    composer.focus();
    return true;
  },
};

const fileName = (name) => `seamount-${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}.json`;

const listActions = {
  open,
  rename: (conversation, title) => chat.rename(conversation, title),
  export: (conversation) => download(fileName(conversation.title), exportDocument([conversation], Date.now())),
  remove: (conversation) => toast(t("removed"), chat.remove([conversation.id])),
};

const actions = {
  "new-chat": () => open(null),
  key: () => keyDialog.open(),
  keys() {
    if (location.hash !== "#keys") history.pushState(null, "", "#keys");
    showKeys(true);
    if (isNarrow()) restPanels();
  },
  "leave-keys": () => open(currentId),
  stop: () => chat.stop(currentId),
  jump: () => scroll.toEnd(),
  language() {
    settings.nextLanguage();
    showTexts();
    showCurrent();
    showSidebar();
  },
  theme: () => settings.nextTheme(),
  think() {
    settings.set("thinking", !settings.thinking);
    settings.showPanel(showThinking);
    showThinking();
  },
  "toggle-sidebar": () => togglePanel("sidebar"),
  "toggle-settings": () => togglePanel("settings"),
  "dismiss-panel": dismissPanel,
  reset() {
    settings.reset();
    settings.showPanel(showThinking);
    showThinking();
  },
  "export-all": () => download(fileName("conversations"), exportDocument([...chat.conversations.values()], Date.now())),
  "remove-all": () => toast(t("allRemoved"), chat.remove([...chat.conversations.keys()])),
  "copy-code": (button) => copy(button, button.closest(".code-block").querySelector("code").textContent),
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (button) actions[button.dataset.action]?.(button);
});

document.addEventListener("keydown", (event) => {
  if (composing(event) || event.defaultPrevented || keyDialog.isOpen) return;
  const typing = event.target.closest("input, textarea, select");
  if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    open(null);
  } else if (event.key === "Escape") {
    // Stopping comes first, unless a panel hides the answer.
    if (!isCovered() && chat.running(currentId)) chat.stop(currentId);
    else dismissPanel();
  } else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    composer.focus();
  }
});

// --- start ---

async function start() {
  settings.applyLanguage();
  settings.watchSystemTheme();
  let store = memoryStore;
  try {
    store = await openStore();
  } catch {
    toast(t("notKept"));
  }
  const onSaveError = (error) => toast(t("saveFailed", { message: error.message }));
  chat = new Chat({ store, settings, findModels: loadModels, changed, onSaveError });
  await chat.load();
  showTexts();
  restPanels();
  watchWidth();
  const fromAddress = () => (location.hash === "#keys" ? showKeys(true) : open(location.hash.replace(/^#c=/, "")));
  fromAddress();
  addEventListener("popstate", fromAddress);
  addEventListener("pagehide", () => chat.leave());
  addEventListener("pageshow", () => chat.comeBack());
  document.documentElement.dataset.ready = "true";
  await loadModels();
}

start();
