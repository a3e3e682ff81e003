"use strict";
const form = document.querySelector("form"), boards = [...document.querySelectorAll("section.board")];
const ofBoards = ["protocol", "norm", "epsilon", "data"];

function filter() {
  let rows = 0, shown = 0;
  for (const board of boards) {
    let left = 0;
    for (const each of board.querySelectorAll("[data-base]")) {
      each.toggleAttribute("hidden", form.base.value !== "" && each.dataset.base !== form.base.value);
      left += each.matches("tr:not([hidden])");
    }
    const fits = ofBoards.every((name) => form[name].value === "" || board.dataset[name] === form[name].value);
    board.hidden = !fits || left === 0;
    rows += board.hidden ? 0 : left;
    shown += !board.hidden;
  }
  document.querySelector(".count").textContent =
    shown === 0 ? "Nothing fits these filters." : `${rows} rows on ${shown} board${shown === 1 ? "" : "s"}.`;
}

function sort(button) {
  const head = button.closest("th"), table = head.closest("table"), column = head.cellIndex;
  const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : head.dataset.first === "down";
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0], value = (row) => row.cells[column].dataset.value;
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what has no figure stays below
    const found = head.dataset.kind === "number" ? Number(x) - Number(y) : x.localeCompare(y);
    return down ? -found : found;
  };
  body.append(...[...body.rows].sort(order));
}

for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sort(button));
for (const row of document.querySelectorAll("tbody tr")) {
  const point = row.dataset.point && document.getElementById(row.dataset.point);
  if (!point) continue;
  for (const [one, other] of [[row, point], [point, row]]) {
    for (const [event, lit] of [["mouseenter", true], ["mouseleave", false], ["focusin", true], ["focusout", false]])
      one.addEventListener(event, () => [one, other].forEach((each) => each.classList.toggle("lit", lit)));
  }
}
form.addEventListener("change", filter);
form.hidden = false;
filter();
