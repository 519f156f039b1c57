// Who this page is to the server: the token, and what it may ask for.

const TOKEN = /^#token=(.+)$/;

// Returns what the server says of this page, or null if it cannot be reached.
export async function session() {
  const answer = await fetch("/api/session").catch(() => null);
  return answer !== null && answer.ok ? answer.json() : null;
}

// Exchanges a token for a cookie; returns what is wrong, or null.
export async function signIn(token) {
  const answer = await fetch("/api/session", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ token }),
  }).catch(() => null);
  if (answer === null) {
    return "The server cannot be reached.";
  }
  return answer.ok ? null : problemOf(answer);
}

export function holdsToken() {
  return TOKEN.test(location.hash);
}

// Takes the token out of the address, where others could read it, and signs in with it; returns what
// is wrong, or null.
export async function signInByAddress() {
  const found = TOKEN.exec(location.hash);
  if (found === null) {
    return null;
  }
  history.replaceState(history.state, "", location.pathname + location.search);
  return signIn(decoded(found[1]));
}

function decoded(token) {
  try {
    return decodeURIComponent(token);
  } catch {
    return token; // a % that begins no code: as it stands, which the server judges
  }
}

// Asks for an action; returns what the server says of it.
export async function command(run, action, slot) {
  const known = await session();
  const answer = await fetch(`/api/runs/${address(run)}/actions`, {
    method: "POST",
    headers: {
      "Content-Type": "application/json",
      "X-Esper-Command": known?.command_token ?? "",
    },
    body: JSON.stringify({ action, slot }),
  }).catch(() => null);
  if (answer === null) {
    return "The server cannot be reached.";
  }
  return answer.ok ? (await answer.json()).told : problemOf(answer);
}

// Returns why a request was not answered as it should be.
export async function problemOf(answer) {
  const said = await answer.json().catch(() => null);
  return said?.problem ?? `The server answered ${answer.status}.`;
}

export function address(run) {
  return run.split("/").map(encodeURIComponent).join("/");
}
