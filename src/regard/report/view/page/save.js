// The map in sight as a picture: PNG as it is painted, SVG with its labels as text.

import { resolved } from "./profiles.js";
import { make } from "./shared.js";
import { state } from "./state.js";

/** The part of the map in sight, without its profiles, on one canvas. */
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

/** The same as SVG: the cells as one picture, title and ends of the axes as text. */
function svgOf(owner, title) {
  const space = "http://www.w3.org/2000/svg";
  const { width, height } = owner.element.getBoundingClientRect();
  const svg = document.createElementNS(space, "svg");
  const put = (name, attributes, text) => {
    const element = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.textContent = text;
    svg.append(element);
  };
  const seen = owner.profiles.window();
  const size = 2 ** seen.zoom;
  const span = ([from, to], most) => `${(from * size).toLocaleString("en")} … ` +
    `${(Math.min(to * size, most) - 1).toLocaleString("en")}`;
  svg.setAttribute("viewBox", `0 0 ${width} ${height + 46}`);
  svg.setAttribute("xmlns", space);
  const style = getComputedStyle(document.documentElement);
  const font = { "font-family": "system-ui, sans-serif", fill: resolved(style, "--soft") };
  put("rect", { width, height: height + 46, fill: resolved(style, "--raised") });
  put("text", { x: 8, y: 18, "font-size": 14, ...font },
    `${title.replaceAll("-", " ")} · queries ${span(seen.rows, owner.where.rows)} ` +
    `reading keys ${span(seen.cols, owner.where.cols)}`);
  put("image", { x: 0, y: 26, width, height, href: pictureOf(owner).toDataURL("image/png") });
  put("text", { x: 8, y: height + 41, "font-size": 11, ...font },
    `a cell is ${size} × ${size} tokens, ${state.reduce}, ${state.scale} colour · regard view: where a head reads, not why`);
  return new XMLSerializer().serializeToString(svg);
}

async function download(owner, kind, title) {
  if (!owner?.where) return;
  const blob = kind === "svg" ? new Blob([svgOf(owner, title)], { type: "image/svg+xml" })
    : await new Promise((done) => pictureOf(owner).toBlob(done, "image/png"));
  const link = make("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${title}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export { download, pictureOf, svgOf };
