// What is shown of each edge, in words: weights, what keys add, effects.

import { short, three } from "./shared.js";
import { state } from "./state.js";

const MEASURES = {
  weight: { column: "weight", whole: "mass", unit: "", pictured: "weights",
    summed: "the share of its mass a token gives there, on average", largest: "the largest weight there" },
  value: { column: "adds", whole: "lengths added", unit: " added", pictured: "what keys add: weight · ‖W_O v‖",
    summed: "the lengths added there to a token, on average", largest: "the largest length added there" },
  effect: { column: "effect", whole: "effects kept", unit: " effect", pictured: "|effect| of the edges kept",
    summed: "the effects there on a token, on average", largest: "the largest effect there" },
};

const measured = () => MEASURES[state.measure];

/** Whether lengths of what keys add, or effects, are shown instead of weights. */
const added = () => state.measure !== "weight";

/** A length or an effect, which may be of any size. */
const amount = (value, digits) => (Math.abs(value) >= 10 ** (digits - 1) ? Math.round(value).toLocaleString("en")
  : value === 0 ? "0" : value.toPrecision(digits));

/** What an edge has, in three digits; and in as few as fit at a word. */
const valued = (value) => (added() ? amount(value, 3) : three(value));
const brief = (value) => (added() ? amount(value, 2) : short(value));

export { added, amount, brief, measured, valued };
