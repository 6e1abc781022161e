// The maps and the text as they stand on the page, drawn into SVG.

import { make } from "./shared.js";

const SPACE = "http://www.w3.org/2000/svg";
const SANS = { "font-family": "system-ui, sans-serif" };

/** Elements of SVG, put into one by name. */
function pen(into) {
  return (name, attributes, text) => {
    const element = document.createElementNS(SPACE, name);
    for (const [key, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(key, value);
    // What is no character of XML would make the file none
    if (text) element.textContent = text.toWellFormed().replace(/[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]/g, "\ufffd");
    into.append(element);
    return element;
  };
}

/** A colour of CSS as one that every reader of SVG knows, and how opaque it is. */
function plain(colour) {
  const context = (plain.canvas ??= make("canvas")).getContext("2d", { willReadFrequently: true });
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = context.getImageData(0, 0, 1, 1).data;
  return { fill: `rgb(${red},${green},${blue})`, "fill-opacity": (alpha / 255).toFixed(3) };
}

/** The part of a map in sight, without its profiles, on one canvas. */
function pictureOf(owner) {
  const scale = devicePixelRatio;
  const frame = owner.element.getBoundingClientRect();
  const canvas = make("canvas");
  [canvas.width, canvas.height] = [Math.round(frame.width * scale), Math.round(frame.height * scale)];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.fillStyle = getComputedStyle(owner.element).backgroundColor;
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (const tile of owner.tiles()) {
    if (tile.place.zoom !== owner.zoom) continue;
    const box = tile.getBoundingClientRect();
    context.drawImage(tile, (box.left - frame.left) * scale, (box.top - frame.top) * scale,
      box.width * scale, box.height * scale);
  }
  return canvas;
}

/** A map with its profiles, and the row, column or range that is kept. */
function drawMap(owner, put, frame, colour) {
  const place = (element) => {
    const { left, top, width, height } = element.getBoundingClientRect();
    return { x: left - frame.left, y: top - frame.top, width, height };
  };
  put("rect", { ...place(owner.frame), rx: 8, fill: colour("--raised"), stroke: colour("--line") });
  const title = owner.frame.querySelector("h2");
  if (title) put("text", { x: place(title).x + 14, y: place(title).y + 19, "font-size": 12, ...SANS, fill: colour("--soft") }, title.textContent);
  for (const [canvas, where] of [[pictureOf(owner), owner.element], [owner.profiles.top, owner.profiles.top],
    [owner.profiles.right, owner.profiles.right]])
    put("image", { ...place(where), href: canvas.toDataURL("image/png"), preserveAspectRatio: "none" });
  const inside = place(owner.element);
  for (const path of owner.element.querySelectorAll("path.kept, path.range")) {
    const box = place(path);
    const [x, y] = [Math.max(box.x, inside.x), Math.max(box.y, inside.y)];
    const [right, bottom] = [Math.min(box.x + box.width, inside.x + inside.width),
      Math.min(box.y + box.height, inside.y + inside.height)];
    if (right > x && bottom > y) put("rect", { x, y, width: right - x, height: bottom - y, fill: "none",
      stroke: colour(path.matches(".kept") ? "--ink" : "--arc"), "stroke-opacity": 0.6 });
  }
  put("text", { x: inside.x + 12, y: inside.y + inside.height + 20, "font-size": 12, ...SANS, fill: colour("--soft") },
    [owner.status, owner.sighted].map((one) => one.textContent).filter(Boolean).join(" · "));
}

/** The lines that a text node stands on: [text, box] each. */
function linesOf(node) {
  const range = document.createRange();
  range.selectNodeContents(node);
  const boxes = range.getClientRects();
  if (boxes.length < 2) return boxes.length ? [[node.data, boxes[0]]] : [];
  const lines = [];
  let at = 0;
  for (const character of node.data) {
    range.setStart(node, at);
    range.setEnd(node, (at += character.length));
    const [box] = range.getClientRects();
    const last = lines.at(-1);
    if (!box) continue;
    if (last && Math.abs(last[1].top - box.top) < 4) last[0] += character;
    else lines.push([character, box]);
  }
  return lines;
}

/** A pane of the text, as far as it is in sight: words, shades, lines, chips and the strip. */
function drawText(pane, put, frame, colour) {
  const move = ({ left, top, width, height }) => ({ x: left - frame.left, y: top - frame.top, width, height });
  const box = move(pane.section.getBoundingClientRect());
  put("rect", { ...box, rx: 8, fill: colour("--raised"), stroke: colour("--line") });
  const seen = pane.scroll.getBoundingClientRect();
  const clip = `clip${Math.round(box.x)}`;
  pen(put("clipPath", { id: clip }))("rect", move(seen));
  const inside = pen(put("g", { "clip-path": `url(#${clip})` })); // what the text's edges cut off
  const write = (node, put) => {
    const style = getComputedStyle(node.parentElement);
    for (const [text, at] of linesOf(node)) {
      const { x, y, height } = move(at);
      put("text", { x, y: y + height * 0.77, "font-size": style.fontSize, "font-family": style.fontFamily,
        "font-weight": style.fontWeight, "font-style": style.fontStyle, "xml:space": "preserve", ...plain(style.color) }, text);
    }
  };
  for (const word of pane.scroll.querySelectorAll(".word")) {
    const shape = word.getBoundingClientRect();
    if (shape.bottom < seen.top || shape.top > seen.bottom) continue;
    const style = getComputedStyle(word);
    if (word.touched || word.matches(".special")) for (const part of word.getClientRects())
      inside("rect", { ...move(part), rx: 4, ...plain(style.backgroundColor),
        stroke: word.matches(".locked") ? colour("--arc") : word.matches(".special") ? colour("--line") : null });
    if (word.dataset.label) inside("text", { x: move(shape).x + shape.width / 2, y: move(shape).y + shape.height + 9,
      "text-anchor": "middle", "font-size": 10.5, ...SANS, fill: colour("--soft") }, word.dataset.label);
  }
  const paper = move(pane.paper.getBoundingClientRect());
  for (const path of pane.fan.children) inside("path", { d: path.getAttribute("d"), fill: "none", stroke: colour("--arc"),
    "stroke-width": path.getAttribute("stroke-width"), "stroke-opacity": path.getAttribute("stroke-opacity"),
    "stroke-linecap": "round", transform: `translate(${paper.x} ${paper.y})` });
  const walk = document.createTreeWalker(pane.scroll, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const shape = walk.currentNode.parentElement.getBoundingClientRect();
    if (shape.bottom >= seen.top && shape.top <= seen.bottom && walk.currentNode.data.trim()) write(walk.currentNode, inside);
  }
  for (const chip of pane.section.querySelectorAll(".chip")) {
    const { x, y, width, height } = move(chip.getBoundingClientRect());
    if (!width || x + width > box.x + box.width) continue; // scrolled to, or hidden
    if (chip.matches("span")) put("rect", { x: x - 6, y: y - 1, width: width + 6, height: height + 2, fill: colour("--raised") });
    put("rect", { x, y, width, height, rx: 11, fill: colour("--paper"), stroke: colour("--line") });
    const inner = document.createTreeWalker(chip, NodeFilter.SHOW_TEXT);
    while (inner.nextNode()) write(inner.currentNode, put);
  }
  if (pane.strip.width && pane.strip.clientWidth)
    put("image", { ...move(pane.strip.getBoundingClientRect()), href: pane.strip.toDataURL("image/png"), preserveAspectRatio: "none" });
}

export { SPACE, drawMap, drawText, pen };
