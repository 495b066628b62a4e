// Sets theme and language on <html> before the first paint, so that nothing flashes.
// A classic script on purpose: modules run after the page is parsed. settings.js takes over later.
(() => {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem("seamount.settings")) || {};
  } catch {
    // Storage is shut or holds something else: the defaults below are right then.
  }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const root = document.documentElement;
  root.dataset.theme = kept.theme === "light" || kept.theme === "dark" ? kept.theme : dark ? "dark" : "light";
  const language = kept.language || navigator.language || "en";
  root.lang = language.toLowerCase().startsWith("zh") ? "zh-CN" : "en";
})();
