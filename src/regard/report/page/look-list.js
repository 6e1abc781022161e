// ---------------------------------------------------------------- the list of words read

/** The rows of the list: words of the first text, and those of the second without a counterpart. */
function listed({ part, row, aside, second: other }) {
  const rows = [];
  row.weights.forEach((weight, key) => {
    const two = across[key + part.keys[0]] ?? null;
    const there = other && two !== null ? two - other.part.keys[0] : null;
    const mark = aside[key] || (there === null ? 0 : other.aside[there]);
    const label = main.labels[key + part.keys[0]];
    const after = there === null ? null : other.row.weights[there];
    rows.push({ label, key, mark, one: weight, two: after });
    if (there !== null) {
      const name = second.labels[two];
      if (name !== label) rows.at(-1).label += ` | ${name}`;
    }
  });
  other?.row.weights.forEach((weight, key) => {
    const word = key + other.part.keys[0];
    if (back[word] !== undefined) return;
    const mark = other.aside[key];
    rows.push({ label: second.labels[word], key: null, mark, one: null, two: weight });
  });
  for (const one of rows) one.most = Math.max(one.one ?? 0, one.two ?? 0);
  return rows.filter((one) => one.most >= 0.0005).sort((a, b) => b.most - a.most);
}

function headButton(part, chosen, head, text) {
  const at = make("button", "at", text);
  at.type = "button";
  at.addEventListener("click", () => {
    const [layer, number] = part.heads[head];
    state.chosen = { part: chosen.part, layer, head: number };
    changed();
  });
  return at;
}

function drawList(seen) {
  const { word, part, chosen, row, aside, target } = seen;
  let held = 0;
  row.weights.forEach((weight, key) => (held += aside[key] ? weight : 0));
  const rest = Math.max(row.sum - held, 1e-9);
  const rows = listed(seen);
  const plain = rows.filter((one) => !one.mark).slice(0, Math.max(main.top, 8));
  const others = rows.filter((one) => one.mark).slice(0, 4);
  const most = plain[0]?.most ?? 1;
  const table = make("table");
  const caption = make("caption");
  caption.append(bold(main.labels[word]), ` reads, ${nameOf(main, chosen)}`);
  const head = make("tr");
  const titles = ["word", "", "weight", ...(second ? ["second", "change"] : ["of rest"])];
  for (const title of [...titles, "strongest heads"]) head.append(make("th", "", title));
  const header = make("thead");
  header.append(head);
  const body = make("tbody");
  let shown = 0;
  for (const { label, key, mark, one, two } of [...plain, ...others]) {
    shown += one ?? 0;
    const line = make("tr", mark ? "apart" : "");
    const first = make("td");
    const name = make(key === null ? "span" : "button", "name", label);
    first.append(name);
    const gauge = make("td", "gauge");
    if (mark) gauge.textContent = mark === 1 ? "special" : "sink";
    else
      for (const value of second ? [one, two] : [one]) {
        const bar = make("i");
        bar.style.setProperty("--shade", ((value ?? 0) / most).toFixed(3));
        gauge.append(bar);
      }
    line.append(first, gauge, make("td", "", one === null ? "–" : three(one)));
    if (second) {
      line.append(make("td", "", two === null ? "–" : three(two)));
      const change = one === null || two === null ? "" : (two - one).toFixed(3);
      line.append(make("td", "", change > 0 ? `+${change}` : change.replace("-", "−")));
    } else line.append(make("td", "", mark ? "" : percent(one / rest)));
    const where = make("td");
    if (key !== null) {
      line.classList.toggle("target", key === target);
      line.dataset.key = name.dataset.key = key + part.keys[0];
      name.type = "button";
      name.setAttribute("aria-pressed", state.pin === key + part.keys[0]);
      name.addEventListener("click", () => {
        const number = key + part.keys[0];
        state.pin = state.pin === number ? null : number;
        state.lock = word;
        state.aim = null;
        changed();
      });
      const heads = part.heads.map((_, i) => [linkOf(part, i, word, key), i]);
      heads.sort((a, b) => b[0] - a[0]);
      for (const [value, i] of heads.slice(0, 3)) {
        if (value < 0.005) break;
        const text = `${part.heads[i].join(".")} ${value.toFixed(2)}`;
        where.append(headButton(part, chosen, i, text));
      }
    }
    line.append(where);
    body.append(line);
  }
  table.append(caption, header, body);
  const lost = 1 - row.sum;
  const mass = make("p", "mass", `shown ${percent(shown)} of the mass`);
  if (lost > 0.005) mass.append(` · ${percent(lost)} more goes to a learned sink`);
  if (!second) mass.append(" · of rest: its share without special tokens and sinks");
  const list = byId("list");
  const active = list.contains(document.activeElement) ? document.activeElement : null;
  const again = active && [...list.querySelectorAll("button")].indexOf(active);
  list.replaceChildren(table, mass);
  if (active) list.querySelectorAll("button")[again]?.focus();
}

// ---------------------------------------------------------------- effects

function buildEffects() {
  for (const one of data.effects ?? []) {
    const section = make("section", "effects");
    const title = make("h2");
    if (one.word === null) title.append("effect on the log-probability of ", bold(one.token));
    else title.append("effect on the final vector of ", bold(main.labels[one.word]));
    const table = make("table");
    const head = make("tr");
    for (const said of ["link", "head", "effect", "weight", "weight·‖W_O v‖"])
      head.append(make("th", "", said));
    const header = make("thead");
    header.append(head);
    const body = make("tbody");
    for (const { layer, head: number, from, to, effect, weight, value } of one.links) {
      const line = make("tr");
      const cell = make("td");
      const name = make("button", "name", `${main.labels[from]} → ${main.labels[to]}`);
      name.type = "button";
      name.addEventListener("click", () => {
        const part = main.parts.findIndex((some) => members(some, { layer, head: number }).length);
        state.chosen = { part, layer, head: number };
        state.lock = from;
        state.pin = to;
        state.aim = null;
        reveal();
        scrollTo({ top: 0 });
      });
      cell.append(name);
      const signed = one.word === null && effect > 0 ? "+" : "";
      line.append(
        cell, make("td", "", `${layer}.${number}`), make("td", "", signed + effect.toPrecision(3)),
        make("td", "", three(weight)),
        make("td", "", value === null ? "–" : value.toPrecision(3)),
      );
      body.append(line);
    }
    table.append(header, body);
    const of = one.word === null
      ? `The log-probability is ${one.size.toFixed(3)}; an effect is what cutting ` +
        "the link adds to it."
      : `The vector is ${one.size.toPrecision(3)} long; an effect is the length of what cutting ` +
        `the link changes in it, from ${one.directions} of ${one.width} directions.`;
    const note = `${of} To first order. Weight says where a head reads, effect what the link does ` +
      "to this target, weight·‖W_O v‖ how long a vector it adds; none is truer than another. The " +
      `${one.links.length} links of largest effect; ${one.edges} edges a token were compared.`;
    section.append(title, table, make("p", "mass", note));
    byId("more").append(section);
  }
}
