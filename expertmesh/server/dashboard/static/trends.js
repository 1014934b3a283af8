// The course of the main figures: a number, and its line.

import { el, num, percent, say, short, svg, table, times } from "./dom.js";
import { panel, withTable } from "./panel.js";
import { on, store } from "./store.js";

const [WIDTH, HEIGHT] = [240, 46];
const LISTED = 20;
const time = (value) => short(value).join(" ").trim();
const last = (name) => store.history[name]?.at(-1) ?? null;
const slow = (name) => (last(name) === null ? "no request lately" : `95th percentile ${time(last(name))}`);

// lines: the first is drawn full, a second one thin; base: where the axis begins.
const TILES = [
  { name: "Generation", lines: ["generated"], value: rate, sub: () => `${num(store.state.tokens.generated)} so far` },
  { name: "Prompts", lines: ["prompt"], value: rate, sub: hits },
  { name: "Requests", lines: ["running", "waiting"], value: (x) => [num(x), "running"], sub: others },
  { name: "Time to first token", lines: ["ttft_p50", "ttft_p95"], value: short, sub: () => slow("ttft_p95") },
  { name: "Time per token", lines: ["tpot_p50", "tpot_p95"], value: short, sub: () => slow("tpot_p95") },
  { name: "Step", lines: ["step"], value: short, sub: () => `${num(store.state.steps.count)} so far` },
  { name: "Imbalance", lines: ["imbalance"], base: 1, value: (x) => [times(x), ""], sub: () => "fullest card over the mean" },
  { name: "Cache", lines: ["cache"], top: 1, value: (x) => [x === null ? "–" : percent(x), ""], sub: pages },
];

function rate(x) {
  return [num(x), "tokens/s"];
}

function others() {
  const finished = Object.values(store.state.requests.finished).reduce((sum, x) => sum + x, 0);
  return `${num(last("waiting"))} waiting, ${num(finished)} finished`;
}

function hits() {
  const { prompt, cached } = store.state.tokens;
  return prompt ? `${percent(cached / prompt)} found in the cache` : "none yet";
}

function pages() {
  const { pages: all, used } = store.state.cache;
  const sum = (list) => list.reduce((total, x) => total + x, 0);
  return `${num(sum(used))} of ${num(sum(all))} pages`;
}

/** The path of a line, broken where there is no number. */
function path(values, low, high, count) {
  let text = "";
  let open = false;
  values.forEach((value, i) => {
    if (value === null) { open = false; return; }
    const x = WIDTH - ((values.length - 1 - i) * WIDTH) / Math.max(1, count - 1);
    const y = HEIGHT - 2 - ((value - low) / (high - low || 1)) * (HEIGHT - 6);
    text += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    open = true;
  });
  return text;
}

function build(tile) {
  tile.number = el("span", { class: "number" });
  tile.unit = el("span", { class: "unit" });
  tile.under = el("p", { class: "sub" });
  tile.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  tile.picture.addEventListener("pointermove", (event) => {
    const box = tile.picture.getBoundingClientRect();
    tile.at = Math.round((1 - (event.clientX - box.left) / box.width) * Math.max(1, tile.count - 1));
    draw(tile);
  });
  tile.picture.addEventListener("pointerleave", () => { tile.at = null; draw(tile); });
  return el("article", { class: "tile" }, el("h3", { text: tile.name }),
    el("p", { class: "value" }, tile.number, tile.unit), tile.under, tile.picture);
}

function draw(tile) {
  const series = tile.lines.map((name) => store.history[name] ?? []);
  const seen = series.flat().filter((x) => x !== null);
  const low = tile.base ?? 0;
  const high = tile.top ?? Math.max(low + 1e-9, ...seen) * 1.05;
  tile.count = Math.max(30, series[0].length);
  const back = tile.at ?? 0;
  const [number, unit] = tile.value(series[0].at(-1 - back) ?? null);
  say(tile.number, number);
  say(tile.unit, unit ? ` ${unit}` : "");
  say(tile.under, back ? `${ago(back)} ago` : tile.sub());
  const line = path(series[0], low, high, tile.count);
  const shapes = [svg("path", { class: "line", d: line })];
  if (line && !series[0].includes(null)) {
    const begin = WIDTH - ((series[0].length - 1) * WIDTH) / Math.max(1, tile.count - 1);
    shapes.unshift(svg("path", { class: "area", d: `${line}L${WIDTH} ${HEIGHT}L${begin.toFixed(1)} ${HEIGHT}Z` }));
  }
  if (series[1]) shapes.push(svg("path", { class: "second", d: path(series[1], low, high, tile.count) }));
  if (back) {
    const x = WIDTH - (back * WIDTH) / Math.max(1, tile.count - 1);
    shapes.push(svg("path", { class: "cross", d: `M${x.toFixed(1)} 0V${HEIGHT}` }));
  }
  tile.picture.replaceChildren(...shapes);
}

function ago(back) {
  const times = store.history.time;
  return `${Math.round(times.at(-1) - (times.at(-1 - back) ?? times[0]))} s`;
}

export function startTrends() {
  const p = panel("trends");
  p.view.append(...TILES.map(build));
  const drawn = withTable(p, () => {
    const count = store.history.time?.length ?? 0;
    const step = Math.max(1, Math.floor(count / LISTED));
    const rows = [];
    for (let i = count - 1; i >= 0; i -= step) {
      rows.push([new Date(1000 * store.history.time[i]).toLocaleTimeString("en-GB"),
        ...TILES.flatMap(({ lines, value }) => lines.map((name) => value(store.history[name][i]).join(" ").trim()))]);
    }
    const heads = TILES.flatMap(({ name, lines }) => (lines.length > 1 ? [`#${name}, median`, "#95th percentile"] : [`#${name}`]));
    heads.splice(heads.indexOf("#Requests, median"), 2, "#Running", "#Waiting");
    return table("The main figures over time", ["time", ...heads], rows);
  });
  on(["state", "history"], () => {
    if (!store.state) return;
    TILES.forEach(draw);
    drawn();
  });
}
