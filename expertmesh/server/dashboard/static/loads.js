// The two heat maps: how full each card is, layer by layer, and how often each expert is chosen.

import { highlight } from "./cluster.js";
import { num, say, table, times } from "./dom.js";
import { drawScale, HeatMap } from "./heatmap.js";
import { panel, withTable } from "./panel.js";
import { named, on, ranks, store } from "./store.js";

const CARDS = [0.5, 1.5]; // of the mean: the range that colours tell apart
const EXPERTS = [0, 4];
const LISTED = 40;

const layer = (row) => store.loads.layers[row];
const perSecond = (row) => store.loads.rows[row] / (store.loads.seconds || 1);

function largest(values) {
  let best = 0;
  values.forEach((value, i) => { if (value > values[best]) best = i; });
  return best;
}

function startCards() {
  const p = panel("cards");
  const tell = (row, rank) => {
    highlight(row === null ? [] : [rank]);
    say(p.readout, row === null ? hottest() : text(row, rank));
  };
  const text = (row, rank) =>
    `layer ${layer(row)}, ${named(rank)}: ${times(store.loads.cards[row * ranks() + rank])} the mean`;
  const hottest = () => {
    const at = largest(store.loads.cards);
    return store.loads.rows.some(Boolean) ? `Fullest: ${text(Math.floor(at / ranks()), at % ranks())}` : "No rows lately";
  };
  const map = new HeatMap(p.view, "Load of every card in every layer; arrow keys move from cell to cell", "cards-readout", tell);
  const drawn = withTable(p, () => table("Load of every card in every layer, over the layer's mean",
    ["layer", "#imbalance", ...Array.from({ length: ranks() }, (_, rank) => `#${named(rank)}`)],
    store.loads.layers.map((name, row) => [name, times(store.loads.imbalance[row]),
      ...Array.from(store.loads.cards.slice(row * ranks(), (row + 1) * ranks()), times)])));
  on(["loads"], () => {
    drawScale(p.scale, ["0.5×", "1.5×"]);
    map.draw({
      rows: store.loads.layers.map(String), columns: ranks(), group: store.hello.cluster.cards_per_node,
      values: store.loads.cards, low: CARDS[0], high: CARDS[1],
    });
    if (!map.at) tell(null);
    drawn();
  });
}

function startExperts() {
  const p = panel("experts");
  const experts = () => store.hello.model.experts;
  const homes = (row, expert) => store.placement?.homes[row]?.get(expert) ?? [];
  const value = (row, expert) => store.loads.experts[row * experts() + expert];
  const text = (row, expert) => {
    const on = homes(row, expert);
    const rate = (value(row, expert) * perSecond(row)) / experts();
    return `layer ${layer(row)}, expert ${expert}: ${times(value(row, expert))} the mean, ${num(rate)} rows/s, on `
      + (on.length > 1 ? `${on.length} cards: ` : "") + on.map(named).join(", ");
  };
  const hottest = () => {
    const at = largest(store.loads.experts);
    return store.loads.rows.some(Boolean) ? `Hottest: ${text(Math.floor(at / experts()), at % experts())}` : "No rows lately";
  };
  const tell = (row, expert) => {
    highlight(row === null ? [] : homes(row, expert));
    say(p.readout, row === null ? hottest() : text(row, expert));
  };
  const map = new HeatMap(p.view, "How often every expert is chosen, layer by layer; arrow keys move from cell to cell",
    "experts-readout", tell);
  const drawn = withTable(p, () => {
    const order = Array.from(store.loads.experts.keys()).sort((a, b) => store.loads.experts[b] - store.loads.experts[a]);
    return table("The experts that are chosen most", ["expert", "#layer", "#over the mean", "#rows/s", "cards"],
      order.slice(0, LISTED).map((at) => {
        const [row, expert] = [Math.floor(at / experts()), at % experts()];
        return [expert, layer(row), times(value(row, expert)), num((value(row, expert) * perSecond(row)) / experts()),
          homes(row, expert).map(named).join(", ")];
      }));
  });
  on(["loads", "placement"], () => {
    if (!store.loads) return;
    drawScale(p.scale, ["0×", "4× or more"]);
    map.draw({
      rows: store.loads.layers.map(String), columns: experts(), group: 0, values: store.loads.experts,
      low: EXPERTS[0], high: EXPERTS[1],
    });
    const slots = store.placement ? [...(store.placement.homes[0]?.values() ?? [])].reduce((sum, on) => sum + on.length, 0) : 0;
    p.note(slots > experts() ? `${experts()} experts in ${slots} slots of a layer` : `${experts()} experts`);
    if (!map.at) tell(null);
    drawn();
  });
}

export function startLoads() {
  startCards();
  startExperts();
}
