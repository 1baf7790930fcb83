// Small plots of the last minutes, five at most, drawn from the account as this page has seen it: nothing is stored elsewhere.
// Lines differ in dash as well as in colour, and each plot says its figures in words.

import { age, count, put, rate } from "./dom.js";

const SPAN = 300_000; // milliseconds; the least is a minute, so that a page just opened shows more than a dot
const LEAST = 60_000;
const GAP = 15_000; // longer between two samples: the page was asleep or the sidecar away; the line breaks
const WIDTH = 300;
const HEIGHT = 80;
const SVG = "http://www.w3.org/2000/svg";

const PLOTS = [
  { id: "owed", title: "Accepted, records a second", of: (s) => s.owed, perSecond: true, words: rate },
  { id: "delivered", title: "Delivered, records a second", of: (s) => s.delivered, perSecond: true, words: rate },
  { id: "pending", title: "Pending, records", of: (s) => s.pending, words: count },
  { id: "oldest", title: "Oldest pending", of: (s) => s.oldest, words: age },
];

const drawn = new Map(); // plot id + store -> [[at, value]]; a value of NaN breaks the line
const before = new Map(); // store -> the sample before

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function figure(plot, stores) {
  const made = document.createElement("figure");
  const svg = element("svg", { class: "plot", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  svg.append(element("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT / 2, y2: HEIGHT / 2 }));
  for (const store of stores) svg.append(element("path", { class: store }));
  const words = document.createElement("figcaption");
  const title = document.createElement("b");
  put(title, plot.title);
  words.append(title);
  for (const store of stores) {
    const key = document.createElement("span");
    key.className = `key ${store}`;
    words.append(key, " ");
  }
  const span = document.createElement("span");
  span.className = "muted";
  words.append(span);
  made.append(words, svg);
  made.dataset.plot = plot.id;
  return made;
}

// stores: {name: the store's part of /status}; at: performance.now() of the answer.
export function plot(holder, stores, at) {
  const names = Object.keys(stores).filter((name) => name === "postgres" || name === "dynamodb");
  if (holder.childElementCount !== PLOTS.length) holder.replaceChildren(...PLOTS.map((each) => figure(each, names)));
  for (const name of names) {
    const { account } = stores[name];
    const sample = {
      at,
      owed: account.owed,
      delivered: account.delivered,
      pending: account.pending,
      oldest: stores[name].oldest_pending_age_seconds,
    };
    const last = before.get(name);
    before.set(name, sample);
    if (!last) continue;
    const broken = at - last.at > GAP;
    for (const each of PLOTS) {
      const known = drawn.get(each.id + name) || [];
      drawn.set(each.id + name, known);
      const grown = each.of(sample) - each.of(last);
      if (broken || (each.perSecond && grown < 0)) known.push([at, NaN]);
      else known.push([at, each.perSecond ? (grown * 1000) / (at - last.at) : each.of(sample)]);
      while (known.length && known[0][0] < at - SPAN) known.shift();
    }
  }
  PLOTS.forEach((each, number) => draw(holder.children[number], each, names, at));
}

function draw(made, each, names, now) {
  const lines = names.map((name) => drawn.get(each.id + name) || []);
  const peak = Math.max(0, ...lines.flat().map(([, value]) => (Number.isNaN(value) ? 0 : value)));
  const top = peak || 1;
  const first = Math.min(now, ...lines.filter((line) => line.length).map((line) => line[0][0]));
  const span = Math.max(LEAST, now - first);
  const keys = made.querySelectorAll(".key");
  const told = [];
  names.forEach((name, number) => {
    const newest = lines[number].at(-1);
    const words = `${name} ${each.words(newest ? newest[1] : NaN)}`;
    put(keys[number], words);
    told.push(words);
    made.querySelectorAll("path")[number].setAttribute("d", stroke(lines[number], now, span, top));
  });
  const most = `peak ${each.words(peak)} in ${age(span / 1000)}`;
  put(made.querySelector(".muted"), most);
  made.querySelector("svg").setAttribute("aria-label", `${each.title}: ${told.join(", ")}; ${most}`);
}

// One path; a value of NaN lifts the pen.
function stroke(line, now, span, top) {
  let pen = "M";
  let d = "";
  for (const [at, value] of line) {
    if (Number.isNaN(value)) {
      pen = "M";
      continue;
    }
    const x = WIDTH - ((now - at) / span) * WIDTH;
    const y = HEIGHT - 2 - (value / top) * (HEIGHT - 6);
    d += `${pen}${x.toFixed(1)},${y.toFixed(1)}`;
    pen = "L";
  }
  return d;
}
