// The text: words wrapped, drawn only where they are in sight, shaded by what one of them reads.

import "./process.js";
import { Virtualizer, elementScroll, observeElementOffset, observeElementRect }
  from "./vendor/virtual-core/index.js";
import { visible } from "./api.js";
import { drawChips, drawLines, drawStrip } from "./edges.js";
import { Flow, LINE } from "./flow.js";
import { brief } from "./measure.js";
import { make, shade } from "./shared.js";
import { state } from "./state.js";

const BLOCK = 128; // tokens that are laid out together
const LARGE = 60; // a text of up to so many tokens is set large
const LONGEST = 200; // characters of a word that are drawn

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
    this.flow = new Flow(this);
    this.stood = null; // the first word in sight, once the text was scrolled
    this.cursor = null; // where the keyboard stands
    this.shown = null;
    this.listen();
    this.virtual = new Virtualizer({
      count: Math.ceil((stop - start) / BLOCK),
      getScrollElement: () => this.scroll,
      estimateSize: (index) => this.guess(index),
      measureElement: (element) => this.size(Number(element.dataset.index)),
      paddingStart: this.section.classList.contains("large") ? 0 : 8,
      paddingEnd: this.section.classList.contains("large") ? 0 : 24, // a label stands below the last line
      observeElementRect,
      observeElementOffset,
      scrollToFn: elementScroll,
      onChange: () => this.render(),
      overscan: 2,
    });
    this.end = this.virtual._didMount();
    this.virtual._willUpdate();
    this.render();
    this.width = this.paper.clientWidth;
    this.watch = new ResizeObserver(() => this.resized());
    this.watch.observe(this.paper);
  }

  /** Lay the text out anew where it got another width; what was in sight stays there. */
  resized() {
    const width = this.paper.clientWidth;
    if (!width) return; // hidden
    if (width === this.width) return this.render();
    this.width = width;
    const first = this.stood;
    this.flow.forget();
    for (const { element } of this.blocks.values()) element.remove();
    this.blocks.clear();
    this.virtual.measure();
    this.render();
    if (first !== null) this.goTo(first, 0);
  }

  /** About how tall a block is, before it has been laid out. */
  guess(index) {
    const width = Math.max(200, this.scroll.clientWidth - 80);
    const [first, last] = this.range(index);
    return Math.ceil(((last - first) * 5.2 * 7.6) / width) * LINE;
  }

  /** How far below a block the next one begins: on its last line, where the text flows on. */
  size(index) {
    const block = this.blocks.get(index);
    if (block?.words.size && block.element.clientWidth) block.size = this.flow.size(index, block);
    return block?.size ?? this.guess(index);
  }

  remove() {
    this.end?.();
    this.watch.disconnect();
    this.section.remove();
  }

  has(i) {
    return i >= this.start && i < this.stop;
  }

  /** Draw the blocks in sight. What is learned of their heights meanwhile moves those below. */
  render() {
    this.again = true;
    if (this.rendering) return;
    this.rendering = true;
    while (this.again) {
      this.again = false;
      this.place(this.virtual.getVirtualItems());
    }
    this.rendering = false;
    this.shadeWords();
  }

  place(items) {
    this.paper.style.height = `${this.virtual.getTotalSize()}px`;
    const seen = new Set(items.map((item) => item.index));
    for (const [index, block] of this.blocks)
      if (!seen.has(index)) {
        block.element.remove();
        this.blocks.delete(index);
      }
    for (const { index, start } of items) {
      const block = this.blocks.get(index) ?? this.build(index);
      block.element.style.transform = `translateY(${start}px)`;
    }
  }

  /** A block in its place, its words as soon as they are there. */
  build(index) {
    const block = this.frameOf(index);
    const [first, last] = this.range(index);
    this.blocks.set(index, block);
    this.paper.append(block.element);
    const fill = () => {
      if (this.blocks.get(index) !== block) return;
      if (!this.paper.clientWidth) { // hidden by now: once it is shown
        this.blocks.delete(index);
        return block.element.remove();
      }
      this.flow.fill(index, block);
      if (this.blocks.has(index - 1)) this.virtual.resizeItem(index - 1, this.size(index - 1));
      this.virtual.resizeItem(index, this.size(index));
    };
    const before = this.flow.from(index); // what is before says where it begins
    if (this.tokens.loaded(before, last)) fill();
    else {
      block.text.append(make("span", "untold", "…"));
      this.tokens.need(before, last).then(() => {
        fill();
        this.render();
      }, this.does.failed);
    }
    this.virtual.measureElement(block.element);
    return block;
  }

  range(index) {
    const first = this.start + index * BLOCK;
    return [first, Math.min(this.stop, first + BLOCK)];
  }

  /** A block without its words. */
  frameOf(index) {
    const element = make("div", "block");
    element.dataset.index = index;
    const number = make("span", "number", this.range(index)[0].toLocaleString("en"));
    if (this.stop - this.start > BLOCK) element.append(number);
    const text = make("div", "text");
    element.append(text);
    return { element, text, number, words: new Map() };
  }

  /** Its words. */
  put(index, block) {
    const [first, last] = this.range(index);
    for (let i = first; i < last; i++) if (this.tokens.first(i) === i) this.word(block, block.text, i);
  }

  word(block, text, i) {
    const piece = this.tokens.piece(i);
    const bare = piece.trim();
    this.between(text, this.tokens.gap(i));
    if (bare) this.between(text, piece.slice(0, piece.indexOf(bare)));
    const characters = bare.length > LONGEST ? [...bare] : [];
    const long = characters.length > LONGEST;
    const word = make("span", "word",
      long ? visible(characters.slice(0, LONGEST).join("")) : bare ? visible(bare) : this.tokens.name(i));
    if (long) word.append(make("small", "more", `… ${(characters.length - LONGEST).toLocaleString("en")} more characters`));
    if (!bare) word.classList.add("blank");
    if (this.does.special.has(i) && this.tokens.side === "text") word.classList.add("special");
    if (this.hits?.size) this.markWord(word, i);
    word.dataset.kind = word.className;
    word.dataset.word = i;
    block.words.set(i, word);
    text.append(word);
    if (!bare && piece.includes("\n")) text.append(make("br"));
  }

  /** Mark the words that hold one of these tokens. */
  mark(hits) {
    this.hits = hits;
    this.edges();
    for (const { words } of this.blocks.values()) for (const [i, word] of words) this.markWord(word, i);
  }

  markWord(word, i) {
    let found = false;
    for (let j = i; j < this.stop && this.tokens.first(j) === i; j++) found ||= this.hits.has(j);
    word.toggleAttribute("data-hit", found);
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
    this.scroll.addEventListener("pointerover", (event) => {
      this.cursor = null;
      this.does.hover(at(event), this);
    });
    this.scroll.addEventListener("pointerleave", () => this.does.hover(null, this));
    this.scroll.addEventListener("click", (event) => at(event) !== null && this.does.keep(at(event), this));
    this.scroll.addEventListener("keydown", (event) => {
      const here = this.cursor ?? (this.shown?.focusHere ? this.shown.focus : null);
      const next = this.step(event.key, here);
      if (next !== null) {
        this.cursor = next;
        if (!this.inSight(next)) this.goTo(next);
        this.does.hover(next, this);
        this.shadeWords();
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
    this.scroll.addEventListener("scroll", () => {
      this.edges();
      clearTimeout(this.resting);
      this.resting = setTimeout(() => {
        this.stood = this.scroll.scrollTop > 4 ? this.topWord() : null;
        this.does.stands(this);
      }, 200);
    });
  }

  /** The word that an arrow key leads to; null for other keys. */
  step(key, here) {
    const across = { ArrowLeft: -1, ArrowRight: 1 }[key];
    const down = { ArrowUp: -1, ArrowDown: 1 }[key];
    if (!across && !down) return null;
    if (here === null || !this.has(here)) return this.topWord();
    if (down) return this.beside(here, down) ?? here;
    let next = here + across;
    while (next < this.stop && this.tokens.first(next) !== next) next += across;
    return this.tokens.first(Math.max(this.start, Math.min(this.stop - 1, next)));
  }

  /** The word above (−1) or below (1) another. */
  beside(i, down) {
    const from = this.element(i)?.getBoundingClientRect();
    let best = null;
    for (const { words } of from ? this.blocks.values() : [])
      for (const [other, word] of words) {
        const box = word.getBoundingClientRect();
        const lines = Math.round((down * (box.top - from.top)) / LINE);
        const far = lines * 1e4 + Math.abs(box.left + box.width / 2 - from.left - from.width / 2);
        if (lines > 0 && (!best || far < best.far)) best = { far, other };
      }
    return best && best.other;
  }

  /** The first word in sight; null where none is. */
  topWord() {
    const { top } = this.scroll.getBoundingClientRect();
    let best = null;
    for (const { words } of this.blocks.values())
      for (const [i, word] of words)
        if ((best === null || i < best) && word.getBoundingClientRect().top >= top) best = i;
    return best;
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

  /** Scroll to a token: to its block, and, once that is laid out, to the word itself. Where it is
   * to stand is a share of the height; without one it may stay where it is. */
  goTo(i, share = null) {
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
      const strays = share === null ? box.top < frame.top + 30 || box.bottom > frame.bottom - 30
        : Math.abs(box.top - frame.top - 8 - frame.height * share) > 2;
      if (strays) this.scroll.scrollTop += box.top - frame.top - 8 - frame.height * (share ?? 1 / 3);
      if (turns) requestAnimationFrame(() => settle(turns - 1));
    };
    this.target = i;
    if (!this.element(i)) near();
    this.tokens.need(i, i + 1).then(() => requestAnimationFrame(() => settle(16)), this.does.failed);
  }

  /** `shown`: {focus, items [[token, weight]], most: of a weight, bins, bin, locked}; null: nothing. */
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
        word.style.setProperty("--shade", (0.9 * shade(weight / shown.most)).toFixed(3));
        word.dataset.weight = weight.toPrecision(6);
        if (labelled.has(i) && weight / shown.most >= 0.02) word.dataset.label = brief(weight);
      }
      const focus = shown.focusHere && this.has(shown.focus) && this.element(shown.focus);
      if (focus) {
        focus.touched = true;
        focus.classList.add("focus");
        focus.classList.toggle("locked", shown.locked);
      }
    }
    const cursor = this.cursor !== null && this.element(this.cursor);
    if (cursor) {
      cursor.touched = true;
      cursor.classList.add("cursor");
    }
    this.edges();
  }

  /** What depends on where the text is scrolled to: lines, chips at the edges, the strip. */
  edges() {
    if (this.edging) return;
    this.edging = requestAnimationFrame(() => {
      this.edging = null;
      drawLines(this);
      drawChips(this);
      drawStrip(this);
    });
  }
}

export { BLOCK, Pane };
