// The theme that a reader chose, before the first paint; automatic follows the system.
(function () {
  "use strict";
  const KEY = "moebench-theme";
  const root = document.documentElement;

  // Storage may be refused, as in private windows; the choice then lasts for this page.
  function recall() {
    try { return localStorage.getItem(KEY) || ""; } catch (error) { return ""; }
  }
  function remember(theme) {
    try { if (theme) { localStorage.setItem(KEY, theme); } else { localStorage.removeItem(KEY); } } catch (error) { /* see above */ }
  }
  function apply(theme) {
    if (theme === "light" || theme === "dark") { root.dataset.theme = theme; } else { delete root.dataset.theme; }
  }

  apply(recall());
  document.addEventListener("DOMContentLoaded", function () {
    const choice = document.getElementById("theme");
    choice.value = root.dataset.theme || "";
    choice.closest("label").hidden = false;
    choice.addEventListener("change", function () {
      apply(choice.value);
      remember(choice.value);
      document.dispatchEvent(new CustomEvent("themechange"));
    });
    addEventListener("storage", function (event) {
      if (event.key !== KEY) { return; }
      apply(event.newValue || "");
      choice.value = root.dataset.theme || "";
      document.dispatchEvent(new CustomEvent("themechange"));
    });
  });
})();
