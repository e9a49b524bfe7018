// Draws the last rounds of a generation: one bar per round, as high as its number of tokens.

import { svg } from "./dom.js";

const SLOTS = 40;

export function bars(box, history) {
  const rounds = history.slice(-SLOTS);
  const most = Math.max(4, ...rounds);
  const step = 120 / SLOTS;
  box.replaceChildren(...rounds.map((tokens, i) => {
    const height = (23 * tokens) / most;
    return svg("rect", { x: (i + SLOTS - rounds.length) * step, y: 24 - height, width: step * 0.66, height, rx: 0.6, class: i === rounds.length - 1 ? "newest" : "" });
  }));
}
