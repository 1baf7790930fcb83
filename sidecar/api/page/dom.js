// How a value gets onto the page: by textContent alone, and only where it has changed, so that a selection, the focus
// and a screen reader's place survive an update. Nothing here parses markup; the page's policy forbids it as well.

const NOTHING = "–";

export const byId = (id) => document.getElementById(id);

export function put(node, value) {
  const text = value === null || value === undefined || value === "" ? NOTHING : String(value);
  if (node.textContent !== text) node.textContent = text;
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

function mark(node, kind, inner) {
  const name = kind ? `mark ${kind}` : "";
  let span = node.firstElementChild;
  if (!span || node.childNodes.length !== 1) {
    span = document.createElement("span");
    node.replaceChildren(span);
  }
  if (span.className !== name) span.className = name;
  put(span, inner);
}

// A cell is a text or number; {text, mark: good|warn|bad|idle}; or {label, act, name}: a button, made once a row.
function fillCell(node, cell) {
  if (cell !== null && typeof cell === "object" && cell.act) {
    let button = node.querySelector("button");
    if (!button) {
      button = document.createElement("button");
      button.type = "button";
      node.replaceChildren(button);
    }
    button.onclick = cell.act;
    put(button, cell.label);
    button.setAttribute("aria-label", cell.name);
  } else if (cell !== null && typeof cell === "object") {
    mark(node, cell.mark, cell.text);
  } else {
    put(node, cell);
  }
}

// rows: [{key, cells}]. Rows keep their element as long as their key is there; columns right-aligned as the head's are.
export function fill(table, rows) {
  const body = table.tBodies[0];
  const heads = table.tHead.rows[0].cells;
  const kept = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  rows.forEach(({ key, cells }, at) => {
    const name = String(key);
    let row = kept.get(name);
    if (row) {
      kept.delete(name);
    } else {
      row = document.createElement("tr");
      row.dataset.key = name;
      cells.forEach((_, column) => {
        const cell = document.createElement(column === 0 ? "th" : "td");
        if (column === 0) cell.scope = "row";
        if (heads[column].className) cell.className = heads[column].className;
        row.append(cell);
      });
    }
    if (body.rows[at] !== row) body.insertBefore(row, body.rows[at] || null);
    cells.forEach((cell, column) => fillCell(row.cells[column], cell));
  });
  for (const row of kept.values()) row.remove();
  show(table, rows.length > 0);
}

// facts: [[term, cell]], into a dl.
export function facts(list, pairs) {
  const kept = new Map([...list.children].map((pair) => [pair.dataset.key, pair]));
  pairs.forEach(([term, cell], at) => {
    let pair = kept.get(term);
    if (pair) {
      kept.delete(term);
    } else {
      pair = document.createElement("div");
      pair.dataset.key = term;
      pair.append(document.createElement("dt"), document.createElement("dd"));
    }
    if (list.children[at] !== pair) list.insertBefore(pair, list.children[at] || null);
    put(pair.firstElementChild, term);
    fillCell(pair.lastElementChild, cell);
  });
  for (const pair of kept.values()) pair.remove();
}

// items: [{text, mark}], into a list of problems.
export function problems(list, items) {
  while (list.children.length > items.length) list.lastElementChild.remove();
  items.forEach(({ text, mark: kind }, at) => {
    const item = list.children[at] || list.appendChild(document.createElement("li"));
    if (item.className !== kind) item.className = kind;
    mark(item, kind, text);
  });
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const small = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const count = (n) => (typeof n === "number" ? whole.format(n) : NOTHING);
export const rate = (n) => (Number.isFinite(n) ? (n < 100 ? small : whole).format(n) : NOTHING);

export function bytes(n) {
  if (typeof n !== "number") return NOTHING;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  let value = n;
  while (value >= 1024 && at < units.length - 1) {
    value /= 1024;
    at += 1;
  }
  return `${(at ? small : whole).format(value)} ${units[at]}`;
}

export function age(seconds) {
  if (typeof seconds !== "number") return NOTHING;
  if (seconds < 1) return seconds > 0 ? "< 1 s" : "0 s";
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${small.format(seconds / 3600)} h`;
  return `${small.format(seconds / 86400)} d`;
}

// Microseconds since the epoch, milliseconds being what Date takes; UTC, as everywhere in logs.
export function moment(us) {
  if (typeof us === "string") return us.replace("T", " ").replace(/(\.\d+)?(Z|\+00:00)$/, "");
  if (typeof us !== "number") return NOTHING;
  const at = new Date(us / 1000);
  return Number.isNaN(at.getTime()) ? NOTHING : at.toISOString().slice(0, 19).replace("T", " ");
}

export const yes = (flag) => (flag ? "yes" : "no");
