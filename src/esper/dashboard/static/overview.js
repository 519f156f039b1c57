// What the page shows while no run is chosen.

import { addressOf } from "./choice.js";
import { element, fill } from "./dom.js";
import * as format from "./format.js";

const ORDER = ["running", "finished", "failed", "interrupted", "killed", "starting", "unreadable"];

export class Overview {
  constructor(container) {
    this.container = element("div", {});
    container.replaceChildren(this.container);
  }

  close() {}

  take(rows, root) {
    if (rows.length === 0) {
      fill(this.container, root, () => [
        element("div", { class: "welcome card" },
          element("h1", {}, "No runs yet"),
          element("p", {}, "Runs in ", element("code", {}, root), " appear here by themselves. This makes one:"),
          element("pre", {}, "esper grow digits"),
        ),
      ]);
      return;
    }
    const counts = ORDER.map((status) => [
      status,
      rows.filter((row) => row.status === status).length,
    ]).filter(([, number]) => number > 0);
    const committed = rows.reduce((sum, row) => sum + row.committed, 0);
    const pruned = rows.reduce((sum, row) => sum + row.pruned, 0);
    const newest = rows.reduce((one, other) =>
      other.started_seconds > one.started_seconds ? other : one,
    );
    fill(this.container, [counts, committed, pruned, newest.id], () => [
      element("header", { class: "story-head" },
        element("div", { class: "title" }, element("h1", {}, format.several(rows.length, "run"))),
        element("p", { class: "quiet" },
          "Open one from the list to follow it, or tick several to compare them. The newest is ",
          element("a", { href: addressOf([newest.id]) }, newest.id), "."),
      ),
      element("dl", { class: "figures" },
        ...[...counts, ["seeds committed", committed], ["seeds pruned", pruned]].map(
          ([name, number]) =>
            element("div", {},
              element("dt", {}, name),
              element("dd", {}, format.count(number))),
        ),
      ),
    ]);
  }
}
