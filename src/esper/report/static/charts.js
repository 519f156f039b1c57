// Draws figures in the page's colours, and again when these change. Needs Plotly.
"use strict";

const esperCharts = (() => {
  const drawn = new Map();
  const settings = {
    responsive: true,
    displaylogo: false,
    displayModeBar: false,
    scrollZoom: false,
  };

  // plotly takes some HTML in texts, and names in runs are not the page's own: only what a pointer
  // shows is a template, into which names come as values.
  function literal(text) {
    return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  }

  // Returns a figure, or a part of it, with the page's colours and with texts that are shown as they
  // are.
  function forPlotly(value, style) {
    if (typeof value === "string") {
      return value.startsWith("var(--")
        ? style.getPropertyValue(value.slice(4, -1)).trim()
        : literal(value);
    }
    if (Array.isArray(value)) {
      return value.length > 0 && typeof value[0] === "number"
        ? value
        : value.map((item) => forPlotly(item, style));
    }
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(
        Object.entries(value).map(([key, item]) => [
          key,
          key === "hovertemplate" ? item : forPlotly(item, style),
        ]),
      );
    }
    return value;
  }

  function plot(element, figure) {
    const style = getComputedStyle(document.documentElement);
    const { data, layout } = forPlotly(figure, style);
    drawn.set(element, figure);
    return Plotly.react(element, data, layout, settings);
  }

  function figureOf(chart) {
    const figure = document.createElement("figure");
    figure.className = "chart card";
    figure.dataset.key = chart.key;
    const caption = document.createElement("figcaption");
    const title = document.createElement("h2");
    const summary = document.createElement("p");
    caption.append(title, summary);
    const plotted = document.createElement("div");
    plotted.className = "plot";
    plotted.setAttribute("role", "img");
    figure.append(caption, plotted);
    return figure;
  }

  // Makes or updates one figure per chart, in their order, and removes what is none of them.
  function draw(container, charts) {
    const known = new Map(
      [...container.querySelectorAll(":scope > figure")].map((item) => [item.dataset.key, item]),
    );
    const drawings = [];
    let half = 0;
    charts.forEach((chart, index) => {
      const figure = known.get(chart.key) ?? figureOf(chart);
      known.delete(chart.key);
      // One that has no neighbour in its row fills it.
      const next = charts[index + 1];
      const alone = half % 2 === 0 && (next === undefined || next.wide);
      const wide = chart.wide || alone;
      half = wide ? 0 : half + 1;
      figure.classList.toggle("wide", wide);
      figure.querySelector("h2").textContent = chart.title;
      figure.querySelector("p").textContent = chart.summary;
      if (container.children[index] !== figure) {
        container.insertBefore(figure, container.children[index] ?? null);
      }
      const plotted = figure.querySelector(".plot");
      plotted.setAttribute("aria-label", `${chart.title}. ${chart.summary}`);
      drawings.push(plot(plotted, chart.figure));
    });
    for (const figure of known.values()) {
      const plotted = figure.querySelector(".plot");
      drawn.delete(plotted);
      Plotly.purge(plotted);
      figure.remove();
    }
    return Promise.all(drawings);
  }

  function redraw() {
    for (const [element, figure] of drawn) {
      plot(element, figure);
    }
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", (change) => {
    redraw();
    for (const element of drawn.keys()) {
      const onPaper = { width: element.clientWidth, autosize: false };
      Plotly.relayout(element, change.matches ? onPaper : { width: null, autosize: true });
    }
    if (change.matches) {
      document.querySelectorAll("details").forEach((details) => {
        details.open = true;
      });
    }
  });

  return { draw };
})();
