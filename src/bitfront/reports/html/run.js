"use strict";
// The page of one run: everything that its record has.

const card = (title, ...content) => el("section", { class: "card" }, title && el("h2", {}, title), content);
const tile = (name, value, more) => el("div", { class: "tile" }, el("span", {}, name), el("b", {}, value), more && el("small", {}, more));

/** Keys and values, nested. */
function tree(value) {
  if (value === null) return el("span", { class: "null" }, "null");
  if (Array.isArray(value)) return value.some((v) => v && typeof v === "object")
    ? el("div", {}, value.map((v) => tree(v))) : el("span", {}, value.length ? value.map(String).join(", ") : "[]");
  if (typeof value === "object") return el("dl", { class: "tree" }, Object.entries(value).map(([key, v]) =>
    el("div", { class: v && typeof v === "object" && !Array.isArray(v) ? "branch" : null }, el("dt", {}, key), el("dd", {}, tree(v)))));
  return el("span", {}, String(value));
}

function curves(record) {
  const groups = new Map();
  for (const key of new Set(record.history.flatMap(Object.keys))) {
    if (key === "epoch") continue;
    const [kind, name] = key.includes("/") ? key.split("/", 2) : ["", key];
    groups.set(name, [...(groups.get(name) || []), { key, name: kind || name, color: kind === "train" ? "var(--faint)" : "var(--accent)" }]);
  }
  const first = [record.primary.name, "loss", "size_mb"];
  const order = [...groups.keys()].sort((a, b) => (first.indexOf(a) + 9) % 9 - (first.indexOf(b) + 9) % 9);
  const at = record.history.map((h) => h.epoch);
  const known = order.filter((name) => groups.get(name).some((s) => record.history.some((h) => h[s.key] != null)));
  return known.map((name) => {
    const series = groups.get(name).map((s) => ({ ...s, values: record.history.map((h) => h[s.key]) }));
    const label = name === "size_mb" ? "size, MB" : series.map((s) => s.name).filter((s) => s !== name).join(", ") + ` ${name}`;
    return figure((width, hover) => lines({ series, at, xlabel: "epoch", ylabel: label, height: 220 }, width, hover), label);
  });
}

function layerLine(found, ylabel, log) {
  const names = found.map(([name]) => layerName(name));
  const series = [{ name: ylabel, color: "var(--accent)", values: found.map(([, v]) => v) }];
  const about = (s, n, v) => el("p", {}, el("b", {}, show.number(v)), ` ${names[n]}`);
  return figure((width, hover) => lines({ series, names, ylabel, log, about }, width, hover), ylabel);
}

function layerTable(record) {
  const widths = new Map(meanBits(record));
  const logs = new Map((record.calibration?.layers || []).map((entry) => [entry.name, entry]));
  const names = [...new Set([...widths.keys(), ...logs.keys()])];
  const rows = names.map((name, n) => ({ n, name, bits: widths.get(name), counts: record.widths[name], ...logs.get(name) }));
  const known = (key) => rows.some((row) => row[key] != null);
  const shown = new Set(["n", "name", "bits", "counts", "steps", "shape", "block"]);
  const more = [...new Set(rows.flatMap(Object.keys))].filter((key) => !shown.has(key) && known(key));
  const columns = [
    { head: "layer", lead: true, value: (row) => row.n, cell: (row) => layerName(row.name) },
    known("shape") && { head: "shape", cell: (row) => row.shape?.join(" × ") || "" },
    { head: "weights", number: true, value: (row) => row.counts?.reduce((a, b) => a + b), cell: (row) => row.counts?.reduce((a, b) => a + b).toLocaleString("en") || "" },
    { head: "mean bits", number: true, value: (row) => row.bits, cell: (row) => row.bits?.toFixed(3) ?? "" },
    { head: "weights by bits", cell: (row) => (row.counts || []).map((n, b) => n && `${b}: ${n.toLocaleString("en")}`).filter(Boolean).join(" · ") },
    ...more.map((key) => ({ head: key.replaceAll("_", " "), number: rows.every((row) => typeof row[key] !== "string"), value: (row) => row[key],
      cell: (row) => (row[key] == null ? "" : key === "seconds" ? show.time(row[key]) : typeof row[key] === "number" ? show.number(row[key]) : JSON.stringify(row[key])) })),
    known("steps") && { head: "loss after each step", cell: (row) => Object.entries(row.steps || {}).map(([k, v]) => `${k} ${+v.toPrecision(4)}`).join(" → ") },
  ].filter(Boolean);
  return table(columns, rows, { caption: "Layers in the network's order" });
}

/** Columns with something in them. */
const filled = (columns, rows) => columns.filter((column) => rows.some((row) => column.cell(row) !== ""));

function blockTable(blocks) {
  return table(filled([
    { head: "block", lead: true, cell: (b) => b.name || "(all)" },
    { head: "loss on held-out batches before and after each epoch", cell: (b) => (b.held_out || []).map((v) => +v.toPrecision(4)).join(" → ") },
    { head: "best epoch", number: true, value: (b) => b.best_epoch, cell: (b) => b.best_epoch ?? "" },
    { head: "time", number: true, value: (b) => b.seconds, cell: (b) => show.time(b.seconds) },
    { head: "more", cell: (b) => Object.entries(b).filter(([k]) => !["name", "held_out", "best_epoch", "seconds"].includes(k)).map(([k, v]) => `${k} ${JSON.stringify(v)}`).join(", ") },
  ], blocks), blocks, { caption: "Blocks, tuned against the float network" });
}

function metricTable(record) {
  const splits = Object.keys(record.metrics);
  const names = [...new Set(splits.flatMap((split) => Object.keys(record.metrics[split])))];
  return table([{ head: "metric", lead: true, cell: (name) => name },
    ...splits.map((split) => ({ head: split, number: true, cell: (name) => (record.metrics[split][name] == null ? "" : show.number(record.metrics[split][name])) }))],
  names, { caption: "Metrics by split" });
}

function stageTable(record) {
  const stages = Object.entries(record.stages);
  return table(filled([{ head: "stage", lead: true, cell: ([name]) => name },
    { head: "time", number: true, cell: ([, s]) => show.time(s.seconds) },
    { head: "peak memory", number: true, cell: ([, s]) => (s.peak_memory ? show.memory(s.peak_memory) : "") },
    { head: "peak GPU memory", number: true, cell: ([, s]) => (s.peak_gpu_memory ? show.memory(s.peak_gpu_memory) : "") }], stages),
  stages, { caption: "Stages" });
}

function runPage(record) {
  const row = ROWS.get(record.id), task = row.task;
  const counts = Object.values(record.widths).reduce((sum, c) => c.map((n, b) => n + (sum[b] || 0)).concat(sum.slice(c.length)), []);
  const bits = meanBits(record), loss = losses(record), layers = bits.length || record.calibration?.layers?.length;
  const others = row.runs.filter((id) => id !== record.id);
  const own = ["config", "environment", "metrics", "stages", "history", "widths", "calibration", "command", "sizes", "primary"];
  const rest = Object.fromEntries(Object.entries(record).filter(([key]) => !own.includes(key)));
  return [
    el("p", { class: "back" }, el("a", { href: taskLink(task) }, `← ${task.name}`)),
    el("h1", {}, swatch(LOOKS.get(record.method)), `${record.method} `, el("span", { class: "setting" }, record.setting)),
    el("p", { class: "sub" }, `run ${record.id}, seed ${record.seed}`, record.device && `, on ${record.device}`,
      record.environment.dirty && el("b", { class: "warn" }, " with code that git does not have"),
      others.length > 0 && [" · other seeds: ", others.map((id) => [runLink(id), " "])]),
    el("div", { class: "tiles" },
      tile(`test ${record.primary.name} ${arrow(task)}`, show.metric(record.primary.value), row.runs.length > 1 && `${metric(row)} over seeds`),
      tile("file", `${show.size(record.sizes.file)} MiB`, `${record.sizes.file.toLocaleString("en")} bytes`),
      tile("smaller than float", `${(record.sizes.float / record.sizes.file).toFixed(2)}×`),
      tile("bits per weight", (8 * record.sizes.file / record.sizes.parameters).toFixed(2), "of the file, everything included"),
      tile("training, solving", show.time(Object.entries(record.stages).reduce((sum, [name, s]) => sum + (name === "evaluate" ? 0 : s.seconds), 0))),
      tile("peak memory", memory(row) || "not recorded")),
    card("Command", copyable(record.command)),
    record.history.length > 0 && card("Curves", el("div", { class: "grid3" }, curves(record))),
    bits.length > 0 && card("Bits", el("div", { class: "grid2" },
      figure((width, hover) => bars({ counts, xlabel: "bits", ylabel: "share of weights" }, width, hover), "Weights by bits"),
      layerLine(bits, "mean bits per weight"))),
    loss.length > 0 && card("Loss by layer", layerLine(loss, "relative loss of the layer's output", loss.every(([, v]) => v > 0))),
    layers > 0 && card("Layers", layerTable(record)),
    record.calibration?.blocks?.length > 0 && card("Blocks", blockTable(record.calibration.blocks)),
    el("div", { class: "grid2" }, card("Metrics", metricTable(record)), card("Stages", stageTable(record))),
    el("div", { class: "grid2" }, card("Config", tree(record.config)),
      el("div", {}, card("Sizes", tree(record.sizes)), card("Environment", tree(record.environment)), card("Record", tree(rest)))),
  ];
}
