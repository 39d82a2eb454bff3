"use strict";
// Routes, filters, the overview and the pages of tasks.

const main = document.getElementById("main");
const filters = { text: "", hidden: new Set(), max: null, front: false };
let sort = { column: "MiB", down: false };

function fits(row) {
  const words = filters.text.toLowerCase().split(/\s+/).filter(Boolean);
  const text = `${row.task.name} ${row.method} ${row.setting} ${row.task.shared} ${row.runs.join(" ")}`.toLowerCase();
  return words.every((word) => text.includes(word)) && !filters.hidden.has(row.method)
    && (filters.max == null || row.size <= filters.max * MIB) && (!filters.front || row.best);
}

/** The filters' controls; they keep their values from page to page. */
function toolbar(methods, onchange) {
  const count = el("output", { class: "count" });
  const text = el("input", { type: "search", placeholder: "task, method, setting, run", "aria-label": "Filter by words", value: filters.text,
    oninput: () => { filters.text = text.value; onchange(); } });
  const max = el("input", { type: "number", min: 0, step: "any", placeholder: "any", "aria-label": "Maximum size in MiB", value: filters.max,
    oninput: () => { filters.max = max.value === "" ? null : Number(max.value); onchange(); } });
  const front = el("input", { type: "checkbox", checked: filters.front, onchange: () => { filters.front = front.checked; onchange(); } });
  const chips = methods.map((method) => {
    const chip = el("button", { type: "button", class: "chip", "aria-pressed": String(!filters.hidden.has(method)), onclick: () => {
      if (!filters.hidden.delete(method)) filters.hidden.add(method);
      chip.setAttribute("aria-pressed", String(!filters.hidden.has(method)));
      onchange();
    } }, swatch(LOOKS.get(method)), method);
    return chip;
  });
  const clear = el("button", { type: "button", class: "clear", onclick: () => {
    Object.assign(filters, { text: "", max: null, front: false });
    filters.hidden.clear();
    [text.value, max.value, front.checked] = ["", "", false];
    chips.forEach((chip) => chip.setAttribute("aria-pressed", "true"));
    onchange();
  } }, "Reset");
  const node = el("form", { class: "toolbar", role: "search", onsubmit: (event) => event.preventDefault() },
    el("div", { class: "fields" }, el("label", { class: "words" }, text), el("label", {}, "at most ", max, " MiB"),
      el("label", { class: "check" }, front, " Pareto front only"), count, clear),
    el("div", { class: "chips", role: "group", "aria-label": "Methods" }, chips));
  return { node, count: (shown, all) => { count.textContent = `${shown} of ${all}`; } };
}

const facts = (...pairs) => el("dl", { class: "facts" }, pairs.filter(Boolean).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));

/** What the box beside a point says. */
function about(row) {
  return [
    el("p", { class: "head" }, swatch(LOOKS.get(row.method)), el("b", {}, row.method), ` ${row.setting}`),
    facts([`test ${row.task.metric}`, metric(row)], ["file", `${show.size(row.size)} MiB, ${row.ratio.toFixed(2)}× smaller, ${row.bits.toFixed(2)} bits/w`],
      row.paper && ["paper", `${marked(row.paper, show.metric(row.paper.value))} ${row.paper.metric}, ${row.paper.source}`]),
    copyable(row.command),
    el("p", { class: "runs" }, row.runs.length > 1 ? "runs " : "run ", row.runs.map((id) => [runLink(id), " "])),
  ];
}

function aboutPaper(p) {
  return [
    el("p", { class: "head" }, swatch(LOOKS.get(p.method)), el("b", {}, p.method), ` ${p.setting}, published`),
    facts([p.metric, p.value == null ? "" : marked(p, show.metric(p.value))], p.size && ["file", `${show.size(p.size)} MiB`], ["model", p.model],
      ["where", [p.table, p.source].filter(Boolean).join("; ")], p.certainty !== "quoted" && ["certainty", NOTES[p.certainty]], p.note && ["note", p.note]),
  ];
}

function tradeoff(task, rows) {
  const within = (row) => task.limit == null || (task.higher ? row.value >= task.limit : row.value <= task.limit);
  const finite = rows.filter((row) => row.value != null), stretch = !finite.some(within); // all that is left is far off
  const place = (row) => (stretch || within(row) ? { y: row.value, spread: row.error } : { y: task.limit, spread: 0, beyond: show.metric(row.value) });
  const points = finite.map((row) => ({ x: row.size / MIB, ...place(row), look: LOOKS.get(row.method), best: row.best, row,
    run: row.runs[0], name: `${row.method} ${row.setting}: ${show.size(row.size)} MiB, ${metric(row)}` }));
  const known = task.papers.filter((p) => p.size && p.value != null && p.metric === task.metric && !filters.hidden.has(p.method));
  const hollow = known.map((p) => ({ x: p.size / MIB, y: p.value, look: LOOKS.get(p.method), hollow: true, p, name: `published, ${p.method} ${p.setting}` }));
  const front = points.filter((p) => p.best).sort((a, b) => a.x - b.x);
  return { points, hollow, front, xlabel: "file size, MiB", ylabel: `test ${task.metric} ${arrow(task)}`, about: (p) => (p.row ? about(p.row) : aboutPaper(p.p)) };
}

function rowColumns(task) {
  const papers = task.rows.some((row) => row.paper || row.paper_file);
  return [
    { head: "method", lead: true, value: (r) => `${r.method} ${r.setting}`, cell: (r) => [swatch(LOOKS.get(r.method)), el("b", {}, r.method), el("span", { class: "setting" }, ` ${r.setting}`)] },
    { head: "★", title: "not beaten in both size and validation metric", value: (r) => (r.best ? 0 : 1),
      cell: (r) => [r.best && el("span", { class: "star", title: "not beaten in both size and validation metric", role: "img", "aria-label": "on the Pareto front" }, "★"),
        r.dirty && el("span", { class: "warn", title: "with code that git does not have" }, "!")] },
    { head: "MiB", number: true, value: (r) => r.size, cell: (r) => show.size(r.size) },
    { head: `${task.metric} ${arrow(task)}`, title: "on the test split, mean ± standard deviation over seeds", number: true, value: (r) => r.value, cell: metric },
    task.rows.some((r) => r.change != null) && { head: "Δ start", title: "less the metric of the network that a run starts from, mean ± standard deviation over seeds", number: true, value: (r) => r.change, cell: change },
    papers && { head: "paper MiB", number: true, value: (r) => r.paper_file?.size, cell: (r) => (r.paper_file ? marked(r.paper_file, +(r.paper_file.size / MIB).toPrecision(4)) : "") },
    papers && { head: "paper", number: true, value: (r) => r.paper?.value, cell: (r) => (r.paper ? marked(r.paper, show.metric(r.paper.value)) + (r.paper.metric === task.metric ? "" : ` ${r.paper.metric}`) : "") },
    papers && { head: "difference", number: true, value: (r) => r.difference, cell: (r) => (r.difference == null ? "" : (r.difference > 0 ? "+" : "") + r.difference.toFixed(2)) },
    { head: "ratio", title: "how many times smaller than float", number: true, value: (r) => r.ratio, cell: (r) => r.ratio.toFixed(2) },
    { head: "bits/w", title: "bits of the file per parameter", number: true, value: (r) => r.bits, cell: (r) => r.bits.toFixed(2) },
    { head: "seeds", number: true, value: (r) => r.values.length, cell: (r) => r.values.length },
    { head: "time", title: "of training or solving, by the kind of device", number: true, value: (r) => Object.values(r.seconds)[0],
      cell: (r) => Object.entries(r.seconds).map(([device, s]) => show.time(s) + (device === "cpu" ? "" : " GPU")).join(", ") },
    { head: "memory", title: "most that was held", number: true, value: (r) => r.gpu_memory || r.memory, cell: memory },
    { head: "runs", wide: true, value: (r) => r.runs[0], cell: (r) => r.runs.map((id) => [runLink(id), " "]) },
  ].filter(Boolean);
}

/** All that papers say about a task, with or without a run of ours beside it. */
function publishedTable(task) {
  return table(filled([
    { head: "method", lead: true, value: (p) => `${p.method} ${p.setting}`, cell: (p) => [swatch(LOOKS.get(p.method)), el("b", {}, p.method), el("span", { class: "setting" }, ` ${p.setting}`)] },
    { head: "metric", value: (p) => p.metric, cell: (p) => p.metric },
    { head: "value", number: true, value: (p) => p.value, cell: (p) => (p.value == null ? "" : marked(p, show.metric(p.value))) },
    { head: "MiB", number: true, value: (p) => p.size, cell: (p) => (p.size == null ? "" : marked(p, +(p.size / MIB).toPrecision(4))) },
    { head: "model", value: (p) => p.model, cell: (p) => p.model },
    { head: "source", value: (p) => p.source, cell: (p) => p.source },
    { head: "where", cell: (p) => p.table },
    { head: "note", wide: true, cell: (p) => p.note },
  ], task.papers), task.papers, { caption: `Published numbers of ${task.name}` });
}

/** Charts over layers of the rows' first runs, one for each set of layers. */
function overLayers(rows, all, values, ylabel, log) {
  const networks = new Map();
  for (const row of rows) {
    const found = values(all[row.runs[0]]);
    if (!found.length || found.every(([, v]) => v == null)) continue;
    const key = JSON.stringify(found.map(([name]) => name));
    networks.set(key, [...(networks.get(key) || []), { row, values: found.map(([, v]) => v) }]);
  }
  return [...networks].map(([key, found]) => {
    const names = JSON.parse(key).map(layerName);
    const methods = [...new Set(found.map((f) => f.row.method))];
    const series = found.map(({ row, values: numbers }) => {
      const own = found.filter((f) => f.row.method === row.method), n = own.findIndex((f) => f.row === row);
      const light = own.length > 1 ? 100 - (60 * n) / (own.length - 1) : 100;
      return { row, values: numbers, dash: methods.length > 1 ? ["", "6 3", "2 3", "8 3 2 3"][methods.indexOf(row.method) % 4] : "",
        name: `${row.method} ${row.setting}`, color: `color-mix(in oklab, ${LOOKS.get(row.method).color} ${light.toFixed(0)}%, var(--mix))` };
    });
    const tell = (s, n, v) => [el("p", { class: "head" }, el("b", {}, show.number(v)), ` ${names[n]}`), el("p", {}, s.name), copyable(s.row.command)];
    const legend = series.length <= 24 && el("ul", { class: "legend" }, series.map((s) => el("li", {},
      svg("svg", { viewBox: "0 0 22 8", class: "dash", "aria-hidden": "true" }, svg("path", { d: "M0 4H22", stroke: s.color, "stroke-dasharray": s.dash })), s.name)));
    return [figure((width, hover) => lines({ series, names, ylabel, log, height: 300, about: tell }, width, hover), ylabel), legend];
  });
}

function taskPage(task) {
  const chart = el("div"), grid = el("div"), bits = el("div"), loss = el("div");
  const methods = [...new Set(task.rows.map((row) => row.method))].sort();
  const runs = task.rows.reduce((sum, row) => sum + row.runs.length, 0);
  const certainties = new Set(task.papers.map((p) => p.certainty));
  const legend = ["★ not beaten in both size and validation metric", ...(task.shared ? [`all with ${task.shared}`] : []), ...Object.entries(NOTES).filter(([c]) => certainties.has(c)).map(([c, text]) => `${DATA.certainty[c]} ${text}`),
    task.papers.some(differs) && "≠ of another network, or with quantized activations",
    task.rows.some((row) => row.dirty) && "! with code that git does not have"].filter(Boolean);
  const update = async () => {
    const rows = task.rows.filter(fits);
    bar.count(rows.length, task.rows.length);
    const data = tradeoff(task, rows);
    chart.replaceChildren(data.points.length || data.hollow.length ? figure((width, hover) => scatter(data, width, hover), "Metric against size")
      : el("p", { class: "empty" }, "No point fits the filters."));
    grid.replaceChildren(table(rowColumns(task), rows, { caption: `${task.name}, ${rows.length} rows`, sort, onsort: (by) => { sort = by; },
      rowClass: (row) => row.best && "best" }));
    const all = await records();
    for (const [place, title, values, label, log] of [[bits, "Bits per layer", (r) => (learned(r) ? meanBits(r) : []), "mean bits per weight", false],
      [loss, "Loss per layer of post-training methods", losses, "relative loss of the layer's output", true]]) {
      const charts = overLayers(rows, all, values, label, log);
      place.replaceChildren(...(charts.length ? [card(title, charts)] : []));
    }
  };
  const bar = toolbar(methods, update);
  const page = [el("h1", {}, task.name),
    el("p", { class: "sub" }, `test ${task.metric}, ${task.higher ? "higher" : "lower"} is better · ${task.rows.length} settings, ${runs} runs`),
    bar.node, card("Metric against size", chart, el("p", { class: "hint" }, `The line joins the best rows; bars are standard deviations over seeds, of Δ start where there is one${task.papers.length ? "; hollow points are published" : ""}. A point tells its run and command.`)),
    card("All settings", grid, el("p", { class: "hint" }, legend.join(" · "))),
    task.papers.length > 0 && card("Published numbers", publishedTable(task)), bits, loss];
  update();
  return page;
}

/** The smallest row whose metric is within one percent of float's. */
function smallestNearFloat(task, rows) {
  const float = task.rows.find((row) => row.method === "float");
  const close = (row) => (task.higher ? row.value >= float.value - 0.01 * Math.abs(float.value) : row.value <= float.value + 0.01 * Math.abs(float.value));
  return float?.value != null && rows.filter((row) => row !== float && close(row)).sort((a, b) => a.size - b.size)[0];
}

function miniature(task, rows, width) {
  const height = 110, x = scale(rows.map((r) => r.size), 10, width - 10, { log: true }), y = scale(rows.map((r) => r.value), height - 8, 8);
  const front = rows.filter((row) => row.best).sort((a, b) => a.size - b.size);
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${task.metric} against size` },
    front.length > 1 && svg("path", { class: "front", d: front.map((r, n) => (n ? `H${x(r.size)}V${y(r.value)}` : `M${x(r.size)} ${y(r.value)}`)).join("") }),
    rows.map((row) => shape(LOOKS.get(row.method), { class: "solid", fill: LOOKS.get(row.method).color, transform: `translate(${x(row.size)} ${y(row.value)}) scale(.8)` })));
}

function overview() {
  const cards = el("div", { class: "cards" });
  const update = () => {
    const parts = DATA.tasks.map((task) => [task, task.rows.filter((row) => row.value != null && fits(row))]).filter(([, rows]) => rows.length);
    bar.count(parts.reduce((sum, [, rows]) => sum + rows.length, 0), DATA.tasks.reduce((sum, task) => sum + task.rows.length, 0));
    cards.replaceChildren(...(parts.length ? parts.map(([task, rows]) => {
      const float = task.rows.find((row) => row.method === "float"), small = smallestNearFloat(task, rows);
      return el("a", { class: "card task", href: taskLink(task) }, el("h2", {}, task.name, el("small", {}, `${task.metric} ${arrow(task)}`)),
        figure((width) => miniature(task, rows, width), "preview"),
        facts(float && ["float", `${metric(float)} in ${show.size(float.size)} MiB`],
          small && ["within 1 %", `${small.method} ${small.setting}: ${metric(small)} in ${show.size(small.size)} MiB, ${small.ratio.toFixed(1)}× smaller`]));
    }) : [el("p", { class: "empty" }, "No row fits the filters.")]));
  };
  const bar = toolbar(METHODS.filter((method) => DATA.tasks.some((task) => task.rows.some((row) => row.method === method))), update);
  update();
  return [el("h1", {}, "At this size, which method keeps the accuracy?"),
    el("p", { class: "sub" }, `${DATA.tasks.length} tasks, ${ROWS.size} runs. Sizes are of the files on disk; metrics are of the test split, measured on the reloaded file. “Within 1 %” is the smallest file whose metric is no more than one percent worse than float's.`),
    bar.node, cards];
}

const places = new Map();
let here = null, forward = true;
async function route() {
  if (here !== null) places.set(here, scrollY);
  const hash = decodeURIComponent(location.hash.slice(1));
  here = location.hash;
  let page = null, title = "", task = TASKS.get(hash);
  if (hash.startsWith("run/") && ROWS.has(hash.slice(4))) {
    const record = (await records())[hash.slice(4)];
    if (here !== location.hash) return;
    [page, title, task] = [runPage(record), `${record.method} ${record.setting}, ${record.task}`, ROWS.get(record.id).task];
  } else if (task) [page, title] = [taskPage(task), task.name];
  else page = overview();
  document.title = title ? `${title} · Bitfront` : "Bitfront";
  for (const link of document.querySelectorAll("nav a")) {
    const current = task && link.getAttribute("href") === taskLink(task);
    link.toggleAttribute("data-current", Boolean(current));
    current ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
    if (current) link.parentElement.scrollLeft = link.offsetLeft - 60;
  }
  main.replaceChildren(...page.filter(Boolean));
  const place = forward ? 0 : places.get(here) || 0;
  forward = false;
  requestAnimationFrame(() => requestAnimationFrame(() => scrollTo(0, place)));
}

document.getElementById("tasks").append(...DATA.tasks.map((task) => el("a", { href: taskLink(task) }, task.name)));
document.addEventListener("click", (event) => { forward = Boolean(event.target.closest?.('a[href^="#"]')); });
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
history.scrollRestoration = "manual";
addEventListener("hashchange", route);
route();
