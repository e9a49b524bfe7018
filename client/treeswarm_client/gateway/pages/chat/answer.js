// Collects the chunks of an answer into its message, and measures it.

import { Trips } from "./markdown/draw.js";

/** What only this page knows of an answer, as long as it is open: the trees of its rounds, by message. */
export const roundsOf = new WeakMap();

/** One answer that is being streamed into `message`. */
export class Answering {
  constructor(message, isChat, { resumes = false } = {}) {
    Object.assign(this, { message, isChat, resumes });
    this.controller = new AbortController();
    this.began = performance.now();
    delete message.error;
    delete message.finish;
    if (!resumes) Object.assign(message, { content: "", trips: [], traversals: [], tokens: 0 });
    message.state = "running";
    this.trips = new Trips(message.trips);
    this.rounds = resumes ? (roundsOf.get(message) ?? []) : [];
    roundsOf.set(message, this.rounds);
    // A continued answer counts on, in tokens, traversals and time.
    this.before = { tokens: message.tokens, traversals: message.traversals.at(-1)?.[0] ?? 0, ms: message.lastMs ?? 0 };
  }

  take(chunk) {
    this.note(chunk.treeswarm ?? {});
    if (chunk.usage) {
      this.message.tokens = this.before.tokens + chunk.usage.completion_tokens;
      this.message.promptTokens = chunk.usage.prompt_tokens;
      this.message.cachedTokens = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
    }
    const choice = chunk.choices[0];
    if (!choice) return;
    const delta = this.isChat ? choice.delta : { content: choice.text };
    this.add(delta, this.number(chunk.treeswarm?.traversal));
    if (choice.finish_reason) this.message.finish = choice.finish_reason;
  }

  add({ content, reasoning_content: reasoning, tool_calls: calls }, traversal) {
    const { message } = this;
    if (content) {
      message.content += content;
      if (traversal !== undefined) this.trips.add(message.content.length, traversal);
    }
    if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
    for (const part of calls ?? []) {
      message.calls ??= [];
      const call = (message.calls[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
      call.id ||= part.id ?? "";
      call.name += part.function?.name ?? "";
      call.arguments += part.function?.arguments ?? "";
    }
  }

  /** Return the number of a traversal within the whole answer. */
  number(traversal) {
    return traversal === undefined ? undefined : this.before.traversals + traversal;
  }

  /** Note what the gateway says of the traversals of this answer. */
  note({ traversal, tokens, rounds, route, stats }) {
    const { message } = this;
    if (rounds) this.rounds.push(...rounds.map((round) => ({ ...round, traversal: this.number(round.traversal) })));
    if (route) message.route = route;
    if (stats) message.stats = stats;
    if (traversal === undefined) return;
    message.lastMs = this.before.ms + performance.now() - this.began;
    message.firstMs ??= message.lastMs;
    const number = this.number(traversal);
    const all = this.before.tokens + tokens;
    const last = message.traversals.at(-1);
    if (last?.[0] === number) last[1] += all - message.tokens;
    else message.traversals.push([number, all - message.tokens]);
    message.tokens = all;
  }
}

/** Return the figures of an answer, each as text; those that are not known are missing. */
export function figuresOf(message) {
  const { tokens = 0, traversals = [], firstMs, lastMs } = message;
  const figures = { tokens: tokens ? tokens.toLocaleString("en") : "", per: "", speed: "", first: "" };
  if (traversals.length) figures.per = (tokens / traversals.length).toFixed(2);
  if (lastMs > firstMs && tokens > 1) {
    const speed = ((tokens - traversals[0][1]) / (lastMs - firstMs)) * 1000;
    figures.speed = speed >= 100 ? `${Math.round(speed)}` : speed.toFixed(1);
  }
  if (firstMs !== undefined) figures.first = firstMs < 995 ? `${Math.round(firstMs)} ms` : `${(firstMs / 1000).toFixed(1)} s`;
  return figures;
}
