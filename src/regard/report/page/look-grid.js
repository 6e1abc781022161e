// ---------------------------------------------------------------- the grid of heads

function values(metric, seen, of) {
  const { word, part, target, chosen, second: other } = seen;
  const same = of === part;
  if (metric === "change")
    return of.heads.map(([layer, head], i) => {
      if (!same || !other || other.target === null) return null;
      const at = members(other.part, { layer, head })[0];
      if (at === undefined) return null;
      return linkOf(other.part, at, other.word, other.target) - linkOf(of, i, word, target);
    });
  if (metric === "link" || metric === "best")
    return of.heads.map(([layer, head], i) => {
      if (!reads(of, word)) return null;
      if (metric === "link") return same ? linkOf(of, i, word, target) : null;
      const one = { part: chosen.part, layer, head };
      const aside = apart(main, of, one);
      let best = 0;
      rowOf(of, one, word).weights.forEach((weight, key) => {
        const own = of.same && key + of.keys[0] === word;
        if (!aside[key] && !own && weight > best) best = weight;
      });
      return best;
    });
  return of.metrics[metric] ?? of.heads.map(() => null);
}

function drawGrid(seen) {
  const { word, part, chosen, target } = seen;
  const metric = state.metric;
  const title = byId("metric-title");
  if (metric === "link" || metric === "change")
    title.replaceChildren(
      metric === "link" ? "weight from " : "change of the weight from ",
      bold(main.labels[word]), " to ", bold(main.labels[target + part.keys[0]]),
      " in each head, %",
    );
  else if (metric === "best")
    title.replaceChildren(
      "weight of the word that ", bold(main.labels[word]),
      " reads most in each head, itself, special tokens and sinks apart, %",
    );
  else title.textContent = SAID[metric] + (metric in { distance: 0, entropy: 0 } ? "" : ", %");
  const all = main.parts.map((some) => values(metric, seen, some));
  const scaled = metric === "distance" || metric === "entropy";
  const most = scaled ? Math.max(1e-9, ...all.flat().map((value) => value ?? 0)) : 1;
  main.parts.forEach((some, number) => {
    const marked = number === chosen.part && chosen.layer !== null;
    const inside = new Set(marked ? members(some, chosen) : []);
    some.heads.forEach(([layer, head], i) => {
      const cell = some.cells[i];
      const value = all[number][i];
      const size = Math.abs(value ?? 0);
      cell.style.setProperty("--shade", (0.95 * shade(size / most)).toFixed(3));
      cell.classList.toggle("minus", value < 0);
      const said = value === null ? "" : scaled ? value.toFixed(1)
        : size < 0.005 ? "·" : String(Math.round(value * 100)).replace("-", "−");
      if (cell.dataset.said !== said) {
        cell.dataset.said = said;
        cell.textContent = main.wide ? said : "";
      }
      if (value === null) delete cell.dataset.value;
      else cell.dataset.value = value.toFixed(4);
      const text = value === null ? "" : scaled ? value.toFixed(2)
        : value < 0 ? value.toFixed(3) : three(value);
      cell.title = `head ${layer}.${head}${text && ` ${text}`}`;
      cell.setAttribute("aria-label", cell.title);
      const { part: p, layer: l, head: h } = state.chosen;
      cell.setAttribute("aria-pressed", p === number && l === layer && h === head);
      cell.classList.toggle("in", inside.has(i));
    });
    for (const [button, one] of some.means) {
      const { part: p, layer: l, head: h } = state.chosen;
      button.setAttribute("aria-pressed", h === null && p === one.part && l === one.layer);
    }
  });
  byId("metric-note").textContent =
    part.listed && metric === "link"
      ? `· also where the word is not among the ${part.listed} read most` : "";
}

/** Cells as large as lets the heads stand side by side; numbers in them where they are legible. */
function sizeGrid() {
  const most = Math.max(...main.parts.map((part) => new Set(part.heads.map(([, h]) => h)).size));
  const side = 14 + Math.max(...[...byId("grid").querySelectorAll("tbody th")].map(
    (header) => (header.firstElementChild ?? header).getBoundingClientRect().width));
  const tools = byId("tools");
  const columns = getComputedStyle(tools).gridTemplateColumns.split(" ").length;
  const whole = tools.clientWidth - (columns > 1 ? 420 : 0); // the list stands beside: look.css
  const room = Math.min(620, whole - side) - 2 * most;
  const size = Math.max(9, Math.min(34, Math.floor(room / most)));
  main.wide = size >= 19;
  byId("grid").style.setProperty("--cell", `${size}px`);
  byId("grid").classList.toggle("small", size < 27);
  for (const header of byId("grid").querySelectorAll("thead th[data-column]")) {
    const head = Number(header.dataset.column);
    header.textContent = main.wide ? `${size < 27 ? "" : "h"}${head}` : head % 5 ? "" : head;
  }
  for (const cell of byId("grid").querySelectorAll("td button")) delete cell.dataset.said;
}

function buildGrid() {
  const grid = byId("grid");
  const stops = [];
  const choose = (button, chosen) => {
    button.type = "button";
    button.tabIndex = -1;
    button.addEventListener("pointerenter", () => {
      state.preview = chosen;
      changed();
    });
    button.addEventListener("pointerleave", () => {
      state.preview = null;
      changed();
    });
    button.addEventListener("focus", () => {
      for (const line of stops) for (const stop of line) stop.tabIndex = -1;
      button.tabIndex = 0;
      if (!button.matches(":focus-visible")) return;
      state.preview = chosen;
      changed();
    });
    button.addEventListener("blur", () => {
      state.preview = null;
      changed();
    });
    button.addEventListener("click", () => {
      state.chosen = chosen;
      state.preview = null;
      changed();
    });
    return button;
  };
  main.parts.forEach((part, number) => {
    const table = make("table");
    if (part.kind !== "self") table.append(make("caption", "", part.kind));
    part.cells = [];
    part.means = [];
    const heads = [...new Set(part.heads.map(([, head]) => head))].sort((a, b) => a - b);
    const top = make("tr");
    const corner = make("th");
    const everything = { part: number, layer: null, head: null };
    const all = choose(make("button", "", "all heads"), everything);
    all.title = "the mean of all heads";
    corner.append(all);
    part.means.push([all, everything]);
    top.append(corner);
    stops.push([all]);
    heads.forEach((head) => {
      const header = make("th");
      header.dataset.column = head;
      top.append(header);
    });
    const headers = make("thead");
    headers.append(top);
    const body = make("tbody");
    const blanks = part.kind === "self" ? main.blanks : [];
    const layers = [...part.layers, ...blanks.map((blank) => blank.layer)].sort((a, b) => a - b);
    for (const layer of layers) {
      const line = make("tr");
      const header = make("th");
      line.append(header);
      body.append(line);
      const blank = blanks.find((some) => some.layer === layer);
      if (blank) {
        header.textContent = `layer ${layer}`;
        const cell = make("td", "none", "no pattern");
        cell.title = blank.reason;
        cell.colSpan = heads.length;
        line.append(cell);
        continue;
      }
      const chosen = { part: number, layer, head: null };
      const name = choose(make("button", "", `layer ${layer}`), chosen);
      name.title = `the mean of layer ${layer}'s heads: ${part.names[layer]}`;
      header.append(name);
      part.means.push([name, chosen]);
      const stopsHere = [name];
      for (const head of heads) {
        const cell = make("td");
        const at = part.heads.findIndex(([l, h]) => l === layer && h === head);
        if (at >= 0) {
          const button = choose(make("button"), { part: number, layer, head });
          button.dataset.head = `${layer}.${head}`;
          part.cells[at] = button;
          cell.append(button);
          stopsHere.push(button);
        }
        line.append(cell);
      }
      stops.push(stopsHere);
    }
    table.append(headers, body);
    grid.append(table);
  });
  stops[0][0].tabIndex = 0;
  arrows(grid, stops);
  const select = byId("metric");
  for (const [key, said] of Object.entries(METRICS)) {
    if (!SAID[key] || main.parts.some((part) => part.metrics[key])) {
      const option = make("option", "", said);
      option.value = key;
      select.append(option);
    }
  }
  select.addEventListener("change", () => {
    state.metric = select.value;
    changed();
  });
}
