// Beside the map: what each row and each column in sight holds, and their tokens' names.

import { make } from "./shared.js";

const LABELS = 13; // pixels that a token needs for its name to be written

class Profiles {
  constructor(owner) {
    this.owner = owner;
    this.corner = make("button", "corner", "all");
    this.corner.type = "button";
    this.corner.title = "show the whole map";
    this.corner.addEventListener("click", () => owner.whole());
    this.top = make("canvas", "profile top");
    this.right = make("canvas", "profile right");
    this.top.title = "by how much each key in sight is read";
    this.right.title = "how much of its mass each query gives to the keys in sight";
    this.at = null;
    this.waiting = false;
    const listen = (canvas, along) => {
      canvas.addEventListener("pointermove", (event) => {
        this.at = { [along]: this.token(event, along) };
        this.due();
      });
      canvas.addEventListener("pointerleave", () => {
        this.at = null;
        this.due();
      });
      canvas.addEventListener("click", (event) => {
        const token = this.token(event, along);
        if (token !== null) this.owner.picked?.(along, token);
      });
    };
    listen(this.top, "col");
    listen(this.right, "row");
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

  /** Sums over what is in sight: of each row and of each column. */
  sums({ zoom, rows, cols }) {
    const [byRow, byCol] = [new Float64Array(Math.max(0, rows[1] - rows[0])),
      new Float64Array(Math.max(0, cols[1] - cols[0]))];
    for (const { place, values } of this.owner.tiles()) {
      if (place.zoom !== zoom) continue;
      const [y0, x0] = [place.row * 128, place.col * 128];
      for (let y = Math.max(y0, rows[0]); y < Math.min(y0 + 128, rows[1]); y++)
        for (let x = Math.max(x0, cols[0]); x < Math.min(x0 + 128, cols[1]); x++) {
          const value = Math.abs(values[(y - y0) * 128 + x - x0]);
          if (!Number.isFinite(value)) continue;
          byRow[y - rows[0]] += value;
          byCol[x - cols[0]] += value;
        }
    }
    return { byRow, byCol };
  }

  draw() {
    const { map, unit, where } = this.owner;
    if (!where || !this.top.clientWidth) return;
    const seen = this.window();
    const { byRow, byCol } = this.sums(seen);
    const size = 2 ** seen.zoom;
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
      const named = size === 1 && step >= LABELS;
      if (named && sums.length && tokens.piece(first) === null)
        tokens.need(first, Math.min(limit, first + sums.length)).then(() => this.due(), () => {});
      sums.forEach((value, i) => {
        const at = place((first + i) * size, along);
        const on = this.at?.[along] !== undefined && this.at[along] !== null
          && this.at[along] >> seen.zoom === first + i;
        context.fillStyle = on ? colours[3] : colours[0];
        const length = (value / most) * (named ? room * 0.3 : room - 4);
        context.fillRect(0, at, Math.max(value > 0 ? 0.75 : 0, length), Math.max(0.75, step > 6 ? step - 1 : step + 0.3));
        if (!named) return;
        context.fillStyle = on ? colours[1] : colours[2];
        context.font = `${on ? 600 : 400} 11.5px system-ui, sans-serif`;
        context.textBaseline = "middle";
        const from = Math.max(8, room * 0.3 + 5);
        context.fillText(tokens.name(first + i, 14), from, at + step / 2, room - from - 3);
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
