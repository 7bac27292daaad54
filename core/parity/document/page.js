"use strict";
// Sorts a table by a click on its head, and filters the table of bounds. Numbers sort by data-v, texts as shown.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => {
        const cell = row.cells[column];
        return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
      };
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        const order = typeof a === "number" && typeof b === "number" ? a - b || 0 : String(a).localeCompare(String(b));
        return up ? order : -order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
const words = document.getElementById("filter");
const only = document.getElementById("only");
function filter() {
  const wanted = words.value.toLowerCase();
  for (const row of document.getElementById("bounds").tBodies[0].rows) {
    const seen = row.textContent.toLowerCase().includes(wanted) && !(only.checked && !row.classList.contains("broken"));
    row.hidden = !seen;
  }
}
words.addEventListener("input", filter);
only.addEventListener("change", filter);
