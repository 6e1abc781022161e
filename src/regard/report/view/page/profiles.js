// Beside the map: what each row and each column in sight holds, and their tokens' names.

import { make } from "./shared.js";
import { state } from "./state.js";

const LABELS = 13; // pixels that a token needs for its name to be written

class Profiles {
  constructor(owner) {
    this.owner = owner;
    this.corner = make("button", "corner", "all");
    this.corner.type = "button";
    this.corner.title = "show the whole map; the square says where what is in sight lies in it";
    this.locator = make("span", "locator");
    this.locator.append(make("i"));
    this.corner.append(this.locator);
    this.corner.addEventListener("click", () => owner.whole());
    this.top = this.canvas("top", "by how much each key in sight is read");
    this.right = this.canvas("right", "how much of its mass each query gives to the keys in sight");
    this.at = null;
    this.waiting = false;
    this.listen(this.top, "col");
    this.listen(this.right, "row");
  }

  canvas(where, said) {
    const canvas = make("canvas", `profile ${where}`);
    canvas.title = `${said}: click keeps one, drag keeps a range and shows the other side for it alone`;
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${said}: arrows move, Shift with arrows keeps a range, Enter keeps one`);
    return canvas;
  }

  /** A click keeps a token; a drag, or Shift with arrows, a range that the other profile is of. */
  listen(canvas, along) {
    let from = null; // where a drag began
    canvas.addEventListener("pointerdown", (event) => {
      from = this.token(event, along);
      if (from !== null) canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const token = this.token(event, along);
      this.at = { [along]: token };
      if (from !== null && token !== null && token >> this.owner.zoom !== from >> this.owner.zoom)
        this.range(along, from, token);
      this.due();
    });
    canvas.addEventListener("pointerup", (event) => {
      const token = this.token(event, along);
      if (token !== null && from !== null && token >> this.owner.zoom === from >> this.owner.zoom)
        this.owner.picked?.(along, token);
      from = null;
    });
    canvas.addEventListener("pointercancel", () => (from = null));
    canvas.addEventListener("pointerleave", () => {
      this.at = null;
      this.due();
    });
    canvas.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      const { where, zoom } = this.owner;
      const seen = this.window()[along === "row" ? "rows" : "cols"];
      const here = this.at?.[along] ?? null;
      if (by) {
        const most = (along === "row" ? where.rows : where.cols) - 1;
        const first = Math.min(seen[0] << zoom, most);
        const next = here === null ? first : Math.max(0, Math.min(most, here + by * 2 ** zoom));
        this.at = { [along]: next };
        this.anchor = event.shiftKey ? this.anchor ?? here ?? next : null;
        if (event.shiftKey) this.range(along, this.anchor, next);
        this.due();
      } else if (event.key === "Enter" && here !== null) this.owner.picked?.(along, here);
      else return;
      event.preventDefault();
    });
  }

  /** Keep a range of whole cells, from one token to another. */
  range(along, one, other) {
    const { where, zoom } = this.owner;
    const [first, last] = [Math.min(one, other), Math.max(one, other)];
    const stop = Math.min(along === "row" ? where.rows : where.cols, ((last >> zoom) + 1) * 2 ** zoom);
    this.owner.ranged?.([along, (first >> zoom) * 2 ** zoom, stop].join(","));
  }

  /** The range that is kept: {along, first, stop}; null where there is none. */
  get kept() {
    const [along, first, stop] = (state.range ?? "").split(",");
    const most = along === "row" ? this.owner.where?.rows : this.owner.where?.cols;
    return along && Number(first) < most ? { along, first: Number(first), stop: Math.min(most, Number(stop)) } : null;
  }

  due() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  point(cell) {
    this.at = cell;
    this.due();
  }

  token(event, along) {
    const { map, unit, where } = this.owner;
    const box = this.owner.element.getBoundingClientRect();
    const point = [event.clientX - box.left, event.clientY - box.top];
    const latlng = map.containerPointToLatLng(point);
    const token = Math.floor((along === "row" ? latlng.lat : latlng.lng) / unit);
    return token >= 0 && token < (along === "row" ? where.rows : where.cols) ? token : null;
  }

  /** The rows and columns in sight, in cells of the zoom shown. */
  window() {
    const { map, unit, where, zoom } = this.owner;
    const seen = map.getBounds();
    const size = unit * 2 ** zoom;
    const span = (low, high, n) =>
      [Math.max(0, Math.floor(low / size)), Math.min(Math.ceil(n / 2 ** zoom), Math.ceil(high / size))];
    // Latitudes grow downwards here
    return { zoom, rows: span(Math.min(seen.getNorth(), seen.getSouth()),
      Math.max(seen.getNorth(), seen.getSouth()), where.rows),
    cols: span(seen.getWest(), seen.getEast(), where.cols) };
  }

  /** Sums over what is in sight, of each row and of each column; a range that is kept on one side
   * is all that the other side is of. */
  sums({ zoom, rows, cols }) {
    const { kept } = this;
    const inside = (along, cell) => kept?.along !== along
      || (cell + 1) * 2 ** zoom > kept.first && cell * 2 ** zoom < kept.stop;
    const [byRow, byCol] = [new Float64Array(Math.max(0, rows[1] - rows[0])),
      new Float64Array(Math.max(0, cols[1] - cols[0]))];
    for (const { place, values } of this.owner.tiles()) {
      if (place.zoom !== zoom) continue;
      const [y0, x0] = [place.row * 128, place.col * 128];
      for (let y = Math.max(y0, rows[0]); y < Math.min(y0 + 128, rows[1]); y++) {
        const counted = inside("row", y);
        for (let x = Math.max(x0, cols[0]); x < Math.min(x0 + 128, cols[1]); x++) {
          const value = Math.abs(values[(y - y0) * 128 + x - x0]);
          if (!Number.isFinite(value)) continue;
          if (inside("col", x)) byRow[y - rows[0]] += value;
          if (counted) byCol[x - cols[0]] += value;
        }
      }
    }
    return { byRow, byCol };
  }

  /** The share of their mass that the rows in sight, or those kept, give to the columns in sight. */
  mass({ zoom, rows }, byRow) {
    const { kept } = this;
    let [sum, count] = [0, 0];
    byRow.forEach((value, i) => {
      const first = (rows[0] + i) * 2 ** zoom;
      if (kept?.along === "row" && (first + 2 ** zoom <= kept.first || first >= kept.stop)) return;
      sum += value;
      count += Math.min(2 ** zoom, this.owner.where.rows - first);
    });
    return { share: count ? sum / count : 0, count };
  }

  /** Where in the whole map what is in sight lies. */
  locate({ zoom, rows, cols }) {
    const { where } = this.owner;
    const share = (cell, of) => `${((100 * Math.min(of, cell * 2 ** zoom)) / of).toFixed(2)}%`;
    const size = 2 ** zoom;
    const all = [[rows, where.rows], [cols, where.cols]].every(([[from, to], of]) => from === 0 && to * size >= of);
    this.locator.style.visibility = all ? "hidden" : "";
    const { style } = this.locator.firstChild;
    [style.left, style.top] = [share(cols[0], where.cols), share(rows[0], where.rows)];
    [style.width, style.height] = [share(cols[1] - cols[0], where.cols), share(rows[1] - rows[0], where.rows)];
  }

  draw() {
    const { map, unit, where } = this.owner;
    if (!where || !this.top.clientWidth) return;
    const seen = this.window();
    const { byRow, byCol } = this.sums(seen);
    const size = 2 ** seen.zoom;
    this.owner.sight(this.mass(seen, byRow), seen);
    this.locate(seen);
    const style = getComputedStyle(document.documentElement);
    const colours = ["--mark", "--ink", "--soft", "--arc"].map((name) => resolved(style, name));
    const place = (token, along) => {
      const point = map.latLngToContainerPoint(along === "row" ? [token * unit, 0] : [0, token * unit]);
      return along === "row" ? point.y : point.x;
    };
    for (const [canvas, along, sums, first, tokens, limit] of [
      [this.right, "row", byRow, seen.rows[0], where.rowTokens, where.rows],
      [this.top, "col", byCol, seen.cols[0], where.colTokens, where.cols],
    ]) {
      const scale = devicePixelRatio;
      const [width, height] = [canvas.clientWidth, canvas.clientHeight];
      [canvas.width, canvas.height] = [width * scale, height * scale];
      const context = canvas.getContext("2d");
      context.scale(scale, scale);
      if (along === "col") { // drawn lying, as the rows are standing
        context.translate(0, height);
        context.rotate(-Math.PI / 2);
      }
      const room = along === "row" ? width : height;
      const step = place(size, along) - place(0, along);
      const most = Math.max(1e-12, ...sums);
      const { kept } = this;
      if (kept?.along === along) { // the range that is kept, as a band
        context.globalAlpha = 0.16;
        context.fillStyle = colours[3];
        context.fillRect(0, place(kept.first, along), room, place(kept.stop, along) - place(kept.first, along));
        context.globalAlpha = 1;
      }
      const named = size === 1 && step >= LABELS;
      if (named && sums.length && first < tokens.length && tokens.piece(first) === null)
        tokens.need(first, Math.min(limit, first + sums.length)).then(() => this.due(), () => {});
      sums.forEach((value, i) => {
        const at = place((first + i) * size, along);
        const on = this.at?.[along] !== undefined && this.at[along] !== null
          && this.at[along] >> seen.zoom === first + i;
        context.fillStyle = on ? colours[3] : colours[0];
        const length = (value / most) * (named ? room * 0.3 : room - 4);
        // Whole pixels where bars stand close: no pale seams between them
        const [from, to] = step > 6 ? [at, at + step - 1] : [at, at + step].map((one) => Math.round(one * scale) / scale);
        context.fillRect(0, from, Math.max(value > 0 ? 0.75 : 0, length), Math.max(1 / scale, to - from));
        if (!named) return;
        context.fillStyle = on ? colours[1] : colours[2];
        context.font = `${on ? 600 : 400} 11.5px system-ui, sans-serif`;
        context.textBaseline = "middle";
        const begin = Math.max(8, room * 0.3 + 5);
        context.fillText(tokens.name(first + i, 14), begin, at + step / 2, room - begin - 3);
      });
    }
  }
}

/** A variable that may be light-dark(…), as the colour it is here. */
function resolved(style, name) {
  const probe = resolved.probe ??= document.body.appendChild(make("i", "probe"));
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

export { Profiles, resolved };
