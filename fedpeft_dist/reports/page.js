// Helpers for all scripts of report.html, and the sorting of its tables.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const fill = (element, attributes, text = "") => {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
};
const make = (name, attributes = {}, text = "") => fill(document.createElement(name), attributes, text);
const draw = (name, attributes, text = "") =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, text);

// A click on a heading sorts by its column; a second click turns the order round. Empty cells always come last.
const sortBy = (table, heading) => {
  const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const body = table.tBodies[0];
  const keyOf = (row) => row.cells[heading.cellIndex]?.dataset.sort ?? "";
  const numeric = [...body.rows].every((row) => Number.isFinite(Number(keyOf(row))));
  const compare = (x, y) => {
    if (x === "" || y === "") return (x === "") - (y === "");
    return direction * (numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true }));
  };
  const rows = [...body.rows].sort((a, b) => compare(keyOf(a), keyOf(b)) || a.dataset.row - b.dataset.row);
  for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  body.append(...rows);
};
for (const table of document.querySelectorAll("table.sortable")) {
  for (const heading of table.tHead.rows[0].cells) {
    heading.querySelector("button")?.addEventListener("click", () => sortBy(table, heading));
  }
}
byId("privacy").hidden = !byId("privacy").querySelector("table");
byId("comparisons").hidden = !byId("comparisons").querySelector("table");
