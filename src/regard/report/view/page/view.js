// The page of `regard view`: what is chosen, what is under the pointer, and who draws it.

import { tellAbout } from "./about.js";
import { Tokens, ask, held, known } from "./api.js";
import { Along } from "./along.js";
import { buildFind } from "./find.js";
import { drawHeadline } from "./headline.js";
import { Heads } from "./heads.js";
import { drawList } from "./list.js";
import { Maps } from "./maps.js";
import { added, measured } from "./measure.js";
import { download } from "./save.js";
import { byId, count, make, percent } from "./shared.js";
import { Segments } from "./segments.js";
import { changed, measures, onChange, read, state, write } from "./state.js";
import { Pane } from "./text.js";

const PAUSE = 60; // milliseconds that the pointer rests before a token is asked about

let about, heads, maps, segments, along;
let finder;
let panes = [];
let hits = new Set(); // tokens that were found
let paned = null; // what the panes were made for
let hover = null; // a token of the text under the pointer
let cell = null; // a cell of the map under the pointer
let fan = null; // the answer about one token
let asking = null;
const tokens = new Map();

function failed(error) {
  if (error?.name === "AbortError") return;
  byId("error").hidden = false;
  const said = String(error.message).replace(/\.$/, "");
  byId("error").textContent = `${said.charAt(0).toUpperCase()}${said.slice(1)}.`;
}

const recording = () => about.recordings[state.recording];
const layer = () => recording().layers[state.layer];

/** Whether words are the units: in the text, where the recording names them. */
const byWords = () => state.view === "text" && state.units === "words" && recording().words;
const unit = () => (byWords() ? "word" : "token");

/** The tokens of a recording's side, "text" or "decoder"; or the words that they make up. */
function tokensOf(number, side, words = false) {
  const key = `${number}.${side}.${words}`;
  if (!tokens.has(key))
    tokens.set(key, new Tokens(number, side, about.recordings[number].sides[side], about.page, words));
  return tokens.get(key);
}

const readers = () => tokensOf(state.recording, layer().q_side, byWords()).after(shift());
const keys = () => tokensOf(state.recording, layer().k_side, byWords());
const shift = () => (layer().kind === "self" ? layer().k_len - layer().q_len : 0);

// ---------------------------------------------------------------- one token's fan

/** Ask about the token in focus, once the pointer rests. */
function wonder() {
  const index = hover ?? state.word;
  const limit = state.way === "out" ? layer().q_len : layer().k_len;
  const where = { r: state.recording, layer: state.layer, head: state.head, batch: state.batch };
  if (state.measure !== "weight") where.measure = state.measure;
  const question = index === null || index >= limit || lacks() ? null : JSON.stringify([where, index, state.way, unit()]);
  if (question === asking?.question) return;
  asking?.abort.abort();
  clearTimeout(asking?.timer);
  if (question === null) {
    asking = null;
    fan = null;
    return;
  }
  const abort = new AbortController();
  const go = async () => {
    try {
      const side = state.way === "out" ? readers() : keys();
      await side.need(index, index + 1);
      const first = Math.max(0, side.first(index));
      const asked = { ...where, index: first, way: state.way, ...(byWords() ? { by: "words" } : {}) };
      if (hover !== null && !known("fan", asked)) { // an exported page shows what was in view
        [hover, asking] = [null, null];
        return draw();
      }
      const answer = await ask("fan", asked, abort.signal);
      fan = { ...answer, question };
      await Promise.all([readers().needEach(state.way === "out" ? [index] : fan.items.map(([i]) => i)),
        keys().needEach(state.way === "out" ? fan.items.slice(0, 40).map(([i]) => i) : [index])]);
      draw();
    } catch (error) {
      if (error.name !== "AbortError") asking = null;
      failed(error);
    }
  };
  asking = { question, abort, timer: setTimeout(go, hover === null ? 0 : PAUSE) };
}

/** Why what is chosen cannot be shown of this layer; null where it can. */
function lacks() {
  if (measures(layer()).includes(state.measure)) return null;
  const { q_len, name } = layer();
  if (held) return "This file holds what was in view when it was written, and that was something else: choose weights, or open the recording with regard view.";
  return state.measure === "value"
    ? `What keys add needs values, and ${name} has none: record again with --values, or choose weights.`
    : `No effects were measured of ${name}, ${count(q_len, "token")}: record again with --effect, or choose weights.`;
}

/** Offer what this layer's recording has of each edge; with effects, say what on. */
function offerMeasures() {
  const label = byId("measure"), select = label.querySelector("select"), offered = measures(layer());
  for (const option of select.options)
    option.hidden = option.disabled = !offered.includes(option.value) && state.measure !== option.value;
  label.hidden = offered.length < 2 && !lacks();
  select.value = state.measure;
  const { effect } = recording();
  label.title = !offered.includes("effect") || !effect ? ""
    : `effect: how much cutting each edge would change the ${effect.target}, of the ${effect.edges} edges of each token that change it most`;
}

/** The items that hold the share of the mass that the slider asks for. */
function chosenItems() {
  let sum = 0;
  const items = [];
  for (const [i, weight] of fan.items) {
    if (sum >= (state.share / 100) * fan.total - 1e-9) break;
    items.push([i, weight]);
    sum += weight;
  }
  return { items, sum };
}

// ---------------------------------------------------------------- drawing

function draw() {
  document.body.dataset.view = state.view;
  const missing = lacks();
  byId("lacking").hidden = !missing;
  byId("lacking").querySelector("p").textContent = missing ?? "";
  byId("map-view").hidden = state.view !== "map" || Boolean(missing);
  byId("text-view").hidden = state.view !== "text" || Boolean(missing);
  for (const button of byId("switch").children)
    button.setAttribute("aria-pressed", button.dataset.view === state.view);
  for (const button of byId("way").children)
    button.setAttribute("aria-pressed", button.dataset.way === state.way);
  byId("share").value = state.share;
  for (const button of byId("units").children)
    button.setAttribute("aria-pressed", button.dataset.units === state.units);
  byId("units").hidden = !recording().words || Boolean(held && !held.whole);
  offerMeasures();
  segments.refresh();
  segments.draw();
  heads.build();
  heads.refresh();
  heads.draw();
  along.refresh();
  if (!missing) state.view === "map" ? maps.draw() : drawText();
  const kept = fan && chosenItems();
  drawList({ fan, unit: unit(), state, readers: readers(), keys: keys(), keep: (i) => goTo(i), shift: layer().kind === "self" ? shift() : null });
  drawShown(kept);
  tellHeadline();
}

function drawText() {
  const { q_side: own, k_side: other } = layer();
  const begun = recording().generated;
  const key = JSON.stringify([state.recording, own, other, unit()]);
  if (paned !== key) {
    finder.refresh();
    for (const pane of panes) pane.remove();
    panes = [];
    paned = key;
    const does = { hover: hovered, keep, failed, stands, special: new Set(recording().special) };
    const add = (side, start, stop, title) => {
      if (stop > start) panes.push(new Pane(byId("panes"), tokensOf(state.recording, side, byWords()), start, stop, does, title));
    };
    if (own !== other) {
      add(other, 0, tokensOf(state.recording, other).length, "the document");
      add(own, 0, tokensOf(state.recording, own).length, "the answer");
    } else {
      const all = tokensOf(state.recording, own).length;
      if (begun && begun < all) {
        add(own, 0, begun, "the document");
        add(own, begun, all, "the answer");
      } else add(own, 0, all, "");
    }
    for (const pane of panes) pane.mark(hits);
    if (state.top !== null) panes.find((one) => one.has(state.top))?.goTo(state.top, 0);
    byId("panes").classList.toggle("two", panes.length > 1);
    byId("text-view").classList.toggle("nothing", !panes.length);
    byId("panes").querySelector(".empty")?.remove();
    if (!panes.length) byId("panes").append(make("p", "empty",
      "This recording holds no tokens, so there is no text to show. Look at the map (m), or record again: " +
      "regard.record and regard record keep the tokens."));
  }
  const kept = fan && chosenItems();
  for (const pane of panes) {
    if (!kept) {
      pane.show(null);
      continue;
    }
    const focusSide = fan.inward ? layer().k_side : layer().q_side;
    const itemSide = fan.inward ? layer().q_side : layer().k_side;
    const same = pane.tokens.side === itemSide;
    const moved = fan.inward ? shift() : 0;
    pane.show({
      focus: fan.index + (fan.inward ? 0 : shift()),
      focusHere: pane.tokens.side === focusSide,
      items: same ? kept.items.map(([i, weight]) => [i + moved, weight]) : [],
      most: added() ? fan.items[0]?.[1] || 1 : fan.inward ? Math.max(0.05, fan.items[0]?.[1] ?? 1) : 1,
      bins: same ? fan.bins : [], bin: fan.bin,
      locked: state.word !== null && hover === null,
    });
  }
}

function drawShown(kept) {
  const said = byId("shown");
  if (!fan) {
    said.textContent = asking ? `reading what ${state.way === "out" ? "it reads" : "reads it"}…` : `hover a ${unit()}, or click it to keep it`;
    return;
  }
  const lost = added() ? 0 : 1 - fan.total;
  const whole = Math.max(fan.total, fan.inward || added() ? 0 : 1);
  const parts = [`shown ${percent(whole > 0 ? kept.sum / whole : 0)} of the ${measured().whole}`,
    `${count(kept.items.length, unit())} of ${fan.visible.toLocaleString("en")}`];
  if (!fan.inward && lost > 0.005) parts.push(`${percent(lost)} goes to a learned sink`);
  if (kept.items.length === about.listed && kept.sum < (state.share / 100) * fan.total - 1e-6)
    parts.push(`at most ${about.listed} are listed`);
  said.textContent = parts.join(" · ");
}

function tellHeadline() {
  drawHeadline({ missing: lacks() !== null, cell, fan, waits: asking !== null, maps, readers: readers(), keys: keys(), shift: shift(), unit: unit(),
    special: new Set(recording().special), letGo, failed, again: tellHeadline });
}

function letGo() {
  [state.word, state.range, hover, fan] = [null, null, null, null];
  changed();
}

// ---------------------------------------------------------------- hands

function hovered(i, pane) {
  if (i !== null && state.way === "out" && pane.tokens.side === layer().q_side) i -= shift();
  const fits = i !== null && i >= 0 && (state.way === "out" ? pane.tokens.side === layer().q_side
    && i < layer().q_len : pane.tokens.side === layer().k_side && i < layer().k_len);
  const next = fits && state.word === null ? i : null;
  if (next === hover) return;
  if (next === null && i === null && state.word === null && fan) return; // the last one stays
  hover = next;
  wonder();
}

function keep(i, pane) {
  if (state.way === "out" && pane.tokens.side === layer().q_side) i -= shift();
  const side = state.way === "out" ? layer().q_side : layer().k_side;
  if (i < 0 || pane.tokens.side !== side) return;
  const kept = state.word === null ? null : pane.tokens.first(state.word + (state.way === "out" ? shift() : 0));
  state.word = kept === i + (state.way === "out" ? shift() : 0) ? null : i;
  hover = null;
  changed();
}

/** Keep a query ("out") or a key ("in"), and bring it into sight. */
function keepAt(i, way) {
  [state.word, state.way, hover] = [i, way, null];
  changed();
  requestAnimationFrame(() => {
    if (state.view === "text") goTo(way === "out" ? i + shift() : i);
    else if (way === "out") maps.first?.goTo(i, Math.min(i + shift(), layer().k_len - 1));
    else maps.first?.goTo(Math.max(0, Math.min(i - shift(), layer().q_len - 1)), i);
  });
}

/** Bring the text to where the address says it stands; else to the token that is kept. */
function standText() {
  const pane = panes.find((one) => one.has(state.top));
  if (state.top !== null && pane) pane.goTo(state.top, 0);
  else if (state.word !== null) goTo(state.word + shift());
}

/** The text was scrolled: the address follows. */
function stands(pane) {
  if (pane !== panes[0] || state.view !== "text") return;
  state.top = pane.stood;
  write();
}

/** Bring a token into sight. */
function goTo(i) {
  for (const pane of panes) if (state.view === "text" && pane.has(i)) pane.goTo(i);
  if (state.view === "map" && state.word !== null && maps.first)
    state.way === "out" ? maps.first.goTo(state.word, i) : maps.first.goTo(i, state.word);
}

function choose(id, key, then = () => {}) {
  const element = byId(id);
  element.addEventListener(element.type === "range" ? "input" : "change", () => {
    state[key] = element.type === "checkbox" ? element.checked
      : element.type === "range" ? Number(element.value) : element.value;
    then();
    changed();
  });
}

/** Save what is in view as a file. */
async function save(kind) {
  if (lacks()) return failed(new Error(lacks()));
  const { name } = recording();
  const head = `head ${state.layer}.${state.head}`;
  const kept = state.word === null || !fan?.items.length ? "" : `, ${byId("headline").textContent.replace(/ · head .*/, "")}`;
  try {
    await download(kind, state.view === "map" ? maps.maps : panes, {
      name: [name, "head", `${state.layer}.${state.head}`, ...(state.measure === "weight" ? [] : [state.measure])].join("-"),
      title: `${name}, ${head}${kept}`,
      legend: `${measured().pictured}, ` +
        `${state.reduce === "sum" ? "summed over a cell" : "the largest of a cell"}, ${state.scale} colour${state.sinks ? "" : ", without first and special tokens"}`,
      foot: `${recording().model} · regard view: where a head reads, not why`,
    });
  } catch (error) {
    failed(error);
  }
}

/** Show the map or the text, what is kept in sight. */
function turn(view) {
  state.view = view;
  cell = null;
  changed();
  if (view === "text" && state.word !== null)
    requestAnimationFrame(() => requestAnimationFrame(() => goTo(state.word + (state.way === "out" ? shift() : 0))));
}

function build() {
  for (const button of byId("switch").children)
    button.addEventListener("click", () => turn(button.dataset.view));
  for (const button of byId("units").children)
    button.addEventListener("click", () => {
      state.units = button.dataset.units;
      changed();
    });
  for (const button of byId("way").children)
    button.addEventListener("click", () => {
      state.way = button.dataset.way;
      changed();
    });
  choose("share", "share");
  byId("lacking").querySelector("button").addEventListener("click", () => {
    state.measure = "weight";
    changed();
    requestAnimationFrame(() => byId("measure").querySelector("select").focus());
  });
  byId("measure").querySelector("select").addEventListener("change", (event) => {
    state.measure = event.target.value;
    changed();
  });
  for (const id of held ? ["reduce", "sinks", "find", "which", "pair", "html"] : []) {
    byId(id).hidden = true;
    byId(id).closest("label")?.setAttribute("hidden", "");
  }
  for (const id of ["reads", "segments"]) byId(id).classList.toggle("held", Boolean(held)); // what they say stays
  for (const kind of ["png", "svg", "html"]) byId(kind).addEventListener("click", () => save(kind));
  finder = buildFind({ layer, shift, failed, goTo, map: () => maps.first, hit: (found) => {
    hits = new Set(found);
    for (const pane of panes) pane.mark(hits);
  } });
  const several = (id, names, key, then) => {
    if (names.length < 2) return;
    const select = byId(id).querySelector("select");
    byId(id).hidden = false;
    names.forEach((name, i) => {
      const option = make("option", "", name);
      option.value = i;
      select.append(option);
    });
    select.value = state[key];
    select.addEventListener("change", () => {
      state[key] = Number(select.value);
      then();
      changed();
    });
  };
  several("which", about.recordings.map((one) => one.name), "recording", () => {
    if (!layer()?.pattern) state.layer = recording().layers.findIndex((one) => one.pattern);
    state.head = Math.min(state.head, layer().heads - 1);
    state.word = null;
  });
  several("item", Array.from({ length: recording().batch }, (_, i) => String(i)), "batch", () => {});
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select")) {
      if (event.key === "Escape") event.target.blur(); // back to the page's own keys
      return;
    }
    if (event.key === "/") {
      byId("find").querySelector("input").focus();
      event.preventDefault();
    } else if (event.key === "Escape") letGo();
    else if ((event.key === "m" || event.key === "t") && !event.ctrlKey && !event.metaKey) turn(event.key === "m" ? "map" : "text");
  });
}

async function start() {
  try {
    about = await ask("about");
  } catch (error) {
    byId("loading").remove();
    document.documentElement.dataset.loaded = "";
    failed(error);
    document.querySelector("main").hidden = true;
    return;
  }
  read(about);
  segments = new Segments(about, { byWords, goTo, failed,
    wordName: () => readers().name(state.word ?? 0) });
  heads = new Heads(about, segments, failed);
  along = new Along(about, { keep: keepAt,
    name: (i, what) => (what === "entropy" ? readers().name(i) : keys().name(i)) });
  byId("loading").remove();
  document.documentElement.dataset.loaded = "";
  maps = new Maps(about, tokensOf, failed, (found) => {
    cell = found;
    tellHeadline();
  });
  build();
  onChange(() => {
    byId("error").hidden = true; // it comes again where it still holds
    tellAbout(recording(), layer());
    wonder();
    draw();
  });
  addEventListener("hashchange", () => { // by hand, or on the way back
    read(about);
    finder.refresh();
    [hover, fan, asking] = [null, null, null];
    maps.stand();
    changed();
    if (state.view === "text") requestAnimationFrame(() => requestAnimationFrame(standText));
  });
  tellAbout(recording(), layer());
  wonder();
  draw();
  if (state.view === "text") requestAnimationFrame(standText);
  document.documentElement.dataset.ready = "";
}

start();
