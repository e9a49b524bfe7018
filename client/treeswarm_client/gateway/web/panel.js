// Draws one generation: its figures, its tree and its text.

import { bars } from "../pages/shared/bars.js";
import { el, plural, setText, svg } from "../pages/shared/dom.js";
import { TreePicture } from "../pages/shared/tree.js";

export class Panel {
  constructor(generation) {
    this.generation = generation;
    this.tip = "";
    const figure = (name) => el("div", {}, el("dt", {}, name), el("dd"));
    this.numbers = { tokens: figure("tokens"), per: figure("per traversal"), ms: figure("per round"), nodes: figure("nodes") };
    this.chip = el("span", { class: "chip" });
    this.bars = svg("svg", { class: "bars", viewBox: "0 0 120 24", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.picture = new TreePicture();
    this.hint = el("p", { class: "hint" });
    this.text = el("p", { class: "text" });
    this.element = el("article", { class: "panel", "aria-label": `Generation ${generation.id}`, "data-id": generation.id },
      el("header", {}, el("h3", {}, `#${generation.id}`), this.chip, this.bars, el("dl", {}, ...Object.values(this.numbers))),
      el("div", { class: "canvas" }, this.picture.element, this.hint),
      el("div", { class: "said" }, this.text));
    this.drawNumbers();
  }

  first(event) {
    this.tip = event.bonus ?? "";
  }

  round(event) {
    this.picture.show(event, this.tip);
    this.tip = event.bonus ?? "";
  }

  end() {
    this.drawNumbers();
  }

  close() {
    this.picture.close();
    this.picture.resized.disconnect();
  }

  drawNumbers() {
    const generation = this.generation;
    this.element.dataset.running = generation.running;
    this.element.dataset.rounds = generation.rounds;
    setText(this.chip, generation.state);
    setText(this.numbers.tokens.lastChild, `${generation.tokens}`);
    setText(this.numbers.per.lastChild, generation.perTraversal);
    setText(this.numbers.ms.lastChild, generation.roundMs);
    setText(this.numbers.nodes.lastChild, generation.rounds ? `${Math.round(generation.drafted / generation.rounds)}` : "–");
    bars(this.bars, generation.history);
    const prompt = generation.prompt === null ? "The prompt" : `The prompt of ${plural(generation.prompt, "token")}`;
    setText(this.hint, generation.rounds || !generation.running ? "" : generation.traversals ? "Waiting for the first tree." : `${prompt} is being processed.`);
    this.writeText();
  }

  /** Write the text, round by round; dots stand for words that the gateway does not send. */
  writeText() {
    const turns = this.generation.turns;
    const parts = turns.map((round, i) => {
      const words = round.words.map((word) => word ?? "•").join("");
      const classes = `turn ${(this.generation.traversals - turns.length + i) % 2 ? "odd" : ""} ${i === turns.length - 1 ? "newest" : ""}`;
      return el("span", { class: classes }, words, el("span", { class: "own" }, round.bonus ?? "◆"));
    });
    this.text.replaceChildren(...parts);
    this.text.parentElement.scrollTop = this.text.parentElement.scrollHeight;
  }
}
