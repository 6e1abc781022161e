"use strict";

// What the page of `regard look --html` and that of `regard view` share.
// Nothing here writes markup: every text of the model's or the reader's is set as text.

const make = (tag, name = "", text = "") => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
};
const byId = (id) => document.getElementById(id);
const bold = (text, name = "") => make("b", name, text);
const three = (value) => (value > 0 && value < 0.0005 ? "<.001" : value.toFixed(3));
const short = (value) => (value >= 0.995 ? "1" : value.toFixed(2).slice(1));
const percent = (share) =>
  share > 0 && share < 0.001 ? "less than 0.1\u00a0%"
    : `${share < 0.0995 ? (100 * share).toFixed(1) : Math.round(100 * share)}\u00a0%`;
const shade = (weight) => Math.sqrt(Math.max(0, Math.min(1, weight)));
const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

/** Arrow keys move among buttons that stand in lines. */
function arrows(grid, stops) {
  grid.addEventListener("keydown", (event) => {
    const y = stops.findIndex((line) => line.includes(document.activeElement));
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (y < 0 || !by[event.key]) return;
    const x = stops[y].indexOf(document.activeElement);
    const line = stops[Math.max(0, Math.min(stops.length - 1, y + by[event.key][0]))];
    line[Math.max(0, Math.min(line.length - 1, x + by[event.key][1]))].focus();
    event.preventDefault();
  });
}

/** Lines from a word to those it reads: arcs above one line of text, curves between lines. */
function drawFan(view, from, targets) {
  const paper = view.paper.getBoundingClientRect();
  const box = (element) => {
    const rects = element.getClientRects();
    const rect = rects[0] ?? element.getBoundingClientRect();
    const left = rect.left - paper.left;
    const top = rect.top - paper.top;
    return { x: left + rect.width / 2, top, bottom: top + rect.height };
  };
  const a = box(from);
  const paths = targets.map(([weight, element]) => {
    const b = box(element);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    let d;
    if (Math.abs(a.top - b.top) < 12) {
      const lift = Math.min(view.room, 7 + Math.abs(a.x - b.x) * 0.16);
      const low = Math.min(a.top, b.top);
      const lean = (b.x - a.x) * 0.18;
      const high = low - lift;
      d = `M${a.x} ${a.top}C${a.x + lean} ${high} ${b.x - lean} ${high} ${b.x} ${b.top}`;
    } else {
      const down = b.top > a.top;
      const [y0, y1] = down ? [a.bottom, b.top] : [a.top, b.bottom];
      const middle = (y0 + y1) / 2;
      d = `M${a.x} ${y0}C${a.x} ${middle} ${b.x} ${middle} ${b.x} ${y1}`;
    }
    path.setAttribute("d", d);
    path.setAttribute("stroke-width", (1 + 5 * weight).toFixed(2));
    path.setAttribute("stroke-opacity", (0.25 + 0.65 * shade(weight)).toFixed(2));
    return path;
  });
  view.fan.replaceChildren(...paths);
}

export { arrows, bold, byId, count, drawFan, make, percent, shade, short, three };
