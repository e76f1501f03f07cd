// What every page shares: sorting of its tables by DataTables, and the few helpers that the other scripts use.
//
// A header says how its column sorts: data-sort-method is "quantity" (numbers; cells carry theirs in data-sort, empty
// where there is none), "text" or "none"; data-sort-reverse starts with the largest; aria-sort is the order as written.
// A column "pinned" is never shown: it keeps its rows apart, small numbers above, whatever else the table is sorted by.
window.moebench = (function () {
  "use strict";
  const order = DataTable.ext.type.order;

  // What is missing comes last in both directions.
  function sorter(sign) {
    return function (a, b) {
      if (a === null || b === null) { return (a === null) - (b === null); }
      return a < b ? -sign : a > b ? sign : 0;
    };
  }
  order["quantity-pre"] = function (value) { return value === "" || value === null || isNaN(value) ? null : Number(value); };
  order["text-pre"] = function (value) {
    const words = String(value).replace(/<[^>]*>/g, "").trim().toLowerCase();
    return words === "" || words === "—" ? null : words;
  };
  ["quantity", "text"].forEach(function (type) {
    order[type + "-asc"] = sorter(1);
    order[type + "-desc"] = sorter(-1);
  });
  order["pinned-pre"] = Number;
  order["pinned-asc"] = order["pinned-desc"] = sorter(1);

  function heads(table) { return Array.from(table.tHead.rows[table.tHead.rows.length - 1].cells); }

  function column(head, at, all) {
    const method = head.dataset.sortMethod || "text";
    const pinned = all.findIndex(function (other) { return other.dataset.sortMethod === "pinned"; });
    return {
      targets: at,
      type: method === "none" ? "text" : method,
      orderable: method !== "none",
      // Not orderFixed: with it DataTables announces the direction of the fixed column as that of the chosen one.
      orderData: pinned < 0 ? [at] : [pinned, at],
      visible: method !== "pinned",
      orderSequence: head.hasAttribute("data-sort-reverse") ? ["desc", "asc"] : ["asc", "desc"],
      ariaTitle: head.textContent.trim(),
      searchable: false,
    };
  }

  // Turns a table into one that sorts; `more` are further settings of DataTables.
  function sortable(table, more) {
    const all = heads(table);
    const first = all.findIndex(function (head) { return head.hasAttribute("aria-sort"); });
    // A cell's header is read as its name alone, without the button that DataTables puts into it.
    all.forEach(function (head) { if (head.textContent.trim()) { head.setAttribute("aria-label", head.textContent.trim()); } });
    const made = new DataTable(table, Object.assign({
      autoWidth: false, info: false, paging: false, searching: false, orderDescReverse: false,
      layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
      order: first < 0 ? [] : [[first, all[first].getAttribute("aria-sort") === "descending" ? "desc" : "asc"]],
      columnDefs: all.map(column),
      language: { zeroRecords: "No model matches the search and the filters.",
        aria: { orderable: ": sort", orderableReverse: ": reverse the order", orderableRemove: ": reverse the order" } },
    }, more));
    table.classList.add("sorting");
    table.tHead.addEventListener("keydown", function (event) {
      if (event.key === " " && event.target.matches(".dt-column-order")) {
        event.preventDefault();
        event.target.click();
      }
    });
    return made;
  }

  // Small tables wait until they come near the screen, or are reached by the keyboard.
  const waiting = new IntersectionObserver(function (entries) {
    entries.filter(function (entry) { return entry.isIntersecting; }).forEach(function (entry) {
      waiting.unobserve(entry.target);
      sortable(entry.target);
    });
  }, { rootMargin: "300px" });
  document.querySelectorAll("table.sortable").forEach(function (table) { waiting.observe(table); });

  // An element with attributes, listeners (onclick and the like) and children; text is never read as HTML.
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    Object.entries(attributes || {}).forEach(function ([name, value]) {
      if (typeof value === "function") { element.addEventListener(name.slice(2), value); }
      else if (value === true) { element.setAttribute(name, ""); }
      else if (value !== false && value !== null && value !== undefined) { element.setAttribute(name, value); }
    });
    element.append(...children.flat().filter(function (child) { return child !== null && child !== undefined; }));
    return element;
  }

  return { sortable, heads, make };
})();
