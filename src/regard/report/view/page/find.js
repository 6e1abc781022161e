// Find tokens by what they hold.

import { ask } from "./api.js";
import { byId, count } from "./shared.js";
import { changed, state } from "./state.js";

/** The field that finds tokens, and goes from one to the next. */
function buildFind({ layer, shift, failed, goTo, map }) {
  const field = byId("find").querySelector("input");
  const said = byId("found");
  let [hits, at, timer] = [[], -1, null];
  const search = async () => {
    const text = field.value.trim();
    try {
      hits = text ? await ask("matching", { r: state.recording, text, side: layer().q_side }) : [];
    } catch (error) {
      return failed(error);
    }
    at = -1;
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
    if (state.view === "map") map().goTo(query, Math.min(query + shift(), layer().k_len - 1));
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
}

export { buildFind };
