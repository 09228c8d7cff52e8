"use strict";
(() => {
  const CONFIG = {
    displaylogo: false, responsive: true, scrollZoom: false,
    modeBarButtons: [["toImage"]], toImageButtonOptions: { format: "svg" },
  };
  const PRINT_WIDTH = 680; // A4 between its margins, in CSS pixels
  const PAGE_ROWS = 200;
  const figures = [...document.querySelectorAll("[data-figure]")];
  const make = (tag, text) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Not every choice goes with every other one (damage has one pool): those that don't are greyed.
  function viewKey(figure, keys) {
    let key = "";
    for (const select of figure.querySelectorAll("select")) {
      const goes = (option) => {
        const start = key + option.value;
        return keys.some((k) => k === start || k.startsWith(`${start}|`));
      };
      for (const option of select.options) option.disabled = !goes(option);
      if (select.selectedOptions[0]?.disabled) {
        const first = [...select.options].findIndex((option) => !option.disabled);
        if (first >= 0) select.selectedIndex = first;
      }
      key += `${select.value}|`;
    }
    return key.slice(0, -1);
  }

  function draw(figure) {
    const script = figure.querySelector("script");
    const views = (figure.views ??= JSON.parse(script.textContent));
    const key = viewKey(figure, Object.keys(views));
    const plot = figure.querySelector(".plot");
    const view = views[key];
    plot.hidden = !view;
    figure.querySelector(".empty").hidden = Boolean(view);
    figure.drawn = true;
    if (view) Plotly.react(plot, structuredClone(view.data), structuredClone(view.layout), CONFIG);
  }

  // A page of many maps opens at once: a figure is drawn when it comes near the window.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !entry.target.drawn) draw(entry.target);
    }
  }, { rootMargin: "800px" });
  for (const figure of figures) {
    for (const select of figure.querySelectorAll("select")) {
      select.addEventListener("change", () => draw(figure));
    }
    near.observe(figure);
  }

  const resize = (width) => {
    for (const figure of figures) {
      if (!figure.drawn) draw(figure);
      const plot = figure.querySelector(".plot");
      if (plot.layout) Plotly.relayout(plot, { width, autosize: width === null });
    }
  };
  window.addEventListener("beforeprint", () => resize(PRINT_WIDTH));
  window.addEventListener("afterprint", () => resize(null));

  function sortButton(th, onSort) {
    const button = make("button", th.textContent);
    button.type = "button";
    th.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = th.getAttribute("aria-sort") === "ascending";
      for (const other of th.parentNode.children) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", descending ? "descending" : "ascending");
      onSort(descending ? -1 : 1);
    });
  }

  // Nulls go last in either direction.
  const order = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" && typeof b === "number"
      ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((th, column) => {
      const value = (row) => {
        const text = row.cells[column].textContent.trim();
        const number = Number.parseFloat(text);
        if (text === "–") return null;
        return th.classList.contains("n") && !Number.isNaN(number) ? number : text;
      };
      sortButton(th, (sign) => {
        body.append(...[...body.rows].sort((a, b) => order(value(a), value(b), sign)));
      });
    });
  }

  const root = document.querySelector("[data-results]");
  const { rows, columns } = JSON.parse(root.querySelector("script").textContent);
  const at = (column, row) => {
    if (column.values) return column.values[row];
    return column.codes[row] < 0 ? null : column.labels[column.codes[row]];
  };
  const shown = columns.filter((c) => (c.values ?? c.codes).some((v) => v !== null && v !== -1));
  const filters = root.querySelector("[data-filters]");
  const tests = new Map();
  let sorted = [...Array(rows).keys()];
  let limit = PAGE_ROWS;

  const title = (name) => name.replaceAll("_", " ");
  const search = make("input");
  search.type = "search";
  const searchLabel = make("label", "Search");
  searchLabel.append(search);
  filters.append(searchLabel);
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    tests.set("search", (row) => {
      const text = shown.map((c) => at(c, row) ?? "").join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    show(PAGE_ROWS);
  });
  for (const column of shown) {
    if (!column.labels || column.labels.length < 2 || column.labels.length > 40) continue;
    const label = make("label", title(column.name));
    const select = make("select");
    select.append(make("option", "any"), ...column.labels.map((l) => make("option", l)));
    label.append(select);
    filters.append(label);
    select.addEventListener("change", () => {
      const code = select.selectedIndex - 1;
      if (code < 0) tests.delete(column.name);
      else tests.set(column.name, (row) => column.codes[row] === code);
      show(PAGE_ROWS);
    });
  }

  const head = make("tr");
  for (const column of shown) {
    const th = make("th", title(column.name));
    if (column.values || column.kind === "number") th.className = "n";
    head.append(th);
    sortButton(th, (sign) => {
      sorted.sort((a, b) => order(at(column, a), at(column, b), sign) || a - b);
      show(limit);
    });
  }
  root.querySelector("thead").append(head);

  function show(most) {
    limit = most;
    const chosen = sorted.filter((row) => [...tests.values()].every((test) => test(row)));
    const lines = chosen.slice(0, limit).map((row) => {
      const line = make("tr");
      for (const column of shown) {
        const value = at(column, row);
        const cell = make("td");
        if (column.values || column.kind === "number") cell.className = "n";
        if (column.name === "reason") cell.className = "wrap";
        if (column.name === "status" && value !== null) {
          const state = make("span", value);
          state.className = `state ${value}`;
          cell.append(state);
        } else if (value === null) cell.textContent = "–";
        else cell.textContent = column.values ? value.toFixed(2) : value;
        line.append(cell);
      }
      return line;
    });
    root.querySelector("tbody").replaceChildren(...lines);
    root.querySelector("[data-count]").textContent =
      `${chosen.length} of ${rows} rows` +
      (chosen.length > lines.length ? `, the first ${lines.length} shown` : "");
    root.querySelector("[data-more]").hidden = chosen.length <= lines.length;
  }
  root.querySelector("[data-more]").addEventListener("click", () => show(limit + 5 * PAGE_ROWS));
  show(PAGE_ROWS);
})();
