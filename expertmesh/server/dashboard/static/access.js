// Calls to the server. Where it wants an API key, the page asks for one, and keeps it as long as the tab is open.

import { byId } from "./dom.js";

const KEY = "expertmesh.key";
let asking = null;

/** As fetch, with the key; a path is seen from the server's root. */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const answer = await fetch(new URL(`../${path}`, import.meta.url), { ...options, headers });
    if (answer.status !== 401) return answer;
    await ask(key !== null);
  }
}

/** One question at a time, however many calls wait for the key. */
function ask(refused) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key");
    byId("key-text").textContent = refused
      ? "The server refused this key. Give another one; it is kept until this tab is closed."
      : "This server answers only with a key. It is kept until this tab is closed.";
    dialog.addEventListener("close", () => {
      const value = byId("key-value").value.trim();
      byId("key-value").value = "";
      if (value) sessionStorage.setItem(KEY, value);
      asking = null;
      resolve();
    }, { once: true });
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.showModal();
  });
  return asking;
}

/** Server-sent events of an answer, one by one: {name, data}. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = { name: "message", data: "" };
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) event.name = line.slice(7);
        if (line.startsWith("data: ")) event.data += line.slice(6);
      }
      yield event;
    }
  }
}
