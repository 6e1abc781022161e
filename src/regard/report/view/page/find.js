// Find tokens by what they hold.

import { ask, known } from "./api.js";
import { byId, count } from "./shared.js";
import { changed, state, write } from "./state.js";

/** The field that finds tokens, and goes from one to the next. `hit` is told all that are found. */
function buildFind({ layer, shift, failed, goTo, map, hit }) {
  const field = byId("find").querySelector("input");
  const said = byId("found");
  let [hits, at, timer, question] = [[], -1, null, null];
  const search = async () => {
    const text = field.value.trim();
    const asked = { r: state.recording, text, side: layer().q_side };
    if (question === JSON.stringify(asked)) return;
    question = JSON.stringify(asked);
    state.find = text || null;
    write();
    try {
      const found = text && known("matching", asked) ? await ask("matching", asked) : [];
      if (question !== JSON.stringify(asked)) return;
      hits = found;
    } catch (error) {
      question = null;
      return failed(error);
    }
    at = -1;
    hit(hits);
    said.textContent = !text ? "" : hits.length ? `${count(hits.length, "place")}; Enter goes to the next`
      : "no such token; try a part of it";
  };
  const go = (by) => {
    if (!hits.length) return;
    at = (at + by + hits.length) % hits.length;
    said.textContent = `${at + 1} of ${hits.length}`;
    const query = hits[at] - shift();
    if (query >= 0 && query < layer().q_len) [state.word, state.way] = [query, "out"];
    changed();
    requestAnimationFrame(() => goTo(hits[at]));
    if (state.view === "map") map()?.goTo(query, Math.min(query + shift(), layer().k_len - 1));
  };
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, 150);
  });
  field.addEventListener("keydown", async (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    clearTimeout(timer);
    if (at < 0) await search();
    go(event.shiftKey ? -1 : 1);
  });
  /** Look for what is chosen, where that or the recording has changed. */
  const refresh = () => {
    if (document.activeElement === field) return;
    field.value = state.find ?? "";
    search();
  };
  return { refresh };
}

export { buildFind };
