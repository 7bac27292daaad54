"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const W = 1000, H = 300, LEFT = 70, RIGHT = 26, TOP = 8, BOTTOM = 28;
const labels = [...new Set(data.panels.flatMap((p) => p.curves.map((c) => c.label)))];
const colour = (label) => data.colours[labels.indexOf(label) % data.colours.length];
const hidden = new Set();
const every = data.panels.flatMap((p) => p.curves.flatMap((c) => c.x)).filter((x) => x !== null);
const whole = [every.reduce((a, b) => Math.min(a, b), Infinity), every.reduce((a, b) => Math.max(a, b), -Infinity)];
if (whole[0] === whole[1]) whole[1] = whole[0] + 1;
let span = [...whole], smooth = 0;

function node(parent, name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

function ticks(low, high) {
  const rough = (high - low) / 6 || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}

const shown = (value) => {
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e6 || size < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(5));
};

function average(ys) {
  let sum = 0, weight = 0;
  return ys.map((y) => {
    if (y === null) return null;
    sum = smooth * sum + (1 - smooth) * y;
    weight = smooth * weight + (1 - smooth);
    return sum / weight;
  });
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

function draw(panel, svg, read) {
  svg.replaceChildren();
  const curves = panel.curves.filter((c) => !hidden.has(c.label));
  const inside = curves.flatMap((c) => c.y.filter((y, n) => y !== null && c.x[n] >= span[0] && c.x[n] <= span[1]));
  const positive = inside.filter((y) => y > 0);
  let low = inside.reduce((a, b) => Math.min(a, b), Infinity), high = inside.reduce((a, b) => Math.max(a, b), -Infinity);
  const log = panel.log && positive.length > 0;
  if (log) { low = positive.reduce((a, b) => Math.min(a, b), Infinity); high = Math.max(high, low); }
  if (!inside.length) { low = 0; high = 1; }
  const form = log ? Math.log10 : (y) => y;
  let [bottom, top] = [form(low), form(high)];
  const margin = (top - bottom) * 0.05 || Math.abs(top) * 0.05 || 0.5;
  bottom -= margin; top += margin;
  const px = (x) => LEFT + ((x - span[0]) / (span[1] - span[0])) * (W - LEFT - RIGHT);
  const py = (y) => H - BOTTOM - ((form(y) - bottom) / (top - bottom)) * (H - TOP - BOTTOM);
  for (const t of ticks(bottom, top)) {
    const y = H - BOTTOM - ((t - bottom) / (top - bottom)) * (H - TOP - BOTTOM);
    node(svg, "line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y, y2: y });
    node(svg, "text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, shown(log ? 10 ** t : t));
  }
  for (const t of ticks(...span)) {
    node(svg, "line", { class: "grid", x1: px(t), x2: px(t), y1: TOP, y2: H - BOTTOM });
    node(svg, "text", { x: px(t), y: H - BOTTOM + 16, "text-anchor": "middle" }, shown(t));
  }
  const clip = "clip" + data.panels.indexOf(panel);
  node(node(svg, "clipPath", { id: clip }), "rect", { x: LEFT, y: TOP, width: W - LEFT - RIGHT, height: H - TOP - BOTTOM });
  const body = node(svg, "g", { "clip-path": `url(#${clip})` });
  for (const [x, text] of data.marks) {
    node(body, "line", { class: "mark", x1: px(x), x2: px(x), y1: TOP, y2: H - BOTTOM });
    node(body, "text", { x: px(x) + 4, y: TOP + 12 }, text);
  }
  const path = (c, ys) => {
    let text = "", pen = false;
    ys.forEach((y, n) => {
      if (y === null || c.x[n] === null || (log && y <= 0)) { pen = false; return; }
      text += `${pen ? "L" : "M"}${px(c.x[n]).toFixed(1)} ${py(y).toFixed(1)}`;
      pen = true;
    });
    return text;
  };
  for (const c of curves) {
    if (smooth) node(body, "path", { class: "curve raw", stroke: colour(c.label), d: path(c, c.y) });
    node(body, "path", { class: "curve", stroke: colour(c.label), d: path(c, smooth ? average(c.y) : c.y) });
    if (c.x.length <= 30) c.x.forEach((x, n) => c.y[n] !== null && node(body, "circle", { cx: px(x), cy: py(c.y[n]), r: 2.5, fill: colour(c.label) }));
  }
  const at = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * W;
    return span[0] + ((Math.min(Math.max(x, LEFT), W - RIGHT) - LEFT) / (W - LEFT - RIGHT)) * (span[1] - span[0]);
  };
  let from = null, rectangle = null;
  svg.onpointerdown = (event) => {
    if (event.button) return;
    from = at(event);
    rectangle = node(svg, "rect", { class: "drag", x: px(from), y: TOP, width: 0, height: H - TOP - BOTTOM });
    svg.setPointerCapture(event.pointerId);
  };
  svg.onpointermove = (event) => {
    const x = at(event);
    if (from !== null) {
      rectangle.setAttribute("x", Math.min(px(from), px(x)));
      rectangle.setAttribute("width", Math.abs(px(x) - px(from)));
    }
    const values = curves.filter((c) => c.x.length).map((c) => {
      const n = nearest(c.x, x);
      return `${c.label} ${c.y[n] === null ? "-" : shown(c.y[n])}`;
    });
    read.textContent = `${data.xLabel} ${shown(Math.round(x))}:  ${values.join("   ")}`;
  };
  svg.onpointerup = (event) => {
    const to = at(event), pair = from === null ? null : [Math.min(from, to), Math.max(from, to)];
    from = null;
    if (pair && px(pair[1]) - px(pair[0]) > 6) { span = pair; render(); } else if (rectangle) rectangle.remove();
  };
  svg.onpointercancel = () => { from = null; if (rectangle) rectangle.remove(); };
  svg.ondblclick = reset;
}

const places = data.panels.map((panel) => {
  const title = document.createElement("h2"), read = document.createElement("div");
  title.textContent = panel.title;
  read.className = "read";
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", panel.title);
  document.getElementById("plots").append(title, svg, read);
  return [panel, svg, read];
});

function render() { for (const place of places) draw(...place); }
function reset() { span = [...whole]; render(); }

for (const label of labels) {
  const button = document.createElement("button"), swatch = document.createElement("span");
  button.type = "button";
  swatch.className = "swatch";
  swatch.style.background = colour(label);
  button.append(swatch, label);
  button.setAttribute("aria-pressed", "true");
  button.onclick = () => {
    if (!hidden.delete(label)) hidden.add(label);
    button.setAttribute("aria-pressed", String(!hidden.has(label)));
    render();
  };
  document.getElementById("runs").append(button);
}
document.getElementById("smooth").oninput = (event) => { smooth = +event.target.value; render(); };
document.getElementById("all").onclick = reset;
document.addEventListener("keydown", (event) => { if (event.key === "Escape") reset(); });
render();
