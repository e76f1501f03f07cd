// One leaderboard: DataTables sorts it and shows its columns; search, filters and comparison are one state, which
// address.js keeps in the page's address.
(function () {
  "use strict";
  const make = moebench.make;
  const FILTERS = [["family", "Family"], ["routing", "Routing"], ["training", "Training"]];
  const MEASURES = /^(ra_worst|sa|ra|ra_\w+|ra\[.*\])$/s;
  const NONE = "none stated";

  function words(node) { return node.textContent.replace(/\s+/g, " ").trim(); }
  function fold(text) { return text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase(); }

  class Board {
    constructor(section) {
      this.section = section;
      this.anchor = section.querySelector("h2").id;
      this.table = section.querySelector("table.ranking");
      this.state = Board.blank();
      this.started = false;
      this.changed = function () {};
    }

    static blank() { return { q: "", sort: "-ra_worst", family: [], routing: [], training: [], show: [], hide: [], pair: [] }; }

    // Reads the table once, before DataTables takes cells of hidden columns out of it.
    start() {
      if (this.started) { return; }
      this.started = true;
      this.data = JSON.parse(this.section.querySelector(':scope script[type="application/json"]').textContent);
      this.n = this.data.protocol.n;
      this.heads = moebench.heads(this.table).map(function (head, at) {
        return { at: at, key: head.dataset.key, label: words(head), measure: MEASURES.test(head.dataset.key), off: "off" in head.dataset };
      });
      this.heads.byKey = new Map(this.heads.map(function (head) { return [head.key, head]; }));
      this.rows = Array.from(this.table.tBodies[0].rows, this.row, this);
      this.furnish();
      this.dt = moebench.sortable(this.table, {
        searching: true,
        order: [[this.heads.byKey.get("ra_worst").at, "desc"]],
      });
      this.dt.search.fixed("view", (text, data, at) => this.matches(this.rows[at]));
      this.dt.on("order", () => this.sorted());
      this.listen();
      this.refresh();
    }

    row(tr, at) {
      const cells = Array.from(tr.cells);
      const link = cells[1].querySelector("a");
      const paper = this.data.paper[at];
      const bibtex = paper === null ? null : this.data.papers[paper];
      const row = { at: at, tr: tr, cells: cells, label: words(link), href: link.getAttribute("href"), key: this.data.keys[at],
        standing: this.data.standing[at], bibtex: bibtex };
      FILTERS.forEach(([key]) => { row[key] = this.value(row, key); });
      return row;
    }

    // What the search looks at: the words of a row, and the authors and the title of its paper.
    text(row) {
      row.text = row.text || fold([row.label, row.family, row.routing, row.training, this.cell(row, "venue").text,
        this.cell(row, "flags").text, row.bibtex || ""].join(" "));
      return row.text;
    }

    value(row, key) {
      const cell = this.cell(row, key);
      return cell.absent ? NONE : cell.text;
    }

    // What a cell holds, from its text and from the count or quantity that it sorts by.
    cell(row, key) {
      const head = this.heads.byKey.get(key), node = row.cells[head.at];
      const absent = node.querySelector(":scope > abbr");
      if (absent) { return { text: words(absent), absent: true, why: absent.title }; }
      const small = node.querySelector("small"), sort = node.dataset.sort;
      if (head.measure) {
        const k = Number(sort), n = Number(node.dataset.n || this.n), [low, high] = moebench.wilson(k, n);
        return { text: words(node.firstChild), interval: words(small), k, n, value: k / n, low, high };
      }
      if (key === "model") { return { text: row.label, latex: this.data.latex[row.at] }; }
      if (key === "flags") { return { text: Array.from(node.children, words).join("; ") }; }
      const main = words(small ? node.firstElementChild || node.firstChild : node);
      if (key === "rank") { return { text: words(node.firstChild), number: Number(sort) }; }
      if (key === "claimed") { return { text: main + ", " + words(small) }; }
      if (sort !== undefined && sort !== "" && !isNaN(sort)) { return { text: main, number: Number(sort) }; }
      return { text: main };
    }

    // Rows ------------------------------------------------------------------------------------------------------------

    matches(row) {
      const wanted = fold(this.state.q).split(/\s+/).filter(Boolean);
      return wanted.every((word) => this.text(row).includes(word)) && FILTERS.every(([key]) => {
        return !this.state[key].length || this.state[key].includes(row[key]);
      });
    }

    seen() { return this.dt.rows({ order: "applied", search: "applied" }).indexes().toArray().map((at) => this.rows[at]); }

    columns() { return this.heads.filter((head) => head.key !== "unranked" && this.visible(head)); }

    visible(head) { return head.off ? this.state.show.includes(head.key) : !this.state.hide.includes(head.key); }

    // Furniture -------------------------------------------------------------------------------------------------------

    furnish() {
      this.search = make("input", { type: "search", placeholder: "Search models, papers …", "aria-label": "Search " + this.data.name, autocomplete: "off", spellcheck: "false" });
      this.menus = FILTERS.map(([key, name]) => {
        const values = Array.from(new Set(this.rows.map(function (row) { return row[key]; }))).sort();
        if (values.length < 2) { return null; }
        const chosen = new Set();
        const menu = moebench.menu(name, values.map(function (value) { return [value, value]; }), chosen, () => this.change({ [key]: Array.from(chosen).sort() }));
        return { key, chosen, menu, node: menu.node };
      }).filter(Boolean);
      this.chosenColumns = new Set();
      const optional = this.heads.filter(function (head) { return !["model", "rank", "ra_worst", "unranked"].includes(head.key); });
      const plain = { type: "button", class: "plain" };
      this.columnMenu = moebench.menu("Columns", optional.map(function (head) { return [head.key, head.label]; }), this.chosenColumns, () => this.choose(optional), [
        make("div", { class: "row" },
          make("button", Object.assign({ onclick: () => this.change({ show: [], hide: [] }) }, plain), "Default"),
          make("button", Object.assign({ onclick: () => this.change({ show: optional.filter((head) => head.off).map((head) => head.key), hide: [] }) }, plain), "All")),
      ]);
      this.tally = make("span", { class: "tally", role: "status" });
      this.reset = make("button", Object.assign({ onclick: () => this.change({ q: "", family: [], routing: [], training: [] }) }, plain), "Clear");
      const button = { type: "button" };
      this.panel = make("div", {});
      const bar = make("div", { class: "toolbar", role: "group", "aria-label": "View of " + this.data.name },
        this.search, this.menus.map(function (one) { return one.node; }), this.columnMenu.node,
        make("span", { class: "found" }, this.tally, this.reset),
        make("span", { class: "exports" },
          make("button", Object.assign({ onclick: () => this.save("csv") }, button), "CSV"),
          make("button", Object.assign({ onclick: () => this.save("json") }, button), "JSON"),
          make("button", Object.assign({ onclick: () => moebench.copy(moebench.address(this), "Link to this view") }, button), "Copy link")));
      this.table.closest(".table").before(bar, this.panel);
      this.rows.forEach(this.equip, this);
    }

    equip(row) {
      row.box = make("input", { type: "checkbox", "aria-label": "Compare " + row.label, title: "Pick two models to compare them" });
      row.cells[1].append(make("span", { class: "tools" }, make("label", {}, row.box),
        make("button", { type: "button", class: "more", "aria-label": "Reasons and citation of " + row.label, title: "Reasons, copy as LaTeX, Markdown, BibTeX" }, "⋯")));
    }

    choose(optional) {
      const wanted = this.chosenColumns;
      this.change({
        show: optional.filter(function (head) { return head.off && wanted.has(head.key); }).map(function (head) { return head.key; }),
        hide: optional.filter(function (head) { return !head.off && !wanted.has(head.key); }).map(function (head) { return head.key; }),
      });
    }

    listen() {
      let typing = false;
      this.search.addEventListener("input", () => {
        this.change({ q: this.search.value }, typing);
        typing = true;
      });
      this.search.addEventListener("blur", function () { typing = false; });
      const body = this.table.tBodies[0];
      const rowOf = (node) => this.rows.find(function (row) { return row.tr === node.closest("tr"); });
      body.addEventListener("change", (event) => this.pick(rowOf(event.target)));
      body.addEventListener("click", (event) => {
        const flag = event.target.closest('a.flag[href^="#"]');
        if (flag || event.target.closest("button.more")) {
          event.preventDefault();
          this.open(rowOf(event.target));
        }
      });
      body.addEventListener("pointerover", (event) => this.explain(event.target, rowOf));
    }

    // Titles are made when the pointer comes, so that the page need not carry thousands of them.
    explain(target, rowOf) {
      const flag = target.closest('a.flag[href^="#"]'), cell = target.closest("td");
      if (flag && !flag.title) { flag.title = this.reason(flag); }
      if (!cell || cell.title || cell.querySelector("abbr")) { return; }
      const row = rowOf(cell), head = row && this.heads[row.cells.indexOf(cell)];
      if (head && head.measure) { cell.title = this.basis(row, head.key); }
    }

    reason(flag) { return words(document.getElementById(flag.hash.slice(1)).querySelector("span")); }

    basis(row, key) {
      const cell = this.cell(row, key);
      const names = { ra_worst: 0, ra: 1 }[key], base = names === undefined ? null : this.data.basis[row.at][names];
      const what = key === "sa" ? " unperturbed samples are right" : " samples stand" + (base === null ? "" : " after " + this.data.bases[base]);
      return cell.k + " of " + cell.n + what;
    }

    open(row) {
      const columns = this.columns(), cells = columns.map((head) => this.cell(row, head.key));
      const flags = Array.from(row.cells[this.heads.byKey.get("flags").at].querySelectorAll("a"));
      const doubts = Array.from(this.section.querySelectorAll('li[id^="why-' + this.anchor + "-" + row.at + '-"]'), (item) => {
        return words(item).slice(words(item.querySelector("strong")).length + 2);
      });
      const rest = ["ra_worst", "ra", "sa"].filter((key) => !this.cell(row, key).absent)
        .map((key) => this.heads.byKey.get(key).label + ": " + this.basis(row, key));
      const absent = this.heads.filter((head) => head.key !== "unranked" && head.key !== "flags")
        .map((head) => [head.label, this.cell(row, head.key)]).filter(function ([, cell]) { return cell.absent; })
        .map(function ([label, cell]) { return label + ": " + cell.why; });
      const said = ["claimed", "gap"].flatMap((key) => Array.from(row.cells[this.heads.byKey.get(key).at].querySelectorAll("a.flag[title], span[title]"), function (node) { return node.title; }));
      moebench.card(row, [
        ["Reasons for doubt", flags.length ? doubts : []], ["What the numbers rest on", rest], ["Of the claim", said],
        ["Not there", absent], ["Weights", ["SHA-256 " + this.data.weights[row.at]]],
      ], [
        ["LaTeX", moebench.latex(columns, cells)], ["Markdown", moebench.markdown(columns, cells)],
        ["BibTeX", row.bibtex, "no paper is known for this model"],
      ]);
    }

    pick(row) {
      let pair = this.picked || this.state.pair;
      pair = row.box.checked ? pair.concat(row.key).slice(-2) : pair.filter(function (key) { return key !== row.key; });
      this.picked = pair.length === 1 ? pair : null;
      moebench.say(this.picked ? this.rows.find((one) => one.key === pair[0]).label + " picked; pick a second model to compare" : "");
      this.change({ pair: pair.length === 2 ? pair : [] });
      const title = this.panel.querySelector("h3");
      if (title) {
        title.focus({ preventScroll: true });
        this.panel.scrollIntoView({ block: "nearest" });
      }
    }

    compare() {
      const pair = this.state.pair.map((key) => this.rows.find(function (row) { return row.key === key; }));
      if (pair.length < 2 || pair.includes(undefined)) {
        this.panel.replaceChildren();
        return;
      }
      const facts = this.heads.filter(function (head) { return !["model", "unranked"].includes(head.key); })
        .map((head) => [head.label, this.cell(pair[0], head.key), this.cell(pair[1], head.key)]);
      this.panel.replaceChildren(moebench.comparison(this.n, pair[0], pair[1], facts, () => {
        this.change({ pair: [] });
        pair[0].box.focus();
      }));
    }

    save(kind) {
      const columns = this.columns();
      const records = this.seen().map((row) => moebench.record(kind === "csv" ? Object.assign({}, this.data.protocol) : {}, columns,
        columns.map((head) => this.cell(row, head.key))));
      const text = kind === "csv" ? moebench.csv(records)
        : JSON.stringify({ leaderboard: this.data.protocol, rows: records }, null, 1) + "\n";
      moebench.download(this.anchor + "." + kind, kind === "csv" ? "text/csv" : "application/json", text);
    }

    // State -----------------------------------------------------------------------------------------------------------

    change(part, replace) {
      Object.assign(this.state, part);
      this.refresh();
      this.changed(Boolean(replace));
    }

    sorted() {
      if (this.applying) { return; }
      const [at, direction] = this.dt.order()[0];
      this.state.sort = (direction === "desc" ? "-" : "") + this.heads[at].key;
      this.changed(false);
    }

    apply(state) {
      Object.assign(this.state, Board.blank(), state);
      this.picked = null;
      if (this.started) { this.refresh(); }
    }

    refresh() {
      const state = this.state;
      this.applying = true;
      const sort = this.heads.byKey.get(state.sort.replace(/^-/, "")) || this.heads.byKey.get("ra_worst");
      this.dt.order([[sort.at, state.sort.startsWith("-") ? "desc" : "asc"]]);
      this.heads.filter((head) => head.key !== "unranked").forEach((head) => {
        if (this.dt.column(head.at).visible() !== this.visible(head)) { this.dt.column(head.at).visible(this.visible(head), false); }
      });
      this.dt.draw();
      this.applying = false;
      if (this.search.value !== state.q) { this.search.value = state.q; }
      this.menus.forEach(function (one) {
        one.chosen.clear();
        state[one.key].forEach(function (value) { one.chosen.add(value); });
        one.menu.show(state[one.key].length ? state[one.key].join(", ") : "");
      });
      this.chosenColumns.clear();
      this.heads.filter((head) => this.visible(head)).forEach((head) => this.chosenColumns.add(head.key));
      this.columnMenu.show("");
      const pair = this.picked || state.pair;
      this.rows.forEach(function (row) { row.box.checked = pair.includes(row.key); });
      const left = this.dt.rows({ search: "applied" }).count(), all = this.rows.length;
      this.tally.textContent = (left === all ? "" : left + " of ") + all + (all === 1 ? " model" : " models");
      this.reset.hidden = !state.q && FILTERS.every(function ([key]) { return !state[key].length; });
      this.compare();
    }
  }

  moebench.boards = Array.from(document.querySelectorAll("section.board")).filter(function (section) {
    return section.querySelector("table.ranking");
  }).map(function (section) { return new Board(section); });
  moebench.Board = Board;
})();
