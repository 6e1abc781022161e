// Segments of a text: documents, turns, functions. How much of its mass each head gives to each.

import { ask } from "./api.js";
import { bold, byId, make, percent } from "./shared.js";
import { changed, state } from "./state.js";

const OWN = "a pattern or ranges";

class Segments {
  /** `byWords` says whether words are the unit; `goTo` brings a token into sight. */
  constructor(about, { byWords, goTo, wordName, failed }) {
    Object.assign(this, { about, byWords, goTo, wordName, failed, answers: new Map() });
    this.question = this.listed = null;
    const form = byId("segments");
    const { kind, given } = form.elements;
    for (const name of [OWN, ...Object.keys(about.kinds)]) {
      const option = make("option", "", name);
      option.value = about.kinds[name] ?? "";
      kind.append(option);
    }
    kind.addEventListener("change", () => {
      given.value = kind.value;
      if (kind.value) this.take(kind.value);
      else given.focus();
    });
    given.addEventListener("input", () => (kind.value = ""));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.take(given.value);
    });
  }

  take(given) {
    state.given = given.trim() || null;
    state.segment = 0;
    state.metric = state.given ? "segment" : this.about.metrics[0].key;
    this.question = null;
    changed();
  }

  /** Ask, layer by layer, where something that the answer depends on has changed. */
  async refresh() {
    const asked = { r: state.recording, batch: state.batch, given: state.given };
    if (state.word !== null) asked.index = state.word;
    if (this.byWords()) asked.by = "words";
    const question = JSON.stringify(asked);
    if (question === this.question) return;
    this.question = question;
    this.answers.clear();
    const said = byId("segments-said");
    said.textContent = state.given ? "reading all heads…" : "";
    if (!state.given) return this.draw();
    const { layers } = this.about.recordings[state.recording];
    // The head that is shown comes first
    const order = [state.layer, ...layers.keys()].filter((n, at, all) => all.indexOf(n) === at);
    for (const layer of order) {
      if (!layers[layer].pattern) continue;
      try {
        const answer = await ask("segments", { ...asked, layer });
        if (this.question !== question) return;
        if (answer) this.answers.set(layer, answer);
      } catch (error) {
        if (this.question === question) said.textContent = `${error.message}.`;
        return;
      }
      changed();
    }
  }

  any() {
    return this.answers.get(state.layer) ?? this.answers.values().next().value;
  }

  get chosen() {
    return Math.min(state.segment, (this.any()?.names.length ?? 1) - 1);
  }

  value(layer, head) {
    return this.answers.get(layer)?.shares[head]?.[this.chosen] ?? null;
  }

  name(n) {
    return this.any()?.names[n] || "before the first";
  }

  /** Who reads: the word that is kept, the generated tokens, or some of all. */
  from() {
    const { kind, rows } = this.any() ?? {};
    return kind === "word" ? `“${this.wordName()}”`
      : kind === "generated" ? (rows === 1 ? "the generated token" : `${rows} generated tokens, on average`)
        : `${rows} tokens spread over the text, on average`;
  }

  said() {
    return this.any() ? `mass given to “${this.name(this.chosen)}” by ${this.from()}` : "mass given to a segment";
  }

  draw() {
    const list = byId("segments-list");
    const answer = this.answers.get(state.layer);
    const { kind, given } = byId("segments").elements;
    if (document.activeElement !== given) {
      given.value = state.given ?? "";
      kind.value = given.value;
      if (kind.selectedIndex < 0) kind.value = "";
    }
    if (!answer) {
      this.listed = null;
      return list.replaceChildren();
    }
    byId("segments-said").replaceChildren("head ", bold(`${state.layer}.${state.head}`), `, by ${this.from()}`);
    // Every answer draws again: what is under the pointer or has the focus must stay the same element
    if (this.listed !== this.question) list.replaceChildren(...answer.names.map((_, n) => this.button(n)));
    this.listed = this.question;
    const shares = answer.shares[state.head];
    const most = Math.max(1e-9, ...shares);
    for (const [n, button] of [...list.children].entries()) {
      button.dataset.share = shares[n];
      button.setAttribute("aria-pressed", state.metric === "segment" && n === this.chosen);
      button.querySelector("i").style.setProperty("--shade", (shares[n] / most).toFixed(3));
      button.querySelector(".share").textContent = percent(shares[n]).replace("less than ", "< ");
    }
  }

  /** One segment of the list: where it lies, and that a click colours the heads by it. */
  button(n) {
    const [first, last] = this.any().ranges[n];
    const button = make("button", "segment");
    button.type = "button";
    button.title = `tokens ${first.toLocaleString("en")} to ${(last - 1).toLocaleString("en")}: colour the heads by it`;
    const gauge = make("span", "gauge");
    gauge.append(make("i"));
    button.append(make("span", "name", this.name(n)), gauge, make("span", "share"));
    button.addEventListener("click", () => {
      [state.segment, state.metric] = [n, "segment"];
      changed();
      this.goTo(first);
    });
    return button;
  }
}

export { Segments };
