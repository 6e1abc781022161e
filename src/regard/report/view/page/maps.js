// The maps on the page: one, two side by side, or their difference; what they share is chosen here.

import { HeadMap, lock } from "./map.js";
import { byId, make } from "./shared.js";
import { changed, state } from "./state.js";
import { Loader, darkness, ramps } from "./tiles.js";

const LONG = 16384; // tokens from which a coarse tile takes long where it was not pooled while recording

class Maps {
  constructor(about, tokensOf, failed, told) {
    Object.assign(this, { about, tokensOf, failed, told, maps: [] });
    this.loader = new Loader(failed);
    this.loader.watch = () => this.maps.forEach((map) => map.tell());
    for (const key of ["reduce", "scale", "compare"])
      byId(key).addEventListener("change", () => {
        state[key] = byId(key).value;
        changed();
      });
    byId("sinks").addEventListener("change", () => {
      state.sinks = byId("sinks").checked;
      changed();
    });
    byId("pair").hidden = about.recordings.length < 2;
    darkness.addEventListener("change", () => this.legend());
  }

  get first() {
    return this.maps[0];
  }

  /** The other recording of a pair. */
  other() {
    return state.recording === 0 ? 1 : 0;
  }

  /** What can be shown of the two: the other must have that head, too. */
  shows() {
    if (state.compare === "one") return "one";
    const [, two] = this.layers();
    if (!two?.pattern || state.head >= two.heads) return "one";
    return state.compare;
  }

  /** The layer of the chosen recording, and that of the other. */
  layers() {
    return [state.recording, this.other()].map((r) => this.about.recordings[r].layers[state.layer]);
  }

  /** How many queries and keys both have ("min"), or the longer one ("max"). */
  lengths(which) {
    const [one, two] = this.layers();
    return { rows: Math[which](one.q_len, two.q_len), cols: Math[which](one.k_len, two.k_len) };
  }

  /** What a difference is of. */
  common() {
    const [least, most] = ["min", "max"].map((which) => this.lengths(which));
    return { versus: this.other(), ...least, unequal: least.rows !== most.rows || least.cols !== most.cols };
  }

  draw() {
    for (const key of ["reduce", "scale", "compare"]) byId(key).value = state[key];
    byId("sinks").checked = state.sinks;
    const shows = this.shows();
    const count = shows === "both" ? 2 : 1;
    byId("maps").classList.toggle("both", count === 2);
    while (this.maps.length > count) {
      this.maps.pop().remove();
    }
    while (this.maps.length < count) this.add();
    const here = state.recording;
    const which = shows === "second" ? [this.other()] : [here, this.other()].slice(0, count);
    const { at } = state; // the first view is of the whole map, and forgets it
    this.maps.forEach((map, i) => this.name(map, which[i], shows));
    this.maps.forEach((map, i) => map.show({ ...this.where(which[i]),
      ...(shows === "both" ? { whole: this.lengths("max") } : {}),
      ...(shows === "change" ? this.common() : {}) }));
    if (this.restored === undefined) {
      this.restored = true;
      if (at) this.first.restore(at);
    }
    this.legend();
  }

  /** Stand where the address says, which has changed. */
  stand() {
    if (!this.first?.where) return;
    this.restored = undefined;
    if (!state.at) this.first.whole();
  }

  add() {
    const frame = make("div", "frame");
    byId("maps").append(frame);
    const map = new HeadMap(frame, this.loader, (cell) => this.told(cell));
    map.picked = (along, token) => {
      [state.word, state.way] = [token, along === "row" ? "out" : "in"];
      changed();
    };
    map.ranged = (range) => {
      state.range = range;
      changed();
    };
    this.maps.push(map);
    if (this.maps.length === 2) {
      lock(...this.maps);
      map.leader = this.first; // the address says where that one stands
    }
  }

  name(map, r, shows) {
    const title = map.frame.querySelector("h2") ?? make("h2");
    const names = this.about.recordings.map((one) => one.name);
    title.textContent = (shows === "change" ? `${names[this.other()]} − ${names[state.recording]}` : names[r])
      + this.said(r, shows);
    if (this.about.recordings.length > 1 && !title.parentNode) map.frame.prepend(title);
  }

  /** Of recordings of unequal lengths, or of different texts: what a place of one is in the other. */
  said(r, shows) {
    if (shows !== "both" && shows !== "change") return "";
    const [least, most] = ["min", "max"].map((which) => this.lengths(which));
    const unequal = least.rows !== most.rows || least.cols !== most.cols;
    const { alike } = this.about;
    const parted = alike !== null && alike < least.cols && r === state.recording
      ? ` · the texts part at token ${alike.toLocaleString("en")}` : "";
    if (!unequal) return parted;
    return (shows === "change" ? ` · of the ${least.rows.toLocaleString("en")} × ${least.cols.toLocaleString("en")} that both have`
      : ` · ${this.about.recordings[r].layers[state.layer].k_len.toLocaleString("en")} tokens`) + parted;
  }

  where(r) {
    const { layers, special } = this.about.recordings[r];
    const layer = layers[state.layer];
    return {
      r, layer: state.layer, head: state.head, batch: state.batch, rows: layer.q_len, cols: layer.k_len,
      slow: state.measure === "value" && !layer.value_maps && Math.max(layer.q_len, layer.k_len) > LONG,
      rowTokens: this.tokensOf(r, layer.q_side).after(layer.kind === "self" ? layer.k_len - layer.q_len : 0), colTokens: this.tokensOf(r, layer.k_side), special,
    };
  }

  legend() {
    const canvas = make("canvas");
    [canvas.width, canvas.height] = [256, 1];
    const context = canvas.getContext("2d");
    const { up, down } = ramps();
    const both = this.shows() === "change";
    for (let i = 0; i < 256; i++) {
      const at = both ? Math.abs(i - 128) * 2 : i;
      const colour = both && i < 128 ? down : up;
      context.fillStyle = `rgb(${colour[Math.min(255, at)].join(" ")})`;
      context.fillRect(i, 0, 1, 1);
    }
    const low = this.first?.where ? this.first.scale(this.first.zoom).low : 0;
    const from = both ? "−1" : state.scale === "linear" ? "0" : low.toExponential(0).replace("e-", "·10⁻").replace(/⁻(\d+)/, (_, n) => `⁻${[...n].map((d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).join("")}`);
    byId("legend").replaceChildren(make("span", "", state.measure === "weight" ? from : "0"), canvas,
      make("span", "", state.measure === "weight" ? "1" : "most in sight"));
  }
}

export { Maps };
