// Two models on the same samples: verdicts from bits, the exact McNemar test, and the panel that shows them.
(function () {
  "use strict";
  const make = moebench.make;

  // The verdicts behind base64 of bits, first sample in the highest bit: an array of 0 and 1.
  function verdicts(text, n) {
    const bytes = atob(text);
    const found = new Uint8Array(n);
    for (let i = 0; i < n; i++) { found[i] = (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1; }
    return found;
  }

  // Twice the lower binomial tail at 1/2, summed from its largest term down; log C(total, low) keeps large counts finite.
  function mcnemar(onlyFirst, onlySecond) {
    const total = onlyFirst + onlySecond, low = Math.min(onlyFirst, onlySecond);
    if (total === 0 || onlyFirst === onlySecond) { return 1; }
    let log = -total * Math.LN2;
    for (let i = 1; i <= low; i++) { log += Math.log((total - low + i) / i); }
    let sum = 1, term = 1;
    for (let k = low; k > 0; k--) {
      term *= k / (total - k + 1);
      sum += term;
      if (term < sum * 1e-17) { break; }
    }
    return Math.min(1, 2 * Math.exp(log + Math.log(sum)));
  }

  function written(p) {
    if (p >= 0.001) { return "= " + p.toFixed(3); }
    if (p < 1e-300) { return "< 10⁻³⁰⁰"; }
    const power = Math.floor(Math.log10(p));
    const digits = "⁰¹²³⁴⁵⁶⁷⁸⁹";
    return "= " + (p / 10 ** power).toFixed(1) + " × 10⁻" + String(-power).replace(/\d/g, function (digit) { return digits[digit]; });
  }

  function samples(one, other) {
    const found = [];
    one.forEach(function (stands, i) { if (stands && !other[i]) { found.push(i); } });
    return found;
  }

  function listed(who, over, found) {
    if (!found.length) { return null; }
    return make("details", {}, make("summary", {}, "Samples that ", name(who), " alone survives (" + found.length + ")"),
      make("p", { class: "mono small" }, found.join(", ")));
  }

  function name(row) { return make("bdi", {}, row.label); }

  function bar(parts, n) {
    return make("div", { class: "split", "aria-hidden": "true" }, parts.filter(function (part) { return part[1]; }).map(function ([kind, size]) {
      const piece = make("span", { class: kind });
      piece.style.flexGrow = size / n;
      return piece;
    }));
  }

  // The panel for two rows of a board; `facts` are [label, first, second] of the columns in sight.
  moebench.comparison = function (n, first, second, facts, close) {
    const a = verdicts(first.standing, n), b = verdicts(second.standing, n);
    const onlyA = samples(a, b), onlyB = samples(b, a);
    const both = a.reduce(function (sum, stands, i) { return sum + (stands & b[i]); }, 0);
    const neither = n - both - onlyA.length - onlyB.length;
    const p = mcnemar(onlyA.length, onlyB.length);
    const points = 100 * (onlyA.length - onlyB.length) / n;
    const verdict = onlyA.length === onlyB.length ? "They survive equally many samples."
      : [name(points > 0 ? first : second), " survives " + Math.abs(points).toFixed(n >= 1000 ? 2 : 1) + " points more; the difference is " +
        (p <= 0.05 ? "significant" : "not significant") + " at 5 %."];
    const title = make("h3", { tabindex: "-1" }, name(first), " against ", name(second));
    return make("section", { class: "compare", "aria-label": "Comparison" },
      make("div", { class: "titled" }, title, make("button", { type: "button", class: "plain", onclick: close }, "Close")),
      make("p", { class: "verdict" }, "On the same " + n + " samples, under all attacks recorded for each: ", verdict),
      bar([["both", both], ["first", onlyA.length], ["second", onlyB.length], ["neither", neither]], n),
      make("dl", { class: "counts" },
        count("both", "both stand", both), count("first", [name(first), " alone stands"], onlyA.length),
        count("second", [name(second), " alone stands"], onlyB.length), count("neither", "both fall", neither),
        make("div", {}, make("dt", {}, "exact McNemar test, two-sided"), make("dd", { "data-p": p, title: String(p) }, "p " + written(p)))),
      listed(first, second, onlyA), listed(second, first, onlyB),
      table(first, second, facts));
  };

  function count(kind, words, value) {
    return make("div", {}, make("dt", {}, make("span", { class: "key " + kind, "aria-hidden": "true" }), words), make("dd", {}, String(value)));
  }

  function table(first, second, facts) {
    const rows = facts.map(function ([label, left, right]) {
      return make("tr", {}, make("th", { scope: "row" }, label), shown(left), shown(right),
        make("td", { class: "num" }, left.value !== undefined && right.value !== undefined
          ? signed(100 * (left.value - right.value)) : make("abbr", { title: "no two accuracies to subtract" }, "—")));
    });
    const head = make("tr", {}, make("th", { scope: "col" }, "Column"), make("th", { scope: "col", class: "num" }, name(first)),
      make("th", { scope: "col", class: "num" }, name(second)), make("th", { scope: "col", class: "num" }, "Difference, points"));
    return make("details", {}, make("summary", {}, "All columns side by side"),
      make("div", { class: "table", role: "region", "aria-label": "All columns side by side", tabindex: "0" },
        make("table", {}, make("thead", {}, head), make("tbody", {}, rows))));
  }

  function signed(points) { return (points > 0 ? "+" : points < 0 ? "−" : "") + Math.abs(points).toFixed(1); }

  function shown(cell) {
    return make("td", { class: "num" }, cell.text || "—", cell.interval ? make("span", { class: "ci" }, cell.interval) : null);
  }

  moebench.mcnemar = mcnemar;
})();
