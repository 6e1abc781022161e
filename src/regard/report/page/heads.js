// The table sorted by a column: first the largest above, then the smallest; heads by their number.
"use strict";
const body = document.querySelector("#heads tbody");
const columns = [...document.querySelectorAll("#heads th")];

function value(row, column) {
  const said = row.cells[column].dataset.value;
  if (said === undefined) return null;
  if (column > 0) return Number(said);
  const [layer, head] = said.split(".").map(Number);
  return layer * 1e5 + head;
}

function sortBy(column) {
  const before = columns[column].getAttribute("aria-sort");
  const first = column === 0 ? "ascending" : "descending";
  const other = column === 0 ? "descending" : "ascending";
  const now = before === first ? other : first;
  columns.forEach((cell, at) => cell.setAttribute("aria-sort", at === column ? now : "none"));
  const sign = now === "ascending" ? 1 : -1;
  const rows = [...body.rows].map((row) => [value(row, column), row]);
  rows.sort(([a], [b]) => (a === null ? 1 : 0) - (b === null ? 1 : 0) || sign * (a - b));
  body.append(...rows.map(([, row]) => row));
}

columns.forEach((cell, column) => cell.firstElementChild.addEventListener("click", () => sortBy(column)));
