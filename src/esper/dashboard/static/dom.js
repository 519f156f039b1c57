// Makes elements. Text is only ever set as text: names in runs are not the page's own.

const SVG = "http://www.w3.org/2000/svg";

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  set(made, attributes);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  set(made, attributes);
  made.append(...children);
  return made;
}

function set(made, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) {
      continue;
    }
    if (name.startsWith("on")) {
      made.addEventListener(name.slice(2), value);
    } else if (name === "style") {
      for (const [property, setting] of Object.entries(value)) {
        made.style.setProperty(property, setting);
      }
    } else {
      made.setAttribute(name, value === true ? "" : value);
    }
  }
}

// Replaces what an element holds only if it would look different, so that focus and selection stay.
const contents = new WeakMap();

export function fill(container, key, make) {
  const content = JSON.stringify(key);
  if (contents.get(container) !== content) {
    contents.set(container, content);
    container.replaceChildren(...[make()].flat().filter((child) => child !== null));
  }
}
