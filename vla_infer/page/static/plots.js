"use strict";
// Lines of the last seconds on a canvas. Colours are the style sheet's, so that light and dark need nothing here.

const Plots = (() => {
  let colours = {};
  function readColours() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["one", "two", "muted", "line", "grid", "good", "bad"]) colours[name] = style.getPropertyValue(`--${name}`).trim();
  }
  readColours();

  // The canvas in CSS pixels, sharp on dense screens; cleared.
  function surface(canvas) {
    const ratio = Math.min(3, window.devicePixelRatio || 1);
    const width = canvas.clientWidth, height = canvas.clientHeight;
    const w = Math.round(width * ratio), h = Math.round(height * ratio);
    if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    return { pen, width, height };
  }

  // At most about `count` round numbers between low and high.
  function rounds(low, high, count) {
    const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((s) => s * power >= raw) * power, found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(10)));
    return found;
  }

  // What is drawn: everything seen, with room above and below, never so near that noise fills the plot.
  function range(lines, smallest) {
    let low = Infinity, high = -Infinity;
    for (const line of lines) for (const v of line) if (v !== null) { if (v < low) low = v; if (v > high) high = v; }
    if (low > high) return null;
    const room = Math.max(0.08 * (high - low), (smallest - (high - low)) / 2);
    return [low - room, high + room];
  }

  function stroke(pen, times, values, x, y, colour, width) {
    pen.beginPath();
    let down = false;
    for (let i = 0; i < times.length; i++) {
      const v = values[i];
      if (v === null) { down = false; continue; }
      if (down) pen.lineTo(x(times[i]), y(v)); else pen.moveTo(x(times[i]), y(v));
      down = true;
    }
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.lineJoin = "round";
    pen.stroke();
  }

  // One joint. times: s, the last is now; limits: [low, high] or null, shown where they are in sight.
  function joint(canvas, { times, measured, commanded, span, limits, smallest }) {
    const { pen, width, height } = surface(canvas);
    const left = 38, right = width - 4, top = 8, bottom = height - 18;
    const now = times.length ? times[times.length - 1] : 0;
    const x = (t) => right - (now - t) / span * (right - left);
    const seen = range([measured, commanded], smallest) ?? [0, 1];
    const y = (v) => bottom - (v - seen[0]) / (seen[1] - seen[0]) * (bottom - top);
    pen.font = "11px system-ui, sans-serif";
    pen.lineWidth = 1;
    pen.fillStyle = colours.muted;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const v of rounds(seen[0], seen[1], 3)) {
      const at = Math.round(y(v)) + 0.5;
      pen.strokeStyle = colours.grid;
      pen.beginPath(); pen.moveTo(left, at); pen.lineTo(right, at); pen.stroke();
      pen.fillText(String(v), left - 6, at);
    }
    pen.textBaseline = "alphabetic";
    for (let back = 0; back <= span; back += 5) {
      pen.textAlign = back === 0 ? "right" : back === span ? "left" : "center";
      pen.fillText(back === 0 ? "now" : `−${back} s`, x(now - back), height - 4);
    }
    pen.save();
    pen.beginPath(); pen.rect(left, 0, right - left + 2, bottom + 1); pen.clip();
    if (limits) {
      pen.setLineDash([4, 4]);
      pen.strokeStyle = colours.bad;
      for (const v of limits) {
        if (v < seen[0] || v > seen[1]) continue;
        pen.beginPath(); pen.moveTo(left, y(v)); pen.lineTo(right, y(v)); pen.stroke();
      }
      pen.setLineDash([]);
    }
    stroke(pen, times, commanded, x, y, colours.two, 1.4);
    stroke(pen, times, measured, x, y, colours.one, 2);
    pen.restore();
    pen.strokeStyle = colours.line;
    pen.beginPath(); pen.moveTo(left, bottom + 0.5); pen.lineTo(right, bottom + 0.5); pen.stroke();
  }

  // A small line without axes: from 0 to the largest of the values.
  function spark(canvas, values, length) {
    const { pen, width, height } = surface(canvas);
    const high = Math.max(1e-9, ...values.filter((v) => v !== null));
    const x = (i) => width - 1 - (values.length - 1 - i) / (length - 1) * (width - 2);
    const y = (v) => height - 2 - v / high * (height - 4);
    pen.strokeStyle = colours.grid;
    pen.beginPath(); pen.moveTo(0, height - 1.5); pen.lineTo(width, height - 1.5); pen.stroke();
    stroke(pen, values.map((_, i) => i), values, x, y, colours.one, 1.5);
  }

  return { joint, spark, readColours };
})();
