// A table of very many rows (grid.py): columns stay plain arrays, only rows in view are in the page. Text is only ever set as text.
const ROW = 34, SPARE = 8;
const decoder = new TextDecoder();

function unpack(bytes) {
  const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  const length = new DataView(buffer).getUint32(0, true);
  const table = JSON.parse(decoder.decode(new Uint8Array(buffer, 4, length)));
  const start = 4 + length;
  for (const column of table.columns) {
    const [first, second] = column.places.map((place) => place + start);
    if (column.kind === "number") {
      column.values = new Float32Array(buffer, first, table.rows);
    } else {
      const ends = new Uint32Array(buffer, first, table.rows + 1);
      column.at = (row) => decoder.decode(new Uint8Array(buffer, second + ends[row], ends[row + 1] - ends[row]));
    }
  }
  return table;
}

const grouped = new Intl.NumberFormat("en");
function said(column, row) {
  if (column.kind === "text") return column.at(row);
  const value = column.values[row];
  if (Number.isNaN(value)) return "";
  const digits = +column.form.slice(1);
  if (column.form === "int") return column.name === "latent" ? `${value}` : grouped.format(value);
  return column.form[0] === "p" ? `${(100 * value).toFixed(digits)}%` : value.toFixed(digits);
}

const classes = (column) => `${column.kind} ${column.name.replaceAll(" ", "-")}`;

// Rows in order; what is missing comes last either way.
function ordered(table, name, down) {
  const order = new Uint32Array(table.rows).map((_, row) => row);
  const column = table.columns.find((c) => c.name === name);
  if (!column) return order;
  const sign = down ? -1 : 1;
  if (column.kind === "number") {
    const values = column.values;
    return order.sort((a, b) => {
      const x = values[a], y = values[b];
      if (x !== x || y !== y) return (x !== x) - (y !== y) || a - b;
      return sign * (x - y) || a - b;
    });
  }
  const texts = Array.from(order, (row) => column.at(row).toLowerCase());
  return order.sort((a, b) => {
    const x = texts[a], y = texts[b];
    if (!x || !y) return !x - !y || a - b;
    return x < y ? -sign : x > y ? sign : a - b;
  });
}

const element = (tag, attributes, text) => {
  const made = Object.assign(document.createElement(tag), attributes);
  if (text !== undefined) made.textContent = text;
  return made;
};

export default function ({ data, parentElement }) {
  if (!data) return parentElement.sbEnd;
  const table = unpack(data);
  if (parentElement.sbShown === table.digest) return parentElement.sbEnd;
  parentElement.sbEnd?.();
  parentElement.sbShown = table.digest;
  const asked = new URLSearchParams(location.search).get("sort") ?? "";
  const state = { name: asked.replace(/-$/, ""), down: asked.endsWith("-"), drawn: "" };
  let order = ordered(table, state.name, state.down);

  const box = element("div", { className: "sb-grid" });
  box.setAttribute("role", "grid");
  box.setAttribute("aria-rowcount", table.rows);
  const widths = table.columns.map((c) => c.width).join(" ");
  const head = element("div", { className: "sb-grid-head" });
  head.setAttribute("role", "row");
  head.style.gridTemplateColumns = widths;
  const body = element("div", { className: "sb-grid-body" });
  body.style.height = `${table.rows * ROW}px`;
  box.append(head, body);
  parentElement.append(box);

  const heads = table.columns.map((column) => {
    const cell = element("button", { type: "button", title: column.help, className: classes(column) }, column.title);
    cell.setAttribute("role", "columnheader");
    cell.onclick = () => sort(column);
    head.append(cell);
    return cell;
  });

  function sort(column) {
    const first = column.kind === "number" && column.name !== "latent";
    if (state.name !== column.name) Object.assign(state, { name: column.name, down: first });
    else if (state.down === first) state.down = !first;
    else state.name = "";
    order = ordered(table, state.name, state.down);
    const url = new URL(location.href);
    if (state.name) url.searchParams.set("sort", state.name + (state.down ? "-" : ""));
    else url.searchParams.delete("sort");
    history.replaceState(history.state, "", url);
    dispatchEvent(new PopStateEvent("popstate")); // so that Streamlit knows of it
    box.scrollTop = 0;
    marked();
    draw(true);
  }

  function marked() {
    table.columns.forEach((column, i) => {
      const here = column.name === state.name;
      heads[i].setAttribute("aria-sort", here ? (state.down ? "descending" : "ascending") : "none");
    });
  }

  function draw(anew) {
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - SPARE);
    const last = Math.min(table.rows, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + SPARE);
    if (!anew && state.drawn === `${first} ${last}`) return;
    state.drawn = `${first} ${last}`;
    const focused = body.contains(document.activeElement) ? document.activeElement.dataset.row : null;
    body.replaceChildren(...Array.from({ length: last - first }, (_, i) => line(first + i)));
    if (focused !== null) body.querySelector(`[data-row="${focused}"]`)?.focus({ preventScroll: true });
  }

  function line(place) {
    const row = order[place];
    const made = element("a", { className: "sb-grid-row", href: table.link + table.columns[0].values[row] });
    made.setAttribute("role", "row");
    made.dataset.go = "";
    made.dataset.row = place;
    made.style.gridTemplateColumns = widths;
    made.style.top = `${place * ROW}px`;
    for (const column of table.columns) {
      const text = said(column, row);
      const cell = element("span", { className: classes(column) }, text);
      if (text.length > 24) cell.title = text;
      cell.setAttribute("role", "gridcell");
      made.append(cell);
    }
    return made;
  }

  box.onscroll = () => {
    sessionStorage.setItem("sb-grid", JSON.stringify([table.of, state.name, state.down, box.scrollTop]));
    requestAnimationFrame(() => draw(false));
  };
  box.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15 }[event.key];
    if (!step) return;
    event.preventDefault();
    const from = +(document.activeElement?.dataset.row ?? -1);
    const place = Math.min(table.rows - 1, Math.max(0, from + step));
    const top = place * ROW, view = box.clientHeight - ROW;
    if (top < box.scrollTop) box.scrollTop = top;
    if (top > box.scrollTop + view - ROW) box.scrollTop = top - view + ROW;
    draw(true);
    body.querySelector(`[data-row="${place}"]`)?.focus({ preventScroll: true });
  };
  marked();
  draw(true);
  const [of, name, down, top] = JSON.parse(sessionStorage.getItem("sb-grid") ?? "[]");
  if (of === table.of && name === state.name && down === state.down) box.scrollTop = top;
  const seen = new ResizeObserver(() => draw(true));
  seen.observe(box);
  parentElement.sbEnd = () => {
    seen.disconnect();
    box.remove();
    parentElement.sbShown = null;
  };
  return parentElement.sbEnd;
}
