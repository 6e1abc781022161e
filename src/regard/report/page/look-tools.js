// ---------------------------------------------------------------- find, switch, walk

const touch = matchMedia("(hover: none)");
const VIEWS = { raw: "as computed", rest: "special tokens and sinks apart" };

/** One panel where two would be long or narrow: which weights it shows. */
function buildSwitch() {
  for (const [kind, said] of Object.entries(VIEWS)) {
    const button = make("button", "", said);
    button.type = "button";
    button.dataset.shows = kind;
    button.addEventListener("click", () => {
      state.view = kind;
      changed();
    });
    byId("switch").append(button);
  }
  byId("switch").classList.toggle("always", single);
}

function drawSwitch() {
  document.body.dataset.shows = state.view;
  for (const button of byId("switch").children)
    button.setAttribute("aria-pressed", button.dataset.shows === state.view);
  if (!single) return;
  for (const [view] of readings.map((reading) => reading.views)) {
    view.kind = state.view;
    view.section.dataset.view = state.view;
    view.title.textContent = VIEWS[state.view];
  }
}

function buildFind() {
  const field = byId("find").querySelector("input");
  const said = byId("found");
  const reader = (word) => main.parts.some((part) => reads(part, word));
  let hits = [];
  let at = -1;
  const go = (by) => {
    if (!hits.length) return;
    at = (at + by + hits.length) % hits.length;
    said.textContent = `${at + 1} of ${hits.length}`;
    const element = main.views[0].words[hits[at]];
    const frame = main.views[0].scroll;
    const [seen, edge] = [element.getBoundingClientRect(), frame.getBoundingClientRect()];
    if (seen.top < edge.top + 20 || seen.bottom > edge.bottom - 20)
      frame.scrollTop += seen.top - edge.top - frame.clientHeight / 2;
    if (reader(hits[at])) {
      [state.lock, state.pin, state.aim] = [hits[at], null, null];
      changed();
    }
  };
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLocaleLowerCase();
    hits = wanted
      ? main.labels.flatMap((name, i) => (name.toLocaleLowerCase().includes(wanted) ? [i] : []))
      : [];
    at = -1;
    for (const view of main.views)
      view.words.forEach((word, i) => {
        const hit = hits.includes(i);
        if (hit !== word.hasAttribute("data-hit")) word.toggleAttribute("data-hit", hit);
      });
    said.textContent = !wanted ? "" : hits.length
      ? `${count(hits.length, "word")}; Enter goes to the next` : "no such word";
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") go(event.shiftKey ? -1 : 1);
    else if (event.key === "Escape" && field.value) {
      field.value = "";
      field.dispatchEvent(new Event("input"));
      event.stopPropagation();
    } else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input, select")) return;
    field.focus();
    event.preventDefault();
  });
}

/** A word in quotes, as a shell takes it. */
const quoted = (word) =>
  /^[\p{L}\p{N}_.+-]+$/u.test(word) ? word
    : /["$`\\!]/.test(word) ? `'${word.replaceAll("'", "'\\''")}'` : `"${word}"`;

function drawWalk({ word, chosen, part }) {
  const shown = main.walk && part.kind === "self" && !main.special.includes(word);
  byId("walk").hidden = !shown;
  if (!shown) return;
  const head = chosen.head === null ? "" : ` --head ${chosen.layer}.${chosen.head}`;
  const from = ` --from ${quoted(main.labels[word])}`;
  const code = byId("walk").querySelector("code");
  if (code.textContent === main.walk + from + head) return;
  code.replaceChildren(main.walk, make("span", "", from), make("span", "", head));
  byId("walk-said").textContent = "";
  const what = head ? "this head" : "this word’s strongest head";
  const file = main.walk.startsWith("regard walk @FILE") ? "; FILE holds the text" : "";
  byId("walk-title").textContent = `walk ${what}: each step with the model’s numbers${file}`;
}

function buildWalk() {
  const code = byId("walk").querySelector("code");
  byId("walk").querySelector("button").addEventListener("click", async () => {
    let done = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code); // a browser that keeps its clipboard: by hand
      done = document.execCommand("copy");
    }
    byId("walk-said").textContent = done ? "copied" : "selected: copy it with the keyboard";
  });
}
