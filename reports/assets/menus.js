// Menus of check boxes, copying, downloads: the furniture of a leaderboard.
(function () {
  "use strict";
  const make = moebench.make;

  // A menu that opens below its name. `options` are [value, label]; `chosen` holds the ticked values.
  moebench.menu = function (name, options, chosen, changed, extra) {
    const boxes = options.map(function ([value, label]) {
      return make("label", {}, make("input", { type: "checkbox", value: value }), label);
    });
    const note = make("span", { class: "chosen" });
    const menu = make("details", { class: "menu" },
      make("summary", {}, name, note),
      make("div", { class: "sheet", role: "group", "aria-label": name }, extra || [], boxes));
    function inputs() { return boxes.map(function (box) { return box.firstChild; }); }
    menu.addEventListener("change", function (event) {
      if (event.target.checked) { chosen.add(event.target.value); } else { chosen.delete(event.target.value); }
      changed();
    });
    return { node: menu, show: function (words) {
      inputs().forEach(function (box) { box.checked = chosen.has(box.value); });
      note.textContent = words;
    } };
  };

  // One menu at a time: a click elsewhere or Escape closes it.
  document.addEventListener("click", function (event) {
    document.querySelectorAll("details.menu[open]").forEach(function (menu) {
      if (!menu.contains(event.target)) { menu.open = false; }
    });
  });
  document.addEventListener("keydown", function (event) {
    const menu = event.key === "Escape" && document.activeElement.closest("details.menu[open]");
    if (menu) {
      menu.open = false;
      menu.querySelector("summary").focus();
    }
  });

  // A line that screen readers speak and that goes by itself.
  const status = make("p", { class: "status", role: "status" });
  document.body.append(status);
  let timer = 0;
  moebench.say = function (words) {
    status.textContent = words;
    clearTimeout(timer);
    timer = setTimeout(function () { status.textContent = ""; }, 4000);
  };

  moebench.copy = function (text, what) {
    function done() { moebench.say(what + " copied"); }
    function byHand() {
      const area = make("textarea", { class: "offscreen", "aria-hidden": "true", tabindex: "-1" });
      (document.querySelector("dialog[open]") || document.body).append(area);
      area.value = text;
      area.select();
      const copied = document.execCommand("copy");
      area.remove();
      if (copied) { done(); } else { moebench.say("The browser refuses to copy; select the text and copy it by hand"); }
    }
    if (navigator.clipboard) { navigator.clipboard.writeText(text).then(done, byHand); } else { byHand(); }
  };

  moebench.download = function (name, type, text) {
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: type })), download: name });
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 10000);
  };
})();
