// The page's clock: asks /status every two seconds and the migration routes every ten, hands the answers to the
// sections, and says aloud (role=status) only what changed. Which routes there are is read from /openapi.json, so that a
// part that is not there is never asked for. A hidden page does not ask; a paused one neither.

import { ask } from "./ask.js";
import { byId, count, put } from "./dom.js";
import { letters, startLetters } from "./letters.js";
import { plot } from "./plots.js";
import * as sections from "./sections.js";

const STATUS_EVERY = 2_000; // milliseconds
const REST_EVERY = 10_000;
const REST = {
  migration: "/api/migration",
  fleet: "/api/migration/fleet",
  history: "/api/migration/history",
  validation: "/api/migration/validation",
};
const ABSENT = { state: "absent", body: null, error: "" };

let routes = null; // paths that this sidecar serves; null: not known
let rest = Object.fromEntries(Object.keys(REST).map((name) => [name, ABSENT]));
let restAt = -Infinity;
let last = null; // the last /status
let lostAt = null;
let held = false;
let wake = () => {};

const clock = () => new Date().toISOString().slice(11, 19);

function announce(text) {
  put(byId("announce"), text);
}

async function learnRoutes() {
  const answer = await ask("openapi.json");
  if (answer.ok) routes = new Set(Object.keys(answer.body.paths || {}));
}

// A route that wants a token which this page does not have is not asked again.
async function askRest() {
  await Promise.all(
    Object.entries(REST).map(async ([name, path]) => {
      if (rest[name].state === "closed") return;
      if (!routes.has(path)) {
        rest[name] = ABSENT;
        return;
      }
      const answer = await ask(path.slice(1));
      const state = answer.ok ? "answered" : answer.status === 401 || answer.status === 403 ? "closed" : "failed";
      rest[name] = { state, body: answer.ok ? answer.body : rest[name].body, error: answer.error };
    }),
  );
}

async function cycle() {
  const answer = await ask("status");
  const at = performance.now();
  if (!answer.ok) return lose(answer.error);
  if (lostAt !== null) {
    announce("The sidecar answers again");
    routes = null; // it may be another version
    lostAt = null;
  }
  document.documentElement.dataset.link = "up";
  if (routes === null) await learnRoutes();
  if (routes !== null && at - restAt >= REST_EVERY) {
    await askRest();
    restAt = at;
  }
  tell(last, answer.body);
  last = answer.body;
  draw(at);
}

function lose(error) {
  if (lostAt === null) {
    lostAt = clock();
    announce(`The sidecar does not answer: ${error}`);
  }
  document.documentElement.dataset.link = "lost";
  put(byId("fresh"), `No answer since ${lostAt} UTC`);
  sections.attention(last, `The sidecar does not answer (${error}) since ${lostAt} UTC; what stands below is older.`, []);
}

function draw(at) {
  put(byId("instance"), `instance ${last.instance}`);
  document.title = `${last.phase.applied} · ${last.instance} · Hybrid log sidecar`;
  put(byId("fresh"), `As of ${clock()} UTC`);
  const failed = Object.entries(rest)
    .filter(([, answer]) => answer.state === "failed")
    .map(([name, answer]) => `${REST[name]} did not answer: ${answer.error}.`);
  sections.attention(last, "", failed, rest.migration.body?.forced);
  sections.phase(last, rest.migration);
  sections.stores(last);
  plot(byId("plots"), last.stores, at);
  sections.divergence(last);
  sections.gaps(last);
  sections.validation(rest.validation);
  letters(last.spool.dead_letters, routes?.has("/api/control/dead-letters/redrive") ?? false);
  sections.history(last, rest.history);
  sections.fleet(last, rest.fleet);
  sections.buffer(last);
}

// What a screen reader is told: changes of state, never figures that move all the time.
function tell(before, now) {
  if (!before) return;
  const said = [];
  if (before.phase.applied !== now.phase.applied) said.push(`Applied phase: ${now.phase.applied}`);
  if (before.phase.desired !== now.phase.desired) said.push(`Desired phase: ${now.phase.desired}`);
  if (before.phase.hold?.gate !== now.phase.hold?.gate && now.phase.hold) said.push(`Held by ${now.phase.hold.gate}`);
  for (const [name, store] of Object.entries(now.stores)) {
    if (before.stores[name]?.state !== store.state) said.push(`${name} is ${store.state}`);
    const more = store.account.dead_lettered - (before.stores[name]?.account.dead_lettered ?? 0);
    if (more > 0) said.push(`${count(more)} more dead letters for ${name}`);
  }
  if (said.length) announce(said.join(". "));
}

function sleep(milliseconds) {
  return new Promise((resolve) => {
    wake = resolve;
    setTimeout(resolve, milliseconds);
  });
}

function refresh() {
  restAt = -Infinity;
  wake();
}

byId("hold").addEventListener("click", () => {
  held = !held;
  byId("hold").setAttribute("aria-pressed", String(held));
  if (held) put(byId("fresh"), `Paused; as of ${clock()} UTC`);
  else refresh();
});
document.addEventListener("visibilitychange", () => document.hidden || refresh());
startLetters(refresh);

for (;;) {
  try {
    if (!held && !document.hidden) await cycle();
  } catch (defect) {
    console.error(defect);
    put(byId("fresh"), "An answer that this page does not understand; reload it");
  }
  await sleep(STATUS_EVERY);
}
