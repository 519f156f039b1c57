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
  return answer.ok ? null : (await answer.json()).problem;
}

// Takes the token out of the address, where others could read it, and signs in with it.
export async function signInByAddress() {
  const found = TOKEN.exec(location.hash);
  if (found !== null) {
    history.replaceState(history.state, "", location.pathname + location.search);
    await signIn(decodeURIComponent(found[1]));
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
  const said = await answer.json();
  return said.told ?? said.problem;
}

export function address(run) {
  return run.split("/").map(encodeURIComponent).join("/");
}
