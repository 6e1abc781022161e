// What is chosen, kept in the address: a link to it opens the same.

import { bridge, held } from "./api.js";

const state = {
  recording: 0,
  layer: 0,
  head: 0,
  batch: 0,
  view: "map",
  units: "words", // of the text, where the recording names them
  given: null, // what segments begin at
  segment: 0,
  word: null, // the token that is locked, by its number
  way: "out", // what it reads; "in": who reads it
  metric: "largest",
  reduce: "sum",
  scale: "log",
  sinks: true,
  range: null, // of rows or columns that are kept: row or col, first, last + 1
  measure: "weight", // "value": weight times the length of what the key adds; "effect": of cutting the edge
  along: "entropy", // what the line along the text says: "received"
  at: null, // where the map stands: zoom, row, column
  top: null, // the first token of the text in sight
  source: null, // the words that heads are ranked by: which reads …
  target: null, // … which
  find: null, // what is looked for in the text
  share: 90, // % of a word's mass to show
  compare: "one", // "second", "both", "change"
};
const SHORT_NAMES = {
  recording: "r", batch: "batch", view: "view", word: "word", way: "way", metric: "metric",
  reduce: "pool", scale: "scale", share: "share", compare: "compare", at: "at",
  range: "range", measure: "measure", along: "along", units: "by", given: "segments", segment: "segment",
  top: "top", source: "from", target: "reads", find: "find",
};
/** What the way back goes through: not where the map or the text stands, nor how they look. */
const STEPS = ["head", "r", "batch", "view", "word", "way", "metric", "measure", "compare", "range", "segments", "segment", "from", "reads"];
const fresh = { ...state };
const listeners = new Set();
let due = false;
let last = null; // the step that the address holds

/** Something was chosen: draw again, once, before the next frame. */
function changed() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    for (const listener of listeners) listener();
    write();
  });
}

function onChange(listener) {
  listeners.add(listener);
}

/** What is chosen, as the address says it. */
function said() {
  const query = new URLSearchParams();
  query.set("head", `${state.layer}.${state.head}`);
  for (const [key, name] of Object.entries(SHORT_NAMES))
    if (state[key] !== null && state[key] !== fresh[key]) query.set(name, state[key]);
  if (!state.sinks) query.set("sinks", "off");
  return query;
}

function write() {
  const query = said();
  const hash = `#${query}`;
  if (bridge) return; // a frame in a notebook has no address of its own
  const step = JSON.stringify(STEPS.map((name) => query.get(name)));
  if (hash !== location.hash)
    history[last === null || last === step ? "replaceState" : "pushState"](null, "", hash);
  last = step;
}

/** Take over what the address says, as far as `about` knows of it. */
function read(about) {
  last = null; // what is made of it is no step of its own
  const query = new URLSearchParams(location.hash.slice(1) || held?.opens);
  const number = (name, most, otherwise) => {
    const text = query.get(name);
    return text !== null && /^\d{1,9}$/.test(text) && Number(text) < most ? Number(text) : otherwise;
  };
  const oneOf = (name, choices, otherwise) =>
    choices.includes(query.get(name)) ? query.get(name) : otherwise;
  Object.assign(state, fresh);
  state.recording = number("r", about.recordings.length, 0);
  const { layers, batch } = about.recordings[state.recording];
  const [layer, head] = (query.get("head") ?? "").split(".").map(Number);
  const known = layers[layer]?.pattern && head >= 0 && head < layers[layer].heads;
  state.layer = known ? layer : layers.findIndex((one) => one.pattern);
  state.head = known ? Math.trunc(head) : 0;
  state.batch = number("batch", batch, 0);
  state.view = oneOf("view", ["map", "text"], "map");
  state.word = number("word", layers[state.layer].q_len, null);
  state.way = oneOf("way", ["out", "in"], "out");
  state.metric = oneOf("metric", [...about.metrics.map((one) => one.key), "reads", "segment"],
    fresh.metric);
  state.units = oneOf("by", ["words", "tokens"], "words");
  state.given = query.get("segments")?.slice(0, 1000) || null;
  state.segment = number("segment", 10_000, 0);
  state.reduce = oneOf("pool", ["sum", "max"], "sum");
  state.scale = oneOf("scale", ["log", "linear"], "log");
  state.share = number("share", 101, fresh.share);
  const pairs = about.recordings.length > 1;
  state.compare = oneOf("compare", pairs ? ["one", "second", "both", "change"] : ["one"], "one");
  state.sinks = query.get("sinks") !== "off";
  const range = /^(row|col),(\d{1,9}),(\d{1,9})$/.exec(query.get("range") ?? "");
  state.range = range && Number(range[2]) < Number(range[3]) ? range[0] : null;
  state.measure = oneOf("measure", ["weight", "value", "effect"], "weight"); // where it was not kept, the page says so
  state.along = oneOf("along", ["entropy", "received"], "entropy");
  const at = (query.get("at") ?? "").split(",").map(Number);
  state.top = number("top", 1e9, null);
  for (const [key, name] of [["source", "from"], ["target", "reads"], ["find", "find"]])
    state[key] = query.get(name)?.slice(0, 1000) || null;
  state.at = at.length === 3 && at.every(Number.isFinite) ? query.get("at") : null;
}

/** What a recording has of each edge of a layer; an exported page may hold less. */
const measures = ({ norms, effects }) => ["weight", ...(norms ? ["value"] : []), ...(effects ? ["effect"] : [])]
  .filter((one) => !held || held.measures.includes(one));

export { changed, measures, onChange, read, said, state, write };
