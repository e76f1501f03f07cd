// Gives every block that is worth copying a button; without scripts it is text to select.
(function () {
  "use strict";
  // Pages opened from disk may be refused the clipboard: then the selection is copied as by hand.
  function byHand(block) {
    var selection = getSelection(), range = document.createRange();
    range.selectNodeContents(block);
    selection.removeAllRanges();
    selection.addRange(range);
    var done = document.execCommand("copy");
    if (done) { selection.removeAllRanges(); }
    return done;
  }

  function copy(block) {
    if (!navigator.clipboard) { return Promise.resolve(byHand(block)); }
    return navigator.clipboard.writeText(block.textContent).then(
      function () { return true; },
      function () { return byHand(block); }
    );
  }

  document.querySelectorAll("pre[data-copy]").forEach(function (block) {
    var button = document.createElement("button"), said = document.createElement("span");
    var words = "Copy " + block.dataset.copy, waiting;
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.setAttribute("aria-label", words);
    said.className = "said";
    said.setAttribute("role", "status");
    block.before(button, said);
    button.addEventListener("click", function () {
      copy(block).then(function (done) {
        button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
        said.textContent = button.textContent;
        clearTimeout(waiting);
        waiting = setTimeout(function () { button.textContent = "Copy"; said.textContent = ""; }, 2500);
      });
    });
  });
})();
