// Nodes and their cards, coloured by load, the slowest one named.

import { el, long, percent, say, table, times } from "./dom.js";
import { drawScale } from "./heatmap.js";
import { colour, css, ink } from "./palette.js";
import { panel, roving, withTable } from "./panel.js";
import { cardLoads, cardOf, named, nodeOf, on, rankTimes, ranks, store } from "./store.js";
import { theme } from "./theme.js";

const RANGE = [0.5, 1.5];
let tiles = [];

/** Show which cards are meant elsewhere. */
export function highlight(marked) {
  tiles.forEach((tile, rank) => tile.classList.toggle("marked", marked.includes(rank)));
}

/** What part of a step each card computes, null where that was not measured. */
function working() {
  const parts = rankTimes();
  return parts && parts.map((part) => {
    const all = Object.values(part).reduce((sum, x) => sum + x, 0);
    return { seconds: part.attention + part.experts, computing: (part.attention + part.experts) / all, waiting: part.waiting / all };
  });
}

/** The card that the others wait for: that computes longest, or has most rows where times are not measured. */
function slowest(loads, work) {
  const cost = work ? work.map((each) => each.seconds) : loads;
  if (cost.length < 2 || cost.some((x) => x === null)) return null;
  return cost.indexOf(Math.max(...cost));
}

function build(p) {
  const { nodes, cards_per_node: cards } = store.hello.cluster;
  tiles = [];
  const boxes = Array.from({ length: nodes }, (_, node) => {
    const box = el("div", { class: "cards", role: "group", "aria-label": `Cards of node ${node}` });
    for (let card = 0; card < cards; card += 1) {
      const rank = node * cards + card;
      const tile = el("button", { type: "button", class: "card", tabindex: rank ? "-1" : "0" },
        el("span", { class: "which", text: `c${card}` }), el("span", { class: "load" }),
        el("span", { class: "busy" }, el("span", {})), el("span", { class: "hidden" }));
      const tell = () => say(p.readout, tile.dataset.text ?? "");
      tile.addEventListener("focus", tell);
      tile.addEventListener("pointerenter", tell);
      tile.addEventListener("pointerleave", () => say(p.readout, p.summary ?? ""));
      tiles.push(tile);
      box.append(tile);
    }
    box.style.setProperty("--columns", cards > 4 ? Math.ceil(cards / Math.ceil(cards / 4)) : cards);
    const host = store.hello.ranks[node * cards]?.host ?? "";
    return el("div", { class: "node" }, el("p", { class: "name" }, el("b", { text: `node ${node}` }), ` ${host}`), box);
  });
  p.view.replaceChildren(...boxes);
}

function describe(rank, load, work) {
  const { pid } = store.hello.ranks[rank];
  const group = Math.floor(rank / store.hello.cluster.attention_tp);
  const parts = [`rank ${rank}, ${named(rank)}, TP group ${group}`];
  if (pid) parts.push(`process ${pid}`);
  parts.push(load === null ? "no rows lately" : `${times(load)} the mean load`);
  if (work) parts.push(`computes ${percent(work.computing)} of a step, waits ${percent(work.waiting)}`);
  const silence = store.state.silence[rank];
  parts.push(store.state.problem ? "ended" : silence > 3 ? `last heard ${long(silence)} ago` : "answers");
  return parts.join(" · ");
}

export function startCluster() {
  const p = panel("cluster");
  roving(p.view, ".card", () => {
    const inside = getComputedStyle(tiles[0].parentElement).gridTemplateColumns.split(" ");
    return inside.length;
  });
  const drawn = withTable(p, () => {
    const [loads, work] = [cardLoads(), working()];
    return table("Every card", ["rank", "#node", "#card", "host", "#process", "#load", "#computes", "#waits"],
      loads.map((load, rank) => [rank, nodeOf(rank), cardOf(rank), store.hello.ranks[rank].host,
        store.hello.ranks[rank].pid ?? "–", load === null ? "–" : times(load),
        work ? percent(work[rank].computing) : "–", work ? percent(work[rank].waiting) : "–"]));
  });
  on(["loads", "state"], () => {
    if (!store.loads || !store.state) return;
    if (tiles.length !== ranks() || !p.view.firstChild) build(p);
    const [loads, work] = [cardLoads(), working()];
    const last = slowest(loads, work);
    tiles.forEach((tile, rank) => {
      const load = loads[rank];
      const back = colour(theme(), load === null ? 0 : (load - RANGE[0]) / (RANGE[1] - RANGE[0]));
      tile.style.setProperty("--back", css(back));
      tile.style.setProperty("--ink", ink(back));
      tile.classList.toggle("slowest", rank === last);
      tile.classList.toggle("lost", Boolean(store.state.problem));
      say(tile.children[1], load === null ? "idle" : times(load));
      tile.children[2].hidden = !work;
      tile.children[2].firstChild.style.width = work ? `${100 * work[rank].computing}%` : "0";
      tile.dataset.text = describe(rank, load, work?.[rank]) + (rank === last ? " · slowest" : "");
      say(tile.children[3], ` ${tile.dataset.text}`);
    });
    drawScale(p.scale, ["0.5×", "1.5×"]);
    p.summary = last === null ? "" : `Slowest now: rank ${last}, ${named(last)}, ${times(loads[last])} the mean load`
      + (work ? `; computes ${percent(work[last].computing)} of a step, the bar below each number` : "");
    if (!p.view.contains(document.activeElement) && !p.view.matches(":hover")) say(p.readout, p.summary);
    p.note(`${store.hello.cluster.ranks}, rows over the mean`);
    drawn();
  });
}
