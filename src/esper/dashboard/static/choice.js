// Which runs are shown. Lives in the address, so that it can be sent to others and gone back from.

export function chosen() {
  return [...new Set(new URLSearchParams(location.search).getAll("run"))];
}

export function addressOf(runs) {
  const query = new URLSearchParams(runs.map((run) => ["run", run])).toString();
  return query === "" ? "/" : `/?${query}`;
}

export function choose(runs) {
  history.pushState(null, "", addressOf(runs));
  dispatchEvent(new PopStateEvent("popstate"));
}

// Lets plain clicks on a link to this page change the choice without loading the page anew.
export function followLinks(container) {
  container.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='/']");
    const plain = event.button === 0 && !(event.ctrlKey || event.metaKey || event.shiftKey);
    if (link !== null && plain) {
      event.preventDefault();
      history.pushState(null, "", link.getAttribute("href"));
      dispatchEvent(new PopStateEvent("popstate"));
    }
  });
}
