// What the page asks its server, or the kernel of a notebook. An exported page carries the answers itself, in `held`.

const inside = JSON.parse(document.getElementById("held")?.textContent ?? "null");
const held = inside?.answers ? inside : null;
/** In a notebook: asks the kernel. */
const bridge = inside?.bridged ? frameElement.bridge : null;

/** "light" or "dark" where the notebook around the page says so. */
const theme = () => (bridge ? frameElement.theme?.() ?? null : null);

const elsewhere = "this file holds what was in view; for the rest, open the recording with regard view";

/** An answer that says what is wrong in one sentence. */
class Refused extends Error {}

function address(path, parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) query.set(name, value);
  return `api/${path}?${query}`;
}

/** What the file itself answers; undefined where that is not in it. */
function heldAnswer(path, parameters) {
  const pairs = Object.entries(parameters).map(([name, value]) => [name, String(value)]);
  return held.answers[`${path} ${JSON.stringify(pairs.sort(([one], [other]) => (one < other ? -1 : 1)))}`];
}

/** Whether an answer can be had: an exported page holds some. */
const known = (path, parameters) => !held || heldAnswer(path, parameters) !== undefined;

/** The answer to a question, as JSON. */
async function ask(path, parameters = {}, signal = undefined) {
  const url = address(path, parameters);
  if (held) {
    const answer = heldAnswer(path, parameters);
    if (answer !== undefined) return answer;
    throw new Refused(elsewhere);
  }
  if (bridge) return bridged(path, parameters, null, signal);
  let response;
  try {
    response = await fetch(url, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server is gone: start regard view again, then reload this page");
  }
  const answer = await response.json();
  if (!response.ok) throw new Refused(answer.error ?? `the server answered ${response.status}`);
  return answer;
}

/** The bytes of a tile that a file holds. */
async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

/** The same, asked of the kernel. */
async function bridged(path, parameters, got, signal) {
  const given = Object.fromEntries(Object.entries(parameters).map(([name, value]) => [name, String(value)]));
  try {
    return await bridge(path, given, got, signal);
  } catch (said) {
    if (said === null) throw new DOMException("left behind", "AbortError");
    throw new Refused(said);
  }
}

/** Tiles one after another: `got(i, Float32Array)` for each place, as it comes. */
async function tilesOf(parameters, places, got, signal) {
  const at = places.map(({ row, col }) => `${row}.${col}`).join(",");
  if (held) {
    const packed = places.map(({ row, col }) => heldAnswer("tiles", { ...parameters, at: `${row}.${col}` }));
    for (const [i, text] of packed.entries()) if (text) got(i, new Float32Array(await unpacked(text)));
    if (!packed.every(Boolean)) throw new Refused(elsewhere);
    return;
  }
  if (bridge) {
    let number = 0;
    await bridged("tiles", { ...parameters, at }, (bytes) => got(number++, new Float32Array(bytes)), signal);
    return;
  }
  let response;
  try {
    response = await fetch(address("tiles", { ...parameters, at }), { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server is gone: start regard view again, then reload this page");
  }
  if (!response.ok) throw new Refused((await response.json()).error);
  const size = 4 * 128 * 128;
  let [tile, filled, number] = [new Uint8Array(size), 0, 0];
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    for (let at = 0; at < value.length; ) {
      const part = value.subarray(at, at + size - filled);
      tile.set(part, filled);
      filled += part.length;
      at += part.length;
      if (filled < size) continue;
      got(number++, new Float32Array(tile.buffer));
      [tile, filled] = [new Uint8Array(size), 0];
    }
  }
  if (number === places.length) return;
  if (!number) throw new Refused("the server stopped in the middle: reload the page");
  // What kept it from going on is said in the answer to the rest
  await tilesOf(parameters, places.slice(number), (i, values) => got(number + i, values), signal);
}

/** Control characters, and marks that turn the direction of a text, as signs. */
function visible(text) {
  return text.replace(/[\p{Cc}\p{Zl}\p{Zp}\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]/gu,
    (char) => {
      const code = char.codePointAt(0);
      if (char === "\n") return "↵";
      if (char === "\t") return "⇥";
      return code < 32 ? String.fromCharCode(0x2400 + code) : "⍽";
    });
}

/** The tokens of one side of a recording, brought in pages when they are looked at. */
class Tokens {
  /** By words, the text of a whole word stands at its first token. */
  constructor(recording, side, length, page, byWords = false) {
    Object.assign(this, { recording, side, length, page, byWords });
    this.pages = new Map();
    this.asked = new Map();
  }

  /** The same, counted from token `by` on. */
  after(by) {
    return by ? new After(this, by) : this;
  }

  entry(i) {
    return this.pages.get(Math.floor(i / this.page))?.[i % this.page];
  }

  /** The first token of the word that a token continues; itself otherwise. */
  first(i) {
    while (i > 0 && this.entry(i) === 0) i--;
    return i;
  }

  /** A token as the text holds it, with the white space before it; null while it is on its way. */
  piece(i) {
    if (!this.pages.has(Math.floor(i / this.page))) return null;
    const piece = this.entry(this.first(i)) ?? "";
    return typeof piece === "string" ? piece : piece[1];
  }

  /** What stands before a token that is no token's; "" mostly. */
  gap(i) {
    const piece = this.entry(this.first(i));
    return Array.isArray(piece) ? piece[0] : "";
  }

  /** A token's name, fit for one line. */
  name(i, most = 40) {
    const piece = i < this.length ? this.piece(i) : null;
    if (piece === null) return `token ${i.toLocaleString("en")}`;
    const bare = piece.trim();
    if (!bare) return piece ? visible(piece).replaceAll(" ", "␣") : "⍽";
    const characters = [...visible(bare)];
    return characters.length > most ? `${characters.slice(0, most - 1).join("")}…` : characters.join("");
  }

  /** Whether the pages that hold start … stop − 1 are there. */
  loaded(start, stop) {
    for (let number = Math.floor(start / this.page); number * this.page < stop; number++)
      if (!this.pages.has(number)) return false;
    return true;
  }

  /** Brings the pages that hold start … stop − 1. */
  async need(start, stop) {
    const waits = [];
    for (let number = Math.floor(start / this.page); number * this.page < stop; number++) {
      if (this.pages.has(number)) continue;
      if (!this.asked.has(number)) {
        const asked = ask("tokens", { r: this.recording, side: this.byWords ? "words" : this.side, page: number });
        this.asked.set(number, asked.then((answer) => this.pages.set(number, answer.pieces)));
        asked.catch(() => this.asked.delete(number));
      }
      waits.push(this.asked.get(number));
    }
    await Promise.all(waits);
  }

  /** The same for single tokens, here and there. */
  async needEach(indices) {
    await Promise.all([...new Set(indices.map((i) => Math.floor(i / this.page)))]
      .map((page) => this.need(page * this.page, page * this.page + 1)));
  }
}

/** Tokens counted from a later one on: those of queries that keys stand before. */
class After {
  constructor(tokens, by) {
    Object.assign(this, { tokens, by, side: tokens.side, length: tokens.length - by });
  }

  first(i) {
    return this.tokens.first(i + this.by) - this.by;
  }

  piece(i) {
    return this.tokens.piece(i + this.by);
  }

  name(i, most) {
    return this.tokens.name(i + this.by, most);
  }

  need(start, stop) {
    return this.tokens.need(start + this.by, stop + this.by);
  }

  needEach(indices) {
    return this.tokens.needEach(indices.map((i) => i + this.by));
  }
}

export { Refused, Tokens, ask, bridge, held, known, theme, tilesOf, visible };
