// The last rounds of a generation, a bar each: how many tokens a round trip brought.

import { svg } from "./dom.js";

const SLOTS = 40;

export function bars(box, history) {
  const shown = history.slice(-SLOTS);
  const most = Math.max(4, ...shown);
  const step = 120 / SLOTS;
  box.replaceChildren(...shown.map((tokens, i) => {
    const height = (23 * tokens) / most;
    return svg("rect", { x: (i + SLOTS - shown.length) * step, y: 24 - height, width: step * 0.66, height, rx: 0.6, class: i === shown.length - 1 ? "newest" : "" });
  }));
}
