// Requests to the service that this page comes from, with the API key of this tab.

/** Where the endpoints are; also under a path of a proxy. */
export const root = new URL("..", import.meta.url);

const KEY = "coe.key";
const MOST_EVENT = 2 ** 25; // characters of one event of a stream

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY));

/** An error of the service, or of the way to it. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }

  /** What to do about it. */
  get advice() {
    const wait = this.retryAfter ? `Wait ${this.retryAfter} s, then send it again.` : null;
    return ADVICE[this.code] ?? wait ?? BY_STATUS[this.status] ?? null;
  }
}

const ADVICE = {
  no_connection: "Check that the service runs and that this page was opened at its address.",
  invalid_api_key: "Enter a valid key of this service above (Key). `coe keys create NAME` prints one.",
  key_not_allowed: "Use another key: `coe keys create NAME --admin` prints one that may read all of this page.",
  admin_not_allowed:
    "Open this page on the machine of the service, or use a key: `coe keys create NAME --admin`, or that of serve.admin_key_env.",
  model_not_found: "Choose a model of the list; reload the page if experts were changed.",
  context_length_exceeded: "Shorten the message, start a new conversation, or lower max. tokens.",
  no_eligible_expert: "Choose another model, or leave out what its experts cannot do (tools, a schema, the length).",
  abstained: "Name an expert instead of a policy, or give the policy a fallback in the configuration.",
  invalid_json: "Correct the JSON in the options.",
  cut: "Send it again. If it happens again, look at the log of the service.",
  load_failing: "Choose another expert; `coe ps` on the service's machine shows why its weights do not load.",
  rate_limit_exceeded: "Wait until the window of the limit ends, or use a key with other limits (`coe keys list`).",
};
const BY_STATUS = {
  400: "Correct what the message names, then send it again.",
  429: "Wait a moment, then send it again.",
  500: "Look up the id in the log of the service.",
  501: "This service cannot do that.",
  502: "Send it again, or choose another expert; the view Live shows the state of the hosts.",
  503: "Send it again in a moment; the view Live shows the state of the hosts.",
  504: "Send it again with fewer tokens, or raise serve.deadline_s.",
};

/** The response of an endpoint. Raises ApiError unless its status is 2xx; an abort stays an AbortError. */
export async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (body !== undefined) sent["content-type"] = "application/json";
  if (key()) sent.authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(new URL(path, root), {
      method, headers: sent, body: body === undefined ? undefined : JSON.stringify(body), signal, cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(`the service did not answer (${error.message})`, { code: "no_connection" });
  }
  if (!response.ok) {
    const error = await errorOf(response);
    if (error.status === 401) document.dispatchEvent(new CustomEvent("coe:key"));
    throw error;
  }
  return response;
}

/** The JSON of a GET. */
export async function get(path, signal) {
  return (await request(path, { signal })).json();
}

async function errorOf(response) {
  const status = response.status;
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  try {
    return fromBody(await response.json(), { status, retryAfter });
  } catch {
    return new ApiError(`HTTP ${status} without a message`, { status, retryAfter });
  }
}

/** The error in a body of OpenAI's form. */
export function fromBody(body, more = {}) {
  const { message, code, param } = body.error;
  return new ApiError(String(message), { code, param, ...more });
}

/** The events of a stream as JSON values, until `[DONE]`. Raises ApiError if the stream ends before. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError("the connection ended before the answer was complete", { code: "cut" });
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      if (rest.length > MOST_EVENT) throw new ApiError("an event of the stream is too large", { code: "cut" });
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const event = JSON.parse(data);
        if (event.error) throw fromBody(event);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(`the answer was cut off (${error.message})`, { code: "cut" });
  } finally {
    reader.cancel().catch(() => {}); // an aborted stream is closed already
  }
}
