// One function for each section: what /status and the migration routes say, put into the elements of index.html.
// A part that this sidecar does not have says "not enabled"; one that did not answer says so, with its own words.

import { age, byId, bytes, count, facts, fill, moment, problems, put, show, yes } from "./dom.js";

const PHASES = [
  ["sql_only", "writes and reads PostgreSQL"],
  ["dual_write", "writes both, reads PostgreSQL"],
  ["dual_write_read_dynamo", "requires both, reads DynamoDB"],
  ["dynamo_only", "writes and reads DynamoDB"],
];
const STATES = { up: "good", throttled: "warn", down: "bad", blocked: "bad", waiting: "bad", paused: "warn" };
const LINES = 20; // of the history
const PRESENCES = { live: "good", silent: "warn", gone: "bad", drained: "idle" };

const label = (phase) => (typeof phase === "number" ? PHASES[phase]?.[0] : phase) || "none";

export function phase(status, migration) {
  const { phase: now } = status;
  const steps = byId("steps");
  PHASES.forEach(([name, text], number) => {
    let step = steps.children[number];
    if (!step) {
      step = document.createElement("li");
      step.append(document.createElement("b"), document.createElement("span"));
      steps.append(step);
    }
    const tags = [name === now.applied && "applied", name === now.desired && "desired"].filter(Boolean);
    put(step.firstElementChild, `${number} ${name}${tags.length ? ` · ${tags.join(" and ")}` : ""}`);
    put(step.lastElementChild, text);
    if (name === now.applied) step.setAttribute("aria-current", "step");
    else step.removeAttribute("aria-current");
    step.className = name === now.desired && name !== now.applied ? "wished" : "";
  });
  put(byId("applied"), now.applied);
  put(byId("desired"), now.desired);
  put(byId("epoch"), now.epoch ?? "none stated");
  put(byId("f-sql"), yes(now.flags.writes_to_sql));
  put(byId("f-dynamodb"), yes(now.flags.writes_to_dynamodb));
  put(byId("f-both"), yes(now.flags.require_both_writes));
  put(byId("f-reads"), now.flags.reads_from_dynamodb ? "DynamoDB" : "PostgreSQL");
  gates(now, migration);
}

function gates(now, migration) {
  const known = migration.body?.gates || [];
  const rows = known.map((gate) => gateRow(gate, gate.ok));
  for (const hold of now.fleet?.holds || (now.hold ? [now.hold] : [])) {
    if (!known.some((gate) => gate.gate === hold.gate)) rows.push(gateRow(hold, false));
  }
  fill(byId("gates"), rows);
  const none = byId("gates-none");
  const follows = now.fleet && !now.fleet.leads;
  show(none, rows.length === 0 || migration.state !== "answered" || follows);
  if (migration.state === "absent") put(none, "Evidence of gates: not enabled in this sidecar; a step that is held names what holds it.");
  else if (migration.state === "failed") put(none, `The gates did not answer: ${migration.error}`);
  else if (follows) put(none, elsewhere(now.fleet));
  else put(none, "No gate is looked at: no step is due.");
}

// Of an instance that does not lead: who looks at the gates, and what it says.
function elsewhere(fleet) {
  if (fleet.fenced) return "This instance is fenced: it does not know who looks at the gates. Ask another one.";
  if (!fleet.leader) return "It is not known here who leads the fleet and looks at the gates.";
  const said = fleet.holds.length ? "this is what it says holds the step" : "it says that nothing holds a step";
  return `${fleet.leader} leads the fleet and looks at the gates: ${said}.`;
}

function gateRow(gate, ok) {
  const verdict = ok === true ? { text: "green", mark: "good" } : { text: "red", mark: "bad" };
  if (ok === true && gate.warning) Object.assign(verdict, { text: "green, with a warning", mark: "warn" });
  const since = gate.since ?? gate.since_us;
  return { key: gate.gate, cells: [gate.gate, verdict, gate.observed, gate.required, moment(since)] };
}

export function stores(status) {
  const rows = Object.entries(status.stores).map(([name, store]) => {
    const { account } = store;
    const why = store.reason ? `${store.state}: ${store.reason}` : store.state;
    return {
      key: name,
      cells: [
        name,
        { text: `${why} (for ${age(store.since_seconds)})`, mark: STATES[store.state] || "idle" },
        `${count(account.pending)} (${bytes(account.pending_bytes)})`,
        age(store.oldest_pending_age_seconds),
        count(account.owed),
        count(account.delivered),
        count(account.dead_lettered),
        count(account.released),
        count(account.discarded),
        count(account.quarantined),
        orders(status.orders?.[name]),
      ],
    };
  });
  fill(byId("stores"), rows);
}

function orders(given) {
  const said = [];
  if (given?.paused) said.push(`paused by ${given.paused.by}: ${given.paused.reason}`);
  if (given?.rate) said.push(`at most ${given.rate.records_per_second} records/s by ${given.rate.by}: ${given.rate.reason}`);
  return said.join("; ") || "none";
}

export function divergence(status) {
  const rows = status.spool.divergence.map((pair) => ({
    key: `${pair.present_in}/${pair.missing_from}`,
    cells: [pair.present_in, pair.missing_from, { text: count(pair.records), mark: pair.records ? "warn" : "good" }],
  }));
  fill(byId("divergence"), rows);
}

export function gaps(status) {
  const rows = status.gaps.map((gap) => ({ key: `${gap.store}/${gap.kind}`, cells: [gap.store, gap.kind, count(gap.records)] }));
  fill(byId("gaps"), rows);
  show(byId("gaps-none"), rows.length === 0);
  put(byId("gaps-none"), "None.");
}

const OUTCOMES = { clean: "good", divergent: "bad", failed: "bad", undecided: "warn", stopped: "warn", running: "idle" };

export function validation(answer) {
  const { body, state, error } = answer;
  const last = body?.runs?.find((run) => run.finished_at);
  const said = {
    absent: "Not enabled in this sidecar.",
    closed: "Not shown: it needs the token of reads. Ask GET /api/migration/validation.",
    failed: `It did not answer: ${error}`,
    answered: last ? "" : "No validation has been finished yet.",
  }[state];
  put(byId("validation-none"), said);
  show(byId("validation-none"), Boolean(said));
  show(byId("validation"), Boolean(body));
  if (!body) return;
  const { days, tail, running } = body;
  const pairs = [];
  if (last) {
    const found = last.error || last.discrepancies.join("; ") || "no difference";
    pairs.push(
      ["Last run", { text: last.outcome, mark: OUTCOMES[last.outcome] || "idle" }],
      ["Found", found],
      ["Window (UTC)", `${last.start ? moment(last.start) : "everything"} to ${moment(last.end)}`],
      ["Records", `${count(last.sql_record_count)} in PostgreSQL, ${count(last.dynamo_db_record_count)} in DynamoDB`],
      ["Finished (UTC)", moment(last.finished_at)],
      ["Compared", last.mode],
    );
  }
  if (tail) {
    const clean = tail.unexplained === 0;
    const text = clean ? `clean, ${count(tail.compared)} compared` : `${count(tail.unexplained)} unexplained of ${count(tail.compared)}`;
    pairs.push(["Newest records", { text, mark: clean ? "good" : "bad" }]);
  }
  if (days) {
    const all = days.clean === days.known;
    pairs.push(["Days clean", { text: `${count(days.clean)} of ${count(days.known)}`, mark: all ? "good" : "warn" }]);
    if (days.unclean.length) pairs.push(["Days not clean", some(days.unclean)]);
    if (days.stale.length) pairs.push(["Days to validate again", some(days.stale)]);
  }
  if (running) pairs.push(["Running here", running.request ? "a request" : running.tail ? "the newest records" : "nothing"]);
  facts(byId("validation"), pairs);
}

const some = (list) => (list.length > 5 ? `${list.slice(0, 5).join(", ")} and ${list.length - 5} more` : list.join(", "));

// lines: of /api/migration/history, or of /status where that route did not answer.
export function history(status, answer) {
  const lines = answer.body?.history || status.phase.history.toReversed();
  const rows = lines.slice(0, LINES).map((line) => {
    const at = line.at ?? line.at_us;
    const [from, to] = [line.from ?? line.source, line.to ?? line.target];
    const done = line.action ? `${line.action}: ${line.outcome}` : "step: done";
    const key = [at, done, line.id, from, to].join("/");
    return { key, cells: [moment(at), done, label(from), label(to), line.epoch, line.by, line.why, evidence(line)] };
  });
  fill(byId("history"), rows);
  show(byId("history-none"), rows.length === 0);
}

function evidence(line) {
  const seen = Array.isArray(line.evidence)
    ? line.evidence.map((one) => `${one.gate}: ${one.observed}`)
    : [line.evidence, ...(line.overridden || [])].filter(Boolean);
  if (line.forced) return { text: ["forced", ...seen].join("; "), mark: "warn" };
  if (line.outcome === "refused") return { text: seen.join("; ") || "refused", mark: "bad" };
  return { text: seen.join("; ") || "–", mark: "" };
}

export function fleet(status, answer) {
  const own = status.phase.fleet;
  show(byId("fleet-facts"), Boolean(own));
  if (own) {
    const counted = Object.entries(own.instances).map(([presence, n]) => `${count(n)} ${presence}`);
    facts(byId("fleet-facts"), [
      ["The record says", own.record ? `${label(own.record.phase)}, epoch ${own.record.epoch}` : "no record seen yet"],
      ["Decided by", own.record?.by],
      ["This instance", own.fenced ? { text: "fenced: it does not know the phase", mark: "bad" } : { text: own.leads ? "leads" : "follows", mark: "good" }],
      ["Led by", own.leads ? "this instance" : own.leader || "not known here"],
      ["Has applied epoch", own.claimed_epoch],
      ["Instances", counted.join(", ") || "only the one that leads knows"],
    ]);
  }
  const members = (own && answer.body?.instances) || [];
  fill(byId("fleet"), members.map(member));
  const said = [];
  if (!own) said.push("Not enabled: this sidecar follows its own configuration and knows of no other.");
  if (answer.state === "failed") said.push(`The fleet did not answer: ${answer.error}`);
  for (const [store, why] of Object.entries(answer.body?.unreachable || {})) said.push(`Not read from ${store}: ${why}.`);
  put(byId("fleet-none"), said.join(" "));
  show(byId("fleet-none"), said.length > 0);
}

function member(one) {
  const oldest = Math.max(0, ...Object.values(one.oldest_pending_age_seconds || {}));
  return {
    key: `${one.instance}/${one.incarnation}`,
    cells: [
      one.instance,
      { text: one.fenced ? `${one.state}, fenced` : one.leads ? `${one.state}, leads` : one.state, mark: one.fenced ? "warn" : PRESENCES[one.state] || "idle" },
      label(one.phase),
      one.epoch,
      count(total(one.pending)),
      age(oldest),
      count(total(one.dead_letters)),
      one.version,
      `${age(one.unchanged_seconds)} ago`,
    ],
  };
}

const total = (by) => Object.values(by || {}).reduce((sum, n) => sum + n, 0);

export function buffer(status) {
  const { spool, configuration: file } = status;
  const share = spool.capacity_bytes ? Math.round((100 * spool.bytes_used) / spool.capacity_bytes) : 0;
  facts(byId("buffer"), [
    ["Takes records", spool.accepting ? { text: "yes", mark: "good" } : { text: `no: ${spool.busy_reason}`, mark: "bad" }],
    ["Used", `${bytes(spool.bytes_used)} of ${bytes(spool.capacity_bytes)} (${share} %)`],
    ["Disk free", bytes(spool.free_disk_bytes)],
    ["Last commit", `${(spool.commit_seconds_last * 1000).toFixed(1)} ms`],
    ["Quarantined", count(spool.quarantined_records)],
    ["Configuration", file.last_reload_successful ? { text: "in force", mark: "good" } : { text: "the file was refused; the last good one is in force", mark: "bad" }],
    ["Its hash", file.sha256.slice(0, 12)],
    ["Needs a restart", file.restart_required.join(", ") || "nothing"],
  ]);
}

// What somebody who has just opened the page should know first, worst first.
export function attention(status, lost, failed, forced = null) {
  const found = [];
  const add = (mark, text) => found.push({ mark, text });
  if (lost) add("bad", lost);
  if (status) {
    const { phase: now, spool, configuration: file } = status;
    if (!spool.accepting) add("bad", `Records are refused: ${spool.busy_reason}.`);
    for (const [name, store] of Object.entries(status.stores)) {
      if (store.state !== "up") {
        const why = store.reason ? `: ${store.reason}` : "";
        add(STATES[store.state] === "bad" ? "bad" : "warn", `${name} is ${store.state}${why}; ${count(store.account.pending)} records wait for it.`);
      }
    }
    if (now.fleet?.fenced) add("bad", "This instance is fenced: it accepts records and refuses reads until it has read the fleet's record again.");
    const shared = now.fleet?.shared_names || [];
    if (shared.length) add("bad", `More than one process bears the name ${shared.join(", ")}: give each its own instance.`);
    for (const [store, text] of Object.entries(now.fleet?.trouble || {})) add("warn", `The fleet's tables in ${store}: ${text}.`);
    for (const [store, text] of Object.entries(now.gap_ledger_trouble || {})) {
      if (status.stores[store]?.state !== "waiting") add("warn", `Records for ${store} wait for a line in the gap ledger: ${text}.`);
    }
    const holds = now.fleet?.holds || (now.hold ? [now.hold] : []);
    const step = `The step from ${now.applied} to ${now.desired} is held by`;
    if (holds.length === 1) add("warn", `${step} ${holds[0].gate}: ${holds[0].observed}; required: ${holds[0].required}.`);
    else if (holds.length) add("warn", `${step} ${count(holds.length)} gates: ${holds.map((hold) => hold.gate).join(", ")}.`);
    const last = now.history.at(-1);
    if (last?.forced) add("warn", `The last step was forced by ${last.by}: ${last.why || "no reason given"}.`);
    if (forced) add("warn", `phase_force is stated: ${forced}; red gates are overridden until it is removed.`);
    const dead = Object.values(spool.dead_letters).reduce((sum, n) => sum + n, 0);
    if (dead) add("warn", `Dead letters that wait for a decision: ${count(dead)}.`);
    if (!file.last_reload_successful) add("bad", "The configuration file was refused; the last good one is in force.");
    if (file.restart_required.length) add("warn", `Changed settings wait for a restart: ${file.restart_required.join(", ")}.`);
    for (const text of failed) add("warn", text);
  }
  problems(byId("problem-list"), found);
  show(byId("problems-none"), found.length === 0 && status !== null);
}
