// Shows beside the conversation how one answer came: its figures, the tree of each round, and the nodes that computed it.

import { el, plural, setText, svg, updateChildren } from "../shared/dom.js";
import { TreePicture } from "../shared/tree.js";
import { figuresOf, roundsOf } from "./answer.js";

const FIGURES = { tokens: "tokens", per: "per traversal", speed: "tokens per second", first: "to the first token" };
const PARTS = { compute: "computing", wire: "on the way", queue: "waiting for a node", draft: "drafting" };
// Number of bars at most: more would be too thin to point at.
const MOST_BARS = 64;
const LEAST_BARS = 24;
const BAR = { width: 6, gap: 2, height: 34 };

export class TracePanel {
  /** `onTraversal` is called with the number of the traversal whose text is to be marked, or null. */
  constructor(home, onTraversal) {
    this.home = home;
    this.onTraversal = onTraversal;
    this.message = null;
    this.pinned = null;
    this.drawnRounds = 0;
    this.picture = new TreePicture();
    this.build();
  }

  build() {
    const figure = (name) => el("div", { "data-figure": name }, el("dd", {}, "–"), el("dt", {}, FIGURES[name]));
    this.figures = el("dl", { class: "answer-figures" }, ...Object.keys(FIGURES).map(figure));
    this.state = el("p", { class: "trace-state", role: "status" });
    this.hint = el("p", { class: "hint" });
    this.bars = svg("svg", { class: "trip-bars", "aria-hidden": "true" });
    this.slider = el("input", { type: "range", min: 1, step: 1, "aria-label": "Traversal to show" });
    this.caption = el("p", { class: "caption" });
    this.slider.addEventListener("input", () => this.pin(Number(this.slider.value)));
    const legend = [["k-guess", "guess"], ["k-late", "sent later"], ["k-kept", "accepted"], ["k-bonus", "model’s own"]];
    this.treeBox = el("section", { "aria-label": "Tree of guesses" },
      el("div", { class: "canvas" }, this.picture.element, this.hint),
      el("ul", { class: "legend", "aria-label": "Colours of the tree" }, ...legend.map(([kind, name]) => el("li", { class: kind }, name))));
    this.tripBox = el("section", { class: "trips", "aria-label": "Traversals" }, el("div", { class: "scrub" }, this.bars, this.slider), this.caption);
    this.route = el("ol", { class: "route-line" });
    this.parts = el("div", { class: "time-bar", role: "img" });
    this.partNames = el("ul", { class: "time-names" });
    this.routeBox = el("section", { "aria-labelledby": "h-route" }, el("h3", { id: "h-route" }, "Route of this answer"), this.route);
    this.timeBox = el("section", { "aria-labelledby": "h-time" }, el("h3", { id: "h-time" }, "Where the time went"), this.parts, this.partNames);
    this.content = el("div", { class: "trace" }, this.state, this.figures, this.treeBox, this.tripBox, this.routeBox, this.timeBox);
    this.empty = el("div", { class: "trace-empty" }, el("p", {}, "Each round trip through the nodes carries a tree of guesses. What the model itself would say is kept."), el("p", {}, "Ask something, and the tree and the nodes of the answer appear here."));
    this.home.replaceChildren(this.empty, this.content);
    this.show(null);
  }

  /** Show this answer, or none. */
  show(message) {
    if (message !== this.message) {
      if (this.pinned !== null) this.onTraversal(null);
      this.message = message;
      this.pinned = null;
      this.drawnRounds = 0;
      this.picture.clear();
    }
    this.empty.hidden = message !== null;
    this.content.hidden = message === null;
    if (message) this.update();
  }

  /** Draw what is new. */
  update() {
    const { message } = this;
    const rounds = roundsOf.get(message) ?? [];
    for (const [name, text] of Object.entries(figuresOf(message))) setText(this.figures.querySelector(`[data-figure="${name}"] dd`), text || "–");
    setText(this.state, describeState(message));
    this.content.dataset.state = message.state;
    if (this.pinned === null && rounds.length > this.drawnRounds) {
      for (let i = this.drawnRounds; i < rounds.length; i += 1) this.picture.show(rounds[i], tipBefore(rounds, i, message));
    }
    this.drawnRounds = rounds.length;
    this.treeBox.hidden = !rounds.length && message.state !== "running";
    setText(this.hint, rounds.length || message.state !== "running" ? "" : hintFor(message));
    this.drawBars();
    this.drawRoute(message.route);
    this.drawTime(message.stats?.time);
  }

  drawBars() {
    const { traversals = [] } = this.message;
    this.tripBox.hidden = traversals.length < 2;
    if (this.tripBox.hidden) return;
    const chosen = this.pinned ?? traversals.length;
    const first = Math.max(0, Math.min(traversals.length - MOST_BARS, chosen - MOST_BARS / 2));
    const shown = traversals.slice(first, first + MOST_BARS);
    const most = Math.max(4, ...shown.map(([, tokens]) => tokens));
    const step = BAR.width + BAR.gap;
    const slots = Math.max(LEAST_BARS, shown.length);
    this.slider.style.width = `${(100 * shown.length) / slots}%`;
    this.bars.setAttribute("viewBox", `0 0 ${slots * step} ${BAR.height}`);
    this.bars.setAttribute("preserveAspectRatio", "none");
    this.bars.replaceChildren(...shown.map(([, tokens], i) => {
      const height = (BAR.height * tokens) / most;
      return svg("rect", { x: i * step, y: BAR.height - height, width: BAR.width, height, rx: 1, class: first + i + 1 === chosen ? "chosen" : null });
    }));
    this.slider.max = traversals.length;
    this.slider.value = chosen;
    const [number, tokens] = traversals[chosen - 1];
    const round = this.roundOf(number);
    const words = [`Traversal ${chosen} of ${traversals.length} brought ${plural(tokens, "token")}`];
    if (round) words.push(`${plural(round.nodes, "guess", "guesses")}, ${round.accepted.length} accepted`, `${Math.round(round.ms)} ms`);
    else if (chosen === 1) words.push("it read the conversation");
    setText(this.caption, words.join(" · "));
    this.slider.setAttribute("aria-valuetext", words.join(", "));
  }

  roundOf(traversal) {
    return (roundsOf.get(this.message) ?? []).find((round) => round.traversal === traversal);
  }

  /** Show one traversal, counted from one; the last one of a running answer follows it. */
  pin(number) {
    const { traversals, state } = this.message;
    this.pinned = state === "running" && number === traversals.length ? null : number;
    const traversal = traversals[number - 1][0];
    const rounds = roundsOf.get(this.message) ?? [];
    const i = rounds.findIndex((round) => round.traversal === traversal);
    if (i >= 0) this.picture.hold(rounds[i], tipBefore(rounds, i, this.message));
    this.onTraversal(this.pinned === null ? null : traversal);
    this.drawBars();
  }

  /** Show the traversal with this number, if the answer has it. */
  pinTraversal(traversal) {
    const i = this.message?.traversals?.findIndex(([number]) => number === traversal) ?? -1;
    if (i >= 0) this.pin(i + 1);
  }

  drawRoute(route) {
    this.routeBox.hidden = !route;
    if (!route) return;
    const rounds = roundsOf.get(this.message) ?? [];
    const compute = route.hops.map((_, i) => meanOf(rounds.map((round) => round.compute_ms).filter((ms) => ms.length === route.hops.length).map((ms) => ms[i])));
    const driver = route.driver ? `${route.driver.address} drives` : "this gateway";
    const stops = [
      { kind: "end", name: driver, about: route.driver ? route.driver.why : "drafts trees and sends them" },
      ...route.hops.map((hop, i) => ({ kind: "hop", name: hop.address, about: [`blocks ${hop.blocks}`, hop.node.slice(0, 8), compute[i] === null ? "" : `${compute[i].toFixed(compute[i] < 10 ? 1 : 0)} ms per traversal`].filter(Boolean).join(" · ") })),
      ...route.repairs.flatMap(describeRepair),
    ];
    updateChildren(this.route, stops, (stop) => `${stop.kind} ${stop.name} ${stop.about}`, (stop) => el("li", { "data-kind": stop.kind }, el("b"), el("span")), (line, stop) => {
      setText(line.firstChild, stop.name);
      setText(line.lastChild, stop.about);
    });
  }

  drawTime(time) {
    this.timeBox.hidden = !time;
    if (!time) return;
    const all = Object.keys(PARTS).reduce((sum, part) => sum + time[part], 0) || 1;
    const parts = Object.keys(PARTS).filter((part) => time[part] / all > 0.004);
    updateChildren(this.parts, parts, (part) => part, (part) => el("span", { "data-part": part }), (bar, part) => (bar.style.flexGrow = time[part] / all));
    updateChildren(this.partNames, parts, (part) => part, (part) => el("li", { "data-part": part }), (line, part) => setText(line, `${PARTS[part]} ${time[part].toFixed(2)} s`));
    this.parts.setAttribute("aria-label", parts.map((part) => `${PARTS[part]} ${time[part].toFixed(2)} seconds`).join(", "));
  }
}

/** Return the token before a round: the root of its tree. */
function tipBefore(rounds, i, message) {
  if (i > 0) return rounds[i - 1].bonus ?? "";
  const end = message.trips?.[0]?.[0] ?? 0;
  return message.content.slice(0, end);
}

function hintFor({ route, traversals }) {
  if (!traversals.length) return "The nodes read the conversation.";
  return route?.driver ? "The trees grow on the node that drives." : "Waiting for the first tree.";
}

function describeState(message) {
  if (message.state === "running") return message.traversals.length ? "growing" : "reading";
  return { stop: "complete", tool_calls: "asks for tools", length: "at its longest" }[message.finish] ?? { stopped: "stopped", failed: "failed", lost: "cut off" }[message.state] ?? "complete";
}

function describeRepair(repair) {
  const lost = repair.lost.map((hop) => ({ kind: "lost", name: hop.address, about: `blocks ${hop.blocks} · ${hop.why.replace(`lost ${hop.address} with blocks ${hop.blocks}: `, "")}` }));
  const nodes = repair.gained.map((hop) => `${hop.address} with blocks ${hop.blocks}`).join(", ");
  const after = `after ${Math.round(1000 * repair.seconds)} ms, nothing was lost`;
  return [...lost, { kind: "gained", name: nodes || "The same nodes", about: `went on ${after}` }];
}

const meanOf = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
