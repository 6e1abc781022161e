// Words that flow from one block of the text into the next, as if there were no blocks.
//
// Blocks are laid out one by one, where they are in sight. So that nobody sees where one ends, each
// begins on the last line of the one before, behind its last word: an empty box of that width stands
// before its first word, and it lies one line higher than its predecessor ends.

import { make } from "./shared.js";

const LINE = 33; // pixels, as view.css has it
const DEEP = 4; // blocks before one that are laid out to know where it begins

class Flow {
  constructor(pane) {
    Object.assign(this, { pane, begins: new Map(), toLeft: null });
  }

  /** Where blocks begin depends on the width. */
  forget() {
    this.begins.clear();
  }

  /** The first token that a block's place depends on. */
  from(index) {
    const deep = this.begins.has(index) ? 0 : DEEP;
    return this.pane.range(Math.max(0, index - deep))[0];
  }

  /** Lay a block out, whose words and those before are there. */
  fill(index, block) {
    const { text, number, words, element } = block;
    this.toLeft ??= this.direction(index);
    text.dir = this.toLeft ? "rtl" : "ltr";
    this.layOut(index, block, this.begin(index));
    const first = words.values().next().value;
    const drop = first ? first.getClientRects()[0].top - element.getBoundingClientRect().top : 0;
    number.style.marginTop = `${Math.floor(drop / LINE) * LINE}px`;
  }

  layOut(index, block, begin) {
    const { text } = block;
    text.replaceChildren();
    if (begin) {
      const box = make("span", "begin");
      box.style.width = `${begin}px`;
      text.append(box);
    }
    this.pane.put(index, block);
    block.mark = make("span", "end");
    text.append(block.mark);
    const [outer, mark] = [text.getBoundingClientRect(), block.mark.getBoundingClientRect()];
    block.end = Math.max(0, this.toLeft ? outer.right - mark.right : mark.left - outer.left);
  }

  /** Pixels before a block's first word. */
  begin(index, deep = DEEP) {
    if (index === 0) return 0;
    if (!this.begins.has(index)) this.begins.set(index, deep ? this.end(index - 1, deep - 1) : 0);
    return this.begins.get(index);
  }

  /** Pixels before the end of a block's last line. A new line in it makes them its own. */
  end(index, deep) {
    const shown = this.pane.blocks.get(index);
    if (shown?.mark) return shown.end;
    const block = this.pane.frameOf(index);
    block.element.style.visibility = "hidden";
    this.pane.paper.append(block.element);
    this.layOut(index, block, 0);
    if (!block.text.querySelector("br")) {
      const begin = this.begin(index, deep);
      if (begin) this.layOut(index, block, begin);
    }
    block.element.remove();
    return block.end;
  }

  /** How far below a block the next one begins. */
  size(index, block) {
    const height = block.element.offsetHeight;
    const [, stop] = this.pane.range(index);
    const next = this.begins.get(index + 1) ?? block.end;
    // A block far from all that was laid out before may have been guessed to begin a line
    return stop >= this.pane.stop || next !== block.end ? height : height - LINE;
  }

  /** Whether the text is written from right to left. */
  direction(index) {
    const [first, last] = this.pane.range(index);
    for (let i = first; i < last; i++) {
      const letter = /\p{L}/u.exec(this.pane.tokens.piece(i) ?? "")?.[0];
      if (letter) return /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u.test(letter);
    }
    return false;
  }
}

export { Flow, LINE };
