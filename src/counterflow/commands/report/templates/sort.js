for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement;
    const column = [...header.parentElement.children].indexOf(header);
    const body = header.closest("table").tBodies[0];
    const descending = header.ariaSort === "ascending";
    const key = (row) => row.cells[column].dataset.order ?? row.cells[column].textContent;
    const compare = (a, b) => (isNaN(a) || isNaN(b) ? String(a).localeCompare(b) : a - b);
    const rows = [...body.rows].sort((a, b) => compare(key(a), key(b)));
    for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
    header.ariaSort = descending ? "descending" : "ascending";
    body.append(...(descending ? rows.reverse() : rows));
  });
}
