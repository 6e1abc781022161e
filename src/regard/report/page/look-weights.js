const data = JSON.parse(document.getElementById("data").textContent);
const readings = data.readings;
const second = readings[1] ?? null; // of --versus
const across = data.aligned ?? []; // the second's word for each of the first's, or null
const back = [];
across.forEach((two, one) => two !== null && (back[two] = one));
const ARCS = 14; // arcs drawn, of those that weigh something
const LEAST = 0.02; // ... at least this
const SHORT = 60; // words; longer texts are set smaller
const single = Boolean(second) || readings.some((one) => one.words.length > SHORT);
const METRICS = {
  link: "one link: this word → that word",
  best: "the strongest link from this word",
  left: "mass left to words",
  before: "the word before",
  after: "the word after",
  itself: "the word itself",
  distance: "distance",
  entropy: "entropy",
};
if (second) METRICS.change = "change of one link, second − first";
const SAID = {
  left: "share of all the mass that is not on special tokens or on the head's sinks",
  before: "mean weight a word gives to the word before it",
  after: "mean weight a word gives to the word after it",
  itself: "mean weight a word gives to itself",
  distance: "how many words away a head reads on average, special tokens and sinks apart",
  entropy: "mean entropy over words, in nats: 0 is one word read, high is many",
};

// ---------------------------------------------------------------- the weights

/** The bytes that the page carries for one part. */
async function unpacked(number) {
  const held = byId(`map-${number}`);
  const text = atob(held.textContent);
  held.remove();
  const bytes = Uint8Array.from(text, (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Numbers whose bytes lie in planes: all lowest ones, then the next, … */
function numbers(bytes, start, length, planes, Kind) {
  const out = new Kind(length);
  for (let plane = 0; plane < planes; plane++) {
    const base = start + plane * length;
    for (let i = 0; i < length; i++) out[i] |= bytes[base + i] << (8 * plane);
  }
  return out;
}

async function load(part) {
  const bytes = await unpacked(part.map);
  const rows = part.readers[1];
  if (!part.listed) {
    part.weights = numbers(bytes, 0, part.heads.length * rows * part.keys[1], 2, Uint16Array);
    return;
  }
  const series = part.heads.length + part.layers.length + 1;
  const length = series * rows * part.listed;
  part.places = numbers(bytes, 0, length, 3, Uint32Array);
  part.weights = numbers(bytes, 3 * length, length, 2, Uint16Array);
  part.sums = numbers(bytes, 5 * length, series * rows, 2, Uint16Array);
}

/** The places in part.heads that a choice stands for. */
function members(part, chosen) {
  if (chosen.head !== null)
    return part.heads.flatMap(([l, h], i) => (l === chosen.layer && h === chosen.head ? [i] : []));
  if (chosen.layer === null) return part.heads.map((_, i) => i);
  return part.heads.flatMap(([l], i) => (l === chosen.layer ? [i] : []));
}

/**
 * What a word reads: weights by key (a Float64Array, 0 where none is listed), their sum `listed`,
 * and `sum`, that of the whole row: less than 1 where a learned sink takes mass.
 */
function rowOf(part, chosen, word) {
  const keys = part.keys[1];
  const place = word - part.readers[0];
  const weights = new Float64Array(keys);
  let sum = 0;
  if (!part.listed) {
    const heads = members(part, chosen);
    for (const head of heads) {
      const start = (head * part.readers[1] + place) * keys;
      for (let i = 0; i < keys; i++) weights[i] += part.weights[start + i];
    }
    for (let i = 0; i < keys; i++) {
      weights[i] /= data.unit * heads.length;
      sum += weights[i];
    }
    return { weights, sum, listed: sum };
  }
  let series = part.heads.length + part.layers.length;
  if (chosen.head !== null) series = members(part, chosen)[0];
  else if (chosen.layer !== null) series = part.heads.length + part.layers.indexOf(chosen.layer);
  const row = series * part.readers[1] + place;
  let listed = 0;
  for (let i = row * part.listed; i < (row + 1) * part.listed; i++) {
    weights[part.places[i]] = part.weights[i] / data.unit;
    listed += part.weights[i] / data.unit;
  }
  sum = part.sums[row] / data.unit;
  return { weights, sum, listed: Math.min(listed, sum) };
}

/** One link in one head. */
function linkOf(part, head, word, key) {
  const place = head * part.readers[1] + word - part.readers[0];
  if (!part.listed) return part.weights[place * part.keys[1] + key] / data.unit;
  for (let i = place * part.listed; i < (place + 1) * part.listed; i++)
    if (part.places[i] === key && part.weights[i]) return part.weights[i] / data.unit;
  return 0;
}

/** Which keys are special tokens or sinks in the chosen heads: in at least half, if several. */
function apart(reading, part, chosen) {
  const heads = members(part, chosen);
  const out = new Uint8Array(part.keys[1]);
  for (const head of heads) for (const key of part.sinks[head]) out[key]++;
  for (let i = 0; i < out.length; i++) out[i] = out[i] && out[i] * 2 >= heads.length ? 2 : 0;
  for (const word of reading.special) {
    const key = word - part.keys[0];
    if (key >= 0 && key < out.length) out[key] = 1;
  }
  return out;
}

// ---------------------------------------------------------------- what is chosen

const main = readings[0];
const state = { lock: null, hover: null, pin: null, aim: null, preview: null, metric: "link" };
state.chosen = { part: 0, layer: null, head: null };
state.view = "raw";

const focusWord = () => state.lock ?? state.hover ?? state.last;
const reads = (part, word) => word >= part.readers[0] && word < part.readers[0] + part.readers[1];

/** The heads shown for a word: those chosen, or all of the first part in which it reads. */
function effective(reading, word) {
  const chosen = state.preview ?? state.chosen;
  const part = reading.parts[chosen.part];
  if (part && reads(part, word) && members(part, chosen).length) return chosen;
  const other = reading.parts.findIndex((some) => reads(some, word));
  return { part: other, layer: null, head: null };
}

const nameOf = (reading, chosen) => {
  const kind = reading.parts[chosen.part].kind;
  const of = kind === "self" ? "" : `, ${kind}`;
  if (chosen.head !== null) return `head ${chosen.layer}.${chosen.head}${of}`;
  if (chosen.layer !== null) return `layer ${chosen.layer}, mean of its heads${of}`;
  return `mean of all ${reading.parts[chosen.part].heads.length} heads${of}`;
};

function written() {
  const said = [];
  if (state.lock !== null) said.push(`word=${state.lock}`);
  const { part, layer, head } = state.chosen;
  if (head !== null) said.push(`head=${layer}.${head}`);
  else if (layer !== null) said.push(`layer=${layer}`);
  else said.push(main.parts.length > 1 ? `all=${main.parts[part].kind}` : "all");
  if (state.pin !== null) said.push(`to=${state.pin}`);
  if (state.view !== "raw") said.push(`view=${state.view}`);
  if (state.metric !== "link") said.push(`metric=${state.metric}`);
  const hash = `#${said.join("&")}`;
  // A notebook's frame has no address of its own
  if (hash !== location.hash && location.protocol !== "about:") history.replaceState(null, "", hash);
}

function readHash() {
  const said = new URLSearchParams(location.hash.slice(1));
  const word = (key) => {
    const number = Number.parseInt(said.get(key) ?? "", 10);
    return number >= 0 && number < main.words.length ? number : null;
  };
  if (said.has("word") || said.has("to")) [state.lock, state.pin] = [word("word"), word("to")];
  if (said.get("view") === "rest") state.view = "rest";
  if (Object.hasOwn(METRICS, said.get("metric") ?? "")) state.metric = said.get("metric");
  const [layer, head] = (said.get("head") ?? said.get("layer") ?? "").split(".").map(Number);
  const part = main.parts.findIndex((some) => some.layers.includes(layer));
  if (said.has("head") && part >= 0) {
    const chosen = { part, layer, head };
    if (members(main.parts[part], chosen).length) state.chosen = chosen;
  } else if (said.has("layer") && part >= 0) state.chosen = { part, layer, head: null };
  else if (said.has("all")) {
    const kind = main.parts.findIndex((some) => some.kind === said.get("all"));
    state.chosen = { part: Math.max(0, kind), layer: null, head: null };
  }
}

/**
 * The head with the strongest link from a word: not to itself, to what stands apart or, since many
 * heads do little else, to a neighbour.
 */
function strongestHead(word) {
  let best = { weight: 0, chosen: { part: 0, layer: null, head: null } };
  main.parts.forEach((part, number) => {
    if (!reads(part, word)) return;
    part.heads.forEach(([layer, head]) => {
      const chosen = { part: number, layer, head };
      const aside = apart(main, part, chosen);
      rowOf(part, chosen, word).weights.forEach((weight, key) => {
        if (aside[key] || (part.same && Math.abs(key + part.keys[0] - word) < 2)) return;
        if (weight > best.weight) best = { weight, chosen };
      });
    });
  });
  return best.chosen;
}

/** The key that a row is about: the one aimed at, else the strongest that says something. */
function targetOf(part, row, aside, word) {
  const aim = state.aim ?? state.pin;
  if (aim !== null && aim >= part.keys[0] && aim < part.keys[0] + part.keys[1])
    return aim - part.keys[0];
  let best = 0;
  let most = -1;
  row.weights.forEach((weight, key) => {
    const own = part.same && key + part.keys[0] === word;
    const rank = weight - (aside[key] ? 2 : 0) - (own ? 4 : 0);
    if (rank > most || key === 0) [best, most] = [key, rank];
  });
  return best;
}
