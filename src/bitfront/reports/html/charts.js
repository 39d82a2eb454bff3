"use strict";
// Elements, numbers and charts. Text only ever becomes text nodes.

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}
const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

const MIB = 2 ** 20;
const show = {
  size: (bytes) => (bytes / MIB).toFixed(3),
  metric: (value) => (value == null ? "not finite" : Math.abs(value) >= 10 ? value.toFixed(2) : String(+value.toPrecision(4))),
  time: (s) => (s < 1 ? `${(1000 * s).toFixed(0)} ms` : s < 90 ? `${+s.toPrecision(3)} s`
    : s < 5400 ? `${(s / 60).toFixed(1)} min` : `${(s / 3600).toFixed(1)} h`),
  memory: (bytes) => `${(bytes / 2 ** 30).toFixed(2)} GiB`,
  number: (value) => (Number.isInteger(value) ? value.toLocaleString("en") : String(+value.toPrecision(6))),
  tick: (value) => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
    ? value.toExponential(0) : String(+value.toPrecision(6))),
};

const SHAPES = [
  "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z", "M-4-4h8v8h-8Z", "M0-5.6L5.6 0L0 5.6L-5.6 0Z", "M0-5L5 4H-5Z",
  "M0 5L5-4H-5Z", "M-1.8-5h3.6v3.2H5v3.6H1.8V5h-3.6V1.8H-5v-3.6h3.2Z",
  "M0-6L1.6-1.9L6-1.9L2.5.9L3.8 5L0 2.5L-3.8 5L-2.5.9L-6-1.9L-1.6-1.9Z", "M-3-5.2H3L6 0L3 5.2H-3L-6 0Z",
];
const shape = (look, attributes) => svg("path", { d: SHAPES[look.number % SHAPES.length], ...attributes });
const swatch = (look) => svg("svg", { viewBox: "-7 -7 14 14", class: "swatch", "aria-hidden": "true" },
  shape(look, { fill: look.color }));

function linearTicks(lo, hi, count) {
  const rough = (hi - lo) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  for (let n = Math.ceil(lo / step - 1e-9); n * step <= hi + 1e-9 * step; n++) ticks.push(n * step);
  return ticks;
}

function logTicks(lo, hi, count) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(lo)); power <= Math.log10(hi); power++)
    for (const factor of [1, 2, 5]) ticks.push(factor * 10 ** power);
  const inside = ticks.filter((tick) => tick >= lo * 0.999 && tick <= hi * 1.001);
  if (inside.length < 2) return linearTicks(lo, hi, count);
  if (inside.length <= count + 1) return inside;
  const decades = inside.filter((tick) => Number.isInteger(+Math.log10(tick).toFixed(6)));
  return decades.filter((_, n) => n % Math.ceil(decades.length / count) === 0);
}

/** A scale over values with some room beyond them: a function to pixels, with its ticks. */
function scale(values, from, to, { log = false, count = 5, room = 0.06 } = {}) {
  const f = log ? Math.log10 : (v) => v;
  let lo = Math.min(...values.map(f)), hi = Math.max(...values.map(f));
  if (hi - lo < 1e-9 * Math.max(1, Math.abs(hi))) [lo, hi] = log ? [lo - 0.3, hi + 0.3] : [lo - 0.5, hi + 0.5];
  [lo, hi] = [lo - room * (hi - lo), hi + room * (hi - lo)];
  const map = (value) => from + ((f(value) - lo) / (hi - lo)) * (to - from);
  map.ticks = log ? logTicks(10 ** lo, 10 ** hi, count) : linearTicks(lo, hi, count);
  return map;
}

/** Axes with a grid; gives the drawing and its scales. */
function frame({ width, height, x, y, xlabel, ylabel, names }) {
  const below = names ? 92 : 46;
  const box = { left: 54, right: width - 14, top: 26, bottom: height - below };
  const sx = scale(x.values, box.left, box.right, { ...x, count: Math.max(2, Math.min(8, width / 90)) });
  const sy = scale(y.values, box.bottom, box.top, { ...y, count: Math.max(3, height / 60) });
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  for (const tick of sy.ticks)
    root.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: sy(tick), y2: sy(tick) }),
      svg("text", { class: "tick", x: box.left - 8, y: sy(tick) + 4, "text-anchor": "end" }, show.tick(tick)));
  if (names) {
    const step = Math.ceil(names.length / ((box.right - box.left) / 13));
    names.forEach((name, n) => n % step || root.append(svg("text", { class: "tick name", "text-anchor": "end",
      transform: `translate(${sx(n) + 3} ${box.bottom + 10}) rotate(-60)` }, name.length > 20 ? `…${name.slice(-19)}` : name)));
  } else for (const tick of sx.ticks)
    root.append(svg("line", { class: "grid", x1: sx(tick), x2: sx(tick), y1: box.top, y2: box.bottom }),
      svg("text", { class: "tick", x: sx(tick), y: box.bottom + 18, "text-anchor": "middle" }, show.tick(tick)));
  root.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    svg("text", { class: "label", x: 4, y: 13 }, ylabel));
  if (xlabel) root.append(svg("text", { class: "label", x: box.right, y: height - 8, "text-anchor": "end" }, xlabel));
  return { root, x: sx, y: sy, box };
}

/** A figure that is drawn anew when its width changes, with a box for what the pointer is on. */
function figure(draw, title) {
  const tip = el("div", { class: "tip", hidden: true });
  const canvas = el("div", { class: "canvas" });
  const node = el("div", { class: "figure", role: "group", "aria-label": title }, canvas, tip);
  const hover = makeTip(node, tip);
  let drawn = 0;
  new ResizeObserver(([entry]) => requestAnimationFrame(() => {
    const width = Math.round(entry.contentRect.width);
    if (!width || width === drawn) return;
    drawn = width;
    hover.hide();
    canvas.replaceChildren(draw(width, hover));
  })).observe(node);
  return node;
}

/** Shows a box beside a point; it stays while the pointer is on it, or once it was clicked or tapped. */
function makeTip(node, tip) {
  let timer = 0, pinned = false;
  const hide = () => { tip.hidden = true; pinned = false; clearTimeout(timer); };
  const later = () => { clearTimeout(timer); if (!pinned) timer = setTimeout(hide, 250); };
  tip.addEventListener("pointerenter", () => clearTimeout(timer));
  tip.addEventListener("pointerleave", later);
  node.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("pointerdown", (event) => node.isConnected && !node.contains(event.target) && hide());
  return {
    hide, later, pin: () => { pinned = true; },
    show(x, y, ...content) {
      clearTimeout(timer);
      tip.replaceChildren(...content.flat().filter(Boolean));
      tip.hidden = false;
      const room = node.clientWidth - tip.offsetWidth;
      tip.style.left = `${Math.max(0, Math.min(room, x + 14 + tip.offsetWidth <= node.clientWidth ? x + 14 : x - tip.offsetWidth - 14))}px`;
      tip.style.top = `${room < 140 ? y + 14 : Math.max(0, y - tip.offsetHeight / 2)}px`;
    },
  };
}

/** Metric against size: points with spread, those far off on the edge with their value, the front, published numbers hollow. */
function scatter({ points, hollow, front, xlabel, ylabel, about }, width, hover) {
  const every = [...points, ...hollow];
  const height = Math.max(280, Math.min(440, width * 0.55));
  const spreads = points.flatMap((p) => [p.y - p.spread, p.y + p.spread]);
  const { root, x, y } = frame({ width, height, xlabel, ylabel,
    x: { values: every.map((p) => p.x), log: true }, y: { values: [...every.map((p) => p.y), ...spreads] } });
  if (front.length > 1)
    root.append(svg("path", { class: "front", d: front.map((p, n) => (n ? `H${x(p.x)}V${y(p.y)}` : `M${x(p.x)} ${y(p.y)}`)).join("") }));
  const tell = (p) => {
    root.querySelector(".on")?.classList.remove("on");
    p.node.classList.add("on");
    hover.show(x(p.x), y(p.y), about(p));
  };
  for (const p of every) {
    const still = p.spread ? svg("path", { class: "spread", stroke: p.look.color,
      d: `M${x(p.x)} ${y(p.y - p.spread)}V${y(p.y + p.spread)}` }) : null;
    p.node = svg("g", { class: "point", tabindex: 0, role: "button", "aria-label": p.name, "data-run": p.run,
      onfocus: () => tell(p), onblur: hover.later,
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); tell(p); hover.pin(); } } },
    still, svg("circle", { class: "target", cx: x(p.x), cy: y(p.y), r: 11 }),
    shape(p.look, { transform: `translate(${x(p.x)} ${y(p.y)})${p.best ? " scale(1.25)" : ""}`, stroke: p.look.color,
      class: p.hollow ? "hollow" : "solid", fill: p.hollow ? null : p.look.color }),
    p.beyond && svg("text", { class: "tick", x: x(p.x), y: y(p.y) + (y(p.y) > height / 2 ? -9 : 18), "text-anchor": "middle" }, p.beyond));
    root.append(p.node);
  }
  const nearest = (event) => { // where points overlap, the one whose middle is closest
    const corner = root.getBoundingClientRect();
    const far = (p) => Math.hypot(x(p.x) - event.clientX + corner.left, y(p.y) - event.clientY + corner.top);
    const found = every.reduce((best, p) => (far(p) < far(best) ? p : best));
    return far(found) < 24 ? found : null;
  };
  let last = null;
  return fill(root, { onpointerleave: () => { last = null; hover.later(); },
    onpointermove: (event) => {
      const found = nearest(event);
      if (found && found !== last) tell(found);
      if (!found && last) hover.later();
      last = found;
    },
    onclick: (event) => { const found = nearest(event); if (found) { tell(found); hover.pin(); } else hover.hide(); } }, []);
}

/** Lines over epochs or layers; the pointer or the arrow keys pick a line and a place on it. */
function lines({ series, at, names, xlabel, ylabel, log, height = 260, about }, width, hover) {
  const known = (v) => v != null && (!log || v > 0);
  const { root, x, y, box } = frame({ width, height: names ? height + 46 : height, names, xlabel, ylabel,
    x: { values: names ? names.map((_, n) => n) : at, room: 0.02 }, y: { values: series.flatMap((s) => s.values.filter(known)), log } });
  const position = (n) => x(names ? n : at[n]);
  const paths = series.map((s) => svg("g", { class: "line", stroke: s.color, fill: s.color },
    svg("path", { fill: "none", "stroke-dasharray": s.dash,
      d: s.values.map((v, n) => (known(v) ? `${n && known(s.values[n - 1]) ? "L" : "M"}${position(n)} ${y(v)}` : "")).join("") }),
    s.values.length <= 80 && s.values.map((v, n) => known(v) && svg("circle", { cx: position(n), cy: y(v), r: 2.4 }))));
  const cursor = svg("circle", { class: "cursor", r: 5, visibility: "hidden" });
  let chosen = [0, 0];
  const choose = (line, n) => {
    const s = series[line], v = s && s.values[n];
    if (v == null) return;
    chosen = [line, n];
    paths.forEach((path, k) => path.classList.toggle("dim", k !== line && series.length > 1));
    fill(cursor, { cx: position(n), cy: y(v), fill: s.color, visibility: "visible" }, []);
    hover.show(position(n), y(v), about ? about(s, n, v) : el("p", {}, el("b", {}, show.number(v)), ` ${s.name}, ${xlabel} ${at[n]}`));
  };
  const leave = () => { paths.forEach((p) => p.classList.remove("dim")); cursor.setAttribute("visibility", "hidden"); hover.later(); };
  const nearest = (event) => {
    const corner = root.getBoundingClientRect();
    const px = event.clientX - corner.left, py = event.clientY - corner.top;
    let best = [Infinity, 0, 0];
    series.forEach((s, line) => s.values.forEach((v, n) => {
      if (!known(v)) return;
      const far = 4 * (position(n) - px) ** 2 + (y(v) - py) ** 2;
      if (far < best[0]) best = [far, line, n];
    }));
    choose(best[1], best[2]);
  };
  const keys = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
  fill(root, { tabindex: 0, role: "application", "aria-label": `${ylabel}, arrow keys move along the lines`, class: "lines",
    onpointermove: nearest, onpointerdown: nearest, onpointerleave: leave, onblur: leave, onfocus: () => choose(...chosen),
    onkeydown: (event) => {
      const move = keys[event.key];
      if (!move) return;
      event.preventDefault();
      choose((chosen[0] + move[0] + series.length) % series.length,
        Math.max(0, Math.min(series[0].values.length - 1, chosen[1] + move[1])));
    } },
  [svg("rect", { class: "target", x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top }), paths, cursor]);
  return root;
}

/** A histogram with its shares written on the bars. */
function bars({ counts, xlabel, ylabel }, width, hover) {
  const height = 260, total = counts.reduce((a, b) => a + b, 0);
  const first = counts.findIndex((n) => n > 0);
  const shown = counts.slice(first);
  const box = { left: 8, right: width - 8, top: 44, bottom: height - 46 }, step = Math.min(90, (box.right - box.left) / shown.length);
  const most = Math.max(...shown), root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${ylabel}: ${shown.map((n, k) => `${first + k} bits ${(100 * n / total).toFixed(1)}%`).join(", ")}` });
  root.append(svg("text", { class: "label", x: 4, y: 13 }, ylabel),
    svg("text", { class: "label", x: box.right, y: height - 8, "text-anchor": "end" }, xlabel),
    svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  shown.forEach((n, k) => {
    const tall = (n / most) * (box.bottom - box.top), left = box.left + k * step;
    const percent = (100 * n) / total;
    root.append(svg("rect", { class: "bar", x: left + step * 0.12, y: box.bottom - tall, width: step * 0.76, height: tall, rx: 3,
      onpointerenter: () => hover.show(left + step, box.bottom - tall, el("p", {}, el("b", {}, n.toLocaleString("en")), ` weights at ${first + k} bits`)),
      onpointerleave: hover.later }),
    svg("text", { class: "tick", x: left + step / 2, y: box.bottom + 18, "text-anchor": "middle" }, first + k),
    n && step > 26 ? svg("text", { class: "tick", x: left + step / 2, y: box.bottom - tall - 6, "text-anchor": "middle" },
      `${percent >= 10 ? percent.toFixed(0) : percent >= 0.1 ? percent.toFixed(1) : "<0.1"}%`) : "");
  });
  return root;
}
