// The text: words wrapped, drawn only where they are in sight, shaded by what one of them reads.

import "./process.js";
import { Virtualizer, elementScroll, observeElementOffset, observeElementRect }
  from "./vendor/virtual-core/index.js";
import { visible } from "./api.js";
import { keyed } from "./keyed.js";
import { drawFan, make, shade, short } from "./shared.js";
import { state } from "./state.js";

const BLOCK = 128; // tokens that are laid out together
const LARGE = 60; // a text of up to so many tokens is set large
const CHIPS = 5; // at each edge

class Pane {
  /** Tokens start … stop − 1 of `tokens`, in `frame`. `does`: {hover, keep}. */
  constructor(frame, tokens, start, stop, does, title) {
    Object.assign(this, { frame, tokens, start, stop, does, room: stop - start > LARGE ? 22 : 40 });
    this.section = make("section", "view pane");
    this.section.classList.toggle("large", stop - start <= LARGE);
    if (title) this.section.append(make("h2", "", title));
    this.scroll = make("div", "scroll");
    this.scroll.tabIndex = 0;
    this.scroll.setAttribute("role", "application");
    this.scroll.setAttribute("aria-label", `${title || "The text"}: arrows move, Enter keeps a token`);
    this.paper = make("div", "paper");
    this.fan = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.fan.setAttribute("class", "fan");
    this.fan.setAttribute("aria-hidden", "true");
    this.paper.append(this.fan);
    this.scroll.append(this.paper);
    [this.above, this.below] = [make("div", "chips above"), make("div", "chips below")];
    this.strip = make("canvas", "strip");
    this.strip.title = "where along the text the weights lie; click to go there";
    const middle = make("div", "middle");
    middle.append(this.above, this.scroll, this.below, this.strip);
    this.section.append(middle);
    frame.append(this.section);
    this.blocks = new Map();
    this.cursor = null;
    this.shown = null;
    this.listen();
    this.virtual = new Virtualizer({
      count: Math.ceil((stop - start) / BLOCK),
      getScrollElement: () => this.scroll,
      estimateSize: () => this.guess(),
      observeElementRect,
      observeElementOffset,
      scrollToFn: elementScroll,
      onChange: () => this.render(),
      overscan: 2,
    });
    this.end = this.virtual._didMount();
    this.virtual._willUpdate();
    this.render();
  }

  /** About how tall a block is, before it has been laid out. */
  guess() {
    const width = Math.max(200, this.scroll.clientWidth - 80);
    return Math.ceil((BLOCK * 5.2 * 7.6) / width) * 33 + 14;
  }

  remove() {
    this.end?.();
    this.section.remove();
  }

  has(i) {
    return i >= this.start && i < this.stop;
  }

  render() {
    const items = this.virtual.getVirtualItems();
    this.paper.style.height = `${this.virtual.getTotalSize()}px`;
    const seen = new Set(items.map((item) => item.index));
    for (const [index, block] of this.blocks)
      if (!seen.has(index)) {
        block.element.remove();
        this.blocks.delete(index);
      }
    for (const { index, start } of items) {
      let block = this.blocks.get(index);
      if (!block) {
        block = this.build(index);
        this.blocks.set(index, block);
        this.paper.append(block.element);
        this.virtual.measureElement(block.element);
      }
      block.element.style.transform = `translateY(${start}px)`;
    }
    this.shadeWords();
  }

  build(index) {
    const element = make("div", "block");
    element.dataset.index = index;
    const first = this.start + index * BLOCK;
    const last = Math.min(this.stop, first + BLOCK);
    const block = { element, words: new Map() };
    if (this.stop - this.start > BLOCK) element.append(make("span", "number", first.toLocaleString("en")));
    const text = make("div", "text");
    text.dir = "auto";
    element.append(text);
    const fill = () => {
      text.replaceChildren();
      for (let i = first; i < last; i++) if (this.tokens.first(i) === i) this.word(block, text, i);
    };
    if (this.tokens.piece(first) !== null && this.tokens.piece(last - 1) !== null) fill();
    else {
      text.append(make("span", "untold", "…"));
      this.tokens.need(first, last).then(() => {
        fill();
        this.render();
      }, this.does.failed);
    }
    return block;
  }

  word(block, text, i) {
    const piece = this.tokens.piece(i);
    const bare = piece.trim();
    this.between(text, this.tokens.gap(i));
    if (bare) this.between(text, piece.slice(0, piece.indexOf(bare)));
    const word = make("span", "word", bare ? visible(bare) : this.tokens.name(i));
    if (!bare) word.classList.add("blank");
    if (this.does.special.has(i) && this.tokens.side === "text") word.classList.add("special");
    word.dataset.kind = word.className;
    word.dataset.word = i;
    block.words.set(i, word);
    text.append(word);
    if (!bare && piece.includes("\n")) text.append(make("br"));
  }

  /** What lies before a token: a new line, a space, or characters that have no token. */
  between(text, gap) {
    const said = gap.trim();
    if (said) text.append(make("span", "untold", visible(said)));
    if (gap.includes("\n")) text.append(make("br"));
    else if (gap && (!said || /\s$/.test(gap))) text.append(" ");
  }

  element(i) {
    i = this.tokens.first(i);
    return this.blocks.get(Math.floor((i - this.start) / BLOCK))?.words.get(i);
  }

  listen() {
    const at = (event) => {
      const word = event.target.closest?.(".word");
      return word ? Number(word.dataset.word) : null;
    };
    this.scroll.addEventListener("pointerover", (event) => this.does.hover(at(event), this));
    this.scroll.addEventListener("pointerleave", () => this.does.hover(null, this));
    this.scroll.addEventListener("click", (event) => at(event) !== null && this.does.keep(at(event), this));
    this.scroll.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) {
        const here = this.cursor ?? state.word ?? this.firstInSight() - by;
        let next = here + by;
        while (next < this.stop && this.tokens.first(next) !== next) next += by;
        this.cursor = this.tokens.first(Math.max(this.start, Math.min(this.stop - 1, next)));
        if (!this.inSight(this.cursor)) this.goTo(this.cursor);
        this.does.hover(this.cursor, this);
      } else if ((event.key === "Enter" || event.key === " ") && this.cursor !== null)
        this.does.keep(this.cursor, this);
      else return;
      event.preventDefault();
    });
    this.strip.addEventListener("click", (event) => {
      const box = this.strip.getBoundingClientRect();
      const share = (event.clientY - box.top) / box.height;
      this.goTo(this.start + Math.floor(share * (this.stop - this.start)));
    });
    this.scroll.addEventListener("scroll", () => this.edges());
  }

  firstInSight() {
    const top = this.scroll.scrollTop;
    const item = this.virtual.getVirtualItems().find((one) => one.start + one.size > top);
    return this.start + (item?.index ?? 0) * BLOCK;
  }

  inSight(i) {
    const box = this.element(i)?.getBoundingClientRect();
    const frame = this.scroll.getBoundingClientRect();
    return box ? box.bottom > frame.top && box.top < frame.bottom : false;
  }

  /** Scroll to a token: to its block, and, once that is laid out, to the word itself. */
  goTo(i) {
    if (!this.has(i)) return;
    const near = () => this.virtual.scrollToIndex(Math.floor((i - this.start) / BLOCK), { align: "start" });
    const settle = (turns) => {
      if (this.target !== i) return; // another one is wanted by now
      const word = this.element(i);
      if (!word) {
        near();
        return turns && requestAnimationFrame(() => settle(turns - 1));
      }
      const [box, frame] = [word.getBoundingClientRect(), this.scroll.getBoundingClientRect()];
      if (box.top < frame.top + 30 || box.bottom > frame.bottom - 30)
        this.scroll.scrollTop += box.top - frame.top - frame.height / 3;
      if (turns) requestAnimationFrame(() => settle(turns - 1));
    };
    this.target = i;
    near();
    this.tokens.need(i, i + 1).then(() => requestAnimationFrame(() => settle(16)), this.does.failed);
  }

  /** `shown`: {focus, items [[token, weight]], whole, bins, bin, locked}; null: nothing. */
  show(shown) {
    this.shown = shown;
    this.shadeWords();
  }

  shadeWords() {
    for (const { words } of this.blocks.values())
      for (const word of words.values()) {
        if (!word.touched) continue;
        word.className = word.dataset.kind;
        word.style.removeProperty("--shade");
        delete word.dataset.label;
        delete word.dataset.weight;
        word.touched = false;
      }
    const { shown } = this;
    if (shown) {
      const labelled = new Set(shown.items.slice(0, 14).map(([i]) => i));
      for (const [i, weight] of shown.items) {
        const word = this.has(i) && this.element(i);
        if (!word) continue;
        word.touched = true;
        word.style.setProperty("--shade", (0.9 * shade(weight / (shown.most ?? 1))).toFixed(3));
        word.dataset.weight = weight.toPrecision(6);
        if (labelled.has(i) && weight >= 0.02) word.dataset.label = short(weight);
      }
      const focus = shown.focusHere && this.element(shown.focus);
      if (focus) {
        focus.touched = true;
        focus.classList.add("focus");
        focus.classList.toggle("locked", shown.locked);
      }
    }
    this.edges();
  }

  /** What depends on where the text is scrolled to: lines, chips at the edges, the strip. */
  edges() {
    if (this.edging) return;
    this.edging = requestAnimationFrame(() => {
      this.edging = null;
      this.drawLines();
      this.drawChips();
      this.drawStrip();
    });
  }

  drawLines() {
    const { shown } = this;
    const from = shown?.focusHere && this.element(shown.focus);
    if (!from) return this.fan.replaceChildren();
    const ends = shown.items.slice(0, 14).filter(([i, weight]) => weight >= 0.02 && i !== shown.focus)
      .map(([i, weight]) => [weight, this.has(i) && this.element(i)]).filter(([, word]) => word);
    drawFan(this, from, ends);
  }

  drawChips() {
    const { shown } = this;
    const edges = { above: [], below: [] };
    const frame = this.scroll.getBoundingClientRect();
    const first = this.firstInSight();
    for (const [i, weight] of shown?.items ?? []) {
      if (!this.has(i) || this.inSight(i)) continue;
      const box = this.element(i)?.getBoundingClientRect();
      edges[(box ? box.bottom <= frame.top : i < first) ? "above" : "below"].push([i, weight]);
    }
    for (const [side, targets] of Object.entries(edges)) {
      const sign = side === "above" ? "↑" : "↓";
      const rest = targets.slice(CHIPS).reduce((total, [, weight]) => total + weight, 0);
      const chips = targets.slice(0, CHIPS);
      if (targets.length > CHIPS) chips.push([null, rest]);
      keyed(this[side], chips, ([i]) => i ?? "rest", ([i]) => this.chip(i), (chip, [i, weight]) => {
        if (i === null) chip.textContent = `${targets.length - CHIPS} more ${rest.toFixed(2)}`;
        else chip.replaceChildren(`${sign} ${i.toLocaleString("en")} `, make("b", "", this.tokens.name(i, 18)),
          ` ${weight < 0.005 ? "<.01" : weight.toFixed(2)}`);
      });
    }
    const unnamed = Object.values(edges).flatMap((list) => list.slice(0, CHIPS).map(([i]) => i))
      .filter((i) => this.tokens.piece(i) === null);
    if (unnamed.length)
      this.tokens.needEach(unnamed).then(() => this.edges(), this.does.failed);
  }

  /** What stands at the edge for a token out of sight, and goes there; null: for all others. */
  chip(i) {
    const chip = make(i === null ? "span" : "button", "chip");
    if (i === null) return chip;
    chip.type = "button";
    chip.dataset.to = i;
    chip.addEventListener("click", () => this.goTo(i));
    return chip;
  }

  drawStrip() {
    const { clientWidth: width, clientHeight: height } = this.strip;
    if (!width) return;
    const scale = devicePixelRatio;
    [this.strip.width, this.strip.height] = [width * scale, height * scale];
    const context = this.strip.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(this.strip);
    const length = this.stop - this.start;
    const whole = this.scroll.scrollHeight || 1;
    context.fillStyle = style.getPropertyValue("border-left-color");
    context.fillRect(0, (this.scroll.scrollTop / whole) * height, width,
      Math.max(3, (this.scroll.clientHeight / whole) * height));
    context.fillStyle = style.color;
    const { shown } = this;
    if (!shown) return;
    const most = Math.max(1e-9, ...shown.bins);
    shown.bins.forEach((value, b) => {
      const at = ((b * shown.bin - this.start) / length) * height;
      if (value <= 0 || at + (shown.bin / length) * height < 0 || at > height) return;
      context.globalAlpha = 0.35 + 0.65 * shade(value / most);
      context.fillRect(0, at, Math.max(2, width * shade(value / most)),
        Math.max(1.5, (shown.bin / length) * height));
    });
    context.globalAlpha = 1;
    if (shown.focusHere && this.has(shown.focus)) {
      context.fillStyle = style.outlineColor;
      context.fillRect(0, ((shown.focus - this.start) / length) * height - 1, width, 2.5);
    }
  }
}

export { BLOCK, Pane };
