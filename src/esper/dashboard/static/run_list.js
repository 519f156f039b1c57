// The list of runs, newest first. Only rows that changed are drawn again.

import { addressOf, choose, chosen } from "./choice.js";
import { element, svg } from "./dom.js";
import { ago, count, measure, several, signed } from "./format.js";

const SPARK_WIDTH = 72;
const SPARK_HEIGHT = 26;
const TIMES_MILLISECONDS = 10000;

export class RunList {
  #rows = new Map();
  #items = new Map();
  #list = document.getElementById("runs");
  #count = document.getElementById("count");
  #filter = document.getElementById("filter");
  #empty = element("li", { class: "empty quiet" });

  constructor() {
    this.#filter.addEventListener("input", () => this.#show());
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/^(input|textarea)$/i.test(event.target.tagName)) {
        event.preventDefault();
        this.#filter.focus();
      }
    });
    setInterval(() => this.#tellTimes(), TIMES_MILLISECONDS);
  }

  row(run) {
    return this.#rows.get(run);
  }

  rows() {
    return [...this.#rows.values()];
  }

  // Takes news; returns the rows that have another status than before, with it.
  take(message) {
    const turned = [];
    if (message.whole) {
      const known = new Set(message.rows.map((row) => row.id));
      message.gone = [...this.#rows.keys()].filter((run) => !known.has(run));
    }
    for (const run of message.gone) {
      this.#rows.delete(run);
      this.#items.get(run)?.remove();
      this.#items.delete(run);
    }
    for (const row of message.rows) {
      const before = this.#rows.get(row.id);
      this.#rows.set(row.id, row);
      if (before !== undefined && before.status !== row.status) {
        turned.push({ row, before: before.status });
      }
      const item = itemOf(row);
      this.#items.get(row.id)?.replaceWith(item);
      this.#items.set(row.id, item);
    }
    this.#order();
    this.mark();
    this.#show();
    return turned;
  }

  // Marks which rows are chosen.
  mark() {
    const runs = chosen();
    for (const [run, item] of this.#items) {
      const is = runs.includes(run);
      item.classList.toggle("chosen", is);
      item.querySelector("input").checked = is;
      const link = item.querySelector("a");
      if (is) {
        link.setAttribute("aria-current", "page");
      } else {
        link.removeAttribute("aria-current");
      }
    }
  }

  #order() {
    const rows = this.rows().sort(
      (one, other) => other.started_seconds - one.started_seconds || (one.id < other.id ? 1 : -1),
    );
    rows.forEach((row, index) => {
      const item = this.#items.get(row.id);
      if (this.#list.children[index] !== item) {
        this.#list.insertBefore(item, this.#list.children[index] ?? null);
      }
    });
  }

  #show() {
    const wanted = this.#filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [run, item] of this.#items) {
      const row = this.#rows.get(run);
      const text = `${row.id} ${row.task} ${row.policy} ${row.status}`.toLowerCase();
      item.hidden = !wanted.every((word) => text.includes(word));
      shown += item.hidden ? 0 : 1;
    }
    const all = this.#items.size;
    this.#count.textContent = shown === all ? count(all) : `${count(shown)} of ${count(all)}`;
    this.#empty.remove();
    if (shown === 0) {
      this.#empty.textContent = all === 0 ? "No runs here yet." : "No run matches the filter.";
      this.#list.append(this.#empty);
    }
  }

  #tellTimes() {
    for (const [run, item] of this.#items) {
      const row = this.#rows.get(run);
      item.querySelector(".when").textContent = whenOf(row);
    }
  }
}

function itemOf(row) {
  const nameId = `run-${encodeURIComponent(row.id)}`; // names may have spaces, ids may not
  const box = element("input", {
    type: "checkbox",
    "aria-label": `Compare ${row.id}`,
    onchange: (event) => {
      const others = chosen().filter((run) => run !== row.id);
      choose(event.target.checked ? [...others, row.id] : others);
    },
  });
  const link = element(
    "a",
    { class: "run", href: addressOf([row.id]), "aria-describedby": nameId },
    element("span", { class: "name" }, row.id),
  );
  const settings = [row.task, row.policy].filter(Boolean).join(" · ");
  const details = element(
    "span",
    { class: "details quiet", id: nameId },
    element("span", {}, row.problem ?? (settings || "waiting for its first event")),
    element("span", { class: "when" }, whenOf(row)),
  );
  return element(
    "li",
    { class: "row" },
    element("label", { class: "tick" }, box),
    element("div", { class: "head" }, link, statusOf(row)),
    element(
      "div",
      { class: "about" },
      details,
      element("div", { class: "figures-line" }, valueOf(row), seedsOf(row), progressOf(row)),
    ),
    spark(row),
  );
}

// What a run is judged by: its held-out loss, or the return that a policy has learned to get.
function valueOf(row) {
  return row.kind === "training"
    ? element("span", { class: "loss number" }, `return ${signed(row.mean_return)}`)
    : element(
        "span",
        { class: "loss number" },
        element("span", { class: "unseen" }, "held-out loss "),
        measure(row.loss),
      );
}

export function statusOf(row) {
  return element("span", { class: "status", "data-status": row.status }, row.status);
}

function whenOf(row) {
  return row.last_seconds === null ? "" : ago(row.last_seconds);
}

function seedsOf(row) {
  if (row.kind === "training") {
    return null; // its episodes' seeds are not its own
  }
  const parts = [
    ["committed", row.committed],
    ["pruned", row.pruned],
    ["growing", row.growing, row.status === "running" ? "growing" : "still growing"],
  ].filter(([, number]) => number > 0);
  if (parts.length === 0) {
    return element("span", { class: "quiet" }, "no seeds");
  }
  return element(
    "span",
    { class: "seeds" },
    ...parts.map(([kind, number, words = kind]) =>
      element(
        "span",
        { class: `seed ${kind}`, title: `${several(number, "seed")} ${words}` },
        element("span", { "aria-hidden": "true" }, `${number}`),
        element("span", { class: "unseen" }, `${number} ${words}`),
      ),
    ),
  );
}

function progressOf(row) {
  const epochs = row.epochs === null ? "" : ` / ${count(row.epochs)}`;
  return element("span", { class: "quiet number" }, `${row.unit} ${count(row.epoch)}${epochs}`);
}

// The held-out loss as a line, on a logarithmic scale if it is positive; or the return.
function spark({ kind, trend }) {
  const isLogarithmic = kind !== "training" && trend.every((value) => value > 0);
  const values = isLogarithmic ? trend.map(Math.log) : trend;
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  const step = SPARK_WIDTH / Math.max(1, values.length - 1);
  const points = values.map(
    (value, index) =>
      `${(index * step).toFixed(1)},${(SPARK_HEIGHT - 2 - ((value - low) / span) * (SPARK_HEIGHT - 4)).toFixed(1)}`,
  );
  return svg(
    "svg",
    {
      class: "spark",
      "aria-hidden": "true",
      viewBox: `0 0 ${SPARK_WIDTH} ${SPARK_HEIGHT}`,
      width: SPARK_WIDTH,
      height: SPARK_HEIGHT,
    },
    svg("polyline", { points: values.length > 1 ? points.join(" ") : "" }),
  );
}
