// A line along the text: the entropy of each token, or how much each is read, in the head shown.

import { default as uPlot } from "./vendor/uplot/uPlot.js";
import { ask } from "./api.js";
import { byId, make, three } from "./shared.js";
import { changed, state } from "./state.js";
import { resolved } from "./profiles.js";
import { darkness } from "./tiles.js";

const HEIGHT = 118;
const SAID = {
  entropy: "entropy of what each token reads, in nats: low is one token read, high is many",
  received: "how much each token is read, summed over all that read it",
};

class Along {
  /** `keep(token, way)` keeps a token; `name(token, what)` is what it is called, once it is known. */
  constructor(about, { keep, name }) {
    Object.assign(this, { about, keep, name, question: null, answer: null, plot: null, drawn: null });
    this.select = byId("along").querySelector("select");
    this.frame = byId("along-line");
    this.said = byId("along-said");
    this.select.addEventListener("change", () => {
      state.along = this.select.value;
      changed();
    });
    this.frame.addEventListener("keydown", (event) => this.typed(event));
    darkness.addEventListener("change", () => this.draw(true));
    new ResizeObserver(() => this.plot?.setSize({ width: Math.max(120, this.frame.clientWidth), height: HEIGHT }))
      .observe(this.frame);
  }

  async refresh() {
    const { r, layer, head, batch } = { r: state.recording, ...state };
    const asked = { r, layer, head, batch, what: state.along };
    const question = JSON.stringify(asked);
    this.select.value = state.along;
    if (question === this.question) return this.draw();
    this.question = question;
    if (!this.answer) this.said.textContent = `reading ${state.along === "entropy" ? "the entropy" : "what is received"}…`;
    try {
      const answer = await ask("along", asked);
      if (this.question !== question) return;
      this.answer = { ...answer, question };
      this.draw();
    } catch (error) {
      if (this.question !== question) return;
      this.answer = null;
      this.tell(`${error.message}.`);
    }
  }

  tell(text) {
    this.plot?.destroy();
    this.plot = this.drawn = null;
    this.said.textContent = text;
  }

  draw(anew = false) {
    if (!this.answer || (this.drawn === this.answer && !anew)) return this.plot?.redraw(false);
    this.drawn = this.answer;
    this.plot?.destroy();
    const { values, most, size } = this.answer;
    this.said.textContent = SAID[state.along] + (size > 1 ? `; a point is ${size.toLocaleString("en")} tokens, pale their largest` : "");
    const style = getComputedStyle(document.documentElement);
    const [line, soft, grid] = ["--arc", "--soft", "--line"].map((name) => resolved(style, name));
    const axis = { stroke: soft, font: "11px system-ui, sans-serif", grid: { stroke: grid, width: 1 }, ticks: { show: false } };
    this.plot = new uPlot({
      width: Math.max(120, this.frame.clientWidth), height: HEIGHT, legend: { show: false }, padding: [8, 8, 0, 0],
      scales: { x: { time: false }, y: { range: (_, low, high) => [Math.min(0, low), high || 1] } },
      axes: [{ ...axis, size: 22, space: 70, grid: { show: false },
        values: (_, ticks) => ticks.map((at) => (Number.isInteger(at) ? at.toLocaleString("en") : "")) },
      { ...axis, size: 40, space: 28 }],
      series: [{}, { stroke: line, width: 0, fill: `color-mix(in srgb, ${line} 22%, transparent)`, points: { show: false } },
        { stroke: line, width: 1.5, points: { show: false } }],
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 6, fill: line } },
      hooks: { setCursor: [() => this.point()], draw: [(plot) => this.mark(plot, soft)] },
    }, [values.map((_, i) => i * size), size > 1 ? most : values.map(() => null), values], this.frame);
    this.plot.over.addEventListener("click", () => this.keepPoint());
  }

  keepPoint() {
    const at = this.plot?.cursor.idx;
    if (at !== null && at !== undefined) this.keep(at * this.answer.size, state.along === "entropy" ? "out" : "in");
  }

  /** Arrows go along the line, Enter keeps the token. */
  typed(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    if (!this.plot || (!by && event.key !== "Enter")) return;
    event.preventDefault();
    if (!by) return this.keepPoint();
    const { values, size } = this.answer;
    const here = this.plot.cursor.idx ?? Math.floor((state.word ?? 0) / size) - by;
    const next = Math.max(0, Math.min(values.length - 1, here + by));
    this.plot.setCursor({ left: this.plot.valToPos(next * size, "x"), top: 10 });
  }

  /** A line where the token that is kept stands. */
  mark(plot, colour) {
    const kept = state.way === (state.along === "entropy" ? "out" : "in") ? state.word : null;
    if (kept === null) return;
    const at = Math.round(plot.valToPos(kept, "x", true));
    plot.ctx.fillStyle = colour;
    plot.ctx.fillRect(at, plot.bbox.top, devicePixelRatio, plot.bbox.height);
  }

  point() {
    const at = this.plot?.cursor.idx;
    if (at === null || at === undefined) return;
    const { values, size } = this.answer;
    const first = at * size;
    const where = size === 1 ? this.name(first, state.along)
      : `${first.toLocaleString("en")}–${(first + size - 1).toLocaleString("en")}`;
    this.said.replaceChildren(make("b", "", where), ` ${three(values[at])}${size > 1 ? " on average" : ""}. Click keeps the token.`);
  }
}

export { Along };
