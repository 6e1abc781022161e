// Layers × heads, coloured by a metric, and the finder that ranks them.

import { ask } from "./api.js";
import { keyed } from "./keyed.js";
import { arrows, byId, make, shade, three } from "./shared.js";
import { changed, state } from "./state.js";

const RANKED = 10;

class Heads {
  constructor(about, segments, failed) {
    Object.assign(this, { about, segments, failed, values: new Map(), cells: new Map(), built: null, filling: null });
    const select = byId("metric");
    for (const { key, title } of about.metrics) this.option(key, title);
    select.addEventListener("change", () => {
      state.metric = select.value;
      changed();
    });
    byId("reads").addEventListener("submit", (event) => {
      event.preventDefault();
      this.findReads();
    });
  }

  option(key, title) {
    const option = make("option", "", title);
    option.value = key;
    byId("metric").append(option);
  }

  get recording() {
    return this.about.recordings[state.recording];
  }

  /** The grid of a recording, empty; its metrics follow layer by layer. */
  build() {
    const name = `${state.recording}.${state.batch}`;
    if (this.built === name) return this.fill(name);
    this.built = name;
    this.values.clear();
    this.cells.clear();
    const grid = byId("grid");
    const { layers } = this.recording;
    const most = Math.max(...layers.map((one) => one.heads));
    grid.classList.toggle("small", most > 16);
    grid.style.setProperty("--cell", most > 16 ? "26px" : most > 12 ? "32px" : "36px");
    const table = make("table");
    const top = make("tr");
    top.append(make("th"));
    for (let head = 0; head < most; head++) top.append(make("th", "", `h${head}`));
    const header = make("thead");
    header.append(top);
    const body = make("tbody");
    const stops = [];
    layers.forEach((one, layer) => {
      const line = make("tr");
      line.append(make("th", "", `${one.kind === "cross" ? "cross" : "layer"} ${one.index}`));
      line.firstChild.title = one.name;
      if (!one.pattern) {
        const cell = make("td", "none", `nothing to show: ${one.reason}`);
        cell.title = one.reason;
        cell.colSpan = most;
        line.append(cell);
      } else stops.push(this.line(line, layer, one.heads));
      body.append(line);
    });
    table.append(header, body);
    grid.replaceChildren(table);
    if (stops.length) stops[0][0].tabIndex = 0;
    if (!grid.dataset.keys) {
      grid.dataset.keys = "";
      this.stops = stops;
      arrows(grid, this.stops);
    } else this.stops.splice(0, this.stops.length, ...stops);
    this.fill(name);
  }

  /** Ask for the metrics of the layers that are missing, one after another. */
  async fill(name) {
    if (this.filling === name) return;
    this.filling = name;
    const { layers } = this.recording;
    for (let layer = 0; layer < layers.length && this.built === name; layer++) {
      if (!layers[layer].pattern || this.values.has(layer)) continue;
      try {
        const answer = await ask("overview", { r: state.recording, batch: state.batch, layer });
        if (this.built !== name) return;
        this.values.set(layer, answer);
      } catch (error) {
        this.filling = null; // asked again when something else is chosen
        this.draw();
        return this.failed(error);
      }
      this.draw();
    }
  }

  line(line, layer, heads) {
    return Array.from({ length: heads }, (_, head) => {
      const button = make("button");
      button.type = "button";
      button.tabIndex = -1;
      button.dataset.head = `${layer}.${head}`;
      button.addEventListener("click", () => {
        [state.layer, state.head] = [layer, head];
        changed();
      });
      button.addEventListener("focus", () => {
        for (const some of this.stops.flat()) some.tabIndex = -1;
        button.tabIndex = 0;
      });
      const cell = make("td");
      cell.append(button);
      line.append(cell);
      this.cells.set(`${layer}.${head}`, button);
      return button;
    });
  }

  metric() {
    return this.about.metrics.find((one) => one.key === state.metric)
      ?? (state.metric === "segment" ? { key: "segment", share: true, said: this.segments.said() } : null)
      ?? { key: "reads", share: true, said: this.readsSaid ?? "reads a word: search below" };
  }

  value(layer, head) {
    if (state.metric === "reads") return this.read?.values[layer]?.[head] ?? null;
    if (state.metric === "segment") return this.segments.value(layer, head);
    return this.values.get(layer)?.[state.metric]?.[head] ?? null;
  }

  draw() {
    if (state.metric === "segment" && state.given && !byId("metric").querySelector("[value=segment]"))
      this.option("segment", "a segment");
    if ((state.metric === "reads" && !this.read && !this.searching) || (state.metric === "segment" && !state.given)) state.metric = this.about.metrics[0].key;
    const metric = this.metric();
    byId("metric").value = state.metric;
    byId("metric-title").textContent = metric.said + (metric.share ? ", %" : "");
    let most = metric.share ? 1 : 1e-9;
    const all = [];
    for (const [name, button] of this.cells) {
      const [layer, head] = name.split(".").map(Number);
      const value = this.value(layer, head);
      all.push([value, layer, head, button]);
      if (!metric.share && value !== null) most = Math.max(most, value);
    }
    // One word's or segment's share is small in most heads: the colour says which have most of it
    if (["reads", "segment"].includes(metric.key)) most = Math.max(0.02, ...all.map(([value]) => value ?? 0));
    for (const [value, layer, head, button] of all) {
      button.style.setProperty("--shade", (0.95 * shade((value ?? 0) / most)).toFixed(3));
      const said = value === null ? ""
        : !metric.share ? (value >= 1000 ? `${Math.round(value / 1000)}k`
          : value.toFixed(value >= 100 ? 0 : 1))
        : value < 0.005 ? "·" : String(Math.round(value * 100));
      button.textContent = said;
      if (value === null) delete button.dataset.value;
      else button.dataset.value = value;
      const words = `head ${layer}.${head}` + (value === null ? "" : ` ${metric.share ? three(value) : value.toFixed(2)}`);
      button.title = words;
      button.setAttribute("aria-label", words);
      button.setAttribute("aria-pressed", layer === state.layer && head === state.head);
    }
    this.rank(all, metric);
    byId("ranked").parentNode.hidden = !all.some(([value]) => value !== null);
    const of = this.recording.layers[state.layer].q_len;
    const sampled = this.about.sampled;
    const readable = this.recording.layers.filter((one) => one.pattern).length;
    byId("grid").setAttribute("aria-busy", this.filling !== null && all.some(([value]) => value === null));
    byId("metric-note").textContent = ["reads", "segment"].includes(state.metric) ? ""
      : this.values.size < readable ? this.filling === null ? "some layers could not be read: see above"
        : `reading heads: ${this.values.size} of ${readable} layers…`
      : !this.values.get(state.layer)?.sampled.includes(state.metric) || of <= sampled ? ""
        : `means over ${sampled} tokens spread over the ${of.toLocaleString("en")}`;
  }

  rank(all, metric) {
    const best = all.filter(([value]) => value !== null).sort((a, b) => b[0] - a[0]).slice(0, RANKED);
    const choose = ([, layer, head]) => {
      const button = make("button", "at");
      button.type = "button";
      button.dataset.ranked = `${layer}.${head}`;
      button.addEventListener("click", () => {
        [state.layer, state.head] = [layer, head];
        changed();
      });
      return button;
    };
    keyed(byId("ranked"), best, ([, layer, head]) => `${layer}.${head}`, choose, (button, [value, layer, head]) => {
      button.textContent = `${layer}.${head} ${!metric.share ? value.toFixed(1) : value < 0.005 ? "<.01" : value.toFixed(2)}`;
    });
  }

  /** What was typed, as what is chosen. */
  findReads() {
    const [source, target] = ["source", "target"].map((name) => byId("reads").elements[name].value.trim());
    if (!source || !target) {
      byId("reads-said").textContent = "give both words: the one that reads, and the one read";
      return;
    }
    [state.source, state.target, state.metric] = [source, target, "reads"];
    this.searched = null; // the best head is chosen, once it is known
    this.best = true;
    changed();
  }

  /** Ask how much heads read the word that is chosen, where that has changed. */
  async refresh() {
    const { source, target } = state;
    const question = source && target ? JSON.stringify([state.recording, state.batch, source, target]) : null;
    if (question === this.searched) return;
    [this.searched, this.searching] = [question, question !== null];
    const fields = byId("reads").elements;
    if (source && target) [fields.source.value, fields.target.value] = [source, target];
    const said = byId("reads-said");
    this.read = null;
    said.textContent = question ? "searching all heads…" : "";
    if (!question) return;
    if (!byId("metric").querySelector("[value=reads]")) this.option("reads", "reads a word");
    try {
      const read = await ask("reads", { r: state.recording, batch: state.batch, source, target });
      if (this.searched !== question) return;
      this.read = read;
    } catch (error) {
      if (this.searched === question) said.textContent = `${error.message.replace(/\.$/, "")}.`;
    } finally {
      if (this.searched === question) this.searching = false;
    }
    if (this.searched !== question || !this.read) return changed();
    const { sources, targets } = this.read;
    this.readsSaid = `how much “${source}” reads “${target}” in each head`;
    said.textContent = `mean over ${sources.length} × “${source}”, summed over ` +
      `${targets.length} × “${target}”`;
    if (this.best) this.takeBest(sources);
    changed();
  }

  /** Choose the head that reads it most, and the last place of the word that reads. */
  takeBest(sources) {
    this.best = false;
    let best = [-1, state.layer, state.head];
    this.read.values.forEach((heads, layer) => heads?.forEach((value, head) => {
      if (value > best[0]) best = [value, layer, head];
    }));
    [, state.layer, state.head] = best;
    if (sources.length) [state.word, state.way] = [sources.at(-1), "out"];
  }
}

export { Heads };
