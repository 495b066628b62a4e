// The two sides of the page: conversations on the left, parameters on the right. On a narrow page they lie over the log,
// one at a time, with a scrim below them; on a wide one they stand beside it.

import { $ } from "./dom.js";

const narrow = matchMedia("(max-width: 800px)");

export const isNarrow = () => narrow.matches;

/** Opens or closes "sidebar" or "settings"; the focus goes in with it, and back to its button. */
export function togglePanel(name) {
  const opened = name === "sidebar" ? !document.body.classList.toggle("sidebar-shut") : !($("settings").hidden = !$("settings").hidden);
  show();
  if (!opened) $(`toggle-${name}`).focus();
  else if (narrow.matches) $(name === "sidebar" ? "new-chat" : "system").focus();
}

/** Brings both sides to where they begin: closed, but for the conversations of a wide page. */
export function restPanels() {
  document.body.classList.toggle("sidebar-shut", narrow.matches);
  $("settings").hidden = true;
  show();
}

/** Closes what lies over the log, or the parameters. False where there was nothing to close. */
export function dismissPanel() {
  if (!$("settings").hidden) togglePanel("settings");
  else if (!$("scrim").hidden) togglePanel("sidebar");
  else return false;
  return true;
}

/** True while a panel lies over the log. */
export const isCovered = () => !$("scrim").hidden;

export function watchWidth() {
  narrow.addEventListener("change", restPanels);
}

function show() {
  const sidebarOpen = !document.body.classList.contains("sidebar-shut");
  const covered = narrow.matches && (sidebarOpen || !$("settings").hidden);
  $("toggle-sidebar").setAttribute("aria-expanded", String(sidebarOpen));
  $("toggle-settings").setAttribute("aria-expanded", String(!$("settings").hidden));
  $("scrim").hidden = !covered;
  // What lies under the scrim must not take the focus.
  $("main").inert = covered;
}
