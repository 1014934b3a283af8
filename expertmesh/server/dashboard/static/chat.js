// A conversation with the model, through the same API as everybody's.

import { call, events } from "./access.js";
import { byId, el, num } from "./dom.js";
import { panel } from "./panel.js";
import { store } from "./store.js";

const MOST = 512; // tokens of an answer
const messages = [];
let running = null;

/** What an empty conversation shows. */
function empty() {
  const text = "Send a message to see how the cluster answers it. It goes the way of every client’s, and is in the figures above.";
  byId("talk").replaceChildren(el("p", { class: "hint", text }));
}

function bubble(role) {
  byId("talk").querySelector(".hint")?.remove();
  const text = el("div", { class: "text" });
  const name = role === "user" ? "You" : store.hello?.name ?? "Model";
  const made = el("div", { class: `said ${role}` }, el("p", { class: "who", text: name }), text);
  byId("talk").append(made);
  return { made, text };
}

/** Thoughts come in a field of their own, or in the text up to </think>; some templates open it in the prompt. */
function split(answer) {
  const found = /^(?:\s*<think>)?([\s\S]*?)<\/think>([\s\S]*)$/.exec(answer.content)
    ?? /^\s*<think>([\s\S]*)()$/.exec(answer.content);
  if (!found) return answer;
  return { thought: answer.thought + found[1], content: found[2].trimStart() };
}

function show(place, answer) {
  const { thought, content } = split(answer);
  if (thought && !place.thoughts) {
    place.thoughts = el("div", { class: "text" });
    place.text.before(el("details", {}, el("summary", { text: "Reasoning" }), place.thoughts));
  }
  if (thought) place.thoughts.textContent = thought.trim();
  place.text.textContent = content;
  const talk = byId("talk");
  if (talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80) talk.scrollTop = talk.scrollHeight;
}

async function stream(place, signal) {
  const answer = { thought: "", content: "" };
  const body = { model: store.hello.name, messages, stream: true, max_tokens: MOST };
  const reply = await call("v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!reply.ok) throw new Error((await reply.json()).error?.message ?? `status ${reply.status}`);
  try {
    for await (const { data } of events(reply)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0]?.delta ?? {};
      answer.thought += delta.reasoning_content ?? "";
      answer.content += delta.content ?? "";
      show(place, answer);
    }
  } finally {
    if (answer.content) messages.push({ role: "assistant", content: split(answer).content });
  }
}

function busy(yes) {
  byId("send").hidden = yes;
  byId("stop").hidden = !yes;
  byId("talk").setAttribute("aria-busy", String(yes));
}

async function send(p) {
  const question = byId("question").value.trim();
  if (!question || running || !store.hello) return;
  byId("question").value = "";
  messages.push({ role: "user", content: question });
  bubble("user").text.textContent = question;
  const place = bubble("assistant");
  const begin = performance.now();
  running = new AbortController();
  busy(true);
  try {
    await stream(place, running.signal);
    p.note(`answered in ${num((performance.now() - begin) / 1000)} s`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    place.made.append(el("p", { class: stopped ? "dim" : "wrong", text: stopped ? "stopped" : error.message }));
  } finally {
    running = null;
    busy(false);
  }
}

export function startChat() {
  const p = panel("chat");
  empty();
  byId("ask").addEventListener("submit", (event) => { event.preventDefault(); send(p); });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send(p);
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", () => {
    running?.abort();
    messages.length = 0;
    empty();
    p.note("");
    byId("question").focus();
  });
}
