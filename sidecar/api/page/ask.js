// Questions to the sidecar that served this page, and to nobody else. Every answer is {ok, status, body, error}.

const PATIENCE = 8_000; // milliseconds

export async function ask(path, { token, body } = {}) {
  const headers = { Accept: "application/json" };
  if (token) Object.assign(headers, { Authorization: `Bearer ${token}`, "X-Actor": "status page" });
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    const answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      signal: AbortSignal.timeout(PATIENCE),
    });
    let said = null;
    try {
      said = await answer.json();
    } catch {
      return { ok: false, status: answer.status, body: null, error: `an answer that is no JSON (${answer.status})` };
    }
    const error = answer.ok ? "" : said?.error?.message || `status ${answer.status}`;
    return { ok: answer.ok, status: answer.status, body: said, error };
  } catch (reason) {
    const late = reason instanceof DOMException && reason.name === "TimeoutError";
    return { ok: false, status: 0, body: null, error: late ? `no answer within ${PATIENCE / 1000} s` : "no connection" };
  }
}

// A header cannot carry every character; what it cannot carry is no token anyway.
export const sendable = (token) => /^[\x21-\x7e]+$/.test(token);
