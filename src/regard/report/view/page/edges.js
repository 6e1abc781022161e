// What stands at the edges of a text, and depends on where it is scrolled to: lines, chips, the strip.

import { keyed } from "./keyed.js";
import { added, amount } from "./measure.js";
import { resolved } from "./profiles.js";
import { drawFan, make, shade } from "./shared.js";

const CHIPS = 5; // at each edge

/** Lines from the word in focus to the strongest of those in sight. */
function drawLines(pane) {
  const { shown } = pane;
  const from = shown?.focusHere && pane.element(shown.focus);
  if (!from) return pane.fan.replaceChildren();
  const ends = shown.items.slice(0, 14).map(([i, weight]) => [i, weight / shown.most])
    .filter(([i, share]) => share >= 0.02 && i !== shown.focus).map(([i, share]) => [share, pane.has(i) && pane.element(i)]).filter(([, word]) => word);
  drawFan(pane, from, ends);
}

/** What is read out of sight, at the edge that it lies behind. */
function drawChips(pane) {
  const { shown } = pane;
  const edges = { above: [], below: [] };
  const frame = pane.scroll.getBoundingClientRect();
  const first = pane.firstInSight();
  for (const [i, weight] of shown?.items ?? []) {
    if (!pane.has(i) || pane.inSight(i)) continue;
    const box = pane.element(i)?.getBoundingClientRect();
    edges[(box ? box.bottom <= frame.top : i < first) ? "above" : "below"].push([i, weight]);
  }
  for (const [side, targets] of Object.entries(edges)) {
    const sign = side === "above" ? "↑" : "↓";
    const rest = targets.slice(CHIPS).reduce((total, [, weight]) => total + weight, 0);
    const chips = targets.slice(0, CHIPS);
    if (targets.length > CHIPS) chips.push([null, rest]);
    keyed(pane[side], chips, ([i]) => i ?? "rest", ([i]) => chipOf(pane, i), (chip, [i, weight]) => {
      if (i === null) chip.textContent = `${targets.length - CHIPS} more ${chipped(rest)}`;
      else chip.replaceChildren(`${sign} ${i.toLocaleString("en")} `, make("b", "", pane.tokens.name(i, 18)),
        ` ${chipped(weight)}`);
    });
  }
  const unnamed = Object.values(edges).flatMap((list) => list.slice(0, CHIPS).map(([i]) => i))
    .filter((i) => pane.tokens.piece(i) === null);
  if (unnamed.length)
    pane.tokens.needEach(unnamed).then(() => pane.edges(), pane.does.failed);
}

const chipped = (value) => (added() ? amount(value, 2) : value < 0.005 ? "<.01" : value.toFixed(2));

/** What stands at the edge for a token out of sight, and goes there; null: for all others. */
function chipOf(pane, i) {
  const chip = make(i === null ? "span" : "button", "chip");
  if (i === null) return chip;
  chip.type = "button";
  chip.dataset.to = i;
  chip.addEventListener("click", () => pane.goTo(i));
  return chip;
}

/** Where along the whole text the weights lie, and what is found; pale, what is in sight. */
function drawStrip(pane) {
  const { clientWidth: width, clientHeight: height } = pane.strip;
  if (!width) return;
  const scale = devicePixelRatio;
  [pane.strip.width, pane.strip.height] = [width * scale, height * scale];
  const context = pane.strip.getContext("2d");
  context.scale(scale, scale);
  const style = getComputedStyle(pane.strip);
  const length = pane.stop - pane.start;
  const whole = pane.scroll.scrollHeight || 1;
  context.fillStyle = style.getPropertyValue("border-left-color");
  context.fillRect(0, (pane.scroll.scrollTop / whole) * height, width,
    Math.max(3, (pane.scroll.clientHeight / whole) * height));
  context.fillStyle = style.color;
  context.fillStyle = resolved(getComputedStyle(document.documentElement), "--ring");
  for (const i of pane.hits ?? []) if (pane.has(i)) context.fillRect(width - 5, ((i - pane.start) / length) * height, 5, 1.5);
  context.fillStyle = style.color;
  const { shown } = pane;
  if (!shown) return;
  const most = Math.max(1e-9, ...shown.bins);
  shown.bins.forEach((value, b) => {
    const at = ((b * shown.bin - pane.start) / length) * height;
    if (value <= 0 || at + (shown.bin / length) * height < 0 || at > height) return;
    context.globalAlpha = 0.35 + 0.65 * shade(value / most);
    context.fillRect(0, at, Math.max(2, width * shade(value / most)),
      Math.max(1.5, (shown.bin / length) * height));
  });
  context.globalAlpha = 1;
  if (shown.focusHere && pane.has(shown.focus)) {
    context.fillStyle = style.outlineColor;
    context.fillRect(0, ((shown.focus - pane.start) / length) * height - 1, width, 2.5);
  }
}

export { drawChips, drawLines, drawStrip };
