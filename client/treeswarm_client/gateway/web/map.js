// The page: what the gateway tells, sorted to those who draw it.

import { byId, say, svg } from "./dom.js";
import { Feed } from "./feed.js";
import { Forest } from "./forest.js";
import { drawSwarm } from "./swarm.js";
import { Totals, line } from "./totals.js";

const now = () => performance.now() / 1000;
const totals = new Totals(now());
const forest = new Forest(byId("trees"), byId("rest"), byId("idle"));

function hear(event) {
  switch (event.kind) {
    case "overview":
      drawSwarm(event);
      drawFigures(event);
      break;
    case "waiting":
      byId("alarm").hidden = false;
      say(byId("alarm"), event.why);
      break;
    case "begin":
      forest.begin(event);
      break;
    case "first":
      totals.add(1, now());
      forest.first(event);
      break;
    case "round":
      totals.add(event.accepted.length + 1, now());
      forest.round(event);
      break;
    case "end":
      forest.end(event);
      break;
  }
}

function drawFigures(overview) {
  const nodes = overview.models.flatMap((model) => model.classes.flatMap((one) => one.nodes));
  const serving = nodes.filter((node) => node.serves).length;
  const silent = nodes.filter((node) => node.why_silent !== null).length;
  say(byId("model"), overview.models.map((model) => model.name).join(", "));
  say(byId("t-nodes"), `${serving}`);
  const others = nodes.length - serving - silent;
  say(byId("t-nodes-more"), [silent ? `${silent} silent` : "", others ? `${others} not serving` : ""].filter(Boolean).join(", ") || "all serving");
  const all = overview.models.reduce((sum, model) => sum + model.blocks, 0);
  const best = overview.models.map((model) => model.classes[0]?.replicas ?? []);
  const covered = best.flat().filter((replicas) => replicas > 0).length;
  const blocks = byId("t-blocks");
  say(blocks, `${covered} / ${all}`);
  blocks.closest(".tile").dataset.alarm = covered < all;
  const weakest = Math.min(...best.map((replicas) => (replicas.length ? Math.min(...replicas) : 0)));
  say(byId("t-blocks-more"), covered < all ? `${all - covered} missing` : `each at least ${weakest === 1 ? "once" : `${weakest} times`}`);
}

function drawTotals() {
  const at = now();
  say(byId("t-per"), totals.perTraversal === null ? "–" : totals.perTraversal.toFixed(2));
  say(byId("t-per-more"), totals.traversals ? `${totals.tokens.toLocaleString("en")} in ${totals.traversals.toLocaleString("en")} round trips` : "none seen yet");
  const speed = totals.speed(at);
  say(byId("t-speed"), speed >= 100 ? `${Math.round(speed)}` : speed.toFixed(speed ? 1 : 0));
  const points = line(totals.minute(at), 120, 40);
  byId("pulse").replaceChildren(svg("polygon", { points: `0,40 ${points} 120,40` }), svg("polyline", { points }));
}

// ---------------------------------------------------------------- the connection

const door = byId("door");
const feed = new Feed(hear, (state, detail, why) => {
  const link = byId("link");
  link.dataset.state = state;
  byId("unlock").hidden = state !== "locked";
  document.body.classList.toggle("stale", state !== "live");
  if (state === "live") forest.forget();
  if (state === "waiting") {
    // A count down is for eyes; who listens is told once.
    if (!link.textContent.startsWith("reconnecting")) say(link, "reconnecting");
    link.dataset.rest = `${why ? `${why}, ` : ""}${detail} s`;
    return;
  }
  delete link.dataset.rest;
  say(link, { live: "live", connecting: link.textContent === "reconnecting" ? "reconnecting" : "connecting", locked: "locked" }[state]);
  if (state === "locked") ask(detail);
});

function ask(refused) {
  say(byId("door-wrong"), refused ? "That key was refused." : "");
  const input = byId("door-key");
  input.value = "";
  input.setAttribute("aria-invalid", refused);
  if (!door.open) door.showModal();
  input.focus();
}

byId("door-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("door-key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) return say(byId("door-wrong"), "A key has letters, digits and signs only, without spaces.");
  door.close();
  return feed.unlock(key);
});
byId("door-later").addEventListener("click", () => door.close());
byId("unlock").addEventListener("click", () => ask(false));

setInterval(drawTotals, 500);
drawTotals();
feed.run();
