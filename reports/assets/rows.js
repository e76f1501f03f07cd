// A row or a view as something to take along: LaTeX, Markdown, BibTeX, CSV, JSON, and the card that offers them.
(function () {
  "use strict";
  const make = moebench.make;
  const Z = 1.959963984540054;

  // The 95 % Wilson interval of k out of n, as everywhere in the report.
  moebench.wilson = function (k, n) {
    const p = k / n, middle = p + Z * Z / (2 * n), half = Z * Math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n));
    return [Math.max(0, Math.min(p, (middle - half) / (1 + Z * Z / n))), Math.min(1, Math.max(p, (middle + half) / (1 + Z * Z / n)))];
  };

  function latexText(text) {
    const special = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "—": "---", "–": "--", "−": "$-$", "≤": "$\\leq$" };
    return text.replace(/[\\{}$&%#_~^—–−≤]/g, function (char) { return special[char] || "\\" + char; })
      .replace(/[^\x20-\x7e]/gu, function (char) { return "\\texttt{U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "}"; });
  }

  function latexCell(cell) {
    if (cell.value === undefined) { return cell.latex || latexText(cell.text); }
    const digits = cell.n >= 1000 ? 2 : 1;
    function points(fraction) { return (100 * fraction).toFixed(digits); }
    return "$" + points(cell.value) + "_{-" + points(cell.value - cell.low) + "}^{+" + points(cell.high - cell.value) + "}$";
  }

  function markdownText(text) { return text.replace(/[\\`*_{}\[\]<>#|~$]/g, "\\$&").replace(/\s+/g, " "); }

  function markdownCell(cell) {
    return cell.interval ? cell.text + " (" + cell.interval + ")" : markdownText(cell.text);
  }

  function bare(heads) { return heads.map(function (head) { return head.label; }); }

  moebench.latex = function (heads, cells) {
    return "% " + bare(heads).map(latexText).join(" & ") + "\n" + cells.map(latexCell).join(" & ") + " \\\\\n";
  };

  moebench.markdown = function (heads, cells) {
    function line(values) { return "| " + values.join(" | ") + " |\n"; }
    return line(bare(heads).map(markdownText)) + line(heads.map(function () { return "---"; })) + line(cells.map(markdownCell));
  };

  // A spreadsheet must run no field as a formula: such text gets a leading apostrophe, as in the report's own CSV.
  function csvField(value) {
    if (value === null || value === undefined) { return ""; }
    let text = String(value);
    if (typeof value === "string" && /^ *[=+\-@\t\r\n]/.test(text)) { text = "'" + text; }
    return /[",\r\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
  }

  moebench.csv = function (records) {
    const names = Object.keys(records[0] || {});
    const lines = [names].concat(records.map(function (record) { return names.map(function (name) { return record[name]; }); }));
    return lines.map(function (line) { return line.map(csvField).join(","); }).join("\n") + "\n";
  };

  // One flat record per row: fractions with their intervals, null where nothing was measured, "n/a" where nothing can be.
  moebench.record = function (facts, heads, cells) {
    const record = Object.assign({}, facts);
    heads.forEach(function (head, at) {
      const cell = cells[at];
      if (!head.measure) {
        record[head.key] = cell.number !== undefined ? cell.number : cell.absent ? null : cell.text;
        return;
      }
      ["", "_low", "_high"].forEach(function (end) {
        const value = cell[end === "" ? "value" : end.slice(1)];
        record[head.key + end] = value !== undefined ? Number(value.toFixed(6)) : cell.text === "n/a" ? "n/a" : null;
      });
    });
    return record;
  };

  // Everything that the row says on hover, for those who cannot hover, and its copies.
  moebench.card = function (row, sections, copies) {
    const shown = make("pre", { class: "copied", tabindex: "0", hidden: true });
    const buttons = copies.map(function ([what, text, why]) {
      return make("button", { type: "button", disabled: text === null, title: text === null ? why : null, onclick: function () {
        shown.hidden = false;
        shown.textContent = text;
        moebench.copy(text, what);
      } }, what);
    });
    const dialog = make("dialog", { class: "card", "aria-label": row.label },
      make("div", { class: "titled" }, make("h3", {}, make("a", { href: row.href }, make("bdi", {}, row.label))),
        make("button", { type: "button", class: "plain", onclick: function () { dialog.close(); } }, "Close")),
      make("p", { class: "copies" }, "Copy this row as ", buttons), shown,
      sections.filter(function (section) { return section[1].length; }).map(function ([title, lines]) {
        return [make("h4", {}, title), make("ul", {}, lines.map(function (line) { return make("li", {}, line); }))];
      }).flat());
    dialog.addEventListener("close", function () { dialog.remove(); });
    dialog.addEventListener("click", function (event) { if (event.target === dialog) { dialog.close(); } });
    document.body.append(dialog);
    dialog.showModal();
  };
})();
