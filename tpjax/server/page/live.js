// Slots, pages and tokens/s, from /stats.

import { $, make } from "./dom.js";

export const REQUEST_COLOURS = ["#1769aa", "#d1790f", "#2a9d52", "#b0413e", "#7b59b5", "#7d5a4f", "#c4579f", "#6b7680"];
const MOST_CELLS = 300, MOST_SLOTS = 64;
const rates = Array(60).fill(0);
let last = null;

export function show(now) {
  if (now.slots === undefined) return;
  $("running").textContent = `${now.running} of ${now.slots}`;
  $("waiting").textContent = now.waiting;
  $("usage").textContent = `${now.pages_in_use} of ${now.pages}`;
  $("hits").textContent = now.prefix_queries ? `${Math.round(100 * now.prefix_hits / now.prefix_queries)} %` : "–";
  showRate(now);
  showPages(now);
  showSlots(now);
  last = now;
}

function showRate(now) {
  if (!last || now.time <= last.time) return;
  rates.push(Math.max(now.generated_tokens - last.generated_tokens, 0) / (now.time - last.time));
  rates.shift();
  $("rate").textContent = rates.at(-1).toFixed(1);
  const top = Math.max(...rates, 1);
  $("curve").setAttribute("points", rates.map((rate, i) => `${i},${19 - 18 * rate / top}`).join(" "));
}

// A cell a page, or several pages where there are many. A page that requests share shows with the first of them.
function showPages(now) {
  const perCell = Math.ceil(now.pages / MOST_CELLS), cells = Math.ceil(now.pages / perCell);
  const nodes = $("pages");
  if (nodes.childElementCount !== cells) nodes.replaceChildren(...Array.from({ length: cells }, () => make("i")));
  const held = [...now.requests].sort((a, b) => a.slot - b.slot);
  const ends = [];
  let end = 0;
  for (const one of held) { end = Math.min(end + one.pages, now.pages_in_use); ends.push([end, one.slot]); }
  [...nodes.children].forEach((cell, i) => {
    const page = i * perCell;
    const slot = page < now.pages_in_use ? ends.find(([upTo]) => page < upTo)?.[1] ?? null : null;
    const colour = slot === null ? "" : REQUEST_COLOURS[slot % REQUEST_COLOURS.length];
    cell.style.background = cell.style.borderColor = colour;
    cell.className = page < now.pages_in_use ? "used" : page < now.pages_in_use + now.pages_cached ? "cached" : "";
  });
  nodes.title = `${now.pages_in_use} pages in use, ${now.pages_cached} kept by the prefix cache (hatched), of ${now.pages}` +
    (perCell > 1 ? `; a cell is ${perCell} pages` : "");
}

function showSlots(now) {
  const bySlot = new Map(now.requests.map(one => [one.slot, one]));
  const shown = Math.min(now.slots, MOST_SLOTS);
  $("slots").replaceChildren(...Array.from({ length: shown }, (_, slot) => {
    const one = bySlot.get(slot);
    if (!one) return make("span", { textContent: `slot ${slot}` });
    const phase = one.prefilled < one.to_prefill ? `prefill ${one.prefilled} of ${one.to_prefill}` : `${one.tokens} tokens`;
    const node = make("span", { className: "busy", textContent: `slot ${slot}: ${phase}, ${one.pages} pages` });
    node.style.borderLeftColor = REQUEST_COLOURS[slot % REQUEST_COLOURS.length];
    return node;
  }));
  if (now.slots > shown) $("slots").append(make("span", { textContent: `and ${now.slots - shown} more slots` }));
}
