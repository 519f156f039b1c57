// Several runs beside each other: their curves, their figures, and what was set differently.

import { ChartsView } from "./charts_view.js";
import { addressOf } from "./choice.js";
import { element, fill } from "./dom.js";
import * as format from "./format.js";
import { statusOf } from "./run_list.js";
import { problemOf } from "./session.js";

export class ComparisonView {
  #version = 0;

  constructor(container, runs) {
    this.runs = runs;
    this.head = element("header", { class: "story-head" });
    this.charts = element("div", { class: "charts compared" });
    this.table = element("section", { class: "card", hidden: true });
    this.settings = element("section", { class: "card", hidden: true });
    container.replaceChildren(this.head, this.table, this.charts, this.settings);
    fill(this.head, runs, () => [
      element("div", { class: "title" }, element("h1", {}, `${runs.length} runs compared`)),
      element(
        "p",
        { class: "quiet" },
        "Untick a run in the list, or remove it from the table, to leave it out.",
      ),
    ]);
    this.chartsView = new ChartsView(this.charts, () => this.#fetch());
    this.refresh();
  }

  close() {
    this.chartsView.close();
  }

  // A run that is compared has changed.
  refresh() {
    this.#version += 1;
    this.chartsView.show(this.#version);
  }

  async #fetch() {
    const query = new URLSearchParams(this.runs.map((run) => ["run", run]));
    const answer = await fetch(`/api/compare?${query}`);
    if (!answer.ok) {
      throw new Error(await problemOf(answer));
    }
    const comparison = await answer.json();
    this.#drawTable(comparison.runs);
    this.#drawSettings(comparison);
    return { version: this.#version, charts: comparison.charts };
  }

  #drawTable(runs) {
    const names = (kind) => [...new Set(runs.flatMap((run) => Object.keys(run[kind])))];
    const rows = [
      ["Status", runs.map((run) => statusOf(run.row))],
      ["Task", runs.map((run) => run.row.task)],
      ["Policy", runs.map((run) => run.row.policy)],
      ["Random seed", runs.map((run) => `${run.row.random_seed ?? "–"}`)],
      ["Steps", runs.map((run) => format.count(run.row.step))],
      ["Parameters", runs.map((run) => format.count(run.params))],
      ["Operations", runs.map((run) => format.compact(run.flops))],
      [
        "Seeds committed / pruned",
        runs.map(({ row }) =>
          row.kind === "training" ? "–" : `${row.committed} / ${row.pruned}`,
        ),
      ],
      ...(runs.some(({ row }) => row.kind === "training")
        ? [["Last mean return", runs.map(({ row }) => format.signed(row.mean_return))]]
        : []),
      ["Best held-out loss", runs.map((run) => format.measure(run.row.best_loss))],
      ...names("metrics").map((name) => [
        `Held-out ${format.words(name)}`,
        runs.map((run) => format.measure(run.metrics[name])),
      ]),
      ...names("test_metrics").map((name) => [
        `Test ${format.words(name)}`,
        runs.map((run) => format.measure(run.test_metrics[name])),
      ]),
      [
        "Time",
        runs.map(({ row }) =>
          format.duration(row.last_seconds === null ? null : row.last_seconds - row.started_seconds),
        ),
      ],
    ];
    this.table.hidden = false;
    fill(this.table, runs, () => [
      element("h2", {}, "Side by side"),
      tableOf("Figures of the runs", runs, rows, (run) => this.#heading(run)),
    ]);
  }

  #heading(run) {
    const others = this.runs.filter((other) => other !== run.row.id);
    return element(
      "span",
      { class: "column" },
      element("span", { class: "swatch", style: { background: run.colour } }),
      element("a", { href: addressOf([run.row.id]) }, run.row.id),
      element(
        "a",
        { class: "remove", href: addressOf(others), "aria-label": `Leave out ${run.row.id}` },
        "×",
      ),
    );
  }

  #drawSettings({ runs, settings }) {
    this.settings.hidden = false;
    const rows = settings.map((setting) => [
      setting.name,
      setting.values.map((value) => (typeof value === "string" ? value : JSON.stringify(value))),
    ]);
    fill(this.settings, [settings, runs.map((run) => run.row.id)], () => [
      element("h2", {}, "Settings that differ"),
      rows.length === 0
        ? element("p", { class: "quiet" }, "None: these runs were set up the same.")
        : tableOf("Settings that differ", runs, rows, (run) => run.row.id),
    ]);
  }
}

function tableOf(caption, runs, rows, headingOf) {
  return element(
    "div",
    { class: "table" },
    element(
      "table",
      {},
      element("caption", { class: "unseen" }, caption),
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          element("td", {}),
          ...runs.map((run) => element("th", { scope: "col", class: "number" }, headingOf(run))),
        ),
      ),
      element(
        "tbody",
        {},
        ...rows.map(([name, values]) =>
          element(
            "tr",
            {},
            element("th", { scope: "row" }, name),
            ...values.map((value) => element("td", { class: "number" }, value)),
          ),
        ),
      ),
    ),
  );
}
