"use strict";
// Draws the report in #data as SVG. Text goes in as textContent only, so nothing in the data can be markup.
const data = JSON.parse(document.getElementById("data").textContent);
const report = data.report, trace = report.trace;
const page = document.getElementById("page");
const SERIES = ["var(--one)", "var(--two)", "var(--three)", "var(--four)"];
const CAMERA = (name) => name.replace(/^observation\.images\./, "");

function make(parent, tag, attributes = {}, text = null) {
  const spaces = ["svg", "g", "line", "path", "rect", "circle", "text", "polyline"];
  const node = spaces.includes(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  parent.appendChild(node);
  return node;
}
const tip = make(document.body, "div", { id: "tip", role: "status" });
function showTip(event, text) {
  tip.textContent = text;
  tip.style.display = "block";
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 10) + "px";
}
const hideTip = () => { tip.style.display = "none"; };

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 100 ? value.toFixed(1) : String(Number(value.toPrecision(digits)));
}
function ticksOf(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((s) => s * power >= raw) * power, found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(10)));
  return found;
}
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (v !== null) { if (v < low) low = v; if (v > high) high = v; }
  return low > high ? [0, 1] : low === high ? [low - 0.5, high + 0.5] : [low, high];
}
function section(title, text) {
  const node = make(page, "section");
  make(node, "h2", {}, title);
  if (text) make(node, "p", {}, text);
  return node;
}
function legend(parent, entries) {
  const node = make(parent, "div", { class: "legend" });
  for (const [name, colour] of entries) {
    const entry = make(node, "span");
    make(entry, "i", { style: `background:${colour}` });
    entry.appendChild(document.createTextNode(name));
  }
}

// One set of axes. x and y turn values into pixels; `layer` is what the series are drawn on.
function axes(parent, { width = 720, height = 240, x, y, xName = "", yName = "", left = 46 }) {
  const svg = make(parent, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const area = { left, right: width - 10, top: 16, bottom: height - 30 };
  const fx = (v) => area.left + (v - x[0]) / (x[1] - x[0]) * (area.right - area.left);
  const fy = (v) => area.bottom - (v - y[0]) / (y[1] - y[0]) * (area.bottom - area.top);
  for (const v of ticksOf(y[0], y[1], height > 180 ? 5 : 3)) {
    make(svg, "line", { x1: area.left, x2: area.right, y1: fy(v), y2: fy(v), stroke: "var(--grid)" });
    make(svg, "text", { x: area.left - 6, y: fy(v) + 4, "text-anchor": "end" }, number(v, 4));
  }
  for (const v of ticksOf(x[0], x[1], width / 90)) {
    make(svg, "text", { x: fx(v), y: area.bottom + 15, "text-anchor": "middle" }, number(v, 4));
  }
  make(svg, "line", { x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom, stroke: "var(--line)" });
  if (yName) make(svg, "text", { x: 0, y: 9 }, yName);
  if (xName) make(svg, "text", { x: area.right, y: height - 3, "text-anchor": "end" }, xName);
  return { svg, fx, fy, area, layer: make(svg, "g"), x, y };
}
function polyline(plot, xs, ys, colour, { width = 1.6, dash = "" } = {}) {
  let path = "", pen = false;
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null || xs[i] < plot.x[0] || xs[i] > plot.x[1]) { pen = false; continue; }
    path += `${pen ? "L" : "M"}${plot.fx(xs[i]).toFixed(1)},${plot.fy(ys[i]).toFixed(1)}`;
    pen = true;
  }
  const attributes = { d: path, fill: "none", stroke: colour, "stroke-width": width, "stroke-linejoin": "round" };
  if (dash) attributes["stroke-dasharray"] = dash;
  return make(plot.layer, "path", attributes);
}
function dots(plot, xs, ys, colour, radius = 1.7) {
  // One path of tiny round strokes is far lighter than a node for each of thousands of points.
  let path = "";
  for (let i = 0; i < xs.length; i++) if (ys[i] !== null) path += `M${plot.fx(xs[i]).toFixed(1)},${plot.fy(ys[i]).toFixed(1)}h0`;
  make(plot.layer, "path", { d: path, stroke: colour, "stroke-width": radius * 2, "stroke-linecap": "round", fill: "none" });
}
// The top of an axis: the largest value, unless a few lie so far above the rest that nothing else could be seen.
function ceiling(values) {
  const sorted = values.filter((v) => v !== null).sort((a, b) => a - b), top = sorted[sorted.length - 1] || 1;
  const usual = sorted[Math.floor(0.95 * (sorted.length - 1))] || top;
  return top > 3 * usual ? 2 * usual : top * 1.08;
}
// As dots, with those above the axis as marks on its upper edge, their number beside it: one for all series of a plot.
function clipped(plot, xs, ys, colour) {
  dots(plot, xs, ys.map((v) => v === null || v > plot.y[1] ? null : v), colour);
  let above = "", count = 0;
  ys.forEach((v, i) => { if (v > plot.y[1]) { above += `M${(plot.fx(xs[i]) - 4).toFixed(1)},${plot.area.top + 6}l4,-6l4,6z`; count++; } });
  if (!count) return;
  make(plot.layer, "path", { d: above, fill: colour });
  plot.above = { count: count + (plot.above?.count ?? 0), top: Math.max(...ys, plot.above?.top ?? 0), note:
    plot.above?.note ?? make(plot.layer, "text", { x: plot.area.right, y: 9, "text-anchor": "end" }) };
  plot.above.note.textContent = `▲ ${plot.above.count} above, up to ${number(plot.above.top)}`;
}
function rule(plot, value, name) {
  make(plot.layer, "line", { x1: plot.area.left, x2: plot.area.right, y1: plot.fy(value), y2: plot.fy(value),
    stroke: "var(--bad)", "stroke-width": 1.4, "stroke-dasharray": "5 4" });
  make(plot.layer, "text", { x: plot.area.right, y: plot.fy(value) - 4, "text-anchor": "end", style: "fill:var(--bad)" }, name);
}
function nearest(xs, value) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] < value) low = mid; else high = mid; }
  return Math.abs(xs[low] - value) <= Math.abs(xs[high] - value) ? low : high;
}
// Values under the pointer: series is [[name, xs, ys], ...] with xs in order.
function hover(plot, series, unit) {
  const cross = make(plot.svg, "line", { y1: plot.area.top, y2: plot.area.bottom, stroke: "var(--muted)", visibility: "hidden" });
  plot.svg.addEventListener("pointermove", (event) => {
    const box = plot.svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * plot.svg.viewBox.baseVal.width;
    const value = plot.x[0] + (at - plot.area.left) / (plot.area.right - plot.area.left) * (plot.x[1] - plot.x[0]);
    if (value < plot.x[0] || value > plot.x[1]) { cross.setAttribute("visibility", "hidden"); hideTip(); return; }
    cross.setAttribute("visibility", "visible");
    cross.setAttribute("x1", at); cross.setAttribute("x2", at);
    const lines = [`${value.toFixed(2)} s`];
    for (const [name, xs, ys] of series) if (xs.length) lines.push(`${name} ${number(ys[nearest(xs, value)])} ${unit}`);
    showTip(event, lines.join("\n"));
  });
  plot.svg.addEventListener("pointerleave", () => { cross.setAttribute("visibility", "hidden"); hideTip(); });
}
// Share of values at or below: a distribution in which every percentile can be read off.
function distribution(parent, series, { unit, limit = null, limitName = "" }) {
  const shown = series.filter((s) => s[1].length);
  const high = Math.max(...shown.map(([, values]) => ceiling(values)), (limit ?? 0) * 1.05);
  const plot = axes(parent, { width: 360, height: 240, x: [0, high], y: [0, 100], xName: unit, yName: "% of values at or below", left: 34 });
  for (const [, values, colour] of shown) {
    const sorted = [...values].sort((a, b) => a - b), xs = [], ys = [];
    const step = Math.max(1, Math.floor(sorted.length / 300));
    for (let i = 0; i < sorted.length; i += step) { xs.push(sorted[i]); ys.push(100 * (i + 1) / sorted.length); }
    polyline(plot, [...xs, sorted[sorted.length - 1]], [...ys, 100], colour);
  }
  if (limit !== null) {
    make(plot.layer, "line", { x1: plot.fx(limit), x2: plot.fx(limit), y1: plot.area.top, y2: plot.area.bottom,
      stroke: "var(--bad)", "stroke-width": 1.4, "stroke-dasharray": "5 4" });
    make(plot.layer, "text", { x: plot.fx(limit) - 4, y: plot.area.top + 10, "text-anchor": "end", style: "fill:var(--bad)" }, limitName);
  }
}

function header() {
  const { bag, policy, contract, host, software } = report;
  make(page, "h1", {}, `${policy.family} on ${bag.name}, ${report.mode}`);
  make(page, "p", {}, `${policy.name}, ${policy.device}, ${policy.precision}, ${policy.cameras.length} cameras, horizon ` +
    `${policy.horizon}, ${policy.num_steps} steps. Contract ${contract.name}, ${contract.control_rate} Hz commands. ` +
    `${host.processor}, ${host.cores} cores, GPU ${host.gpu ?? "none"}. Commit ${software.commit ?? "unknown"}, ${report.date}. ` +
    `Bag ${bag.sha256.slice(0, 12)}, policy ${policy.fingerprint.slice(0, 12)}.`);
  const tiles = make(page, "div", { class: "tiles" });
  const tile = (name, value, note, bad = false) => {
    const node = make(tiles, "div", { class: bad ? "tile bad" : "tile" });
    make(node, "div", { class: "name" }, name);
    make(node, "div", { class: "value" }, value);
    make(node, "div", { class: "note" }, note);
  };
  const latency = report.latency_ms, control = report.control, frames = report.frames;
  const age = latency.capture_to_command;
  if (age && control) {
    tile("capture → command, p99", `${number(age.p99)} ms`, `deadline ${number(control.deadline_ms)} ms, median ${number(age.p50)} ms`, age.p99 > control.deadline_ms);
    tile("commands past the deadline", `${(100 * (control.deadline_miss_share ?? 0)).toFixed(2)} %`, `${control.deadline_misses} of ${control.commands_played}`, control.deadline_misses > 0);
  }
  tile("engine, median", `${number(latency.engine.p50)} ms`, `p99 ${number(latency.engine.p99)} ms, max ${number(latency.engine.max)} ms`);
  tile("observations dropped", frames.dropped_share === null ? "–" : `${(100 * frames.dropped_share).toFixed(1)} %`, `${frames.inferences} inferred, ${frames.dropped} not`);
  if (control) tile("time in hold", `${number(control.hold_s)} s`, `${number(control.starvation_s)} s without a due action`, control.hold_s > 0);
  tile("to the first command", report.cold_start.first_command_s === null ? "–" : `${number(report.cold_start.first_command_s)} s`, `of it ${number(report.cold_start.load_s)} s loading`);
}

function happened() {
  const ran = trace.inferences, ticks = trace.ticks, end = Math.max(report.duration_s, 0.1);
  const node = section("What happened when", "Images as they were sent, inferences from start to chunk, and what the commands came from.");
  const colours = { played: "var(--one)", starved: "var(--two)", waiting: "var(--wait)" };
  const states = [...new Set(ticks.state)];
  legend(node, [["inference", "var(--three)"], ...states.map((s) => [s === "played" ? "commands from a chunk" : s === "starved" ? "held: no action was due" : s === "waiting" ? "nothing sent yet" : s === "recovering" ? "held: until frames are good again" : `held: ${s}`, colours[s] ?? "var(--bad)"])]);
  const frame = make(node, "div");
  const span = Math.min(end, 8);
  let start = 0;
  function draw() {
    frame.textContent = "";
    const cameras = Object.entries(trace.sent), row = 24, height = row * (cameras.length + 1 + (ticks.time.length ? 1 : 0)) + 50;
    const plot = axes(frame, { width: 1180, height, x: [start, start + span], y: [0, 1], xName: "s", left: 150 });
    plot.svg.querySelectorAll("text").forEach((text) => { if (Number(text.getAttribute("x")) < 150 && text.getAttribute("text-anchor") === "end") text.remove(); });
    plot.svg.querySelectorAll("line").forEach((line) => { if (line.getAttribute("stroke") === "var(--grid)") line.remove(); });
    let y = 18;
    const name = (text) => make(plot.svg, "text", { x: 140, y: y + 13, "text-anchor": "end" }, text.length > 22 ? "…" + text.slice(-21) : text);
    const inside = (t) => t >= start && t <= start + span;
    for (const [topic, times] of cameras) {
      name(topic);
      let path = "";
      for (const t of times) if (inside(t)) path += `M${plot.fx(t).toFixed(1)},${y + 3}v12`;
      make(plot.layer, "path", { d: path, stroke: "var(--muted)", "stroke-width": 1.2 });
      y += row;
    }
    name("inference");
    for (let i = 0; i < ran.taken.length; i++) {
      if (ran.ready[i] < start || ran.taken[i] > start + span) continue;
      const from = Math.max(start, ran.taken[i]), to = Math.min(start + span, ran.ready[i]);
      const bar = make(plot.layer, "rect", { x: plot.fx(from), y: y + 3, width: Math.max(1, plot.fx(to) - plot.fx(from) - 0.6), height: 13, rx: 2, fill: "var(--three)" });
      bar.addEventListener("pointermove", (event) => showTip(event, `observation ${ran.sequence[i]} of ${ran.stamp[i].toFixed(3)} s\nstarted ${ran.taken[i].toFixed(3)} s, took ${number(1e3 * (ran.ready[i] - ran.taken[i]))} ms`));
      bar.addEventListener("pointerleave", hideTip);
    }
    for (const [when] of trace.failures) if (inside(when)) make(plot.layer, "circle", { cx: plot.fx(when), cy: y + 9, r: 4, fill: "var(--bad)" });
    y += row;
    if (!ticks.time.length) return;
    name("commands");
    const period = 1 / report.contract.control_rate;
    for (let i = 0; i < ticks.time.length;) {
      let j = i;
      while (j + 1 < ticks.time.length && ticks.state[j + 1] === ticks.state[i] && ticks.chunk[j + 1] === ticks.chunk[i]) j++;
      const from = Math.max(start, ticks.time[i]), to = Math.min(start + span, ticks.time[j] + period);
      if (to > from) {
        const bar = make(plot.layer, "rect", { x: plot.fx(from), y: y + 3, width: Math.max(0.8, plot.fx(to) - plot.fx(from) - 0.8), height: 13, fill: colours[ticks.state[i]] ?? "var(--bad)" });
        const text = ticks.chunk[i] === null ? ticks.state[i] : `chunk of observation ${ticks.chunk[i]}, ${j - i + 1} commands\nage ${number(ticks.age_ms[i])} to ${number(ticks.age_ms[j])} ms`;
        bar.addEventListener("pointermove", (event) => showTip(event, text));
        bar.addEventListener("pointerleave", hideTip);
      }
      i = j + 1;
    }
  }
  draw();
  if (end > span) {
    const label = make(node, "label", { class: "slider" }, "Move through the run");
    const slider = make(label, "input", { type: "range", min: 0, max: end - span, step: span / 50, value: 0 });
    slider.addEventListener("input", () => { start = Number(slider.value); draw(); });
  }
}

function ages() {
  const control = report.control, ticks = trace.ticks;
  if (!control || !report.samples.capture_to_command) return;
  const node = section("Age at actuation", "Time from the capture stamp of the observation to each command made from it. A chunk's later actions are older by design; the deadline says how old is too old.");
  const pair = make(node, "div", { class: "pair" });
  const top = Math.max(control.deadline_ms, report.latency_ms.capture_to_command.max) * 1.08;
  const plot = axes(make(pair, "div"), { x: [0, report.duration_s], y: [0, top], xName: "s", yName: "ms" });
  const xs = [], ys = [];
  ticks.age_ms.forEach((age, i) => { if (age !== null) { xs.push(ticks.time[i]); ys.push(age); } });
  dots(plot, xs, ys, "var(--one)", 1.4);
  rule(plot, control.deadline_ms, `deadline ${number(control.deadline_ms)} ms`);
  hover(plot, [["age", xs, ys]], "ms");
  distribution(make(pair, "div"), [["age", ys, "var(--one)"]], { unit: "ms", limit: control.deadline_ms, limitName: "deadline" });
}

function latencies() {
  const ran = trace.inferences;
  const node = section("Latency", "Each inference: the engine alone, and from taking the observation to its chunk.");
  const whole = ran.taken.map((t, i) => 1e3 * (ran.ready[i] - t));
  legend(node, [["engine", SERIES[0]], ["decode, preprocess, engine and postprocess", SERIES[1]]]);
  const pair = make(node, "div", { class: "pair" });
  const top = ceiling(whole);
  const plot = axes(make(pair, "div"), { x: [0, Math.max(report.duration_s, 0.1)], y: [0, top], xName: "s", yName: "ms" });
  clipped(plot, ran.taken, whole, SERIES[1]);
  clipped(plot, ran.taken, ran.engine_ms, SERIES[0]);
  hover(plot, [["engine", ran.taken, ran.engine_ms], ["inference", ran.taken, whole]], "ms");
  distribution(make(pair, "div"), [["inference", whole, SERIES[1]], ["engine", ran.engine_ms, SERIES[0]]], { unit: "ms" });
  const scroll = make(node, "div", { class: "scroll" }), table = make(scroll, "table"), columns = ["p50", "p90", "p95", "p99", "p99.9", "max", "count"];
  const head = make(table, "tr");
  for (const name of ["ms", ...columns]) make(head, "th", {}, name);
  for (const [name, label] of Object.entries(data.labels)) {
    const values = report.latency_ms[name];
    if (!values) continue;
    const row = make(table, "tr");
    for (const cell of [label, ...columns.map((c) => number(values[c], 4))]) make(row, "td", {}, cell);
  }
}

function actions() {
  const seen = data.observations;
  if (!seen.length) return;
  const recorded = data.recorded, names = report.contract.joints;
  const what = recorded === null ? "" : recorded.source === "commands" ? "recorded commands" : "joint positions reached (the bag has no commands)";
  const node = section("Predicted and recorded actions", "Policy units. Move through the observations: the cameras as the policy saw them, and the chunk it made of them.");
  legend(node, [...(recorded ? [[what, "var(--muted)"]] : []), ["first action of each chunk", SERIES[0]], ["the whole chunk of this observation", SERIES[1]]]);
  const label = make(node, "label", { class: "slider" }), text = make(label, "span");
  const slider = make(label, "input", { type: "range", min: 0, max: seen.length - 1, step: 1, value: Math.min(1, seen.length - 1), "aria-label": "observation" });
  const grid = make(node, "div", { class: "actions" }), pictures = make(grid, "div", { class: "pictures" }), joints = make(grid, "div", { class: "joints" });
  const frames = Object.keys(seen[0].pictures).map((camera) => {
    const figure = make(pictures, "figure"), image = make(figure, "img", { alt: `camera ${CAMERA(camera)}` });
    make(figure, "figcaption", {}, CAMERA(camera));
    return [camera, image];
  });
  const plots = names.map((name, j) => {
    const line = recorded ? recorded.lines[j] : [[], []], first = data.first_actions[j];
    const low = [], high = [];
    for (const one of seen) { const [a, b] = extent(one.chunk[j]); low.push(a); high.push(b); }
    const [a, b] = extent([...line[1], ...first[1], ...low, ...high]), pad = 0.06 * (b - a);
    const plot = axes(make(joints, "div"), { width: 360, height: 150, x: [0, report.bag.seconds], y: [a - pad, b + pad], xName: "s" });
    make(plot.svg, "text", { class: "title", x: plot.area.left, y: 9 }, name);
    polyline(plot, line[0], line[1], "var(--muted)", { width: 2 });
    polyline(plot, first[0], first[1], SERIES[0], { width: 1.2 });
    hover(plot, [...(recorded ? [["recorded", line[0], line[1]]] : []), ["first action", first[0], first[1]]], "");
    return { plot, chunk: null, mark: make(plot.layer, "line", { y1: plot.area.top, y2: plot.area.bottom, stroke: SERIES[1], "stroke-dasharray": "2 3" }) };
  });
  function show() {
    const one = seen[Number(slider.value)];
    text.textContent = `Observation at ${one.time.toFixed(2)} s (${Number(slider.value) + 1} of ${seen.length})`;
    for (const [camera, image] of frames) image.src = one.pictures[camera] ?? "data:,";
    plots.forEach((entry, j) => {
      entry.chunk?.remove();
      const times = one.chunk[j].map((_, i) => one.time + i / data.policy_rate);
      entry.chunk = polyline(entry.plot, times, one.chunk[j], SERIES[1], { width: 2.2 });
      for (const name of ["x1", "x2"]) entry.mark.setAttribute(name, entry.plot.fx(one.time));
    });
  }
  slider.addEventListener("input", show);
  show();
}

function agreement() {
  const found = report.agreement;
  if (!found) return;
  const node = section("Open-loop error", "Mean absolute error by step of the chunk over all observations, divided by the spread of the joint, so that joints can be compared: 1 is as far off as the joint usually moves.");
  const names = Object.keys(found.joints).slice(0, 16);
  const rate = data.policy_rate;
  const spread = names.map((name) => found.joints[name].rmse_over_std ? found.joints[name].rmse / found.joints[name].rmse_over_std : null);
  const lines = names.map((name, k) => {
    const j = report.contract.joints.indexOf(name);
    return found.mae_per_step.map((row) => row[j] === null || !spread[k] ? null : row[j] / spread[k]);
  });
  const pair = make(node, "div", { class: "pair" });
  const xs = found.mae_per_step.map((_, i) => i / rate);
  const [, high] = extent(lines.flat());
  const plot = axes(make(pair, "div"), { x: [0, Math.max(...xs, 1 / rate)], y: [0, high * 1.1], xName: "s into the chunk", yName: "error / spread" });
  const worst = lines.map((line) => Math.max(...line.filter((v) => v !== null), 0));
  const ranked = worst.map((v, i) => [v, i]).sort((a, b) => b[0] - a[0]).slice(0, 4).map((e) => e[1]);
  lines.forEach((line, k) => polyline(plot, xs, line, ranked.includes(k) ? SERIES[ranked.indexOf(k)] : "var(--wait)"));
  hover(plot, names.map((name, k) => [name, xs, lines[k]]), "");
  const side = make(pair, "div", { class: "scroll" });
  legend(node, [...ranked.map((k, i) => [names[k], SERIES[i]]), ...(names.length > 4 ? [["other joints", "var(--wait)"]] : [])]);
  const table = make(side, "table"), head = make(table, "tr");
  for (const name of ["joint", "MAE", "RMSE", "RMSE / spread"]) make(head, "th", {}, name);
  for (const name of names) {
    const row = make(table, "tr"), j = found.joints[name];
    for (const cell of [name, number(j.mae), number(j.rmse), number(j.rmse_over_std)]) make(row, "td", {}, cell);
  }
}

function sweep() {
  const trials = report.extra.trials;
  if (!trials) return;
  const found = report.extra.highest_rate_hz;
  const node = section("Rates tried", (found === null ? "No rate" : `${number(found)} Hz`) + " is the highest camera rate with less than 5 % of the observations dropped. The rest of this page is of the trial at that rate.");
  const shown = [...trials].sort((a, b) => a.rate_hz - b.rate_hz);
  const xs = shown.map((t) => t.rate_hz), ys = shown.map((t) => 100 * t.dropped_share);
  const plot = axes(make(node, "div"), { width: 1180, height: 220, x: [0, Math.max(...xs) * 1.05], y: [0, Math.max(10, ...ys) * 1.05], xName: "Hz", yName: "% dropped" });
  polyline(plot, xs, ys, "var(--wait)");
  dots(plot, xs, ys, SERIES[0], 3.5);
  rule(plot, 5, "5 %");
}

function everything() {
  const node = section("Everything else");
  const { samples, trace: _, latency_ms, ...rest } = report;
  const details = make(node, "details");
  make(details, "summary", {}, "Figures, versions and settings of this run");
  make(details, "pre", {}, JSON.stringify(rest, null, 1));
}

header();
sweep();
happened();
ages();
latencies();
actions();
agreement();
everything();
