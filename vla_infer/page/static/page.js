"use strict";
// Shows what the server sends and sends what the operator does. Text goes in as textContent only, so nothing that
// comes over ROS can be markup.

const $ = (id) => document.getElementById(id);
const KEPT = 60; // reports, one a second, that the small lines show
const RETRY = [500, 1000, 2000, 4000]; // ms
const STALE = 2; // s without a picture

let socket = null, tries = 0, hello = null, status = {}, figures = [], joints = [], tiles = [], dirty = false;
let instructed = null; // {text, refused}: sent and not yet seen in force
let trace = { times: [], measured: [], commanded: [] };

function make(parent, tag, attributes = {}, text = null) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  parent.appendChild(node);
  return node;
}
function put(node, text) { if (node.textContent !== text) node.textContent = text; }
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : value.toFixed(digits - 1);
}

function share(part, whole) {
  return part === null || !whole ? "–" : `${(100 * part / whole).toFixed(part * 10 < whole ? 1 : 0)} %`;
}

// ---- what is told once: the contract's cameras and channels

function begin(told) {
  const same = hello !== null && JSON.stringify(hello) === JSON.stringify(told);
  hello = told;
  trace = { times: [], measured: hello.channels.map(() => []), commanded: hello.channels.map(() => []) };
  if (same) return;
  document.title = `${hello.robot} · vla_infer`;
  put($("robot"), hello.robot);
  put($("span"), `last ${hello.span} s`);
  $("cameras").textContent = "";
  figures = hello.cameras.map((camera) => {
    const figure = make($("cameras"), "figure");
    const canvas = make(figure, "canvas", { role: "img", "aria-label": `camera ${camera.name}`, width: 640, height: 480 });
    const note = make(figure, "p", {}, `waiting for ${camera.topic}`);
    const caption = make(figure, "figcaption");
    make(caption, "b", {}, camera.name);
    return { figure, canvas, note, rate: make(caption, "span", {}, camera.topic), camera, drawn: [], seen: 0 };
  });
  $("joints").textContent = "";
  joints = hello.channels.map((channel) => {
    const node = make($("joints"), "div", { class: "joint" }), title = make(node, "div", { class: "title" });
    make(title, "b", {}, channel.quantity === "position" ? channel.name : `${channel.name} (${channel.quantity})`);
    const shown = make(title, "span"), m = make(shown, "span", { class: "m" });
    shown.append(" · ");
    const c = make(shown, "span", { class: "c" });
    // Below this the plot does not zoom in: a hundredth of the joint's way, else of what its numbers are like.
    const smallest = channel.limits ? (channel.limits[1] - channel.limits[0]) / 50 : 0.02;
    return { channel, m, c, smallest, canvas: make(node, "canvas", { role: "img" }) };
  });
  $("known").textContent = "";
  for (const text of hello.instruction.allowed) make($("known"), "option", { value: text });
  $("foot").textContent = "";
  $("foot").append(`${hello.node} · instructions on ${hello.instruction.topic} · `);
  make($("foot"), "kbd", {}, "/");
  $("foot").append(" to the instruction, ");
  make($("foot"), "kbd", {}, "Esc");
  $("foot").append(" emergency stop · ");
  make($("foot"), "span", { id: "policy" });
}

const TILES = [
  ["inference", "inference", (s) => s.latency.inference, (s) => `p99 ${number(s.latency.inference.p99)} ms, ${number(s.inference_rate)}/s`],
  ["age", "observation age", (s) => s.latency.age, (s) => `p99 ${number(s.latency.age.p99)} ms`],
  ["lateness", "tick lateness", (s) => s.latency.lateness, (s) => `p99 ${number(s.latency.lateness.p99)} ms, ${share(s.late, s.due)} late`],
  ["commands", "commands", (s) => s.command_rate === null ? null : { p50: s.command_rate }, (s) => `of ${s.control_rate ?? "–"} Hz, ${s.held ?? "–"} held`, "Hz"],
];
tiles = TILES.map(([key, name, value, note, unit = "ms"]) => {
  const node = make($("tiles"), "div", { id: `tile-${key}` });
  make(node, "div", { class: "name" }, name);
  const shown = make(node, "div", { class: "value" }, "–");
  return { shown, note: make(node, "div", { class: "note" }, "\u00a0"), canvas: make(node, "canvas", { "aria-hidden": "true" }),
    value, about: note, unit, past: [] };
});

// ---- what comes again and again

function report(news) {
  status = news;
  put($("level-name"), status.level);
  put($("level-reason"), status.reason);
  $("level").className = `level ${status.tone}`;
  $("level").title = status.reason;
  $("mode").hidden = status.dry_run === null;
  put($("mode"), status.dry_run ? "dry run" : "armed");
  $("mode").className = status.dry_run ? "badge" : "badge armed";
  $("mode").title = status.dry_run ? "commands go to topics ending in _dry; nothing moves" : "commands reach the robot";
  put($("run"), status.lifecycle === "inactive" ? "Activate" : "Run");
  inForce();
  for (const tile of tiles) {
    const value = tile.value(status);
    tile.past.push(value ? value.p50 : null);
    if (tile.past.length > KEPT) tile.past.shift();
    tile.shown.textContent = value ? number(value.p50) : "–";
    if (value) make(tile.shown, "small", {}, ` ${tile.unit}`);
    put(tile.note, value ? tile.about(status) : "\u00a0");
  }
  task(status.simulation);
  put($("policy"), [status.policy, status.unlimited === "none" ? "" : `no limits for ${status.unlimited}`].filter(Boolean).join(" · "));
  for (const { canvas, channel, m, c } of joints) {
    canvas.setAttribute("aria-label", `${channel.name}: measured ${m.textContent}, commanded ${c.textContent}`);
  }
  dirty = true;
}

function inForce() {
  const text = status.instruction;
  put($("force"), text === null ? "–" : text === "" ? "none" : text);
  if (instructed === null) return;
  if (text === instructed.text) { tell(`${hello.node} has taken it`); instructed = null; }
  else if (status.refused > instructed.refused) { tell(`${hello.node} refused it; its log says why`, true); instructed = null; }
  $("force").parentElement.classList.toggle("pending", instructed !== null);
}

function task(simulation) {
  $("task").hidden = simulation === null;
  $("stage").classList.toggle("tasked", simulation !== null);
  if (simulation === null) return;
  const { kind, colour, instruction, phase, outcome, success, successes, episodes, episode, seconds } = simulation;
  $("task").classList.toggle("done", success);
  put($("episode"), episode === null ? "" : String(episode));
  put($("task-what"), instruction || [kind, colour].filter(Boolean).join(" ") || "none yet");
  const clock = seconds === null ? "" : `${seconds.toFixed(1)} s`;
  put($("task-note"), success ? "success" : phase === "ended" ? outcome : phase && phase !== "running" ? phase : clock);
  put($("score"), successes === null || episodes === null ? "–" : `${successes} / ${episodes}`);
  put($("share"), successes !== null && episodes > 0 ? `${(100 * successes / episodes).toFixed(0)} %` : "");
}

function take(samples) {
  for (const [time, measured, commanded] of samples) {
    trace.times.push(time);
    measured.forEach((v, j) => trace.measured[j].push(v));
    commanded.forEach((v, j) => trace.commanded[j].push(v));
  }
  const old = trace.times.findIndex((t) => t >= trace.times[trace.times.length - 1] - hello.span - 1);
  if (old > 0) for (const line of [trace.times, ...trace.measured, ...trace.commanded]) line.splice(0, old);
  const last = samples[samples.length - 1];
  joints.forEach(({ channel, m, c }, j) => {
    put(m, last[1][j] === null ? "–" : `${number(last[1][j])}${channel.unit}`);
    put(c, last[2][j] === null ? "–" : `${number(last[2][j])}${channel.unit}`);
  });
  dirty = true;
}

async function picture(data, from) {
  const camera = new Uint8Array(data, 0, 1)[0], entry = figures[camera];
  try {
    const image = await createImageBitmap(new Blob([new Uint8Array(data, 1)], { type: "image/jpeg" }));
    if (entry && from === socket) {
      if (entry.canvas.width !== image.width || entry.canvas.height !== image.height) {
        entry.canvas.width = image.width;
        entry.canvas.height = image.height;
        entry.canvas.style.aspectRatio = String(Math.min(2, Math.max(0.8, image.width / image.height)));
      }
      entry.canvas.getContext("2d").drawImage(image, 0, 0);
      const now = performance.now() / 1000;
      entry.drawn = [...entry.drawn.filter((t) => t > now - 2), now];
      entry.seen = now;
      fresh(entry, now);
    }
    image.close();
  } catch (error) {
    if (entry) put(entry.rate, "a picture could not be shown");
  }
  // The server sends the next one only when this one is drawn: a slow browser misses pictures, none wait for it.
  if (from.readyState === WebSocket.OPEN) from.send(new Uint8Array([camera]));
}

function fresh(entry, now) {
  const age = now - entry.seen, why = status.unreadable?.[entry.camera.topic];
  const stale = entry.seen > 0 && age > STALE;
  entry.figure.classList.toggle("stale", stale);
  entry.note.hidden = entry.seen > 0 && !stale && !why;
  put(entry.note, why ? why : stale ? `no image on ${entry.camera.topic} for ${age.toFixed(0)} s` : `waiting for ${entry.camera.topic}`);
  put(entry.rate, entry.drawn.length > 2 && !stale ? `${((entry.drawn.length - 1) / (entry.drawn[entry.drawn.length - 1] - entry.drawn[0])).toFixed(0)} pictures/s` : entry.camera.topic);
}

function draw() {
  if (dirty && hello) {
    dirty = false;
    joints.forEach(({ channel, canvas, smallest }, j) => Plots.joint(canvas, {
      times: trace.times, measured: trace.measured[j], commanded: trace.commanded[j], span: hello.span, limits: channel.limits, smallest,
    }));
    for (const tile of tiles) Plots.spark(tile.canvas, tile.past, KEPT);
  }
  requestAnimationFrame(draw);
}

// ---- connection

function connect() {
  const mine = new WebSocket(`ws://${location.host}/live`);
  mine.binaryType = "arraybuffer";
  socket = mine;
  mine.onmessage = ({ data }) => {
    if (mine !== socket) return;
    if (typeof data !== "string") { picture(data, mine); return; }
    const message = JSON.parse(data);
    if (message.robot !== undefined) { tries = 0; $("lost").hidden = true; begin(message); }
    if (message.status) report(message.status);
    if (message.samples) take(message.samples);
  };
  mine.onclose = () => {
    if (mine !== socket) return;
    socket = null;
    if (document.hidden) return;
    put($("lost"), "The page has lost its server. What is shown is old, and these buttons reach nothing: use the robot's own stop.");
    $("lost").hidden = false;
    setTimeout(() => { if (socket === null && !document.hidden) connect(); }, RETRY[Math.min(tries++, RETRY.length - 1)]);
  };
}
// A page that nobody looks at costs nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) socket?.close();
  else if (socket === null || socket.readyState > WebSocket.OPEN) connect();
});

// ---- what the operator does

function tell(text, refused = false) {
  put($("told"), text);
  $("told").classList.toggle("refused", refused);
}
async function post(path, body = {}) {
  try {
    const response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    if (!response.ok) return { ok: false, message: await response.text() };
    return await response.json();
  } catch (error) {
    return { ok: false, message: "the page's server does not answer" };
  }
}
async function act(service) {
  const { ok, message } = await post(`/${service}`);
  const what = { run: "run", hold: "hold", reset: "reset", activate: "activate", emergency_stop: "emergency stop", new_scene: "new scene" }[service];
  tell(`${what}: ${message || (ok ? "done" : "refused")}`, !ok);
}
$("run").addEventListener("click", () => act(status.lifecycle === "inactive" ? "activate" : "run"));
for (const service of ["hold", "reset", "emergency_stop", "new_scene"]) $(service).addEventListener("click", () => act(service));

$("instruct").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) { tell("type an instruction first", true); $("text").focus(); return; }
  const refused = status.refused ?? 0;
  const { ok, message, text: sent } = await post("/instruction", { text });
  tell(message, !ok);
  if (!ok) return;
  instructed = { text: sent, refused };
  if (![...$("known").children].some((option) => option.value === text)) make($("known"), "option", { value: text });
  $("text").select();
  inForce();
});

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.key === "Escape") { event.preventDefault(); act("emergency_stop"); }
  if (event.key === "/" && document.activeElement !== $("text")) { event.preventDefault(); $("text").focus(); $("text").select(); }
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { Plots.readColours(); dirty = true; });
addEventListener("resize", () => { dirty = true; });
setInterval(() => { const now = performance.now() / 1000; for (const entry of figures) fresh(entry, now); }, 500);

connect();
requestAnimationFrame(draw);
