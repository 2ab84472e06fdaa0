document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
  const head = button.parentElement, place = head.cellIndex;
  const table = head.closest("table"), body = table.tBodies[0];
  const down = head.getAttribute("aria-sort") !== "descending" && !head.classList.contains("words")
    || head.getAttribute("aria-sort") === "ascending";
  const key = (row) => row.cells[place].dataset.value;
  const compare = (a, b) => key(a) === "" ? 1 : key(b) === "" ? -1
    : (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b)) * (down ? -1 : 1);
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort(compare));
}));
