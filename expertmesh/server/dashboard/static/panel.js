// What all panels have: a note beside the title, and where a picture is shown, a switch to a table of its numbers.

import { byId, el, say } from "./dom.js";

export function panel(id) {
  const section = byId(id);
  const note = section.querySelector(".note");
  return {
    section,
    view: section.querySelector(".view"),
    readout: section.querySelector(".readout"),
    scale: section.querySelector(".scale"),
    note: (text) => say(note, text),
  };
}

/** Adds the switch. make(): the table; drawn() has to be called whenever the picture is new. */
export function withTable(p, make) {
  const title = p.section.querySelector("h2").textContent;
  const place = el("div", { class: "alt scroll", hidden: true, tabindex: "0", role: "region", "aria-label": `Table: ${title}` });
  const button = el("button", {
    type: "button", class: "plain switch", "aria-pressed": "false", "aria-label": `${title} as a table`, text: "Table",
  });
  const drawn = () => {
    if (place.hidden) return;
    const { scrollTop, scrollLeft } = place;
    place.replaceChildren(make());
    place.scrollTo(scrollLeft, scrollTop);
  };
  button.addEventListener("click", () => {
    place.hidden = !place.hidden;
    button.setAttribute("aria-pressed", String(!place.hidden));
    p.section.classList.toggle("as-table", !place.hidden);
    drawn();
  });
  p.section.querySelector("header").append(button);
  p.view.after(place);
  return drawn;
}

/** One tab stop for many things, arrow keys between them. */
export function roving(container, selector, columns) {
  container.addEventListener("keydown", (event) => {
    const all = [...container.querySelectorAll(selector)];
    const at = all.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : at + (step ?? NaN);
    if (at < 0 || !all[to]) return;
    event.preventDefault();
    all[at].tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  });
}
