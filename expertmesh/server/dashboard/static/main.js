// The page: panels that draw what the store holds, and the stream that fills it.

import { startChat } from "./chat.js";
import { startCluster } from "./cluster.js";
import { startLoads } from "./loads.js";
import { health, startHealth, startLog, startRequests } from "./requests.js";
import { startSteps } from "./steps.js";
import { listen, redraw } from "./store.js";
import { follow } from "./stream.js";
import { onTheme, startTheme } from "./theme.js";
import { startTraffic } from "./traffic.js";
import { startTrends } from "./trends.js";

startTheme();
const panels = [startTrends, startCluster, startTraffic, startLoads, startSteps, startRequests, startLog, startChat];
for (const start of [startHealth, ...panels]) start();
onTheme(() => redraw());
follow(listen, (word) => { if (word === "lost") health("wait", "connecting"); });
