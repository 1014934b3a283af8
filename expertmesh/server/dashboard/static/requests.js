// Requests that run or wait, and what the balancer did.

import { byId, el, long, num, say, table } from "./dom.js";
import { panel } from "./panel.js";
import { on, store } from "./store.js";

function bar(done, most) {
  const inner = el("i", {});
  inner.style.width = `${Math.min(100, (100 * done) / Math.max(1, most))}%`;
  return el("span", { class: "progress", "aria-hidden": "true" }, inner);
}

function row(each) {
  const reading = each.computed < each.prompt;
  const doing = each.state === "waiting" ? "waiting" : reading ? "reading" : "writing";
  const left = Math.min(each.max_tokens, store.hello.model.max_context - each.prompt);
  return [each.id, el("span", { class: `state ${doing}`, text: doing }), each.group, long(each.age),
    `${num(each.prompt)}${each.cached ? ` (${num(each.cached)} cached)` : ""}`, `${num(each.output)} of ${num(left)}`,
    reading ? bar(each.computed, each.prompt) : bar(each.output, left), each.preemptions];
}

const HEADS = ["id", "state", "#group", "#age", "#prompt", "#output", "progress", "#preempted"];

export function startRequests() {
  const p = panel("requests");
  on(["state"], () => {
    const { list, running, waiting } = store.state.requests;
    const sum = (counts) => counts.reduce((total, x) => total + x, 0);
    const more = sum(running) + sum(waiting) - list.length;
    p.note(`${sum(running)} running, ${sum(waiting)} waiting${more > 0 ? `; the oldest ${list.length} are shown` : ""}`);
    const made = list.length
      ? table("Requests, the oldest first", HEADS, list.map(row))
      : el("p", { class: "empty", text: "Nothing runs. Ask the model something." });
    p.view.replaceChildren(made);
  });
}

export function startLog() {
  const p = panel("log");
  on(["log", "state"], () => {
    if (!store.state) return;
    const { balance } = store.state;
    p.note(balance
      ? `${balance.doing}; ${num(balance.looks)} looks, ${num(balance.plans)} plans, ${num(balance.moved)} experts moved`
      : "off");
    const made = [...store.log].reverse().map((event) => el("li", {},
      el("time", { text: new Date(1000 * event.time).toLocaleTimeString("en-GB") }), el("span", { text: event.text })));
    const empty = balance ? "Nothing was decided yet." : "Experts stay where they are: the server runs without --rebalance.";
    p.view.replaceChildren(...(made.length ? made : [el("li", { class: "empty", text: empty })]));
  });
}

const SILENCE = 10; // seconds without a word from the engine that are worth telling

export function startHealth() {
  let heard = 0;
  setInterval(() => {
    const silent = (performance.now() - heard) / 1000;
    if (heard && !document.hidden && !store.state.problem && silent > SILENCE) health("wait", `no news for ${long(silent)}`);
  }, 1000);
  on(["state", "hello"], () => {
    const { hello, state } = store;
    const { nodes, cards_per_node: cards, attention_tp: tp, exchange } = hello.cluster;
    say(byId("model"), hello.name);
    const many = nodes * cards > 1;
    const shape = `${nodes} node${nodes > 1 ? "s" : ""} × ${cards} card${cards > 1 ? "s" : ""}`;
    say(byId("shape"), many ? `${shape} · attention TP ${tp} · ${exchange}` : "one card");
    if (!state) return;
    heard = performance.now();
    say(byId("uptime"), `up ${long(state.uptime)}`);
    const silent = state.silence.filter((s) => s > 10).length;
    health(state.problem ? "bad" : silent ? "wait" : "good", state.problem ? "failed" : silent ? `${silent} silent` : "healthy");
    byId("alarm").hidden = !state.problem;
    say(byId("alarm"), state.problem ?? "");
  });
}

/** level: good, wait or bad. */
export function health(level, word) {
  byId("health").dataset.level = level;
  say(byId("health"), word);
}
