// Dead letters: counts from /status for everybody; the list and the redrive with the control token, which lives in the
// two fields of this page and nowhere else. Records are never asked for.

import { ask, sendable } from "./ask.js";
import { byId, count, fill, moment, put, show } from "./dom.js";

const PAGE = 100;
const DOOR = "door"; // refused at the door: no store to go to

let listed = [];
let asked = false;
let next = null;
let chosen = null; // {select, what} while the dialog is open
let opener = null;
let afterwards = () => {};

export function startLetters(refresh) {
  afterwards = refresh;
  byId("show").addEventListener("submit", (event) => {
    event.preventDefault();
    list(false);
  });
  byId("more").addEventListener("click", () => list(true));
  byId("forget").addEventListener("click", forget);
  byId("confirm-cancel").addEventListener("click", () => byId("confirm").close());
  byId("confirm").addEventListener("close", () => {
    chosen = null;
    if (opener?.isConnected) opener.focus();
    else byId("h-letters").focus();
  });
  byId("confirm-form").addEventListener("submit", (event) => {
    event.preventDefault();
    redrive();
  });
  byId("h-letters").tabIndex = -1;
}

// groups: {"store/class": records} of /status.
export function letters(groups, control) {
  const held = Object.entries(groups || {}).filter(([, n]) => n > 0);
  fill(
    byId("dead"),
    held.map(([name, n]) => {
      const at = name.indexOf("/");
      const [store, kind] = [name.slice(0, at), name.slice(at + 1)];
      return { key: name, cells: [store, kind, count(n), action(store, kind, n, control)] };
    }),
  );
  show(byId("dead-none"), held.length === 0);
  show(byId("show"), held.length > 0 && control);
  if (held.length === 0 && !chosen) clear(); // nothing is left that a token would be for
}

function action(store, kind, n, control) {
  if (store === DOOR) return { text: "no store to go to; discard with `sidecar dead-letter`", mark: "" };
  if (!control) return { text: "control is not enabled", mark: "" };
  const what = `${count(n)} of class ${kind} for ${store}`;
  return {
    label: "Redrive all…",
    name: `Redrive all ${what}`,
    act: (event) => open({ select: { store, reason: kind }, what: `All dead letters: ${what}.` }, event),
  };
}

const say = (text) => put(byId("letters-said"), text); // role=status: seen and heard

async function list(more, quiet = false) {
  const token = byId("token").value.trim();
  byId("show-error").textContent = "";
  if (!sendable(token)) return put(byId("show-error"), "A token is needed: visible ASCII characters.");
  const after = more && next ? `&after=${next}` : "";
  const answer = await ask(`api/control/dead-letters?limit=${PAGE}${after}`, { token });
  if (!answer.ok) return put(byId("show-error"), `Not listed: ${answer.error}`);
  const found = answer.body.dead_letters || [];
  listed = more ? [...listed, ...found] : found;
  next = answer.body.next_after;
  asked = true;
  draw();
  if (!quiet) say(`${count(listed.length)} listed.`);
}

function draw() {
  fill(
    byId("letters"),
    listed.map((letter) => ({
      key: letter.key,
      cells: [
        letter.log_id,
        letter.store,
        letter.class,
        [letter.reason, letter.code && `(${letter.code})`].filter(Boolean).join(" "),
        count(letter.attempts),
        moment(letter.first_at),
        moment(letter.last_at),
        one(letter),
      ],
    })),
  );
  show(byId("more"), Boolean(next));
}

function one({ store, log_id: id }) {
  if (store === DOOR || !id) return { text: "no store to go to", mark: "" };
  return {
    label: "Redrive…",
    name: `Redrive ${id} for ${store}`,
    act: (event) => open({ select: { log_ids: [id], store }, what: `The dead letter of ${id} for ${store}.` }, event),
  };
}

function open(what, event) {
  chosen = what;
  opener = event.currentTarget;
  put(byId("confirm-what"), `${chosen.what} It is handed to delivery again at once; if the store refuses it again, it comes back here.`);
  byId("confirm-error").textContent = "";
  byId("confirm-token").value = byId("token").value;
  byId("confirm-reason").value = "";
  byId("confirm").showModal();
  byId(byId("token").value ? "confirm-reason" : "confirm-token").focus();
}

async function redrive() {
  const token = byId("confirm-token").value.trim();
  const reason = byId("confirm-reason").value.trim();
  byId("confirm-error").textContent = "";
  if (!sendable(token)) return put(byId("confirm-error"), "A token is needed: visible ASCII characters.");
  if (!reason) return put(byId("confirm-error"), "A reason is needed: the audit trail keeps it.");
  const button = byId("confirm-form").querySelector("button[type=submit]");
  button.disabled = true;
  const { select } = chosen;
  const answer = await ask("api/control/dead-letters/redrive", { token, body: { select, reason } });
  button.disabled = false;
  if (!answer.ok) return put(byId("confirm-error"), `Not done: ${answer.error}`);
  byId("token").value = token;
  byId("confirm").close();
  say(`${count(answer.body.records)} handed to delivery again.`);
  if (asked) await list(false, true);
  afterwards();
}

function forget() {
  clear();
  say("The token is forgotten.");
}

function clear() {
  byId("token").value = "";
  byId("confirm-token").value = "";
  listed = [];
  asked = false;
  next = null;
  draw();
}
