// The line at the top: the cell under the pointer, or the token in focus and what it reads most.

import { measured, valued } from "./measure.js";
import { bold, byId, make } from "./shared.js";
import { state } from "./state.js";

const touched = matchMedia("(pointer: coarse)").matches; // by fingers

/** Say it. `missing`: whether what is chosen was not recorded; `waits`: whether what a token reads is on its way; `again` says it once more. */
function drawHeadline(seen) {
  const { missing, cell, fan, waits, maps, readers, keys, shift, unit, special, letGo, failed, again } = seen;
  const aside = (i) => i === 0 || special.has(i); // where mass goes that says little
  const line = byId("headline");
  const where = make("span", "where", ` · head ${state.layer}.${state.head}`);
  delete line.dataset.weight;
  if (missing) {
    line.replaceChildren("Nothing to show", where);
    byId("note").textContent = "";
    return;
  }
  if (state.view === "map" && cell) {
    const { row, col, size, zoom, value } = cell;
    const span = (i, most) => (zoom === 0 ? null
      : `${(i - (i % size)).toLocaleString("en")}–${(Math.min(most, i - (i % size) + size) - 1).toLocaleString("en")}`);
    if (zoom === 0) line.replaceChildren(bold(readers.name(row)), " reads ", bold(keys.name(col)), " ");
    else line.replaceChildren(bold(span(row, cell.rows)), " reads ", bold(span(col, cell.cols)), " ");
    if (value !== null) {
      line.dataset.weight = value;
      const shown = zoom && state.reduce === "sum" && maps.shows() !== "change" ? value / size : value;
      line.append(bold(valued(shown) + measured().unit, "weight"));
    }
    line.append(where);
    byId("note").textContent = zoom === 0
      ? `query ${row.toLocaleString("en")} → key ${col.toLocaleString("en")}${value === null ? "" : `: ${Number(value).toPrecision(6)}`}. ${touched ? "A tap keeps the query, another lets it go." : "Click keeps the query."}`
      : `${readers.name(row, 24)} … reads ${keys.name(col, 24)} …: ${state.reduce === "sum" ? measured().summed : measured().largest}`;
    const names = [[readers, row], [keys, col]].filter(([side, i]) => side.piece(i) === null);
    for (const [side, i] of names) side.need(i, i + 1).then(again, failed);
    return;
  }
  if (fan && !fan.items.length) {
    const own = fan.inward ? keys : readers;
    line.replaceChildren(bold(own.name(fan.index)), fan.inward ? " is read by nobody" : " reads nothing", where);
    byId("note").replaceChildren(nothing(fan), ...(state.word === null ? [] : [" ", looseButton(letGo)]));
    return;
  }
  if (!fan) {
    line.replaceChildren(!fan && waits && state.word !== null ? `Token ${state.word.toLocaleString("en")} is kept`
      : state.view === "map" ? (state.at ? "A part of the map" : "The whole map") : "The text", where);
    byId("note").textContent = !fan && waits && state.word !== null ? "Reading its weights…" : state.view === "map"
      ? touched ? "Pinch to zoom, drag to move; touch a cell to name it."
        : "Scroll to zoom, drag to move; the pointer names what it is on."
      : touched ? `Touch a ${unit} to see what it reads.`
        : `Hover a ${unit} to see what it reads; click to keep it.`;
    return;
  }
  const other = fan.index + (fan.inward ? -shift : shift);
  const [best] = fan.items.filter(([i, weight]) => !aside(i) && i !== other && weight >= 0.02)
    .concat(fan.items);
  const names = fan.inward ? [readers.name(best[0]), keys.name(fan.index)]
    : [readers.name(fan.index), keys.name(best[0])];
  line.replaceChildren(bold(names[0]), " reads ", bold(names[1]), " ", bold(valued(best[1]) + measured().unit, "weight"), where);
  byId("note").replaceChildren(...(state.word === null ? ["Click to keep it."]
    : ["Kept. ", looseButton(letGo)]));
}

/** Why a token has nothing to list, and what to do. */
function nothing({ inward }) {
  if (state.measure === "effect") return "None of its edges is among those whose effect was kept: choose weights instead.";
  return inward ? "No query sees this key, or none gives it any weight: choose what it reads instead."
    : "The mask hides every key from it: choose another token.";
}

/** What lets the kept token go, as Escape does. */
function looseButton(letGo) {
  const button = make("button", "at");
  button.type = "button";
  button.append("let go", ...(touched ? [] : [" ", make("kbd", "", "Esc")]));
  button.addEventListener("click", letGo);
  return button;
}

export { drawHeadline, nothing };
