// What the page shows while no run is chosen.

import { addressOf } from "./choice.js";
import { element, fill } from "./dom.js";
import * as format from "./format.js";
import { statusOf } from "./run_list.js";

const STOPPED = ["failed", "interrupted", "stopped", "killed"];
const ORDER = ["running", "finished", ...STOPPED, "starting", "unreadable"];
const MAX_NAMED = 8;

export class Overview {
  constructor(container) {
    this.container = element("div", {});
    container.replaceChildren(this.container);
  }

  close() {}

  take(rows, root) {
    if (rows.length === 0) {
      fill(this.container, root, () => nothingYet(root));
      return;
    }
    const newest = rows.toSorted((one, other) => other.started_seconds - one.started_seconds);
    const running = newest.filter((row) => row.status === "running").slice(0, MAX_NAMED);
    const stopped = newest.filter((row) => STOPPED.includes(row.status)).slice(0, MAX_NAMED);
    const sum = (kind) => rows.reduce((total, row) => total + row[kind], 0);
    const tiles = [
      ...ORDER.map((status) => [status, rows.filter((row) => row.status === status).length]),
      ["seeds committed", sum("committed")],
      ["seeds pruned", sum("pruned")],
    ].filter(([name, number]) => number > 0 || name.startsWith("seeds"));
    fill(this.container, [tiles, newest[0].id, running, stopped], () => [
      element(
        "header",
        { class: "story-head" },
        element("div", { class: "title" }, element("h1", {}, format.several(rows.length, "run"))),
        element(
          "p",
          { class: "quiet" },
          "Open one to follow it, or tick several to compare them. The newest is ",
          element("a", { href: addressOf([newest[0].id]) }, newest[0].id),
          ".",
        ),
      ),
      element(
        "dl",
        { class: "figures" },
        ...tiles.map(([name, number]) =>
          element("div", {}, element("dt", {}, name), element("dd", {}, format.count(number))),
        ),
      ),
      element(
        "div",
        { class: "parts" },
        named("Running now", running, (row) => [
          element(
            "span",
            { class: "number" },
            row.kind === "training"
              ? `return ${format.signed(row.mean_return)}`
              : `loss ${format.measure(row.loss)}`,
          ),
          row.epochs === null
            ? null
            : element("progress", {
                max: row.epochs,
                value: row.epoch,
                "aria-label": `${row.unit} ${row.epoch} of ${row.epochs}`,
              }),
        ]),
        named("Stopped before their end", stopped, (row) => [
          statusOf(row),
          row.resume === "" ? null : element("code", { class: "quiet" }, row.resume),
        ]),
      ),
    ]);
  }
}

function nothingYet(root) {
  return element(
    "div",
    { class: "welcome card" },
    element("h1", {}, "No runs yet"),
    element("p", {}, "Runs in ", element("code", {}, root), " appear here. This makes one:"),
    element("pre", {}, "esper grow digits"),
  );
}

function named(title, rows, partsOf) {
  if (rows.length === 0) {
    return null;
  }
  return element(
    "section",
    { class: "card" },
    element("h2", {}, title),
    element(
      "ul",
      { class: "runs-now" },
      ...rows.map((row) =>
        element("li", {}, element("a", { href: addressOf([row.id]) }, row.id), ...partsOf(row)),
      ),
    ),
  );
}
