// What is in view as a file: SVG and PNG of the maps or the text, or a page of its own.

import { ask } from "./api.js";
import { SPACE, drawMap, drawText, pen } from "./picture.js";
import { byId, make } from "./shared.js";
import { resolved } from "./profiles.js";
import { said, state } from "./state.js";

const HEAD = 58; // pixels above what is shown, for what it says
const FOOT = 26;

/** What is in view, its maps or its panes of text, as SVG. */
function svgOf(shown, { title, legend, foot }) {
  const frame = byId(state.view === "map" ? "maps" : "panes").getBoundingClientRect();
  const [width, height] = [Math.ceil(frame.width), Math.ceil(frame.height)];
  const svg = document.createElementNS(SPACE, "svg");
  for (const [key, value] of Object.entries({ xmlns: SPACE, width, height: height + HEAD + FOOT,
    viewBox: `0 0 ${width} ${height + HEAD + FOOT}` })) svg.setAttribute(key, value);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => resolved(style, name);
  const put = pen(svg);
  const sans = { "font-family": "system-ui, sans-serif" };
  put("rect", { width, height: height + HEAD + FOOT, fill: colour("--paper") });
  put("text", { x: 10, y: 24, "font-size": 17, "font-family": "Georgia, serif", fill: colour("--ink") }, title);
  put("text", { x: 10, y: 45, "font-size": 12, ...sans, fill: colour("--soft") },
    state.view === "map" ? legend : byId("shown").textContent);
  const room = put("svg", { x: 0, y: HEAD, width, height });
  for (const one of shown) (state.view === "map" ? drawMap : drawText)(one, pen(room), frame, colour);
  put("text", { x: 10, y: height + HEAD + 17, "font-size": 11, ...sans, fill: colour("--soft") }, foot);
  return new XMLSerializer().serializeToString(svg);
}

/** The same, as a picture of pixels. */
async function pngOf(svg) {
  const image = new Image();
  image.src = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  await image.decode();
  URL.revokeObjectURL(image.src);
  const canvas = make("canvas");
  [canvas.width, canvas.height] = [image.width, image.height].map((one) => Math.round(one * devicePixelRatio));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

/** Save what is in view as "svg", "png" or "html". shown: the maps or panes; told: what the file's name, its first lines and its last one say. */
async function download(kind, shown, told) {
  if (!shown.length) return;
  const svg = kind === "html" ? null : svgOf(shown, told);
  const blob = kind === "html" ? new Blob([await ask("export", { address: said() })], { type: "text/html" })
    : kind === "svg" ? new Blob([svg], { type: "image/svg+xml" }) : await pngOf(svg);
  const link = make("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${told.name}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export { download };
