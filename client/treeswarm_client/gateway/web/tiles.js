// Draws the tiles: nodes, blocks, and how fast tokens come since the page was opened.

import { byId, setText, svg } from "../pages/shared/dom.js";
import { Totals, line } from "./totals.js";

const REDRAW_MS = 500;
const now = () => performance.now() / 1000;

export class Tiles {
  constructor() {
    this.totals = new Totals(now());
    setInterval(() => this.drawTotals(), REDRAW_MS);
    this.drawTotals();
  }

  /** Count the tokens of one traversal. */
  add(tokens) {
    this.totals.add(tokens, now());
  }

  drawSwarm(overview) {
    const nodes = overview.models.flatMap((model) => model.classes.flatMap((served) => served.nodes));
    const serving = nodes.filter((node) => node.serves).length;
    const silent = nodes.filter((node) => node.why_silent !== null).length;
    setText(byId("model"), overview.models.map((model) => model.name).join(", "));
    setText(byId("t-nodes"), `${serving}`);
    const others = nodes.length - serving - silent;
    setText(byId("t-nodes-more"), [silent ? `${silent} silent` : "", others ? `${others} not serving` : ""].filter(Boolean).join(", ") || "all serving");
    const all = overview.models.reduce((sum, model) => sum + model.blocks, 0);
    const best = overview.models.map((model) => model.classes[0]?.replicas ?? []);
    const covered = best.flat().filter((replicas) => replicas > 0).length;
    const blocks = byId("t-blocks");
    setText(blocks, `${covered} / ${all}`);
    blocks.closest(".tile").dataset.alarm = covered < all;
    const weakest = Math.min(...best.map((replicas) => (replicas.length ? Math.min(...replicas) : 0)));
    setText(byId("t-blocks-more"), covered < all ? `${all - covered} missing` : `each at least ${weakest === 1 ? "once" : `${weakest} times`}`);
  }

  drawTotals() {
    const { totals } = this;
    const at = now();
    setText(byId("t-per"), totals.perTraversal === null ? "–" : totals.perTraversal.toFixed(2));
    setText(byId("t-per-more"), totals.traversals ? `${totals.tokens.toLocaleString("en")} in ${totals.traversals.toLocaleString("en")} traversals` : "none yet");
    const speed = totals.speed(at);
    setText(byId("t-speed"), speed >= 100 ? `${Math.round(speed)}` : speed.toFixed(speed ? 1 : 0));
    const points = line(totals.lastMinute(at), 120, 40);
    byId("pulse").replaceChildren(svg("polygon", { points: `0,40 ${points} 120,40` }), svg("polyline", { points }));
  }
}
