// What the recording is, above and below everything else.

import { held } from "./api.js";
import { bold, byId, count, make } from "./shared.js";
import { state } from "./state.js";

/** Of a recording `shown`, and the layer of it that is. */
function tellAbout(shown, layer) {
  const told = JSON.stringify([state.recording, state.layer]);
  if (tellAbout.told === told) return; // else a selection in it would be lost
  tellAbout.told = told;
  const total = shown.layers.reduce((sum, one) => sum + one.heads, 0);
  byId("about").replaceChildren("regard view · ", bold(shown.model),
    ` · ${count(shown.layers.length, "layer")}, ${count(total, "head")} · ` +
    `${count(layer.k_len, "token")} · where heads read, not why`);
  document.title = `${shown.name} · regard view`;
  const lines = [
    "This page says where heads read, not why: a large weight need not matter to the result.",
    "Every zoom of the map is computed from the recorded queries, keys and log-sum-exps; a cell of " +
      "several tokens holds their sum or their largest weight. In sum, colour and number are the " +
      "share of its mass that a token of the cell's rows gives to its columns, on average.",
    "Keys: m and t change between map and text, / finds, Tab reaches map, text and heads, arrows move, + and − " +
      "zoom the map, Enter keeps a token, Esc lets go. The address holds what is chosen.",
  ];
  if (!shown.whole) lines.splice(1, 0, "The run that wrote this recording was stopped: the layers " +
    "that were whole are here.");
  for (const damage of shown.damaged) lines.splice(1, 0, damage);
  if (held) lines.splice(1, 0, "This file holds what was in view when it was written.");
  byId("foot").replaceChildren(...lines.map((line) => make("p", "", line)));
}

export { tellAbout };
