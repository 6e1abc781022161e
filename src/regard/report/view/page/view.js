// The page of `regard view`: what is chosen, what is under the pointer, and who draws it.

import { tellAbout } from "./about.js";
import { Tokens, ask, held } from "./api.js";
import { Along } from "./along.js";
import { buildFind } from "./find.js";
import { Heads } from "./heads.js";
import { drawList } from "./list.js";
import { Maps } from "./maps.js";
import { bold, byId, count, make, percent, three } from "./shared.js";
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
const touched = matchMedia("(pointer: coarse)").matches; // by fingers

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

const readers = () => tokensOf(state.recording, layer().q_side, byWords());
const keys = () => tokensOf(state.recording, layer().k_side, byWords());
const shift = () => (layer().kind === "self" ? layer().k_len - layer().q_len : 0);

// ---------------------------------------------------------------- one token's fan

/** Ask about the token in focus, once the pointer rests. */
function wonder() {
  const index = hover ?? state.word;
  const limit = state.way === "out" ? layer().q_len : layer().k_len;
  const where = { r: state.recording, layer: state.layer, head: state.head, batch: state.batch };
  if (state.measure !== "weight") where.measure = state.measure;
  const question = index === null || index >= limit ? null : JSON.stringify([where, index, state.way, unit()]);
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
      const moved = state.way === "out" ? shift() : 0;
      await side.need(index + moved, index + moved + 1);
      const first = Math.max(0, side.first(index + moved) - moved);
      const asked = { ...where, index: first, way: state.way, ...(byWords() ? { by: "words" } : {}) };
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

/** Whether lengths are shown, of what each key adds, or effects, instead of weights. */
const added = () => state.measure !== "weight";

/** Offer what this layer's recording has of each edge; with effects, say what on. */
function offerMeasures() {
  const label = byId("measure"), select = label.querySelector("select"), offered = measures(layer());
  for (const option of select.options) option.hidden = option.disabled = !offered.includes(option.value);
  label.hidden = offered.length < 2 || Boolean(held);
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
  byId("map-view").hidden = state.view !== "map";
  byId("text-view").hidden = state.view !== "text";
  for (const button of byId("switch").children)
    button.setAttribute("aria-pressed", button.dataset.view === state.view);
  for (const button of byId("way").children)
    button.setAttribute("aria-pressed", button.dataset.way === state.way);
  byId("share").value = state.share;
  for (const button of byId("units").children)
    button.setAttribute("aria-pressed", button.dataset.units === state.units);
  byId("units").hidden = !recording().words || Boolean(held);
  offerMeasures();
  segments.refresh();
  segments.draw();
  heads.build();
  heads.refresh();
  heads.draw();
  along.refresh();
  if (state.view === "map") maps.draw();
  else drawText();
  const kept = fan && chosenItems();
  drawList({ fan, unit: unit(), state, readers: readers(), keys: keys(), keep: (i) => goTo(i), added: added() });
  drawShown(kept);
  drawHeadline();
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
    } else if (begun && begun < readers().length) {
      add(own, 0, begun, "the document");
      add(own, begun, readers().length, "the answer");
    } else add(own, 0, readers().length, "");
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
  const parts = [`shown ${percent(whole > 0 ? kept.sum / whole : 0)} of the ${state.measure === "effect" ? "effects kept" : added() ? "lengths added" : "mass"}`,
    `${count(kept.items.length, unit())} of ${fan.visible.toLocaleString("en")}`];
  if (!fan.inward && lost > 0.005) parts.push(`${percent(lost)} goes to a learned sink`);
  if (kept.items.length === about.listed && kept.sum < (state.share / 100) * fan.total - 1e-6)
    parts.push(`at most ${about.listed} are listed`);
  said.textContent = parts.join(" · ");
}

function drawHeadline() {
  const line = byId("headline");
  const where = make("span", "where", ` · head ${state.layer}.${state.head}`);
  delete line.dataset.weight;
  if (state.view === "map" && cell) {
    const { row, col, size, zoom, value } = cell;
    const span = (i) => (zoom === 0 ? null
      : `${(i - (i % size)).toLocaleString("en")}–${(i - (i % size) + size - 1).toLocaleString("en")}`);
    if (zoom === 0) line.replaceChildren(bold(readers().name(row)), " reads ", bold(keys().name(col)), " ");
    else line.replaceChildren(bold(span(row)), " reads ", bold(span(col)), " ");
    if (value !== null) {
      line.dataset.weight = value;
      line.append(bold(three(zoom && state.reduce === "sum" && maps.shows() !== "change" ? value / size : value), "weight"));
    }
    line.append(where);
    byId("note").textContent = zoom === 0
      ? `query ${row.toLocaleString("en")} → key ${col.toLocaleString("en")}${value === null ? "" : `: ${Number(value).toPrecision(6)}`}. Click keeps the query.`
      : `${readers().name(row, 24)} … reads ${keys().name(col, 24)} …: ${state.reduce === "sum" ? "the share of its mass a token gives there, on average" : "the largest weight there"}`;
    const names = [[readers(), row], [keys(), col]].filter(([side, i]) => side.piece(i) === null);
    for (const [side, i] of names) side.need(i, i + 1).then(drawHeadline, failed);
    return;
  }
  if (!fan || !fan.items.length) {
    line.replaceChildren(!fan && asking && state.word !== null ? `Token ${state.word.toLocaleString("en")} is kept`
      : state.view === "map" ? (state.at ? "A part of the map" : "The whole map") : "The text", where);
    byId("note").textContent = !fan && asking && state.word !== null ? "Reading its weights…" : state.view === "map"
      ? touched ? "Pinch to zoom, drag to move; touch a cell to name it."
        : "Scroll to zoom, drag to move; the pointer names what it is on."
      : touched ? `Touch a ${unit()} to see what it reads.`
        : `Hover a ${unit()} to see what it reads; click to keep it.`;
    return;
  }
  const other = fan.index + (fan.inward ? -shift() : shift());
  const [best] = fan.items.filter(([i, weight]) => !aside(i) && i !== other && weight >= 0.02)
    .concat(fan.items);
  const names = fan.inward ? [readers().name(best[0]), keys().name(fan.index)]
    : [readers().name(fan.index), keys().name(best[0])];
  line.replaceChildren(bold(names[0]), " reads ", bold(names[1]), " ", bold(added() ? `${best[1].toPrecision(3)} ${state.measure === "effect" ? "effect" : "added"}` : three(best[1]), "weight"), where);
  byId("note").replaceChildren(...(state.word === null ? ["Click to keep it."]
    : ["Kept. ", looseButton()]));
}

/** What lets the kept token go, as Escape does. */
function looseButton() {
  const button = make("button", "at");
  button.type = "button";
  button.append("let go", ...(touched ? [] : [" ", make("kbd", "", "Esc")]));
  button.addEventListener("click", letGo);
  return button;
}

function letGo() {
  [state.word, state.range, hover, fan] = [null, null, null, null];
  changed();
}

/** Whether a key is the first or a special token, where mass goes that says little. */
const aside = (i) => i === 0 || new Set(recording().special).has(i);

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

function build() {
  for (const button of byId("switch").children)
    button.addEventListener("click", () => {
      state.view = button.dataset.view;
      cell = null;
      changed();
      if (state.view === "text" && state.word !== null)
        requestAnimationFrame(() => requestAnimationFrame(() => goTo(state.word + shift())));
    });
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
  byId("measure").querySelector("select").addEventListener("change", (event) => {
    state.measure = event.target.value;
    changed();
  });
  for (const id of held ? ["reduce", "sinks", "find", "reads", "segments", "which", "pair"] : []) {
    byId(id).hidden = true;
    byId(id).closest("label")?.setAttribute("hidden", "");
  }
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
    } else if (event.key === "Escape") letGo(); else if (event.key === "m" || event.key === "t") {
      state.view = event.key === "m" ? "map" : "text";
      changed();
    }
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
    wordName: () => readers().name((state.word ?? 0) + shift()) });
  heads = new Heads(about, segments, failed);
  along = new Along(about, { keep: keepAt,
    name: (i, what) => (what === "entropy" ? readers().name(i + shift()) : keys().name(i)) });
  byId("loading").remove();
  document.documentElement.dataset.loaded = "";
  maps = new Maps(about, tokensOf, failed, (found) => {
    cell = found;
    drawHeadline();
  });
  build();
  onChange(() => {
    byId("error").hidden = true; // it comes again where it still holds
    if (!measures(layer()).includes(state.measure)) state.measure = "weight";
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
