// News from the server. Opens the connection again whenever it breaks, and says so.

const RETRY_MILLISECONDS = 1000;
const SILENCE_MILLISECONDS = 30000; // the server sends a beat every ten seconds

export class Stream {
  #source = null;
  #retry = 0;
  #silence = 0;
  #lastId = "";
  #run = null;

  // hears: runs(message), story(message), connected(), disconnected(), refused()
  constructor(hears) {
    this.hears = hears;
  }

  // Follows the list, and one run's story besides unless it is null.
  open(run) {
    this.close();
    this.#run = run;
    const query = new URLSearchParams({ since: this.#lastId });
    if (run !== null) {
      query.set("run", run);
    }
    const source = new EventSource(`/api/stream?${query}`);
    this.#source = source;
    source.addEventListener("open", () => this.hears.connected());
    source.addEventListener("error", () => this.#broken());
    for (const kind of ["runs", "story", "beat"]) {
      source.addEventListener(kind, (message) => {
        this.#listen();
        if (message.lastEventId !== "") {
          this.#lastId = message.lastEventId;
        }
        if (kind !== "beat") {
          this.hears[kind](JSON.parse(message.data));
        }
      });
    }
    this.#listen();
  }

  close() {
    clearTimeout(this.#retry);
    clearTimeout(this.#silence);
    this.#source?.close();
    this.#source = null;
  }

  #listen() {
    clearTimeout(this.#silence);
    this.#silence = setTimeout(() => this.#broken(), SILENCE_MILLISECONDS);
  }

  async #broken() {
    this.close();
    this.hears.disconnected();
    this.#retry = setTimeout(() => this.#again(), RETRY_MILLISECONDS);
  }

  async #again() {
    const answer = await fetch("/api/session").catch(() => null);
    if (answer !== null && answer.ok && !(await answer.json()).admitted) {
      this.hears.refused();
    } else {
      this.open(this.#run);
    }
  }
}
