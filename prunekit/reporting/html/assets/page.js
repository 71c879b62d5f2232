// Print everything; sort by a column: ascending, descending, then in the original order. Missing values stay last.
"use strict";
(() => {
  const order = new Intl.Collator("en", { numeric: true });
  const key = (row, column, number) => {
    const cell = row.cells[column];
    if (!number) return cell.textContent;
    return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
  };
  const compare = (number, sign) => (a, b) => {
    if (a.key === b.key) return a.index - b.index;
    if (a.key === null) return 1;
    if (b.key === null) return -1;
    return sign * (number ? a.key - b.key : order.compare(a.key, b.key)) || a.index - b.index;
  };
  // Folded details are printed.
  const folded = [...document.querySelectorAll("details")];
  addEventListener("beforeprint", () => folded.forEach((details) => { details.open = true; }));
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    if (rows.length < 2) continue;
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const next = { ascending: "descending", descending: "none" }[head.ariaSort] ?? "ascending";
        const number = head.dataset.type === "n";
        for (const other of heads) other.removeAttribute("aria-sort");
        let sorted = rows;
        if (next !== "none") {
          head.setAttribute("aria-sort", next);
          sorted = rows
            .map((row, index) => ({ row, index, key: key(row, column, number) }))
            .sort(compare(number, next === "ascending" ? 1 : -1))
            .map((entry) => entry.row);
        }
        body.append(...sorted);
      });
    });
  }
})();
