// Asks the gateway for a text and yields it as it comes.

import { keyHeaders } from "../shared/key.js";

/** An answer other than success: `status` is that of HTTP, or 0 where a stream ended with an error or without its end. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Yield the chunks of a streamed answer.  Throws Refusal, and AbortError where `signal` ends it. */
export async function* streamCompletion(path, body, signal) {
  const options = { include_usage: true, include_traversals: true };
  const request = { method: "POST", headers: { "Content-Type": "application/json", ...keyHeaders() }, signal, body: JSON.stringify({ ...body, stream: true, stream_options: options }) };
  const response = await unlessLost(fetch(path, request), "the gateway cannot be reached");
  if (!response.ok) throw new Refusal(response.status, await reasonOf(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await unlessLost(reader.read(), "the connection to the gateway was lost");
    if (done) throw new Refusal(0, "the connection to the gateway ended in the middle of the answer");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (!part.startsWith("data: ")) continue;
      const chunk = JSON.parse(part.slice(6));
      if (chunk.error) throw new Refusal(0, chunk.error.message);
      yield chunk;
    }
  }
}

/** Return what a promise returns.  Browsers' own words for a lost connection do not help users. */
async function unlessLost(promise, message) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, message);
  }
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the gateway answered with status ${response.status}`;
  }
}
