// Draws the map of blocks and nodes: one column per block, one row per node, and blocks that no node serves in red.

import { byId, el, ends, plural, setText, updateChildren } from "../pages/shared/dom.js";

// With more nodes than this, nodes share rows, and their details appear as tooltips.
const MOST_ROWS = 32;
// With more blocks than this, columns are too narrow for numbers.
const MAX_NUMBERED = 40;
// Number of block numbers above the columns at most.
const MOST_TICKS = 16;

export function drawSwarm(overview) {
  const home = byId("swarm");
  home.querySelector(":scope > .idle")?.remove();
  updateChildren(home, overview.models, (model) => `${model.model} ${model.blocks}`, makeModel, updateModel);
  if (!overview.models.length) home.append(el("p", { class: "idle" }, "No node announces a model yet."));
  drawAlarm(overview);
  drawProblems(overview);
}

/** Show the blocks that the best class of each model is missing. */
export function drawAlarm(overview) {
  const alarm = byId("alarm");
  const lacking = overview.models.filter((model) => model.gaps.length);
  alarm.hidden = !lacking.length && !overview.why;
  // Without a gap, the gateway's own reason says more: addresses that do not answer, or records that are refused.
  if (!lacking.length || (overview.why && !lacking.some((model) => model.classes.length))) return setText(alarm, overview.why ?? "");
  const text = lacking.map((model) => {
    const gap = model.gaps.join(", ");
    const single = model.gaps.length === 1 && ends(model.gaps[0])[1] - ends(model.gaps[0])[0] === 1;
    const why = model.why_missing ? ` (${model.why_missing})` : "";
    return `No node serves block${single ? "" : "s"} ${gap} of ${model.name}${why}. Start a swarm-node with --blocks ${model.gaps[0]}`;
  });
  return setText(alarm, text.join("  "));
}

const MEANINGS = {
  forged: "the signature is not the node's",
  expired: "its time is over, or a clock is wrong",
  "from-the-future": "a clock is wrong",
  "other-version": "the node runs another release",
  "other-model": "it is of another model",
  oversized: "it is too large",
  malformed: "it cannot be read",
};

function drawProblems(overview) {
  const refused = Object.entries(overview.refused).filter(([, count]) => count > 0);
  const problems = [
    ...refused.map(([reason, count]) => ({ key: `refused ${reason}`, text: `${plural(count, "record")} refused as ${reason}${MEANINGS[reason] ? `: ${MEANINGS[reason]}` : ""}` })),
    ...Object.entries(overview.silent).map(([address, reason]) => ({ key: `silent ${address}`, text: `${address} sends no records: ${reason}` })),
  ];
  updateChildren(byId("doubts"), problems, (problem) => problem.key, () => el("p"), (line, problem) => setText(line, problem.text));
}

function makeModel() {
  return el("div", { class: "model-card" }, el("h3"), el("div", { class: "classes" }));
}

function updateModel(card, model) {
  setText(card.querySelector("h3"), model.name);
  // A model that no node serves is drawn as one gap.
  const none = { weights: "", dtype: "no node", quantization: "none", activations: "native", covered: false, gaps: model.gaps, replicas: Array(model.blocks).fill(0), nodes: [] };
  const classes = (model.classes.length ? model.classes : [none]).map((served) => ({ ...served, model }));
  updateChildren(card.lastElementChild, classes, (served) => [served.weights, served.dtype, served.quantization, served.activations].join(" "), makeClass, updateClass);
}

function makeClass() {
  return el("div", { class: "class" },
    el("p", { class: "class-head" }, el("span", { class: "badge" }), el("span", { class: "numerics" })),
    el("div", { class: "grid" },
      el("div", { class: "row axis", "aria-hidden": "true" }, el("span", { class: "who" }, "block"), el("div", { class: "track ticks" }), el("span", { class: "figures" }, el("span", {}, "latency"), el("span", {}, "load"), el("span", { class: "version" }, "version"))),
      el("div", { class: "row strip" }, el("span", { class: "who" }, "replicas"), el("div", { class: "track cells", role: "img" }), el("span", { class: "figures" })),
      el("ul", { class: "nodes" })));
}

function updateClass(home, served) {
  const count = served.model.blocks;
  const badge = home.querySelector(".badge");
  badge.dataset.covered = served.covered;
  setText(badge, served.covered ? "complete" : `gap at ${served.gaps.join(", ")}`);
  const weights = served.quantization && served.quantization !== "none" ? served.quantization : "";
  setText(home.querySelector(".numerics"), [served.dtype, weights, served.activations === "native" ? "" : `${served.activations} rows`, served.weights && `weights ${served.weights.slice(0, 8)}`].filter(Boolean).join(" · "));
  const grid = home.querySelector(".grid");
  grid.style.setProperty("--blocks", count);
  grid.classList.toggle("fine", count > MAX_NUMBERED);
  drawTicks(grid.querySelector(".ticks"), count);
  drawReplicas(grid.querySelector(".cells"), served);
  const crowd = served.nodes.length > MOST_ROWS;
  const list = grid.querySelector(".nodes");
  grid.classList.toggle("crowd", crowd);
  const rows = crowd ? makeLanes(served.nodes) : served.nodes.map((node) => [node]);
  updateChildren(list, rows, (row) => (crowd ? `lane ${rows.indexOf(row)}` : row[0].id), makeRow, (row, nodes) => updateRow(row, nodes, served, crowd));
}

function drawTicks(track, count) {
  const step = Math.ceil(count / MOST_TICKS);
  const shown = [...Array(count).keys()].filter((block) => block % step === 0);
  updateChildren(track, shown, (block) => block, (block) => el("span", {}, `${block}`), (tick, block) => {
    tick.style.left = `${(100 * (block + 0.5)) / count}%`;
  });
}

/** Draw one cell per block, with the number of nodes that serve it. */
export function drawReplicas(track, served) {
  track.setAttribute("aria-label", `nodes that serve each block: ${served.replicas.join(" ")}`);
  updateChildren(track, served.replicas.map((replicas, block) => ({ replicas, block })), (cell) => cell.block,
    () => el("span", { class: "cell" }, el("b")),
    (cell, { replicas, block }) => {
      cell.dataset.replicas = Math.min(replicas, 4);
      cell.title = `block ${block}: ${replicas ? plural(replicas, "node") : "no node"}`;
      setText(cell.firstChild, `${replicas}`);
    });
}

/** Divide nodes into lanes without overlaps: each node takes the first lane that is free. */
function makeLanes(nodes) {
  const lanes = [];
  for (const node of nodes) {
    const [start] = ends(node.blocks);
    const free = lanes.find((lane) => ends(lane[lane.length - 1].blocks)[1] <= start);
    if (free) free.push(node);
    else lanes.push([node]);
  }
  return lanes;
}

function makeRow() {
  return el("li", { class: "row" },
    el("span", { class: "who" }, el("b"), el("small")),
    el("div", { class: "track" }, el("div", { class: "gaps" }), el("div", { class: "bars" })),
    el("span", { class: "figures" }, el("span", { class: "latency" }), el("span", { class: "load" }), el("span", { class: "version" })));
}

function updateRow(row, nodes, served, crowd) {
  const count = served.model.blocks;
  updateChildren(row.querySelector(".gaps"), served.gaps, (gap) => gap, () => el("i"), (gap, span) => put(gap, ...ends(span), count));
  updateChildren(row.querySelector(".bars"), nodes, (node) => node.id, makeBar, (bar, node) => updateBar(bar, node, count, crowd));
  if (crowd) return;
  const [node] = nodes;
  setText(row.querySelector("b"), node.address);
  setText(row.querySelector("small"), node.why_silent ?? `${node.id.slice(0, 10)}${node.reachable ? " · reachable" : ""}${node.speculator ? " · proposes" : ""}`);
  row.title = describe(node);
  const figures = row.lastElementChild;
  setText(figures.querySelector(".latency"), latency(node));
  setText(figures.querySelector(".load"), load(node));
  setText(figures.querySelector(".version"), node.software.replace(/^treeswarm /, ""));
}

function makeBar() {
  return el("div", { class: "bar", role: "img" }, el("span", { class: "filled" }), el("span", { class: "name" }));
}

function updateBar(bar, node, count, crowd) {
  const [start, end] = ends(node.blocks);
  put(bar, start, end, count);
  bar.dataset.state = state(node);
  bar.querySelector(".filled").style.width = `${node.why_silent === null ? 100 * (node.load ?? 0) : 0}%`;
  setText(bar.querySelector(".name"), `${node.blocks}${state(node) === "online" ? "" : ` · ${state(node)}`}`);
  bar.setAttribute("aria-label", describe(node));
  if (crowd) {
    bar.title = describe(node);
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

function describe(node) {
  const parts = [`${node.address}, blocks ${node.blocks}, ${state(node)}`, `latency ${latency(node)}`, `load ${load(node)}`, node.software];
  if (node.driver !== "none") parts.push("drives texts");
  if (node.speculator) parts.push(`proposes trees (${node.speculator}${node.agreement ? `, first guess right in ${Math.round(100 * node.agreement)} %` : ""})`);
  if (node.why_silent !== null) parts.push(node.why_silent);
  return parts.filter(Boolean).join(", ");
}
