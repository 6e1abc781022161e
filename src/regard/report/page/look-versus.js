// ---------------------------------------------------------------- what changed in a second text

const changes = new Map((data.versus ?? []).map((one) => [one.word, one]));
let listedChange = null;

/**
 * The head that changed most, of the word asked for or of that whose reading moved most: a word
 * that both texts have, if there is one, since one that was replaced reads otherwise anyhow.
 */
function openOnChange() {
  const all = [...changes.values()];
  const kept = ({ word }) => main.labels[word] === second.labels[across[word]];
  const first = all.find(kept) ?? all[0];
  if (!first) return;
  const [layer, head] = first.head;
  const part = main.parts.findIndex((some) => members(some, { layer, head }).length);
  state.last = first.word;
  state.chosen = { part, layer, head };
  state.pin = first.to;
  state.metric = "change";
}

function flipRow(one, { head: [layer, head], to: [before, after], weights }) {
  const line = make("tr");
  const cells = [
    [main.labels[before], weights[0], weights[1]],
    [second.labels[after], weights[2], weights[3]],
  ];
  const name = make("button", "at", `${layer}.${head}`);
  name.type = "button";
  name.title = `show head ${layer}.${head}`;
  name.addEventListener("click", () => {
    const part = main.parts.findIndex((some) => members(some, { layer, head }).length);
    state.chosen = { part, layer, head };
    [state.lock, state.pin, state.aim] = [one.word, before, null];
    reveal();
    byId("readings").scrollIntoView({ block: "nearest" });
  });
  const first = make("td");
  first.append(name);
  line.append(first);
  for (const [label, was, is] of cells) {
    const cell = make("td");
    const pair = make("div");
    pair.append(make("span", "name", label), make("span", "num", `${was.toFixed(2)} → ${is.toFixed(2)}`));
    cell.append(pair);
    line.append(cell);
  }
  return line;
}

/** The flips of the word in focus; of another word there is none to list, so its button is there. */
function drawChange({ word }) {
  const section = byId("versus");
  if (!second || listedChange === word) return;
  listedChange = word;
  section.hidden = !changes.size;
  const one = changes.get(word);
  const parts = [];
  const title = make("h2");
  if (one) {
    const total = main.parts.reduce((sum, part) => sum + part.heads.length, 0);
    title.append(
      bold(main.labels[word]), `: ${percent(one.moved)} of what it reads moved · `,
      `${one.flips.length || "no"} of ${count(total, "head")} flip${one.flips.length === 1 ? "s" : ""}`,
    );
    parts.push(title);
    if (one.flips.length) {
      const table = make("table");
      const header = make("tr");
      for (const said of ["head", "most read in the first", "most read in the second"])
        header.append(make("th", "", said));
      const head = make("thead");
      head.append(header);
      const body = make("tbody");
      body.append(...one.flips.map((flip) => flipRow(one, flip)));
      table.append(head, body);
      const frame = make("div", "wide");
      frame.append(table);
      parts.push(frame);
    }
  } else {
    title.append(bold(main.labels[word]), ": its changes are in the panels above");
    parts.push(title);
  }
  const others = [...changes.values()].filter((other) => other.word !== word);
  if (others.length) {
    const also = make("p", "others", "changes are listed for ");
    for (const other of others) {
      const button = make("button", "at", main.labels[other.word]);
      button.type = "button";
      button.title = `${percent(other.moved)} of what it reads moved`;
      button.addEventListener("click", () => {
        [state.lock, state.pin, state.aim] = [other.word, other.to, null];
        const [layer, head] = other.head;
        const part = main.parts.findIndex((some) => members(some, { layer, head }).length);
        state.chosen = { part, layer, head };
        reveal();
      });
      also.append(button, " ");
    }
    parts.push(also);
  }
  parts.push(make("p", "mass",
    "A head flips where the word it reads most, special tokens and the word itself apart, is not " +
      `the counterpart of that in the first text; below a weight of ${data.min_flip} it is noise, ` +
      "not counted. " +
      "Weights: in the first text → in the second."));
  section.replaceChildren(...parts);
}
