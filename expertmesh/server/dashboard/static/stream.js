// The stream of events, as long as somebody looks: it ends when the tab is hidden, and begins anew when it is shown.

import { call, events } from "./access.js";

const AGAIN = [500, 1000, 2000, 5000]; // milliseconds until the next try

/** listen(name, data) for every event; status(word) where the connection changes: live, lost. */
export function follow(listen, status) {
  let current = null;
  let failures = 0;
  let timer = null;

  async function run() {
    const mine = (current = new AbortController());
    try {
      const answer = await call("dashboard/events", { signal: mine.signal });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      for await (const { name, data } of events(answer)) {
        failures = 0;
        status("live");
        listen(name, JSON.parse(data));
      }
    } catch (error) {
      if (mine.signal.aborted) return;
      if (!(error instanceof TypeError || /status/.test(error.message))) console.warn(error);
    }
    if (mine.signal.aborted) return;
    status("lost");
    timer = setTimeout(run, AGAIN[Math.min(failures, AGAIN.length - 1)]);
    failures += 1;
  }

  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    current?.abort();
    if (!document.hidden) run();
  });
  run();
}
