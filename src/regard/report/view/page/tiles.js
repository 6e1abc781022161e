// Tiles of the map: asked for together, dropped when left behind, kept while there is room.

import { theme, tilesOf } from "./api.js";

const AT_ONCE = 2; // requests under way
const TOGETHER = 12; // tiles in one
const KEPT = 600; // tiles of 64 KB

class Loader {
  constructor(failed) {
    this.failed = failed;
    this.kept = new Map(); // name → values, least recently used first
    this.queue = [];
    this.running = 0;
    this.wanted = new Map(); // name → those who wait
    this.timer = null;
    this.watch = () => {};
  }

  /** How many tiles are still on their way. */
  get waiting() {
    return this.wanted.size;
  }

  /** Calls got(values) at once or later. Returns what takes the wish back. */
  ask(where, place, got) {
    const name = JSON.stringify([where, place]);
    const values = this.kept.get(name);
    if (values) {
      this.kept.delete(name);
      this.kept.set(name, values);
      got(values);
      return () => {};
    }
    if (!this.wanted.has(name)) {
      this.wanted.set(name, new Set());
      this.queue.push({ name, where, place });
      this.timer ??= setTimeout(() => {
        this.timer = null;
        this.send();
      }, 15);
    }
    this.wanted.get(name).add(got);
    return () => this.forget(name, got);
  }

  forget(name, got) {
    const waiting = this.wanted.get(name);
    if (!waiting) return;
    waiting.delete(got);
    if (waiting.size) return;
    this.wanted.delete(name);
    this.queue = this.queue.filter((one) => one.name !== name);
    for (const request of this.requests ?? [])
      if (request.names.every((one) => !this.wanted.has(one))) request.abort.abort();
    this.watch();
  }

  send() {
    while (this.running < AT_ONCE && this.queue.length) {
      const kind = JSON.stringify(this.queue[0].where);
      const batch = [];
      this.queue = this.queue.filter((one) => {
        const taken = batch.length < TOGETHER && JSON.stringify(one.where) === kind;
        if (taken) batch.push(one);
        return !taken;
      });
      this.request(batch);
    }
    this.watch();
  }

  async request(batch) {
    const request = { names: batch.map((one) => one.name), abort: new AbortController() };
    this.requests ??= new Set();
    this.requests.add(request);
    this.running++;
    try {
      const places = batch.map((one) => one.place);
      await tilesOf(batch[0].where, places, (i, values) => this.take(batch[i].name, values),
        request.abort.signal);
    } catch (error) {
      for (const name of request.names) this.wanted.delete(name);
      if (error.name !== "AbortError") this.failed(error);
    }
    this.running--;
    this.requests.delete(request);
    this.send();
  }

  take(name, values) {
    if (values) this.kept.set(name, values);
    while (this.kept.size > KEPT) this.kept.delete(this.kept.keys().next().value);
    const waiting = this.wanted.get(name) ?? [];
    this.wanted.delete(name);
    for (const got of waiting) got(values);
    this.watch();
  }
}

// ---------------------------------------------------------------- colours

/** A ramp of 256 colours between some, as [r, g, b]. */
function ramp(stops) {
  const colours = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (colours.length - 1);
    const [low, share] = [Math.min(Math.floor(at), colours.length - 2), at % 1 || (i === 255 ? 1 : 0)];
    return colours[low].map((one, c) => Math.round(one + (colours[low + 1][c] - one) * share));
  });
}

// Lightness alone tells the order, so that no kind of colour blindness hides it.
const RAMPS = {
  light: { up: ["#ffffff", "#fbe3bd", "#f0a53a", "#b0600a", "#4d2600"],
    down: ["#ffffff", "#cddff5", "#5b8dd6", "#27559c", "#0f2850"] },
  dark: { up: ["#1d1f23", "#5a3a10", "#b8741a", "#f2b65c", "#fff3dc"],
    down: ["#1d1f23", "#1c3a66", "#3a6dbb", "#8db9f5", "#eaf3ff"] },
};

const preferred = matchMedia("(prefers-color-scheme: dark)");

/** Whether the page is dark: as the notebook around it, else as the reader's system. Says "change". */
class Darkness extends EventTarget {
  constructor() {
    super();
    preferred.addEventListener("change", () => this.told());
    addEventListener("theme", () => this.told());
    this.told();
  }

  get matches() {
    return theme() ? theme() === "dark" : preferred.matches;
  }

  told() {
    document.documentElement.style.colorScheme = theme() ?? "";
    this.dispatchEvent(new Event("change"));
  }
}

const darkness = new Darkness();
const madeRamps = {};

function ramps() {
  const kind = darkness.matches ? "dark" : "light";
  madeRamps[kind] ??= { up: ramp(RAMPS[kind].up), down: ramp(RAMPS[kind].down) };
  return madeRamps[kind];
}

/** How strong a colour is, 0 … 1, for a value between `low` and 1. */
function strength(value, scale, low) {
  if (!(value > 0)) return 0;
  if (scale === "linear") return Math.min(1, value);
  return Math.max(0, Math.min(1, 1 - Math.log(value) / Math.log(low)));
}

/** Paint 128 × 128 values. `drawn`: {scale, low, unit, rows, cols}: cells beyond them are left clear. */
function paint(canvas, values, drawn) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(128, 128);
  const { up, down } = ramps();
  for (let i = 0; i < values.length; i++) {
    if (i >> 7 >= drawn.rows || (i & 127) >= drawn.cols) continue;
    const value = values[i] / drawn.unit;
    if (value === Infinity) { // left out: the largest weight may be a sink's
      const stripe = ((i >> 7) + (i & 127)) % 4 === 0;
      image.data.set([128, 128, 128, stripe ? 110 : 40], 4 * i);
      continue;
    }
    if (Number.isNaN(value)) {
      image.data.set([200, 0, 160, 255], 4 * i);
      continue;
    }
    const colour = value < 0 ? down : up;
    const at = Math.round(255 * strength(Math.abs(value), drawn.scale, drawn.low));
    image.data.set([...colour[value ? Math.max(1, at) : 0], 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

export { Loader, darkness, paint, ramps, strength };
