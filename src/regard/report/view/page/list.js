// The strongest weights of the token in focus, as a table.

import { bold, byId, make, percent, three } from "./shared.js";

const ROWS = 12;

function drawList({ fan, unit, state, readers, keys, keep }) {
  const list = byId("list");
  if (!fan) {
    list.replaceChildren(make("p", "empty",
      `Choose a ${unit} to list its strongest weights: hover or click it in the text, click its row ` +
      "in the map, or find it."));
    return;
  }
  const [own, other] = fan.inward ? [keys, readers] : [readers, keys];
  const table = make("table");
  const caption = make("caption");
  caption.append(bold(own.name(fan.index)), fan.inward ? " is read by" : " reads",
    `, head ${state.layer}.${state.head}`);
  const head = make("tr");
  for (const title of [unit, "", "weight", "at", "distance"]) head.append(make("th", "", title));
  const header = make("thead");
  header.append(head);
  const body = make("tbody");
  const most = fan.items[0]?.[1] ?? 1;
  let sum = 0;
  for (const [i, weight] of fan.items.slice(0, ROWS)) {
    sum += weight;
    const line = make("tr");
    line.dataset.key = i;
    const first = make("td");
    const name = make("button", "name", other.name(i));
    name.type = "button";
    name.addEventListener("click", () => keep(i));
    first.append(name);
    const gauge = make("td", "gauge");
    const bar = make("i");
    bar.style.setProperty("--shade", (weight / most).toFixed(3));
    gauge.append(bar);
    const far = Math.abs(fan.index - i);
    line.append(first, gauge, make("td", "", three(weight)),
      make("td", "", i.toLocaleString("en")), make("td", "", far.toLocaleString("en")));
    body.append(line);
  }
  table.append(caption, header, body);
  const total = fan.inward ? fan.total : 1;
  const said = `shown ${percent(total > 0 ? sum / total : 0)} of the mass`;
  list.replaceChildren(table, make("p", "mass", fan.inward
    ? `${said} that it receives: ${fan.total.toFixed(2)} in sum over ${fan.visible.toLocaleString("en")} ${unit}s`
    : said));
}

export { drawList };
