// ---------------------------------------------------------------- the texts

function buildReading(reading) {
  const block = make("div", "reading");
  if (second) {
    const said = reading === main ? "first" : "second";
    block.append(make("h2", "which", `${said} · ${reading.model}`));
  }
  block.classList.toggle("long", reading.words.length > SHORT);
  block.classList.toggle("single", single);
  const special = new Set(reading.special);
  const kinds = Object.entries(VIEWS).slice(0, single ? 1 : 2);
  reading.views = kinds.map(([kind, title]) => {
    const view = { kind, words: [], touched: [], room: reading.words.length > SHORT ? 22 : 40 };
    const section = make("section", "view");
    section.dataset.view = kind;
    view.section = section;
    view.title = make("h2", "", title);
    section.append(view.title);
    view.scroll = make("div", "scroll");
    view.paper = make("div", "paper");
    view.fan = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    view.fan.setAttribute("class", "fan");
    view.fan.setAttribute("aria-hidden", "true");
    view.paper.append(view.fan);
    for (const side of reading.sides) {
      const text = make("div", "text");
      text.dir = side.rtl ? "rtl" : "ltr";
      for (const piece of side.pieces) {
        if (piece === "\n") text.append(make("br"));
        else if (piece === " ") text.append(" ");
        else if (typeof piece === "string") text.append(make("span", "untold", piece));
        else {
          const [from, to] = reading.generated;
          const word = make("span", "word", reading.words[piece]);
          if (special.has(piece)) word.classList.add("special");
          if (/^[↵⇥␣⍽]+$/.test(reading.words[piece])) word.classList.add("blank");
          if (piece >= from && piece < to) word.classList.add("generated");
          if (!reading.parts.some((part) => reads(part, piece))) word.classList.add("unread");
          word.dataset.kind = word.className;
          word.dataset.word = piece;
          if (kind === "raw" && reading === main) {
            word.setAttribute("role", "button");
            word.setAttribute("aria-pressed", "false");
            word.tabIndex = -1;
          }
          view.words[piece] = word;
          text.append(word);
        }
      }
      view.paper.append(text);
    }
    if (kind === "rest" || reading !== main) view.paper.setAttribute("aria-hidden", "true");
    view.mass = make("p", "mass");
    view.scroll.append(view.paper);
    section.append(view.scroll, view.mass);
    block.append(section);
    listen(reading, view);
    return view;
  });
  const [one, two] = reading.views;
  if (two) {
    one.scroll.addEventListener("scroll", () => (two.scroll.scrollTop = one.scroll.scrollTop));
    two.scroll.addEventListener("scroll", () => (one.scroll.scrollTop = two.scroll.scrollTop));
  }
  byId("readings").append(block);
}

/** Short texts are set as large as lets them stand on one line, within what is easy to read. */
function fit(reading) {
  if (reading.words.length > SHORT) return;
  for (const view of reading.views) {
    const texts = view.paper.querySelectorAll(".text");
    for (let size = 24; size >= 16; size--) {
      for (const text of texts) text.style.fontSize = `${size === 16 ? 20 : size}px`;
      if ([...texts].every((text) => text.offsetHeight < 4 * size)) break;
    }
  }
}

function listen(reading, view) {
  const wordAt = (event) => {
    const element = event.target.closest?.(".word");
    if (!element) return null;
    const word = Number(element.dataset.word);
    return reading === main ? word : back[word] ?? null;
  };
  const reader = (word) => main.parts.some((part) => reads(part, word));
  const over = (word) => {
    if (state.lock !== null) state.aim = word === state.lock ? null : word;
    else if (word !== null && reader(word)) state.hover = word;
    changed();
  };
  const keep = (word) => {
    if (word === null) return;
    if (state.lock === word) release();
    else if (reader(word)) {
      state.lock = word;
      state.pin = state.aim = null;
    }
    changed();
  };
  view.paper.addEventListener("pointerover", (event) => over(wordAt(event)));
  view.paper.addEventListener("pointerleave", () => over(null));
  view.paper.addEventListener("click", (event) => keep(wordAt(event)));
  view.paper.addEventListener("focusin", (event) => {
    const word = wordAt(event);
    for (const element of view.words) element.tabIndex = -1;
    view.words[word].tabIndex = 0;
    if (event.target.matches(":focus-visible")) over(word);
  });
  view.paper.addEventListener("keydown", (event) => {
    const word = wordAt(event);
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (word === null) return;
    if (by) {
      const next = Math.max(0, Math.min(view.words.length - 1, word + by));
      view.words[next].focus();
    } else if (event.key === "Enter" || event.key === " ") keep(word);
    else return;
    event.preventDefault();
  });
}

function release() {
  state.hover = state.lock ?? state.hover;
  state.lock = state.pin = state.aim = null;
}

function buildAbout() {
  const layers = new Set(main.parts.flatMap((part) => part.heads.map(([layer]) => layer)));
  const heads = main.parts.reduce((total, part) => total + part.heads.length, 0);
  byId("about").append(
    "regard look · ", bold(main.model), ` · ${count(layers.size, "layer")}, `,
    `${count(heads, "head")} · ${count(main.words.length, "word")} · where heads read, not why`,
  );
  const said = [
    "This page says where heads read, not why: a large weight need not matter to the result.",
    "Weight of a word: summed over its tokens, averaged over the tokens of the word that reads " +
      `(Clark et al. 2019). Kept to ${1 / data.unit}.`,
    "Sink: a word whose column mean in a head is above 0.3 (Gu et al. 2025), over 8 queries " +
      "or more; for several heads, a sink in at least half of them. Shades grow with the square root of the weight.",
    "Keys: Tab reaches the text and the heads, arrows move, Enter keeps, Esc lets go, / finds. " +
      "The address holds what is chosen.",
  ];
  if (data.cut)
    said.splice(1, 0, `The weights are those of the whole model: nothing is cut (${data.cut}).`);
  const listed = main.parts.find((part) => part.listed)?.listed;
  if (listed)
    said.splice(1, 0, `The text is long: of each word and head, the ${count(listed, "word")} ` +
      "read most are here, and the mass of the rest is stated.");
  for (const line of said) byId("foot").append(make("p", "", line));
}

async function start() {
  for (const reading of readings)
    for (const part of reading.parts) {
      part.layers = [...new Set(part.heads.map(([layer]) => layer))];
      await load(part); // a turn for the browser to say that it is loading
    }
  readings.forEach(buildReading);
  buildSwitch();
  buildFind();
  buildGrid();
  buildWalk();
  buildEffects();
  buildAbout();
  const first = main.parts[0].readers[0];
  const readers = main.words.map((_, i) => i).filter((i) => !main.special.includes(i));
  state.last = main.starts[0] ?? readers.find((i) => i >= first) ?? first;
  state.chosen = strongestHead(state.last);
  openOnChange();
  readHash();
  byId("metric").value = state.metric;
  main.views[0].words[focusWord()].tabIndex = 0;
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    release();
    state.preview = null;
    changed();
  });
  addEventListener("hashchange", () => {
    readHash();
    byId("metric").value = state.metric;
    reveal();
  });
  addEventListener("resize", () => {
    readings.forEach(fit);
    sizeGrid();
    changed();
  });
  touch.addEventListener("change", changed);
  byId("loading").remove();
  document.documentElement.dataset.loaded = "";
  readings.forEach(fit);
  sizeGrid();
  reveal();
  document.documentElement.dataset.ready = "";
}

start();
