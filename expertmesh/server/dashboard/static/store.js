// What the stream has told so far, in the form in which the panels read it.

const POINTS = 600;
const FINE = 1024; // as server/dashboard/feed.py writes ratios
const COARSE = 51;

export const store = { hello: null, state: null, loads: null, placement: null, log: [], history: {} };
const listeners = [];

/** Call `draw` after events of these names. */
export function on(names, draw) {
  listeners.push({ names, draw });
}

export function listen(name, data) {
  if (name === "hello") store.hello = data;
  if (name === "history") store.history = data;
  if (name === "log") store.log = data;
  if (name === "loads") store.loads = withLoads(data);
  if (name === "placement") store.placement = withPlacement(data);
  if (name === "state") {
    store.state = data;
    addPoint(data.point);
  }
  redraw([name]);
}

export function redraw(names) {
  if (!store.hello) return;
  for (const each of listeners) {
    if (!names || each.names.some((name) => names.includes(name))) each.draw();
  }
}

function addPoint(point) {
  if (!point || point.time === store.history.time?.at(-1)) return;
  for (const [name, value] of Object.entries(point)) {
    const values = (store.history[name] ??= []);
    values.push(value);
    if (values.length > POINTS) values.shift();
  }
}

function raw(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
}

function withLoads(data) {
  const cards = Float32Array.from(new Uint16Array(raw(data.cards)), (x) => x / FINE);
  const experts = Float32Array.from(new Uint8Array(raw(data.experts)), (x) => (x / COARSE) ** 2);
  return { ...data, cards, experts };
}

/** With `homes`: for each layer and expert the ranks that hold it. */
function withPlacement({ version, shape: [layers, ranks, slots], slots: text }) {
  const held = new Int16Array(raw(text));
  const homes = Array.from({ length: layers }, (_, layer) => {
    const of = new Map();
    for (let rank = 0; rank < ranks; rank += 1) {
      for (let slot = 0; slot < slots; slot += 1) {
        const expert = held[(layer * ranks + rank) * slots + slot];
        if (expert >= 0) of.set(expert, [...(of.get(expert) ?? []), rank]);
      }
    }
    return of;
  });
  return { version, homes };
}

// What several panels ask

export const ranks = () => store.hello.cluster.nodes * store.hello.cluster.cards_per_node;
export const nodeOf = (rank) => Math.floor(rank / store.hello.cluster.cards_per_node);
export const cardOf = (rank) => rank % store.hello.cluster.cards_per_node;
export const named = (rank) => `node ${nodeOf(rank)} card ${cardOf(rank)}`;

/** Load of each card over the mean, all layers together. */
export function cardLoads() {
  const { loads } = store;
  const total = new Array(ranks()).fill(0);
  const rows = loads.rows.reduce((sum, x) => sum + x, 0);
  if (!rows) return total.fill(null);
  loads.layers.forEach((_, layer) => {
    for (let rank = 0; rank < total.length; rank += 1) {
      total[rank] += (loads.cards[layer * total.length + rank] * loads.rows[layer]) / rows;
    }
  });
  return total;
}

/** Seconds a measured step of each rank: {attention, experts, transfer, waiting}, or null where none was measured.
 * Whoever is least in collectives waits for nobody; what others are longer in them is waiting. */
export function rankTimes() {
  const { names, recent, recent_steps: steps } = store.state.parts;
  if (!steps || !recent.length) return null;
  const of = recent.map((each) => Object.fromEntries(names.map((name, i) => [name, each[i] / steps])));
  const inside = of.map((part) => part.gather + part.dispatch + part.combine);
  const least = Math.min(...inside);
  return of.map((part, rank) => {
    const share = inside[rank] ? least / inside[rank] : 0;
    return {
      attention: part.attention, experts: part.experts, gather: part.gather * share, dispatch: part.dispatch * share,
      combine: part.combine * share, waiting: inside[rank] - least,
    };
  });
}
