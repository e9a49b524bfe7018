// The page: passes the gateway's events to the parts that draw them.

import { connect } from "./connection.js";
import { byId, setText } from "../pages/shared/dom.js";
import { GenerationList } from "./generations.js";
import { drawSwarm } from "./swarm.js";
import { Tiles } from "./tiles.js";

const tiles = new Tiles();
const generations = new GenerationList(byId("trees"), byId("rest"), byId("idle"));

function handle(event) {
  switch (event.kind) {
    case "overview":
      drawSwarm(event);
      tiles.drawSwarm(event);
      break;
    case "waiting":
      byId("alarm").hidden = false;
      setText(byId("alarm"), event.why);
      break;
    case "begin":
      generations.begin(event);
      break;
    case "first":
      tiles.add(1);
      generations.first(event);
      break;
    case "round":
      tiles.add(event.accepted.length + 1);
      generations.round(event);
      break;
    case "end":
      generations.end(event);
      break;
  }
}

connect(handle, (state) => {
  if (state === "live") generations.endAll();
});
