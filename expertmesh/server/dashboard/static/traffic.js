// Bytes from node to node, and what they are for.

import { bytes, el, table } from "./dom.js";
import { colour, css, ink } from "./palette.js";
import { panel, withTable } from "./panel.js";
import { on, store } from "./store.js";
import { theme } from "./theme.js";

const SAID = 10; // nodes up to which cells say their number

const rate = (size) => size / (store.loads.seconds || 1);

function matrix() {
  const { nodes } = store.loads;
  const most = Math.max(1, ...nodes.flat());
  const heads = el("tr", {}, el("th", { scope: "col", text: "from \\ to" }),
    ...nodes.map((_, to) => el("th", { scope: "col", text: `n${to}` })));
  const rows = nodes.map((row, from) => el("tr", {}, el("th", { scope: "row", text: `n${from}` }), ...row.map((size, to) => {
    const back = colour(theme(), Math.sqrt(size / most));
    const said = size ? `${bytes(rate(size))}/s` : "0";
    const cell = el("td", { title: `node ${from} to node ${to}: ${said}`, class: from === to ? "own" : null },
      nodes.length > SAID ? el("span", { class: "hidden", text: said }) : said);
    cell.style.background = css(back);
    cell.style.color = ink(back);
    return cell;
  })));
  return el("table", { class: "matrix" }, el("caption", { class: "hidden", text: "Bytes per second from node to node" }),
    el("thead", {}, heads), el("tbody", {}, ...rows));
}

function purposes() {
  const all = Object.entries(store.loads.bytes).sort((a, b) => b[1][0] + b[1][1] - a[1][0] - a[1][1]);
  const most = Math.max(1, ...all.map(([, [inside, across]]) => inside + across));
  return el("div", { class: "purposes" }, ...all.map(([name, [inside, across]]) => {
    const [own, far] = [el("i", { class: "inside" }), el("i", { class: "across" })];
    own.style.width = `${(100 * inside) / most}%`;
    far.style.width = `${(100 * across) / most}%`;
    return el("p", {}, el("span", { class: "word", text: name }), el("span", { class: "bar", "aria-hidden": "true" }, own, far),
      el("span", { class: "figure", text: `${bytes(rate(inside + across))}/s` }));
  }));
}

export function startTraffic() {
  const p = panel("traffic");
  const drawn = withTable(p, () => table("Bytes per second by purpose", ["purpose", "#in the node", "#across nodes"],
    Object.entries(store.loads.bytes).map(([name, sizes]) => [name, ...sizes.map((size) => `${bytes(rate(size))}/s`)])));
  on(["loads"], () => {
    const sums = Object.values(store.loads.bytes).reduce((sum, [a, b]) => [sum[0] + a, sum[1] + b], [0, 0]);
    if (!Object.keys(store.loads.bytes).length) {
      const text = store.hello.ranks.length > 1 ? "Nothing was sent yet." : "One card sends to nobody.";
      p.view.replaceChildren(el("p", { class: "empty", text }));
    } else {
      const key = el("p", { class: "key" }, el("span", {}, el("i", { class: "inside" }), "in the node"),
        el("span", {}, el("i", { class: "across" }), "across nodes"));
      p.view.replaceChildren(matrix(), purposes(), key);
    }
    p.note(`${bytes(rate(sums[0]))}/s in nodes, ${bytes(rate(sums[1]))}/s across`);
    drawn();
  });
}
