"use strict";
// Tables that sort by a click on a heading, in a box that scrolls by itself; and what runs and rows have in common.

/** columns: {head, title, value: row -> what sorts, cell: row -> what is shown, number, lead: stays when scrolled, wide: wraps}. */
function table(columns, rows, { caption, sort = null, onsort = () => {}, rowClass = () => null } = {}) {
  const body = el("tbody");
  const heads = columns.map((column, n) => el("th", { scope: "col", class: kind(column), title: column.title },
    column.value ? el("button", { type: "button", onclick: () => by(n) }, column.head, el("span", { class: "arrow", "aria-hidden": "true" }))
      : column.head));
  const compare = (a, b) => (a == null) - (b == null)
    || (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  const draw = () => {
    heads.forEach((head, n) => columns[n].value
      && head.setAttribute("aria-sort", sort && sort.column === columns[n].head ? (sort.down ? "descending" : "ascending") : "none"));
    const column = sort && columns.find((c) => c.head === sort.column);
    const sorted = column ? [...rows].sort((a, b) => {
      const [p, q] = [column.value(a), column.value(b)];
      return p == null || q == null ? compare(p, q) : (sort.down ? -1 : 1) * compare(p, q);
    }) : rows;
    body.replaceChildren(...sorted.map((row) => el("tr", { class: rowClass(row) },
      columns.map((c) => el(c.lead ? "th" : "td", { class: kind(c), scope: c.lead && "row" }, c.cell(row))))));
  };
  const by = (n) => {
    const same = sort && sort.column === columns[n].head;
    sort = { column: columns[n].head, down: same ? !sort.down : false };
    onsort(sort);
    draw();
  };
  draw();
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, heads)), body));
}
const kind = (column) => [column.number && "number", column.lead && "lead", column.wide && "wide"].filter(Boolean).join(" ") || null;

function copyable(text) {
  const code = el("code", {}, text);
  const button = el("button", { type: "button", class: "copy", onclick: async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  return el("div", { class: "command" }, code, button);
}

const DATA = JSON.parse(document.getElementById("data").textContent);
const TASKS = new Map(DATA.tasks.map((task) => [task.name, task]));
const METHODS = [...new Set(DATA.tasks.flatMap((t) => [...t.rows, ...t.papers].map((row) => row.method)))].sort();
const LOOKS = new Map(METHODS.map((method, n) => [method, { number: n, color: method === "float" ? "var(--float)" : `var(--m${n % 8})` }]));
const ROWS = new Map(DATA.tasks.flatMap((task) => task.rows.flatMap((row) => {
  row.task = task;
  return row.runs.map((id) => [id, row]);
})));

const arrow = (task) => (task.higher ? "↑" : "↓");
const digits = (row) => (Math.abs(row.value) >= 10 ? 2 : 3);
const seeds = (row, values, spread) => (values.length > 1 && spread != null ? ` ± ${spread.toFixed(digits(row))}` : "");
const metric = (row) => show.metric(row.value) + seeds(row, row.values, row.spread);
const change = (row) => (row.change == null ? "" : (row.change < 0 ? "" : "+") + row.change.toFixed(digits(row)) + seeds(row, row.changes, row.change_spread));
const memory = (row) => (row.gpu_memory ? `${show.memory(row.gpu_memory)} GPU` : row.memory ? show.memory(row.memory) : "");
const differs = (number) => number.note.startsWith("differs: ");
const marked = (number, text) => text + DATA.certainty[number.certainty] + (differs(number) ? "≠" : "");
const runLink = (id) => el("a", { href: `#run/${id}`, class: "run" }, id);
const taskLink = (task) => `#${encodeURIComponent(task.name)}`;
const NOTES = { computed: "computed by the paper's rule", recalled: "recalled, not read", unsure: "not certain" };

/** The records, unpacked once. */
let unpacked = null;
function records() {
  unpacked ||= (async () => {
    const text = atob(document.getElementById("runs").textContent);
    const bytes = new Uint8Array(text.length);
    for (let n = 0; n < text.length; n++) bytes[n] = text.charCodeAt(n);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  })();
  return unpacked;
}

/** Mean bits of each tensor that is quantized, in the network's order. */
function meanBits(record) {
  const used = Object.entries(record.widths).filter(([, counts]) => counts.some(Boolean));
  return used.map(([name, counts]) => [name, counts.reduce((sum, n, b) => sum + n * b, 0) / counts.reduce((a, b) => a + b)]);
}
const learned = (record) => Object.values(record.widths).some((counts) => counts.filter(Boolean).length > 1);
const losses = (record) => (record.calibration?.layers || []).filter((e) => e.loss != null).map((e) => [e.name, e.loss]);
const layerName = (name) => name.replace(/\.weight$/, "");
