// ---------------------------------------------------------------- drawing

let due = false;
function changed() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    draw();
  });
}

function draw() {
  const word = focusWord();
  state.last = word;
  const chosen = effective(main, word);
  const part = main.parts[chosen.part];
  const row = rowOf(part, chosen, word);
  const aside = apart(main, part, chosen);
  const target = targetOf(part, row, aside, word);
  const seen = { word, chosen, part, row, aside, target };
  seen.second = seenSecond(seen);
  drawSwitch();
  const fans = main.views.map((view) => drawView(view, main, seen));
  for (const view of second?.views ?? []) fans.push(drawView(view, second, seen.second));
  drawHeadline(seen);
  drawGrid(seen);
  drawList(seen);
  drawChange(seen);
  drawWalk(seen);
  fans.forEach((fan) => fan()); // last: only these ask where words stand
  written();
}

/** Scroll the texts to the word in focus, where they are long and it is out of sight. */
function reveal() {
  draw();
  for (const view of readings.flatMap((reading) => reading.views)) {
    const word = view.paper.querySelector(".focus")?.getBoundingClientRect();
    const frame = view.scroll.getBoundingClientRect();
    if (word && (word.top < frame.top + 20 || word.bottom > frame.bottom - 20))
      view.scroll.scrollTop += word.top - frame.top - frame.height / 2;
  }
}

/** The same for the counterpart in the second text; null where there is none. */
function seenSecond({ word, chosen, part, target }) {
  const two = across[word] ?? null;
  if (two === null) return null;
  const { kind } = part;
  const number = second.parts.findIndex((some) => some.kind === kind && reads(some, two));
  if (number < 0) return null;
  const other = second.parts[number];
  let same = { ...chosen, part: number };
  if (!members(other, same).length) same = { part: number, layer: null, head: null };
  const key = across[target + part.keys[0]] ?? null;
  return {
    word: two,
    chosen: same,
    part: other,
    row: rowOf(other, same, two),
    aside: apart(second, other, same),
    target: key === null ? null : key - other.keys[0],
  };
}

/** Shade the words of a view; returns what draws its lines. */
function drawView(view, reading, seen) {
  for (const element of view.touched) {
    element.className = element.dataset.kind;
    element.style.removeProperty("--shade");
    delete element.dataset.label;
    delete element.dataset.weight;
    element.setAttribute("aria-pressed", "false");
  }
  view.touched = [];
  if (!seen) {
    view.mass.textContent = `${main.labels[focusWord()]} has no counterpart here`;
    return () => view.fan.replaceChildren();
  }
  const { word, part, row, aside, target, chosen } = seen;
  let base = 1;
  let held = 0;
  if (view.kind === "rest") {
    row.weights.forEach((weight, key) => (held += aside[key] ? weight : 0));
    base = Math.max(row.sum - held, 1e-9);
  }
  const drawn = [];
  row.weights.forEach((weight, key) => {
    const element = view.words[key + part.keys[0]];
    const out = view.kind === "rest" && aside[key];
    if (!weight && (!out || aside[key] === 2)) return;
    view.touched.push(element);
    if (out) return element.classList.add("aside");
    const value = Math.min(1, weight / base);
    element.style.setProperty("--shade", (0.9 * shade(value)).toFixed(3));
    element.dataset.weight = value.toFixed(4);
    if (value >= LEAST) drawn.push([value, key]);
  });
  drawn.sort((a, b) => b[0] - a[0]);
  drawn.splice(ARCS);
  for (const [value, key] of drawn)
    view.words[key + part.keys[0]].dataset.label = short(value);
  const from = view.words[word];
  from.classList.add("focus");
  if (state.lock !== null) {
    from.classList.add("locked");
    from.setAttribute("aria-pressed", "true");
  }
  view.touched.push(from);
  if (target !== null) {
    view.words[target + part.keys[0]].classList.add("target");
    view.touched.push(view.words[target + part.keys[0]]);
  }
  const others = drawn.filter(([, key]) => !(part.same && key + part.keys[0] === word));
  const arcs = others.reduce((total, [value]) => total + value, 0);
  const parts = [];
  const lost = 1 - row.sum;
  if (view.kind === "raw") {
    parts.push(`shown ${percent(row.listed + (lost > 0.005 ? lost : 0))} of the mass`);
    if (part.listed) parts.push(`the ${part.listed} words read most are listed`);
    if (lost > 0.005) parts.push(`${percent(lost)} goes to a learned sink, which is no word`);
  } else {
    parts.push(
      `special tokens and sinks, struck through, hold ${part.listed ? "at least " : ""}` +
        `${percent(held)}; these are shares of the other ${percent(base)}`,
    );
    if (part.listed) parts.push(`shown ${percent(Math.max(0, row.listed - held) / base)} of it`);
  }
  parts.push(`${count(others.length, "line")} drawn: ${percent(arcs)}`);
  if (reading === second) parts.push(nameOf(second, chosen));
  view.mass.textContent = parts.join(" · ");
  const ends = others.map(([value, key]) => [value, view.words[key + part.keys[0]]]);
  return () => drawFan(view, from, ends);
}

function drawHeadline({ word, chosen, part, row, target, second: other }) {
  const label = main.labels[target + part.keys[0]];
  const said = [
    bold(main.labels[word]), " reads ", bold(label), " ",
    bold(three(row.weights[target]), "weight"),
  ];
  if (other && other.target !== null) {
    const name = second.labels[other.target + other.part.keys[0]];
    said.push(", then ", ...(name === label ? [] : [bold(name), " "]));
    said.push(bold(three(other.row.weights[other.target]), "weight"));
  }
  byId("headline").replaceChildren(
    ...said, make("span", "where", ` · ${nameOf(main, chosen)}`),
  );
  const note = byId("note");
  if (touch.matches)
    note.textContent = state.lock === null
      ? "Tap a word to see what it reads; tap a head below for that head."
      : "Tap the word again to let go, or a word in the list for that one link.";
  else if (state.lock === null)
    note.textContent = "Hover a word to see what it reads; click to keep it.";
  else if (state.lock === word) {
    note.replaceChildren(
      "Kept. Hover another word for that one link; ", make("kbd", "", "Esc"), " lets go.",
    );
  }
}
