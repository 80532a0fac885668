// The mesh, what each device holds, and what a step moves, from /shards.

import { $, bytes, make } from "./dom.js";

const MOST_DEVICES = 16; // columns; the rest hold the like
const MOST_COLLECTIVES = 4; // rows
const CONTENT = { held: "held once", copied: "copies", zeros: "zeros" };

export function show(model) {
  $("mesh").textContent = `("tp",): ${model.tp} × ${model.devices[0].kind}, ${model.dtype}` +
    `${model.quantize ? ` with ${model.quantize} weights` : ""}; on each device ` +
    `${bytes(model.weight_bytes_per_device)} of weights, ${bytes(model.cache_bytes_per_device)} of cache`;
  $("heads").textContent = model.heads;
  showTensors(model);
  showLegend(model);
  const { cache } = model;
  $("cache").textContent = `${cache.num_pages - 1} pages of ${cache.page_size} positions, ` +
    `${bytes(cache.page_bytes_per_device)} of each on every device`;
  showStep(model.step);
}

function showTensors(model) {
  const shown = model.devices.slice(0, MOST_DEVICES);
  const head = make("tr", {}, make("th", { className: "name", textContent: "tensor" }), make("th", { className: "how", textContent: "sharded" }),
    ...shown.map((device, i) => {
      const word = make("em", { className: "word", textContent: shown.length > 8 ? "" : "device " });
      return make("th", { className: shown.length > 8 ? "many" : "", title: `${device.kind} ${device.id}, process ${device.process}` }, word, String(i));
    }),
    make("th", { className: "size", textContent: "each" }));
  $("shards").tHead.replaceChildren(head);
  const rows = merged(model.tensors), widest = Math.max(...rows.map(row => row.bytes_per_device));
  const nodes = rows.map(row => tensorRow(row, shown.length, widest));
  const cache = { ...model.cache, title: "KV cache", cut: model.cache.replicated ? "replicated" : "heads", note: "own scale" };
  const own = tensorRow(cache, shown.length, cache.bytes_per_device);
  own.classList.add("own");
  $("shards").tBodies[0].replaceChildren(...nodes, own);
}

// what every device has in full is one row: norms are many, and small
function merged(tensors) {
  const rows = tensors.filter(one => !one.replicated).map(one => ({
    ...one,
    title: one.name.replace(/^layers\.\*\./, "").replace(/\.weight$/, "") + (one.count > 1 ? ` ×${one.count}` : ""),
    note: `${one.shape.join("×")} → ${one.shard_shape.join("×")}`,
  }));
  const all = tensors.filter(one => one.replicated);
  if (!all.length) return rows;
  const sum = of => all.reduce((total, one) => total + of(one), 0);
  const names = all.map(one => one.name.replace(/^layers\.\*\./, "").replace(/\.weight$/, ""));
  const devices = all[0].devices.map((_, i) => Object.fromEntries(
    Object.keys(CONTENT).map(kind => [kind, sum(one => one.devices[i][kind])])));
  const count = sum(one => one.count);
  return [...rows, { title: all.length > 1 ? `${count} norms and the like` : names[0], note: "every device has all of them", cut: "replicated",
    why: names.join(", "), devices, bytes_per_device: sum(one => one.bytes_per_device) }];
}

function tensorRow(row, columns, widest) {
  const name = make("td", { className: "name", title: row.why }, row.title, make("br"), make("span", { className: "dim", textContent: row.note }));
  const how = make("td", { className: "how", title: row.why }, make("span", {},
    make("i", { className: `glyph ${row.cut}` }), make("em", { className: "word", textContent: row.cut })));
  const cells = row.devices.slice(0, columns).map((content, i) => {
    const bar = make("div", { className: `bar ${row.cut}` });
    bar.title = `device ${i}: ` + Object.entries(CONTENT).filter(([kind]) => content[kind])
      .map(([kind, words]) => `${bytes(content[kind])} ${words}`).join(", ");
    for (const kind of Object.keys(CONTENT)) {
      if (!content[kind]) continue;
      const part = make("i", { className: kind });
      part.style.width = `${100 * content[kind] / widest}%`;
      bar.append(part);
    }
    return make("td", { className: "cell" }, bar);
  });
  return make("tr", {}, name, how, ...cells, make("td", { className: "size", textContent: bytes(row.bytes_per_device) }));
}

function showLegend(model) {
  const all = [...model.tensors.flatMap(one => one.devices), ...model.cache.devices];
  const entries = [["held", "column", "held, each number once (colour: how it is cut)"]];
  if (all.some(one => one.copied)) entries.push(["copied", "", "copies of what another device has"]);
  if (all.some(one => one.zeros)) entries.push(["zeros", "", "zeros: padding"]);
  $("legend").replaceChildren(...entries.map(([kind, cut, words]) => {
    const swatch = make("i", { className: kind });
    return make("span", { className: cut }, swatch, words);
  }));
}

function counted(figures) {
  const parts = ["all_reduce", "reduce_scatter", "all_gather"].filter(kind => figures[`${kind}s`]).map(kind => {
    const count = figures[`${kind}s`];
    return `${count} ${kind.replace("_", "-")}${count > 1 ? "s" : ""} (${bytes(figures[`${kind}_bytes`])})`;
  });
  if (figures.others) parts.push(`${figures.others} others`);
  return parts.join(", ") || "nothing";
}

// the largest as they are; the small ones of sampling in one row
function withSmallMerged(collectives) {
  if (collectives.length <= MOST_COLLECTIVES) return collectives;
  const small = collectives.slice(MOST_COLLECTIVES - 1);
  const sum = of => small.reduce((total, one) => total + of(one), 0);
  const distinct = of => [...new Set(small.map(of))].join(", ");
  return [...collectives.slice(0, MOST_COLLECTIVES - 1), { count: sum(one => one.count), kind: "small ones", result: "",
    bytes: sum(one => one.bytes), source: distinct(one => one.source.replace(/:.*/, "")), text: distinct(one => one.kind) }];
}

function showStep(step) {
  const always = step.collectives.filter(one => !one.conditional).sort((a, b) => b.bytes - a.bytes);
  $("moved").textContent = counted(step.always);
  $("collectives").tBodies[0].replaceChildren(...withSmallMerged(always).map(one => make("tr", { title: `${one.source} ${one.text}` },
    make("td", { className: "number", textContent: `${one.count} ×` }), make("td", { textContent: one.kind }),
    make("td", { textContent: one.result }), make("td", { className: "number", textContent: bytes(one.bytes) }),
    make("td", { textContent: `${one.source}  ${one.text}` }))));
  const rest = step.collectives.length - always.length;
  $("budget").textContent = `budget: ${counted(step.budget)}: ${step.budget.rule}` +
    (rest ? `; ${rest} small ones more if a request asks for them` : "");
}
