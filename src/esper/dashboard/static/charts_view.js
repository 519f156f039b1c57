// Draws charts as often as this machine can: after each drawing it rests as long as that took. plotly
// is loaded once there is something to draw.

import { element } from "./dom.js";

const PAUSE_MILLISECONDS = 300;
const RETRY_MILLISECONDS = 2000;

let scripts = null;

function loadScripts() {
  scripts ??= load("/static/plotly.js")
    .then(() => load("/static/charts.js"))
    .catch((error) => {
      scripts = null;
      throw error;
    });
  return scripts;
}

function load(source) {
  return new Promise((loaded, failed) => {
    const script = document.createElement("script");
    script.src = source;
    script.addEventListener("load", loaded);
    script.addEventListener("error", () => failed(new Error(`${source} could not be loaded`)));
    document.head.append(script);
  });
}

export class ChartsView {
  #busy = false;
  #wanted = null;
  #drawn = null;
  #closed = false;

  #problem = element("p", { class: "card problem", role: "alert" });

  // fetchCharts: returns {version, charts}, or throws if there are none now.
  constructor(container, fetchCharts) {
    this.container = container;
    this.fetchCharts = fetchCharts;
  }

  // Draws the charts of a version, or of a later one if one comes meanwhile.
  show(version) {
    this.#wanted = version;
    if (!this.#busy) {
      this.#work();
    }
  }

  close() {
    this.#closed = true;
  }

  async #work() {
    this.#busy = true;
    while (this.#wanted !== this.#drawn && !this.#closed) {
      const version = this.#wanted;
      const took = await this.#draw().catch((error) => {
        this.#tell(`The charts cannot be drawn: ${error.message}`);
        return null;
      });
      if (took !== null) {
        this.#tell(null);
        this.#drawn = version;
      }
      const pause = took === null ? RETRY_MILLISECONDS : Math.max(PAUSE_MILLISECONDS, took);
      await new Promise((done) => setTimeout(done, pause));
    }
    this.#busy = false;
  }

  #tell(problem) {
    if (problem === null) {
      this.#problem.remove();
    } else if (!this.#problem.isConnected || this.#problem.textContent !== problem) {
      this.#problem.textContent = problem;
      this.container.before(this.#problem);
    }
  }

  // Returns how long it took, without loading what draws.
  async #draw() {
    const loading = loadScripts();
    loading.catch(() => null); // said below, unless the server is away altogether
    const asked = performance.now();
    const answer = await this.fetchCharts();
    const answered = performance.now();
    await loading;
    const began = performance.now();
    if (!this.#closed) {
      await esperCharts.draw(this.container, answer.charts);
      this.container.dataset.version = answer.version;
    }
    return answered - asked + (performance.now() - began);
  }
}
