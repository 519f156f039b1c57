// The page: follows the server's news and shows what the address asks for.

import { chosen, followLinks } from "./choice.js";
import { ComparisonView } from "./comparison_view.js";
import { element } from "./dom.js";
import { Overview } from "./overview.js";
import { RunList } from "./run_list.js";
import { holdsToken, session, signIn, signInByAddress } from "./session.js";
import { StoryView } from "./story_view.js";
import { Stream } from "./stream.js";

const SAID_MILLISECONDS = 6000;
const RETRY_MILLISECONDS = 1000;

const shown = document.getElementById("shown");
const connection = document.getElementById("connection");
const fold = document.getElementById("fold");
const said = document.getElementById("said");
const list = new RunList();

let view = null;
let growthPath = [];
let root = "";

const stream = new Stream({
  connected() {
    if (connection.dataset.state === "lost") {
      say("Connected again.");
    }
    tellConnection("live", "live");
  },
  disconnected() {
    if (connection.dataset.state === "live") {
      say("Disconnected. Trying to connect again.");
    }
    tellConnection("lost", "disconnected – trying again");
  },
  refused() {
    askForToken();
  },
  runs(message) {
    for (const { row } of list.take(message)) {
      say(`${row.id}: ${row.status}`);
    }
    root = message.root;
    document.getElementById("root").textContent = `\u200e${root}`; // cut at its left, read from there
    const refused = document.getElementById("refused");
    refused.hidden = message.refused.length === 0;
    refused.textContent = `Not shown: ${message.refused.map(wordsOf).join("; ")}`;
    const changed = new Set([...message.rows.map((row) => row.id), ...message.gone]);
    if (view instanceof StoryView) {
      view.takeRow(list.row(view.run));
    } else if (view instanceof ComparisonView && view.runs.some((run) => changed.has(run))) {
      view.refresh();
    } else if (view instanceof Overview) {
      view.take(list.rows(), root);
    }
    document.body.dataset.ready = "true";
  },
  story(message) {
    if (view instanceof StoryView && view.run === message.run) {
      view.take(message);
    }
  },
});

function wordsOf({ id, reason }) {
  return `${id} (${reason})`;
}

function tellConnection(state, words) {
  connection.dataset.state = state;
  connection.textContent = words;
}

// Tells something to who listens to the page, and to who sees it if it is an answer.
function say(words, { show = false } = {}) {
  said.textContent = words;
  if (show) {
    const note = element("p", { class: "toast" }, words);
    document.body.append(note);
    setTimeout(() => note.remove(), SAID_MILLISECONDS);
  }
}

function showChosen() {
  const runs = chosen();
  view?.close();
  list.mark();
  if (runs.length === 0) {
    view = new Overview(shown);
    if (root !== "") {
      view.take(list.rows(), root);
    }
  } else if (runs.length === 1) {
    view = new StoryView(shown, runs[0], growthPath, say);
    view.takeRow(list.row(runs[0]));
  } else {
    view = new ComparisonView(shown, runs);
  }
  document.title = runs.length === 1 ? `${runs[0]} – Esper` : "Esper";
  setFolded(runs.length > 0);
  stream.open(runs.length === 1 ? runs[0] : null);
}

// On a phone the list makes room for what was chosen.
function setFolded(folded) {
  document.body.classList.toggle("folded", folded);
  fold.setAttribute("aria-expanded", String(!folded));
  fold.textContent = folded ? "Choose runs" : "Hide the list";
}

function askForToken(wrong = null) {
  view?.close();
  view = null;
  stream.close();
  tellConnection("lost", "token needed");
  const problem = element("p", { class: "problem-words", role: "alert" }, wrong);
  const input = element("input", {
    id: "token",
    type: "password",
    autocomplete: "current-password",
    required: true,
  });
  const form = element(
    "form",
    { class: "card welcome" },
    element("h1", {}, "Token"),
    element(
      "p",
      {},
      "This dashboard is open to those who have its token: in the address that ",
      element("code", {}, "esper dashboard"),
      " printed, or in the file it was given.",
    ),
    element("label", { for: "token" }, "Token"),
    input,
    element("button", { type: "submit" }, "Open"),
    problem,
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    problem.textContent = (await signIn(input.value)) ?? "";
    if (problem.textContent === "") {
      begin();
    }
  });
  shown.replaceChildren(form);
  document.body.dataset.ready = "true";
  input.focus();
}

// Shows what the address asks for, or asks for the token; says what was wrong with the one given.
async function begin(problem = null) {
  const known = await session();
  if (known === null) {
    tellConnection("lost", "disconnected – trying again");
    setTimeout(begin, RETRY_MILLISECONDS, problem);
    return;
  }
  growthPath = known.growth_path;
  if (!known.admitted) {
    askForToken(problem);
    return;
  }
  if (known.needs_token && problem !== null) {
    say(problem, { show: true });
  }
  showChosen();
}

followLinks(document.body);
addEventListener("popstate", () => {
  if (view !== null) {
    showChosen();
  }
});
fold.addEventListener("click", () => setFolded(!document.body.classList.contains("folded")));
// A tab that nobody sees needs no news; a browser allows only a few open streams.
document.addEventListener("visibilitychange", () => {
  if (view === null) {
    return;
  }
  if (document.hidden) {
    stream.close();
  } else {
    stream.open(view instanceof StoryView ? view.run : null);
  }
});
// Another token was put into the address of this page.
addEventListener("hashchange", async () => {
  if (holdsToken()) {
    await begin(await signInByAddress());
  }
});
await begin(await signInByAddress());
