// Blocks × nodes: a column a block, a row a node, and what nobody serves in red.

import { blocks, byId, el, ends, keyed, plural, say } from "./dom.js";

// With more nodes than this a row each is a scroll through nowhere: they share rows, and tell of themselves on touch.
const MOST_ROWS = 32;
// Numbers over and in narrower columns cannot be read.
const MOST_FIGURES = 40;
// Of the numbers over the columns.
const MOST_TICKS = 16;

export function drawSwarm(overview) {
  const home = byId("swarm");
  home.querySelector(":scope > .idle")?.remove();
  keyed(home, overview.models, (model) => `${model.model} ${model.blocks}`, makeModel, updateModel);
  if (!overview.models.length) home.append(el("p", { class: "idle" }, "Nobody announces anything here yet."));
  drawAlarm(overview);
  drawDoubts(overview);
}

/** What the best class of each model lacks. */
function drawAlarm(overview) {
  const alarm = byId("alarm");
  const lacking = overview.models.filter((model) => model.gaps.length);
  alarm.hidden = !lacking.length;
  if (!lacking.length) return say(alarm, "");
  const text = lacking.map((model) => {
    const gap = model.gaps.map(blocks).join(", ");
    const one = model.gaps.length === 1 && ends(model.gaps[0])[1] - ends(model.gaps[0])[0] === 1;
    return `Nobody serves block${one ? "" : "s"} ${gap} of ${model.name}. Start a swarm-node with --blocks ${model.gaps[0]}`;
  });
  return say(alarm, text.join("  "));
}

function drawDoubts(overview) {
  const refused = Object.entries(overview.refused).filter(([, count]) => count > 0);
  const doubts = [
    ...refused.map(([why, count]) => ({ key: `refused ${why}`, text: `${plural(count, "record")} refused: ${why}` })),
    ...Object.entries(overview.silent).map(([address, why]) => ({ key: `silent ${address}`, text: `${address} is silent: ${why}` })),
  ];
  keyed(byId("doubts"), doubts, (doubt) => doubt.key, () => el("p"), (line, doubt) => say(line, doubt.text));
}

function makeModel() {
  return el("div", { class: "model-card" }, el("h3"), el("div", { class: "classes" }));
}

function updateModel(card, model) {
  say(card.querySelector("h3"), model.name);
  const classes = model.classes.map((one) => ({ ...one, model }));
  keyed(card.lastElementChild, classes, (one) => [one.weights, one.dtype, one.quantization, one.activations].join(" "), makeClass, updateClass);
}

function makeClass() {
  return el("div", { class: "class" },
    el("p", { class: "class-head" }, el("span", { class: "badge" }), el("span", { class: "numerics" })),
    el("div", { class: "grid" },
      el("div", { class: "row axis", "aria-hidden": "true" }, el("span", { class: "who" }, "block"), el("div", { class: "track ticks" }), el("span", { class: "figures" }, el("span", {}, "latency"), el("span", {}, "load"), el("span", { class: "version" }, "version"))),
      el("div", { class: "row strip" }, el("span", { class: "who" }, "replicas"), el("div", { class: "track cells", role: "img" }), el("span", { class: "figures" })),
      el("ul", { class: "nodes" })));
}

function updateClass(home, one) {
  const count = one.model.blocks;
  const badge = home.querySelector(".badge");
  badge.dataset.covered = one.covered;
  say(badge, one.covered ? "whole" : `gap at ${one.gaps.map(blocks).join(", ")}`);
  const weights = one.quantization && one.quantization !== "none" ? one.quantization : "";
  say(home.querySelector(".numerics"), [one.dtype, weights, one.activations === "native" ? "" : `${one.activations} rows`, `weights ${one.weights.slice(0, 8)}`].filter(Boolean).join(" · "));
  const grid = home.querySelector(".grid");
  grid.style.setProperty("--blocks", count);
  grid.classList.toggle("fine", count > MOST_FIGURES);
  drawTicks(grid.querySelector(".ticks"), count);
  drawReplicas(grid.querySelector(".cells"), one);
  const crowd = one.nodes.length > MOST_ROWS;
  const list = grid.querySelector(".nodes");
  grid.classList.toggle("crowd", crowd);
  const rows = crowd ? lanes(one.nodes) : one.nodes.map((node) => [node]);
  keyed(list, rows, (row) => (crowd ? `lane ${rows.indexOf(row)}` : row[0].id), makeRow, (row, nodes) => updateRow(row, nodes, one, crowd));
}

function drawTicks(track, count) {
  const step = Math.ceil(count / MOST_TICKS);
  const shown = [...Array(count).keys()].filter((block) => block % step === 0);
  keyed(track, shown, (block) => block, (block) => el("span", {}, `${block}`), (tick, block) => {
    tick.style.left = `${(100 * (block + 0.5)) / count}%`;
  });
}

function drawReplicas(track, one) {
  track.setAttribute("aria-label", `nodes that serve each block: ${one.replicas.join(" ")}`);
  keyed(track, one.replicas.map((replicas, block) => ({ replicas, block })), (cell) => cell.block,
    () => el("span", { class: "cell" }, el("b")),
    (cell, { replicas, block }) => {
      cell.dataset.replicas = Math.min(replicas, 4);
      cell.title = `block ${block}: ${replicas ? plural(replicas, "node") : "nobody"}`;
      say(cell.firstChild, `${replicas}`);
    });
}

/** Nodes that do not overlap share a lane: each takes the first that is free. */
function lanes(nodes) {
  const made = [];
  for (const node of nodes) {
    const [start] = ends(node.blocks);
    const free = made.find((lane) => ends(lane[lane.length - 1].blocks)[1] <= start);
    if (free) free.push(node);
    else made.push([node]);
  }
  return made;
}

function makeRow() {
  return el("li", { class: "row" },
    el("span", { class: "who" }, el("b"), el("small")),
    el("div", { class: "track" }, el("div", { class: "gaps" }), el("div", { class: "bars" })),
    el("span", { class: "figures" }, el("span", { class: "latency" }), el("span", { class: "load" }), el("span", { class: "version" })));
}

function updateRow(row, nodes, one, crowd) {
  const count = one.model.blocks;
  keyed(row.querySelector(".gaps"), one.gaps, (gap) => gap, () => el("i"), (gap, span) => put(gap, ...ends(span), count));
  keyed(row.querySelector(".bars"), nodes, (node) => node.id, makeBar, (bar, node) => updateBar(bar, node, count, crowd));
  if (crowd) return;
  const [node] = nodes;
  say(row.querySelector("b"), node.address);
  say(row.querySelector("small"), node.why_silent ?? `${node.id.slice(0, 10)}${node.reachable ? " · dialable" : ""}`);
  row.title = told(node);
  const figures = row.lastElementChild;
  say(figures.querySelector(".latency"), latency(node));
  say(figures.querySelector(".load"), load(node));
  say(figures.querySelector(".version"), node.software.replace(/^treeswarm /, ""));
}

function makeBar() {
  return el("div", { class: "bar", role: "img" }, el("span", { class: "filled" }), el("span", { class: "name" }));
}

function updateBar(bar, node, count, crowd) {
  const [start, end] = ends(node.blocks);
  put(bar, start, end, count);
  bar.dataset.state = state(node);
  bar.querySelector(".filled").style.width = `${node.why_silent === null ? 100 * (node.load ?? 0) : 0}%`;
  say(bar.querySelector(".name"), `${blocks(node.blocks)}${state(node) === "online" ? "" : ` · ${state(node)}`}`);
  bar.setAttribute("aria-label", told(node));
  if (crowd) {
    bar.title = told(node);
    bar.tabIndex = 0;
  }
}

function put(element, start, end, count) {
  element.style.left = `${(100 * start) / count}%`;
  element.style.width = `${(100 * (end - start)) / count}%`;
}

export const state = (node) => (node.why_silent !== null ? "silent" : node.state);
const latency = (node) => (node.latency_ms === null ? "–" : node.latency_ms < 10 ? `${node.latency_ms.toFixed(1)} ms` : `${Math.round(node.latency_ms)} ms`);
const load = (node) => (node.load === null ? "–" : `${Math.round(100 * node.load)} %`);

function told(node) {
  const parts = [`${node.address}, blocks ${blocks(node.blocks)}, ${state(node)}`, `latency ${latency(node)}`, `load ${load(node)}`, node.software];
  if (node.why_silent !== null) parts.push(node.why_silent);
  return parts.filter(Boolean).join(", ");
}
