// One run as it stands: its key figures, its slots, its charts, and what happened.

import { ChartsView } from "./charts_view.js";
import { element, fill } from "./dom.js";
import * as format from "./format.js";
import { statusOf } from "./run_list.js";
import { address, command, problemOf } from "./session.js";

const MAX_LINES = 200;
const NOT_SHOWN = new Set(["loss", "train_loss", "step_seconds", "flops"]);

export class StoryView {
  #lines = [];
  #state = null;
  #row = null;
  #offers = [];
  #slots = new Map();

  // say: told to who listens to the page.
  constructor(container, run, growthPath, say) {
    this.run = run;
    this.growthPath = growthPath;
    this.say = say;
    this.head = element("header", { class: "story-head" });
    this.problem = element("div", {});
    this.figures = element("dl", { class: "figures" });
    this.slotGrid = element("div", { class: "slots" });
    this.slotPart = element(
      "section",
      { class: "card", "aria-labelledby": "slots-title", hidden: true },
      element("h2", { id: "slots-title" }, "Slots"),
      this.slotGrid,
    );
    this.charts = element("div", { class: "charts" });
    this.urgentOnly = element("input", { type: "checkbox", onchange: () => this.#drawLines() });
    this.lines = element("ol", { class: "lines", "aria-label": "Events, newest first" });
    this.linePart = element(
      "section",
      { class: "card", "aria-labelledby": "lines-title", hidden: true },
      element(
        "div",
        { class: "part-head" },
        element("h2", { id: "lines-title" }, "What happened"),
        element("label", { class: "quiet" }, this.urgentOnly, " warnings only"),
      ),
      this.lines,
    );
    this.settings = element("div", { class: "table" });
    this.settingsPart = element(
      "details",
      { class: "card long", hidden: true },
      element("summary", {}, element("h2", {}, "Settings")),
      this.settings,
    );
    container.replaceChildren(
      this.head,
      this.problem,
      this.figures,
      this.slotPart,
      this.charts,
      this.linePart,
      this.settingsPart,
    );
    this.chartsView = new ChartsView(this.charts, async () => {
      const answer = await fetch(`/api/runs/${address(run)}/charts`);
      if (!answer.ok) {
        throw new Error(await problemOf(answer));
      }
      return answer.json();
    });
  }

  close() {
    this.chartsView.close();
  }

  // Takes the run's row in the list, which knows whether it is running.
  takeRow(row) {
    this.#row = row ?? null;
    this.#drawHead();
    this.#drawSlots();
  }

  // Takes news of the story.
  take(message) {
    fill(this.problem, message.problem, () =>
      message.problem === null
        ? []
        : element("p", { class: "card problem", role: "alert" }, message.problem),
    );
    if (message.state === null) {
      return;
    }
    this.#state = message.state;
    this.#offers = message.offers;
    this.#lines = (message.whole ? [] : this.#lines)
      .concat(message.state.lines)
      .slice(-MAX_LINES);
    this.#drawHead();
    this.#drawFigures();
    this.#drawSlots();
    this.#drawLines();
    this.#drawSettings();
    if (message.state.unread === 0) {
      this.chartsView.show(message.state.version);
    }
  }

  #drawHead() {
    const row = this.#row;
    const state = this.#state;
    const config = state?.config ?? {};
    const facts = [
      config.task ?? row?.task,
      row?.policy || config.policy,
      config.random_seed === undefined ? null : `random seed ${config.random_seed}`,
      config.learning_rate === undefined ? null : `learning rate ${config.learning_rate}`,
      config.device,
    ].filter(Boolean);
    const unread = state?.unread ?? 0;
    const offers = this.#offersFor("run");
    const key = [this.run, row?.status, row?.epoch, row?.epochs, facts, unread, offers];
    fill(this.head, key, () => [
      element(
        "div",
        { class: "title" },
        element("h1", {}, this.run),
        row === null ? null : statusOf(row),
        element(
          "span",
          { class: "actions" },
          ...offers.map((offer) => this.#button(offer, null)),
        ),
      ),
      element("p", { class: "quiet" }, facts.join(" · ")),
      row === null || row.epochs === null
        ? null
        : element(
            "div",
            { class: "epochs" },
            element("progress", {
              max: row.epochs,
              value: row.epoch,
              "aria-label": `${row.unit} ${row.epoch} of ${row.epochs}`,
            }),
            element(
              "span",
              { class: "quiet number" },
              `${row.unit} ${format.count(row.epoch)} of ${format.count(row.epochs)}`,
            ),
          ),
      unread === 0
        ? null
        : element(
            "p",
            { class: "quiet reading" },
            `reading the run: ${format.count(unread)} events to go`,
          ),
    ]);
  }

  // The story may have been told before the run ended: its row says how it stands.
  #offersFor(target) {
    return this.#row?.status === "running"
      ? this.#offers.filter((offer) => offer.target === target)
      : [];
  }

  #drawFigures() {
    const { figures, training_figures: ofTraining } = this.#state;
    const tiles = figures === null ? ofTraining.map(capitalised) : this.#tilesOfRun(figures);
    fill(this.figures, tiles, () =>
      tiles.map(([name, value, note]) =>
        element(
          "div",
          { class: name === "Interventions" ? "urgent" : null },
          element("dt", {}, name),
          element("dd", {}, value, note ? element("small", {}, note) : null),
        ),
      ),
    );
  }

  #tilesOfRun(figures) {
    const { metrics } = figures;
    const test = figures.test_metrics ?? {};
    const tiles = [
      [
        "Held-out loss",
        format.measure(metrics.loss),
        this.#row?.best_loss === null ? null : `best ${format.measure(this.#row?.best_loss)}`,
      ],
      ...Object.entries(metrics)
        .filter(([name]) => !NOT_SHOWN.has(name))
        .map(([name, value]) => [`Held-out ${format.words(name)}`, format.measure(value), null]),
      ...Object.entries(test).map(([name, value]) => [
        `Test ${format.words(name)}`,
        format.measure(value),
        figures.twin_metrics?.[name] === undefined
          ? null
          : `its twin ${format.measure(figures.twin_metrics[name])}`,
      ]),
      [
        "Parameters",
        format.count(figures.params),
        sizeNote(figures),
      ],
      [
        "Seeds committed",
        format.count(figures.committed),
        [
          `${format.count(figures.pruned)} pruned`,
          figures.growing > 0 ? `${format.count(figures.growing)} growing` : null,
        ]
          .filter(Boolean)
          .join(", "),
      ],
      [
        "Operations",
        format.compact(metrics.flops),
        metrics.flops === undefined ? "not counted" : "floating point, in all",
      ],
      ["Time", format.duration(figures.seconds), `step ${format.count(figures.step)}`],
    ];
    if (figures.interventions > 0) {
      tiles.push([
        "Interventions",
        format.count(figures.interventions),
        "of the governor and the monitors",
      ]);
    }
    return tiles;
  }

  #drawSlots() {
    const slots = this.#state?.slots ?? [];
    const offers = this.#offersFor("slot");
    this.slotPart.hidden = slots.length === 0;
    const known = new Set(slots.map((slot) => slot.path));
    for (const [path, card] of this.#slots) {
      if (!known.has(path)) {
        card.remove();
        this.#slots.delete(path);
      }
    }
    for (const slot of slots) {
      let card = this.#slots.get(slot.path);
      if (card === undefined) {
        card = element("article", { class: "slot" });
        this.#slots.set(slot.path, card);
        this.slotGrid.append(card);
      }
      fill(card, [slot, offers, this.#state.unit], () => this.#slotParts(slot, offers));
    }
  }

  #slotParts(slot, offers) {
    const { unit } = this.#state;
    const living = slot.blueprint !== null;
    const facts = [
      slot.param_count === null ? null : `${format.count(slot.param_count)} parameters`,
      slot.contribution_fraction === null
        ? null
        : `saves ${format.percent(slot.contribution_fraction)} of the loss`,
      slot.gradient_ratio === null
        ? null
        : `gradient ${slot.gradient_ratio.toPrecision(2)} of the host's`,
    ].filter(Boolean);
    return [
      element(
        "div",
        { class: "slot-head" },
        element("h3", { class: "mono" }, slot.path),
        element(
          "span",
          { class: "stage", style: { "--stage": slot.colour ?? "var(--quiet)" } },
          slot.stage,
        ),
      ),
      this.#track(slot),
      living
        ? element(
            "div",
            { class: "alpha" },
            element("span", {}, element("strong", {}, slot.blueprint)),
            element("meter", {
              min: 0,
              max: 1,
              value: slot.alpha,
              "aria-label": `alpha of ${slot.blueprint} in ${slot.path}`,
              style: { "--stage": slot.colour ?? "var(--quiet)", "--alpha": slot.alpha },
            }),
            element("span", { class: "number" }, `α ${slot.alpha.toFixed(2)}`),
          )
        : null,
      facts.length > 0 ? element("p", { class: "quiet" }, facts.join(" · ")) : null,
      element(
        "p",
        { class: "quiet" },
        living || slot.since_epoch > 0
          ? `${slot.stage} since ${unit} ${slot.since_epoch}`
          : "free",
        slot.refused === null ? "" : `; ${slot.refused}`,
      ),
      slot.committed.length > 0
        ? element(
            "p",
            { class: "grown" },
            element("span", { class: "quiet" }, "grown: "),
            ...slot.committed.map((name) => element("span", { class: "chip good" }, name)),
          )
        : null,
      living && offers.length > 0
        ? element(
            "div",
            { class: "actions" },
            ...offers.map((offer) => this.#button(offer, slot.path)),
          )
        : null,
    ];
  }

  // The path from germination to commit, with how far this seed is.
  #track(slot) {
    const at = this.growthPath.findIndex((step) => step.stage === slot.stage);
    return element(
      "div",
      { class: "track", "aria-hidden": "true" },
      ...this.growthPath.map((step, index) =>
        element("span", {
          class: index <= at ? "done" : null,
          title: step.stage,
          style: { "--stage": step.colour },
        }),
      ),
    );
  }

  #button(offer, slot) {
    return element(
      "button",
      {
        type: "button",
        "aria-label": slot === null ? offer.label : `${offer.label} ${slot}`,
        onclick: async (event) => {
          if (offer.question === null || confirm(offer.question)) {
            const button = event.target;
            button.disabled = true;
            try {
              this.say(await command(this.run, offer.name, slot), { show: true });
            } finally {
              button.disabled = false;
            }
          }
        },
      },
      offer.label,
    );
  }

  #drawLines() {
    const urgent = this.urgentOnly.checked;
    const shown = this.#lines.filter((line) => !urgent || line.priority !== "normal");
    this.linePart.hidden = this.#lines.length === 0;
    fill(this.lines, [shown.map((line) => line.id), this.#state?.telling], () =>
      shown.length === 0
        ? element("li", { class: "quiet" }, "No warnings.")
        : shown.toReversed().map((line) => lineOf(line, this.#state.unit)),
    );
  }

  #drawSettings() {
    const settings = flat(this.#state.config);
    this.settingsPart.hidden = settings.length === 0;
    fill(this.settings, settings, () =>
      element(
        "table",
        {},
        element("caption", { class: "unseen" }, "Settings of the run"),
        element(
          "tbody",
          {},
          ...settings.map(([name, value]) =>
            element(
              "tr",
              {},
              element("th", { scope: "row", class: "mono" }, name),
              element("td", { class: "mono" }, JSON.stringify(value)),
            ),
          ),
        ),
      ),
    );
  }
}

function sizeNote({ host_params: host, params }) {
  if (host === null) {
    return params === null ? "the host's are not known" : null;
  }
  return host > 0 && params !== host
    ? `${format.percent(params / host - 1)} on the host's`
    : "as the host began";
}

function capitalised([name, value, note]) {
  return [name.charAt(0).toUpperCase() + name.slice(1), value, note];
}

function lineOf(line, unit) {
  return element(
    "li",
    { "data-priority": line.priority, "data-row": line.id },
    element(
      "span",
      { class: "place quiet number" },
      element(
        "time",
        { datetime: format.moment(line.time_seconds) },
        format.clock(line.time_seconds),
      ),
      ` · ${unit} ${line.epoch}`,
    ),
    element(
      "span",
      { class: "words" },
      line.priority === "normal"
        ? null
        : element("strong", { class: "priority" }, `${line.priority} `),
      line.words,
    ),
  );
}

function flat(config, prefix = "") {
  return Object.entries(config).flatMap(([key, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value)
      ? flat(value, `${prefix}${key}.`)
      : [[prefix + key, value]],
  );
}
