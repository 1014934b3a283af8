// Where the time of a step goes: in the engine, and on each card.

import { el, percent, short, svg, table } from "./dom.js";
import { panel, withTable } from "./panel.js";
import { named, nodeOf, on, rankTimes, store } from "./store.js";

const HEIGHT = 150;
const PARTS = [["attention", "attention and shared experts"], ["experts", "routed experts"], ["gather", "gather in the TP group"],
  ["dispatch", "dispatch"], ["combine", "combine"], ["waiting", "waiting for others"]];
const ENGINE = { schedule: "scheduling", ranks: "cards computing", balance: "moving experts", update: "text and bookkeeping" };

const said = (seconds) => short(seconds).join(" ").trim();
const total = (part) => Object.values(part).reduce((sum, x) => sum + x, 0);

function columns(ranks) {
  const most = Math.max(...ranks.map(total), 1e-9);
  const gap = 0.6; // of a column between nodes
  const place = ranks.map((_, rank) => rank + gap * nodeOf(rank));
  const width = place.at(-1) + 1;
  const shapes = ranks.flatMap((part, rank) => {
    let below = HEIGHT;
    return PARTS.map(([name, long]) => {
      const height = (part[name] / most) * (HEIGHT - 4);
      below -= height;
      return svg("rect", { class: `part-${name}`, x: place[rank] + 0.08, y: below.toFixed(2), width: 0.84, height: height.toFixed(2) },
        svg("title", { text: `rank ${rank}, ${named(rank)}: ${long} ${said(part[name])}` }));
    });
  });
  return svg("svg", { class: "columns", viewBox: `0 0 ${width} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    "aria-label": "Time of a step on each card by part; the table has the numbers" }, ...shapes);
}

function legend(ranks) {
  const mean = (name) => ranks.reduce((sum, part) => sum + part[name], 0) / ranks.length;
  const all = ranks.reduce((sum, part) => sum + total(part), 0) / ranks.length;
  return el("ul", { class: "legend" }, ...PARTS.map(([name, long]) => el("li", {}, el("i", { class: `part-${name}` }),
    el("span", { text: long }), el("b", { text: said(mean(name)) }), el("span", { class: "dim", text: percent(mean(name) / all) }))));
}

function engine(recent) {
  if (!recent.steps) return el("p", { class: "empty", text: "No step in the last seconds." });
  return el("p", { class: "engine" }, ...Object.entries(recent.step_seconds).map(([name, seconds]) =>
    el("span", {}, `${ENGINE[name] ?? name} `, el("b", { text: said(seconds / recent.steps) }))));
}

export function startSteps() {
  const p = panel("steps");
  const drawn = withTable(p, () => {
    const ranks = rankTimes();
    if (!ranks) return engine(store.state.recent);
    return table("Time of a step on each card", ["card", ...PARTS.map(([, long]) => `#${long}`)],
      ranks.map((part, rank) => [`rank ${rank}, ${named(rank)}`, ...PARTS.map(([name]) => said(part[name]))]));
  });
  on(["state"], () => {
    const { recent, parts } = store.state;
    const ranks = rankTimes();
    const picture = ranks ? [el("div", { class: "split" }, columns(ranks), legend(ranks))] : [];
    p.view.replaceChildren(engine(recent), ...picture);
    p.note(ranks ? `mean of ${parts.recent_steps} measured steps, one column for each card` : "");
    drawn();
  });
}
