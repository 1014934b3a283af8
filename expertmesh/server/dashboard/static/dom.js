// Elements, and numbers as people read them.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

export const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
export const byId = (id) => document.getElementById(id);

/** Set a text only where it differs, so that screen readers hear news alone. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A table; columns whose heads begin with "#" hold numbers. */
export function table(caption, heads, rows) {
  const names = heads.map((head) => head.replace(/^#/, ""));
  const kind = (i) => (heads[i].startsWith("#") ? "number" : null);
  return el("table", {},
    el("caption", { class: "hidden", text: caption }),
    el("thead", {}, el("tr", {}, ...names.map((name, i) => el("th", { scope: "col", class: kind(i), text: name })))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, i) => {
      const made = el(i ? "td" : "th", { class: kind(i), scope: i ? null : "row" });
      made.append(cell instanceof Node ? cell : String(cell));
      return made;
    })))));
}

/** Three digits that count. */
export function num(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${num(value / 1e6)} M`;
  if (size >= 1e4) return `${num(value / 1e3)} k`;
  if (size >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return value.toFixed(size >= 10 ? 1 : 2);
}

export const times = (ratio) => (ratio === null || ratio === undefined ? "–" : `${ratio.toFixed(2)}×`);
export const percent = (part) => `${(100 * part).toFixed(part > 0 && part < 0.0995 ? 1 : 0)} %`;

const BYTES = ["B", "kB", "MB", "GB", "TB", "PB"];
export function bytes(size) {
  let step = 0;
  while (size >= 1000 && step < BYTES.length - 1) { size /= 1000; step += 1; }
  return `${step && size < 100 ? size.toFixed(1) : Math.round(size)} ${BYTES[step]}`;
}

/** [number, unit] of a time that is short as a rule. */
export function short(seconds) {
  if (seconds === null || seconds === undefined) return ["–", ""];
  if (seconds < 0.001) return [num(1e6 * seconds), "µs"];
  return seconds < 1 ? [num(1e3 * seconds), "ms"] : [num(seconds), "s"];
}

export function long(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor(s / 60) % 60} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor(s / 3600) % 24} h`;
}
