// Light or dark: as the system says, until somebody chooses.

import { byId } from "./dom.js";

const KEY = "expertmesh.theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const listeners = [];

export function theme() {
  return document.documentElement.dataset.theme;
}

export function onTheme(listener) {
  listeners.push(listener);
}

function apply(chosen) {
  const name = chosen ?? (system.matches ? "dark" : "light");
  document.documentElement.dataset.theme = name;
  const button = byId("theme");
  button.textContent = name === "dark" ? "☀" : "☾";
  button.setAttribute("aria-label", name === "dark" ? "Light theme" : "Dark theme");
  button.title = button.getAttribute("aria-label");
  for (const listener of listeners) listener();
}

export function startTheme() {
  apply(localStorage.getItem(KEY));
  system.addEventListener("change", () => apply(localStorage.getItem(KEY)));
  byId("theme").addEventListener("click", () => {
    const name = theme() === "dark" ? "light" : "dark";
    localStorage.setItem(KEY, name);
    apply(name);
  });
}
