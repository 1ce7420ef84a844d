// The server's API: JSON, server-sent events, and errors in words. The key lives in this module's memory only.

let key = "";

export function setKey(value) {
  key = value.trim();
}

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server can't be reached. Is it still running?", 0);
  }
  if (!response.ok) throw await asError(response);
  return response;
}

async function asError(response) {
  let message = `The server answered ${response.status} ${response.statusText}`.trim();
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not ours: a proxy's page. The status has to do.
  }
  const retry = response.headers.get("retry-after");
  if (response.status === 503 && retry) message += `; worth another try in ${retry} s`;
  return new ApiError(message, response.status);
}

// The JSON at a path below the page's own, such as "v1/models".
export async function get(path) {
  return (await request(path)).json();
}

function send(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

// The JSON that a JSON is answered with.
export async function post(path, body, signal) {
  return (await send(path, body, signal)).json();
}

// Calls `onEvent` with each event of a streamed comparison; returns the last one, the whole answer.
export async function compare(body, signal, onEvent) {
  const response = await send("v1/compare", { ...body, stream: true }, signal);
  let answer = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") break;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, event.error.code);
    if (event.object === "compare") answer = event;
    else onEvent(event);
  }
  if (!answer) throw new ApiError("The connection ended before the answer did.", 0);
  return answer;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const line = buffer.slice(0, end);
        buffer = buffer.slice(end + 2);
        if (line.startsWith("data: ")) yield line.slice(6);
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection to the server broke.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
