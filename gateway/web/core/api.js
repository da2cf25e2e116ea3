// Talking to the gateway. Whatever goes wrong becomes a Failure, which failures.js puts in words.

const KEY = "miaotui.key";

/** What went wrong: `slug` is the end of the problem's type, or "network", "unauthorized", …. */
export class Failure extends Error {
  constructor(slug, { status = 0, detail = "", errors = [], requestId = "", retryAfter = 0 } = {}) {
    super(detail || slug);
    Object.assign(this, { slug, status, detail, errors, requestId, retryAfter });
  }
}

export function key() {
  try {
    return sessionStorage.getItem(KEY) || "";
  } catch {
    return "";
  }
}

export function setKey(value) {
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Without storage, the key has to be given again for each call.
  }
}

let asker = null;
let asking = null;

/** `ask(wrong)` shows the key's field and resolves to whether a key was given. */
export function onUnauthorized(ask) {
  asker = ask;
}

function askForKey(wrong) {
  // One dialog for all calls that wait.
  asking ??= asker(wrong).finally(() => {
    asking = null;
  });
  return asking;
}

/** The address of an endpoint; relative, so that the gateway may stand under any path. */
export function address(path, base) {
  return new URL(path, base ? base.replace(/\/*$/, "/") : document.baseURI);
}

const BY_STATUS = {
  401: "unauthorized",
  403: "forbidden",
  404: "not-found",
  408: "body-timeout",
  413: "body-too-large",
  429: "rate-limited",
  502: "service-failed",
  503: "unavailable",
  504: "timeout",
};
const BY_CODE = {
  context_length_exceeded: "context-too-long",
  insufficient_quota: "quota-exceeded",
  invalid_api_key: "unauthorized",
  rate_limit_exceeded: "rate-limited",
};

/** A failed response's Failure; reads problem details and OpenAI's errors. */
export function failureOf(status, headers, body) {
  const problem = body && typeof body === "object" ? body : {};
  const more = {
    status,
    requestId: problem.request_id || headers("X-Request-ID") || "",
    retryAfter: Number(headers("Retry-After")) || 0,
  };
  if (problem.error && typeof problem.error === "object") {
    const { code, message, param } = problem.error;
    const slug = BY_CODE[code] || (code ? code.replaceAll("_", "-") : BY_STATUS[status]);
    const errors = param ? [{ pointer: `/${param}`, detail: message }] : [];
    return new Failure(slug || "invalid-request", { ...more, detail: message, errors });
  }
  const named = typeof problem.type === "string" && problem.type.startsWith("/problems/");
  const slug = named && status !== 401 ? problem.type.split("/").pop() : null;
  return new Failure(slug || BY_STATUS[status] || "other", {
    ...more,
    detail: problem.detail || "",
    errors: Array.isArray(problem.errors) ? problem.errors : [],
  });
}

const hex = (length) =>
  Array.from(crypto.getRandomValues(new Uint8Array(length)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** A trace context that asks for this request to be traced: the page shows its trace. */
const traced = () => ({ traceparent: `00-${hex(16)}-${hex(8)}-01` });

async function failed(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // A proxy's error page says nothing that a person could use.
  }
  return failureOf(response.status, (name) => response.headers.get(name), body);
}

/**
 * A response that is a success. Throws Failure, or AbortError.
 * `quiet`: a 401 opens no dialog. `base`, `bearer`: another gateway and its key.
 */
export async function request(path, options = {}) {
  const { method = "GET", body, signal, base, bearer, quiet = false, headers = {} } = options;
  const given = base ? bearer : key();
  const send = { ...headers, ...(method === "POST" && !base ? traced() : {}) };
  if (given) send.Authorization = `Bearer ${given}`;
  if (body !== undefined) send["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path, base), {
      method,
      signal,
      headers: send,
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "omit",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(base ? "other-network" : "network");
  }
  if (response.ok) return response;
  const failure = await failed(response);
  const known = base ? null : key();
  if (response.status === 401 && !base && !quiet && asker) {
    // Another call may have been given the key in the meantime.
    if (known !== given || (await askForKey(Boolean(given)))) return request(path, options);
  }
  throw failure;
}

/** The JSON of a response, or null where there is none. */
export async function call(path, options) {
  const response = await request(path, options);
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(options?.base ? "other-network" : "other");
  }
}

/** The data of server-sent events, parsed, until "[DONE]". Throws Failure for an error event. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Failure("cut-off");
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:"));
        const text = data.map((line) => line.slice(5).trimStart()).join("\n");
        if (text === "[DONE]") return;
        if (!text) continue;
        const event = JSON.parse(text);
        if (event.error) throw failureOf(0, () => null, event);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Failure("cut-off");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Sends one file; `progress(share)` is told how much has gone out. */
export async function upload(path, form, { progress }) {
  const given = key();
  const { status, body, headers } = await new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open("POST", address(path));
    if (given) sending.setRequestHeader("Authorization", `Bearer ${given}`);
    sending.responseType = "json";
    sending.upload.onprogress = (event) => {
      if (event.lengthComputable) progress(event.loaded / event.total);
    };
    sending.upload.onload = () => progress(1);
    sending.onload = () =>
      resolve({
        status: sending.status,
        body: sending.response,
        headers: (name) => sending.getResponseHeader(name),
      });
    sending.onerror = () => reject(new Failure("network"));
    sending.send(form);
  });
  if (status >= 200 && status < 300) return body;
  if (status === 401 && asker && (key() !== given || (await askForKey(Boolean(given))))) {
    return upload(path, form, { progress });
  }
  throw failureOf(status, headers, body);
}
