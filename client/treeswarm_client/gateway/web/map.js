// The page: passes the gateway's events to the parts that draw them.

import { byId, setText, svg } from "./dom.js";
import { Feed } from "./feed.js";
import { GenerationList } from "./generations.js";
import { drawSwarm } from "./swarm.js";
import { Totals, line } from "./totals.js";

const now = () => performance.now() / 1000;
const totals = new Totals(now());
const generations = new GenerationList(byId("trees"), byId("rest"), byId("idle"));

function handle(event) {
  switch (event.kind) {
    case "overview":
      drawSwarm(event);
      drawTiles(event);
      break;
    case "waiting":
      byId("alarm").hidden = false;
      setText(byId("alarm"), event.why);
      break;
    case "begin":
      generations.begin(event);
      break;
    case "first":
      totals.add(1, now());
      generations.first(event);
      break;
    case "round":
      totals.add(event.accepted.length + 1, now());
      generations.round(event);
      break;
    case "end":
      generations.end(event);
      break;
  }
}

function drawTiles(overview) {
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

function drawTotals() {
  const at = now();
  setText(byId("t-per"), totals.perTraversal === null ? "–" : totals.perTraversal.toFixed(2));
  setText(byId("t-per-more"), totals.traversals ? `${totals.tokens.toLocaleString("en")} in ${totals.traversals.toLocaleString("en")} traversals` : "none yet");
  const speed = totals.speed(at);
  setText(byId("t-speed"), speed >= 100 ? `${Math.round(speed)}` : speed.toFixed(speed ? 1 : 0));
  const points = line(totals.lastMinute(at), 120, 40);
  byId("pulse").replaceChildren(svg("polygon", { points: `0,40 ${points} 120,40` }), svg("polyline", { points }));
}

// ---------------------------------------------------------------- the connection

const dialog = byId("key-dialog");
const feed = new Feed(handle, (state, detail, reason) => {
  const link = byId("link");
  link.dataset.state = state;
  byId("unlock").hidden = state !== "locked";
  document.body.classList.toggle("stale", state !== "live");
  if (state === "live") generations.endAll();
  if (state === "waiting") {
    // Screen readers announce the state once, not the count down.
    if (!link.textContent.startsWith("reconnecting")) setText(link, "reconnecting");
    link.dataset.rest = `${reason ? `${reason}, ` : ""}${detail} s`;
    return;
  }
  delete link.dataset.rest;
  setText(link, { live: "live", connecting: link.textContent === "reconnecting" ? "reconnecting" : "connecting", locked: "locked" }[state]);
  if (state === "locked") askForKey(detail);
});

function askForKey(refused) {
  setText(byId("key-error"), refused ? "That key was refused." : "");
  const input = byId("key-input");
  input.value = "";
  input.setAttribute("aria-invalid", refused);
  if (!dialog.open) dialog.showModal();
  input.focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key-input").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) return setText(byId("key-error"), "A key has only letters, digits and punctuation, without spaces.");
  dialog.close();
  return feed.unlock(key);
});
byId("key-later").addEventListener("click", () => dialog.close());
byId("unlock").addEventListener("click", () => askForKey(false));

setInterval(drawTotals, 500);
drawTotals();
feed.run();
