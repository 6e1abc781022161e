// A head's N × N map: pan and zoom from the whole to one cell, every zoom exact.

import "./vendor/leaflet/leaflet.js";
import { held } from "./api.js";
import { make, percent } from "./shared.js";
import { changed, state } from "./state.js";
import { darkness, paint } from "./tiles.js";
import { Profiles } from "./profiles.js";

const L = globalThis.L;
const SIDE = 128; // cells of a tile
const PIXELS = 256; // a tile on the screen: two pixels a cell
const CLOSER = 6; // zooms beyond the one whose cells are single tokens

// Rows grow downwards, as they do on paper.
const CRS = L.extend({}, L.CRS.Simple, { transformation: new L.Transformation(1, 0, 1, 0) });

const MapTiles = L.GridLayer.extend({
  createTile(coords, done) {
    const canvas = make("canvas", "pending");
    canvas.width = canvas.height = SIDE;
    const place = { zoom: this.owner.deepest - coords.z, row: coords.y, col: coords.x };
    canvas.place = place;
    let drop = () => {};
    drop = this.owner.values(place, (values) => {
      canvas.values = values;
      canvas.classList.remove("pending");
      if (values) this.owner.painted(canvas);
      // Leaflet knows of a tile only once this function has returned it
      queueMicrotask(() => done(null, canvas));
    });
    canvas.drop = () => drop();
    return canvas;
  },
});

class HeadMap {
  /** `loaders` gives the tiles; `told` is called with what the pointer is on. */
  constructor(frame, loader, told) {
    Object.assign(this, { frame, loader, told, where: null });
    const element = make("div", "map");
    this.status = make("p", "map-status");
    this.status.setAttribute("role", "status");
    this.sighted = make("p", "map-sight");
    this.loose = make("button", "loose");
    this.loose.type = "button";
    this.loose.addEventListener("click", () => this.ranged?.(null));
    const line = make("div", "map-line");
    line.append(this.status, this.sighted, this.loose);
    this.profiles = new Profiles(this);
    frame.append(this.profiles.corner, this.profiles.top, element, this.profiles.right, line);
    this.element = element;
    this.map = L.map(element, {
      crs: CRS, attributionControl: false, zoomSnap: 0, zoomDelta: 1, wheelPxPerZoomLevel: 120,
      zoomAnimation: !matchMedia("(prefers-reduced-motion: reduce)").matches,
      minZoom: 0, maxZoom: 1, zoomControl: false, fadeAnimation: false,
    });
    frame.append(L.control.zoom().addTo(this.map).getContainer()); // beside the map, not on it
    element.setAttribute("aria-label", "The map of the head: rows read, columns are read. "
      + "Arrows move, + and − zoom, Enter keeps the query in the middle");
    this.map.setView([0, 0], 0);
    this.map.on("moveend zoomend", () => this.moved());
    this.map.on("move", () => this.profiles.due());
    this.map.on("mousemove", (event) => this.point(event.latlng));
    this.map.on("mouseout", () => this.told(null));
    this.map.on("click", (event) => this.click(event.latlng));
    darkness.addEventListener("change", () => this.repaint());
    const plain = { interactive: false, weight: 1, bubblingMouseEvents: false };
    this.marks = { kept: L.rectangle([[0, 0], [0, 0]], { ...plain, className: "kept" }),
      range: L.rectangle([[0, 0], [0, 0]], { ...plain, className: "range" }) };
    this.untouched = true; // until a hand moves it, the whole map is kept in sight
    element.addEventListener("keydown", (event) => this.typed(event));
    for (const kind of ["pointermove", "blur"]) element.addEventListener(kind, () => (this.keyed = false));
    for (const kind of ["pointerdown", "wheel", "keydown"])
      element.addEventListener(kind, () => (this.untouched = false), { passive: true });
    this.sizes = new ResizeObserver(() => {
      this.map.invalidateSize({ animate: false, pan: !this.untouched });
      if (this.where && this.untouched) this.whole();
      this.profiles.draw(); // before the next frame: no stretched one is seen
    });
    this.sizes.observe(element);
  }

  /** Gone, with all that would move the other of a pair. */
  remove() {
    this.where = null;
    this.sizes.disconnect();
    this.map.remove();
    this.frame.remove();
  }

  /** Show a head. `where`: {r, layer, head, batch, rows, cols, rowTokens, colTokens, versus: the other of a difference,
   * whole: the rows and columns of the longer map of a pair}. */
  show(where) {
    const before = this.where;
    this.where = where;
    this.deepest = deepest(where);
    this.least = Math.min(this.deepest, held?.least ?? 0); // no finer tiles are to be had
    this.unit = 2 ** (1 - this.deepest); // pixels of a token at zoom 0
    const same = before && before.rows === where.rows && before.cols === where.cols
      && deepest(before.whole ?? before) === deepest(where.whole ?? where);
    if (before && same && JSON.stringify(this.asked(before)) === JSON.stringify(this.asked(where))) {
      this.mark();
      return this.repaint();
    }
    this.layer?.remove();
    this.layer = new MapTiles({
      tileSize: PIXELS, minZoom: -24, minNativeZoom: 0, maxNativeZoom: this.deepest - this.least, maxZoom: this.deepest + CLOSER,
      bounds: this.bounds(), keepBuffer: 1, updateWhenZooming: false, noWrap: true,
    });
    this.layer.owner = this;
    this.layer.on("tileunload", ({ tile }) => tile.drop());
    this.layer.on("tileload", () => this.profiles.due());
    if (!same) {
      const stood = this.leading(); // before the new size of this one moves that, too
      this.map.invalidateSize({ animate: false, pan: false });
      this.untouched = !stood;
      if (stood) this.place(...stood);
      else this.whole();
    }
    this.layer.addTo(this.map);
    this.mark();
    this.tell();
  }

  /** The row or column of the token that is kept, and the range that is, drawn over the map. */
  mark() {
    const { rows, cols } = this.where;
    const { kept: range } = this.profiles;
    const spans = { range: range && [range.along, range.first, range.stop],
      kept: state.word === null ? null : [state.way === "out" ? "row" : "col", state.word, state.word + 1] };
    for (const [name, span] of Object.entries(spans)) {
      const shape = this.marks[name];
      if (!span || span[1] >= (span[0] === "row" ? rows : cols)) {
        shape.remove();
        continue;
      }
      const [, first, stop] = span.map((one) => one * this.unit);
      shape.setBounds(span[0] === "row" ? [[first, 0], [stop, cols * this.unit]]
        : [[0, first], [rows * this.unit, stop]]);
      shape.addTo(this.map);
    }
    const side = range?.along === "row" ? "queries" : "keys";
    this.loose.hidden = !range;
    this.loose.title = "show the other side for all again";
    if (range) this.loose.textContent =
      `${side} ${range.first.toLocaleString("en")}–${(range.stop - 1).toLocaleString("en")} ×`;
  }

  /** Say what is in sight: which tokens, and how much of their mass the rows are shown with. */
  sight({ share, count: rows }, seen) {
    const size = 2 ** seen.zoom;
    const span = ([from, to], most) => `${(from * size).toLocaleString("en")}–${(Math.min(to * size, most) - 1).toLocaleString("en")}`;
    const weights = state.reduce === "sum" && this.where.versus === undefined && state.measure === "weight";
    this.sighted.textContent = `queries ${span(seen.rows, this.where.rows)} × keys ${span(seen.cols, this.where.cols)}`
      + (weights && rows && !this.element.querySelector("canvas.pending") ? ` · shown ${percent(Math.min(1, share))} of the mass` : "");
  }

  asked({ r, layer, head, batch, versus }) {
    return { r, layer, head, batch, reduce: state.reduce, versus: versus ?? null, sinks: state.sinks, measure: state.measure };
  }

  bounds() {
    return L.latLngBounds([0, 0], [this.where.rows * this.unit, this.where.cols * this.unit]);
  }

  /** The zoom at which the whole map is in sight; of a pair, the longer one's, at the same size of a token. */
  fit() {
    const { rows, cols } = this.where.whole ?? this.where;
    const room = [this.element.clientWidth, this.element.clientHeight].map((one) => Math.max(one, 50));
    const fits = Math.min(room[0] / (cols * this.unit), room[1] / (rows * this.unit));
    return Math.max(this.widest, Math.min(this.deepest + CLOSER, Math.log2(fits)));
  }

  /** The zoom whose one tile holds the whole: below 0 beside a longer map. */
  get widest() {
    return this.deepest - deepest(this.where.whole ?? this.where);
  }

  whole() {
    const { rows, cols } = this.where.whole ?? this.where;
    this.untouched = true;
    this.place([(rows / 2) * this.unit, (cols / 2) * this.unit], this.widest);
    this.map.fire("zoomlevelschange");
    state.at = null;
  }

  /** Where the first map of the pair stands, unless it shows the whole: this one is to stand there. */
  leading() {
    if (!this.leader?.where || this.leader.untouched) return null;
    const { map, unit, deepest: theirs } = this.leader;
    const { lat, lng } = map.getCenter();
    return [[(lat / unit) * this.unit, (lng / unit) * this.unit], map.getZoom() + this.deepest - theirs];
  }

  /** Stand there at once: no animation under way may bring the map elsewhere. */
  place(centre, zoom) {
    this.map.stop();
    const least = this.fit();
    Object.assign(this.map.options, { minZoom: least, maxZoom: this.deepest + CLOSER });
    this.map.setView(centre, Math.max(least, zoom), { animate: false, reset: true });
  }

  /** Bring one cell into sight, so near that it is a single weight. */
  goTo(row, col, zoom = this.deepest + 4) {
    this.untouched = false;
    this.place([(row + 0.5) * this.unit, (col + 0.5) * this.unit], zoom);
  }

  /** The values of a tile; of two recordings, second − first. */
  values(place, got) {
    const { r, layer, head, batch, versus } = this.where;
    const where = { r, layer, head, batch, zoom: place.zoom, reduce: state.reduce };
    if (!state.sinks) where.sinks = 0;
    if (state.measure !== "weight") where.measure = state.measure;
    const at = { row: place.row, col: place.col };
    if (versus === undefined) return this.loader.ask(where, at, got);
    let [one, two] = [null, null];
    const inside = (i) => (i >> 7) + place.row * SIDE < this.cells("rows", place.zoom)
      && (i & 127) + place.col * SIDE < this.cells("cols", place.zoom);
    const both = () => one && two && got(one.map((value, i) => (inside(i) ? two[i] - value : 0)));
    const drops = [
      this.loader.ask(where, at, (values) => ((one = values), both())),
      this.loader.ask({ ...where, r: versus }, at, (values) => ((two = values), both())),
    ];
    return () => drops.forEach((drop) => drop());
  }

  /** Paint a tile that has come; with it all others, where the darkest colour is theirs together. */
  painted(canvas) {
    if (state.measure === "weight") return this.paint(canvas);
    requestAnimationFrame(() => this.tiles().forEach((one) => this.paint(one)));
  }

  paint(canvas) {
    if (!this.where) return; // its map was taken away meanwhile
    const { zoom, row, col } = canvas.place;
    const [rows, cols] = ["rows", "cols"].map((along) => this.cells(along, zoom));
    paint(canvas, canvas.values, { scale: state.scale, ...this.scale(zoom),
      rows: rows - row * SIDE, cols: cols - col * SIDE });
  }

  /** How many cells a side has; of a difference those that both recordings fill, or both end in alike. */
  cells(along, zoom) {
    const { [along]: n, unequal } = this.where;
    return unequal ? Math.floor(n / 2 ** zoom) : Math.ceil(n / 2 ** zoom);
  }

  /** What a value is divided by, and the least that has a colour where the scale is logarithmic. */
  scale(zoom) {
    const size = 2 ** zoom;
    // In sum: the share of its mass that a token of the cell gives to the cell's keys, on average
    const unit = (state.reduce === "sum" ? size : 1) * this.longest(zoom);
    const even = (state.reduce === "sum" ? size : 1) / Math.max(2, this.where.cols);
    return { unit, low: Math.min(0.05, Math.max(1e-7, even / 20)) };
  }

  /** What weights are multiplied by at most, where lengths are shown: the darkest colour's. */
  longest(zoom) {
    if (state.measure === "weight") return 1;
    const size = state.reduce === "sum" ? 2 ** zoom : 1;
    let most = 1e-9;
    for (const { place, values } of this.tiles())
      if (place.zoom === zoom) for (const value of values) if (value < Infinity && Math.abs(value) > most) most = Math.abs(value);
    return most / size;
  }

  get zoom() {
    const near = Math.min(this.deepest - this.least, Math.max(0, Math.round(this.map.getZoom())));
    return this.deepest - near;
  }

  tiles() {
    return [...this.element.querySelectorAll("canvas")].filter((one) => one.values && one.place);
  }

  repaint() {
    for (const canvas of this.tiles()) this.paint(canvas);
    this.profiles.due();
    this.tell();
  }

  /** The cell at a place: its tokens, and its value where the tile is there. */
  cell(latlng) {
    const [row, col] = [Math.floor(latlng.lat / this.unit), Math.floor(latlng.lng / this.unit)];
    if (!this.where || row < 0 || col < 0 || row >= this.where.rows || col >= this.where.cols)
      return null;
    const zoom = this.zoom;
    const [y, x] = [row >> zoom, col >> zoom];
    const tile = this.tiles().find(({ place }) =>
      place.zoom === zoom && place.row === y >> 7 && place.col === x >> 7);
    return { row, col, zoom, size: 2 ** zoom, rows: this.where.rows, cols: this.where.cols,
      value: tile && y < this.cells("rows", zoom) && x < this.cells("cols", zoom) ? tile.values[(y & 127) * SIDE + (x & 127)] : null };
  }

  point(latlng) {
    this.told(this.cell(latlng), this);
    this.profiles.point(this.cell(latlng));
  }

  click(latlng) {
    const cell = this.cell(latlng);
    if (!cell) return;
    state.word = state.word === cell.row ? null : cell.row;
    state.way = "out";
    changed();
  }

  /** By keyboard, the cell in the middle is the one that is named, and that Enter keeps. */
  typed(event) {
    if (event.key === "Tab" || event.key === "Escape") return;
    this.keyed = true;
    if (event.key === "Enter") this.click(this.map.getCenter());
    this.point(this.map.getCenter());
  }

  moved() {
    if (!this.where) return;
    if (this.keyed) this.point(this.map.getCenter());
    this.profiles.due();
    this.tell();
    const { lat, lng } = this.map.getCenter();
    if (this.untouched) state.at = null;
    else state.at = [(this.map.getZoom() + (this.leader ?? this).deepest - this.deepest).toFixed(2), Math.round(lat / this.unit), Math.round(lng / this.unit)]
      .join(",");
    changed();
  }

  /** Back to where the address says the map stood. */
  restore(at) {
    const [zoom, row, col] = at.split(",").map(Number);
    this.untouched = false;
    this.place([row * this.unit, col * this.unit], zoom);
  }

  tell() {
    if (!this.where) return;
    const waits = this.loader.waiting;
    const size = 2 ** this.zoom;
    const cells = size === 1 ? "a cell is one weight"
      : `a cell is ${size.toLocaleString("en")} × ${size.toLocaleString("en")} tokens`;
    const missing = this.element.querySelector("canvas.pending"); // the error says why
    this.status.textContent = waits
      ? `${cells} · coarser until ${waits} exact ${waits === 1 ? "tile comes" : "tiles come"}`
        + (this.where.slow ? ": this recording holds no map of what keys add, so that takes long" : "")
      : missing ? `${cells} · some tiles are missing` : `${cells} · exact`;
    if (missing && !waits) this.profiles.due(); // they were those of what was there before
    this.frame.toggleAttribute("data-waits", waits > 0);
  }
}

/** The zoom at which the cells of so many rows and columns are single tokens. */
function deepest({ rows, cols }) {
  return Math.max(0, Math.ceil(Math.log2(Math.max(rows, cols, 1) / SIDE)));
}

/** Two maps that stand at the same token, and show tokens of one size, whichever is moved. */
function lock(one, two) {
  let moving = false;
  const follow = (from, to) => from.map.on("move", () => {
    if (moving || !from.where || !to.where) return;
    moving = true;
    const { lat, lng } = from.map.getCenter();
    const units = to.unit / from.unit;
    to.untouched = from.untouched; // else it would go back to the whole once its frame changes
    to.map.setView([lat * units, lng * units], from.map.getZoom() + to.deepest - from.deepest, { animate: false });
    moving = false;
  });
  follow(one, two);
  follow(two, one);
}

export { HeadMap, lock };
