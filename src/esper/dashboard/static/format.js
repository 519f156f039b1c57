// Figures as people read them.

const whole = new Intl.NumberFormat("en");
const UNITS = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

export function count(value) {
  return value === null || value === undefined ? "–" : whole.format(value);
}

export function compact(value) {
  if (value === null || value === undefined) {
    return "–";
  }
  const [size, unit] = UNITS.find(([size]) => value >= size) ?? [1, ""];
  return value >= 1e15 ? value.toExponential(2) : `${+(value / size).toPrecision(3)} ${unit}`;
}

export function measure(value) {
  if (value === null || value === undefined) {
    return "–";
  }
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 10000) ? value.toExponential(2) : value.toFixed(4);
}

// A value where more is better and 0 means something, as the return of episodes.
export function signed(value) {
  return value > 0 ? `+${measure(value)}` : measure(value);
}

export function percent(fraction) {
  return fraction === null || fraction === undefined
    ? "–"
    : `${fraction >= 0 ? "+" : "−"}${Math.abs(100 * fraction).toFixed(1)} %`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) {
    return "–";
  }
  if (seconds < 60) {
    return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  }
  if (seconds < 3600) {
    return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  }
  if (seconds < 86400) {
    return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  }
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

export function ago(seconds) {
  const past = Math.max(0, Date.now() / 1000 - seconds);
  if (past < 10) {
    return "just now";
  }
  if (past < 60) {
    return `${10 * Math.floor(past / 10)} s ago`;
  }
  if (past < 3600) {
    return `${Math.floor(past / 60)} min ago`;
  }
  if (past < 86400) {
    return `${Math.floor(past / 3600)} h ago`;
  }
  return date(seconds);
}

export function date(seconds) {
  if (moment(seconds) === null) {
    return "–";
  }
  return new Date(1000 * seconds).toLocaleDateString("en-GB", {
    day: "numeric",
    month: "short",
    year: "numeric",
  });
}

export function clock(seconds) {
  return moment(seconds) === null ? "–" : new Date(1000 * seconds).toLocaleTimeString("en-GB");
}

// A time for machines; null if it is beyond what a calendar has.
export function moment(seconds) {
  const time = new Date(1000 * seconds);
  return Number.isNaN(time.valueOf()) ? null : time.toISOString();
}

export function several(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

export function words(name) {
  return name.replaceAll("_", " ");
}
