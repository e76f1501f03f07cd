(function () {
  "use strict";
  // Missing values sort below every number; tablesort reverses what this gives for ascending order.
  function number(text) {
    return text === "" ? -Infinity : Number(text);
  }
  Tablesort.extend("quantity", function () { return false; }, function (a, b) {
    var left = number(a), right = number(b);
    return left === right ? 0 : right > left ? 1 : -1;
  });
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var sorter = new Tablesort(table);
    sorter.current = table.querySelector("th[aria-sort]") || undefined;
    table.classList.add("sorting");
    table.querySelectorAll("thead tr:last-child th").forEach(function (head) {
      head.addEventListener("keydown", function (event) {
        if (event.key === " ") {
          event.preventDefault();
          head.click();
        }
      });
    });
  });
})();
