// The address of a view: what differs from the page as it opens stands behind the #, so that a link shows the same.
//
// n=500&board=ANCHOR&q=…&sort=-sa&family=…&show=…&hide=…&pair=…&pair=…&board=… : parameters belong to the board before
// them; without any, what follows the # is an ordinary anchor.
(function () {
  "use strict";
  const make = moebench.make, Board = moebench.Board, boards = moebench.boards;
  const LISTS = ["family", "routing", "training", "show", "hide", "pair"];
  let smallest = 0;

  function parse(hash) {
    const found = { n: 0, boards: new Map() };
    if (!hash.includes("=")) { return found; }
    let state = null;
    new URLSearchParams(hash.slice(1)).forEach(function (value, key) {
      if (key === "board") { found.boards.set(value, state = Board.blank()); }
      else if (key === "n") { found.n = Number(value) || 0; }
      else if (state && LISTS.includes(key)) { state[key].push(value); }
      else if (state && (key === "q" || key === "sort")) { state[key] = value; }
    });
    return found;
  }

  function format(shown) {
    const blank = Board.blank(), found = new URLSearchParams();
    if (smallest) { found.append("n", smallest); }
    shown.forEach(function (board) {
      const own = [];
      ["q", "sort"].forEach(function (key) { if (board.state[key] !== blank[key]) { own.push([key, board.state[key]]); } });
      LISTS.forEach(function (key) { board.state[key].forEach(function (value) { own.push([key, value]); }); });
      if (own.length) { [["board", board.anchor]].concat(own).forEach(function ([key, value]) { found.append(key, value); }); }
    });
    return String(found);
  }

  // A link to one board as it stands; to its heading, where nothing differs from how it opens.
  moebench.address = function (board) { return location.href.split("#")[0] + "#" + (format([board]) || board.anchor); };

  function record(replace) {
    const text = format(boards), next = location.pathname + location.search + (text ? "#" + text : "");
    if (location.hash.slice(1) === text) { return; }
    history[replace ? "replaceState" : "pushState"](null, "", next);
  }

  function narrow() {
    document.querySelectorAll("section.board, nav.boards li").forEach(function (part) {
      (part.closest("details.radius") || part).hidden = Number(part.dataset.n) < smallest;
    });
  }

  function start(board) {
    const folded = board.section.closest("details.radius");
    if (folded) { folded.open = true; }
    board.start();
  }

  function apply() {
    const wanted = parse(location.hash);
    smallest = wanted.n;
    if (sizes) { sizes.value = String(smallest); }
    narrow();
    boards.forEach(function (board) {
      const state = wanted.boards.get(board.anchor);
      board.apply(state || Board.blank());
      if (state) { start(board); }
    });
    return boards.find(function (board) { return wanted.boards.has(board.anchor); });
  }

  // Boards of few samples can be left out, where there are boards of different sizes.
  const counts = Array.from(new Set(Array.from(document.querySelectorAll("section.board"), function (one) { return Number(one.dataset.n); })));
  const place = document.querySelector("nav.boards");
  let sizes = null;
  if (place && counts.length > 1) {
    sizes = make("select", { id: "smallest", onchange: function () {
      smallest = Number(sizes.value);
      narrow();
      record(false);
    } }, make("option", { value: "0" }, "any n"), counts.sort(function (a, b) { return a - b; }).slice(1).map(function (n) {
      return make("option", { value: String(n) }, "n ≥ " + n);
    }));
    place.prepend(make("label", { class: "sizes" }, "Samples ", sizes));
  }

  // The first board at once, before the browser lays the page out; others when they come near, folded ones when opened.
  const waiting = new IntersectionObserver(function (entries) {
    entries.filter(function (entry) { return entry.isIntersecting; }).forEach(function (entry) {
      waiting.unobserve(entry.target);
      boards.find(function (board) { return board.section === entry.target; }).start();
    });
  }, { rootMargin: "1000px" });
  boards.forEach(function (board) { board.changed = record; });
  const first = apply();
  boards.slice(0, 1).forEach(function (board) { board.start(); });
  boards.slice(1).forEach(function (board) { waiting.observe(board.section); });
  if (first) { first.section.scrollIntoView(); }
  addEventListener("popstate", apply);
  // A link within the page scrolls; it must not put its anchor in place of the view.
  document.addEventListener("click", function (event) {
    const link = event.target.closest('a[href*="#"]');
    const target = link && !event.defaultPrevented && link.pathname === location.pathname && document.getElementById(link.hash.slice(1));
    if (!target || !format(boards) || event.ctrlKey || event.metaKey || event.shiftKey) { return; }
    event.preventDefault();
    target.scrollIntoView();
    target.tabIndex = -1;
    target.focus({ preventScroll: true });
  });
  addEventListener("beforeprint", function () { boards.forEach(function (board) { if (board.section.offsetParent) { board.start(); } }); });
})();
