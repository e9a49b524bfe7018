// Asks the gateway for a text and yields it as it comes.

import { keyHeaders } from "../map/feed.js";

/** An answer other than success; `status` is that of HTTP, or 0 in the middle of a stream. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Yield the chunks of a streamed answer.  Throws Refusal, and what `fetch` throws. */
export async function* streamCompletion(path, body, signal) {
  const headers = { "Content-Type": "application/json", ...keyHeaders() };
  const response = await fetch(path, { method: "POST", headers, signal, body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }) });
  if (!response.ok) throw new Refusal(response.status, await reasonOf(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
      const chunk = JSON.parse(part.slice(6));
      if (chunk.error) throw new Refusal(0, chunk.error.message);
      yield chunk;
    }
  }
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the gateway answered with status ${response.status}`;
  }
}
