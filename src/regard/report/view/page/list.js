// The strongest weights of the token in focus, as a table.

import { nothing } from "./headline.js";
import { keyed } from "./keyed.js";
import { added, measured, valued } from "./measure.js";
import { bold, byId, make, percent } from "./shared.js";

const ROWS = 12;
let table, empty, mass, keeps; // made once: what is drawn again stays the same elements

function build() {
  table = make("table");
  table.append(make("caption"), make("thead"), make("tbody"));
  const head = make("tr");
  for (const title of ["", "", "weight", "at", "distance"]) head.append(make("th", "", title));
  table.tHead.append(head);
  [empty, mass] = [make("p", "empty"), make("p", "mass")];
  byId("list").append(empty, table, mass);
}

function row([i]) {
  const line = make("tr");
  line.dataset.key = i;
  const first = make("td");
  const name = make("button", "name");
  name.type = "button";
  name.addEventListener("click", () => keeps(i));
  first.append(name);
  const gauge = make("td", "gauge");
  gauge.append(make("i"));
  line.append(first, gauge, make("td"), make("td"), make("td"));
  return line;
}

/** `shift`: how many keys stand before the first query; null where keys are of another text. */
function drawList({ fan, unit, state, readers, keys, keep, shift }) {
  if (!table) build();
  keeps = keep;
  empty.hidden = Boolean(fan?.items.length);
  table.hidden = mass.hidden = !empty.hidden;
  if (!fan?.items.length) {
    empty.textContent = fan ? nothing(fan) : `Choose a ${unit} to list its strongest weights: hover or click it in the ` +
      "text, click its row in the map, or find it.";
    return;
  }
  const [own, other] = fan.inward ? [keys, readers] : [readers, keys];
  table.caption.replaceChildren(bold(own.name(fan.index)), fan.inward ? " is read by" : " reads",
    `, head ${state.layer}.${state.head}`);
  table.querySelector("th").textContent = unit;
  table.querySelector("th:nth-child(3)").textContent = measured().column;
  const items = fan.items.slice(0, ROWS);
  const most = items[0]?.[1] ?? 1;
  keyed(table.tBodies[0], items, ([i]) => `${other.side}.${i}`, row, (line, [i, weight]) => {
    const [name, gauge, value, at, far] = line.cells;
    name.firstChild.textContent = other.name(i);
    gauge.firstChild.style.setProperty("--shade", (weight / most).toFixed(3));
    value.textContent = valued(weight);
    at.textContent = i.toLocaleString("en");
    far.textContent = shift === null ? "–" : Math.abs(fan.index - i + (fan.inward ? -shift : shift)).toLocaleString("en");
  });
  const sum = items.reduce((total, [, weight]) => total + weight, 0);
  const total = fan.inward || added() ? fan.total : 1;
  const said = `shown ${percent(total > 0 ? sum / total : 0)} of the ${measured().whole}`;
  mass.textContent = fan.inward && !added()
    ? `${said} that it receives: ${fan.total.toFixed(2)} in sum over ${fan.visible.toLocaleString("en")} ${unit}s`
    : said;
}

export { drawList };
