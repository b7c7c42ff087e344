// The graph: a click on a node chooses it, and what part of the picture is looked at stays so; both stand in the address. The figure is drawn
// anew whenever it changes, so every new one is listened to.
const PLOT = ".st-key-circuit-figure .js-plotly-plot";
const WHOLE = 0.002; // share of the picture that makes no difference

function choose(event) {
  const id = event.points[0]?.customdata;
  if (!id) return;
  const url = new URL(location.href);
  url.searchParams.set("node", id);
  history.pushState(null, "", url);
  dispatchEvent(new PopStateEvent("popstate")); // as the browser's own Back and Forward, which Streamlit follows
}

// As shares of the whole picture; Streamlit reads the address when it next runs the page.
function look(plot) {
  const [x0, x1, y0, y1] = plot.layout.meta.whole;
  const { xaxis, yaxis } = plot._fullLayout;
  const shares = [...xaxis.range.map((x) => (x - x0) / (x1 - x0)), ...yaxis.range.map((y) => (y - y0) / (y1 - y0))];
  const url = new URL(location.href);
  if (shares.every((share, i) => Math.abs(share - (i % 2)) < WHOLE)) url.searchParams.delete("zoom");
  else url.searchParams.set("zoom", shares.map((share) => share.toFixed(3)).join("_"));
  history.replaceState(history.state, "", url);
}

// A double click shows all, also where the figure began with a part.
function wholeAtReset(plot) {
  const [x0, x1, y0, y1] = plot.layout.meta.whole;
  const { xaxis, yaxis } = plot._fullLayout;
  Object.assign(xaxis, { _rangeInitial0: x0, _rangeInitial1: x1 });
  Object.assign(yaxis, { _rangeInitial0: y0, _rangeInitial1: y1 });
}

export default function ({ parentElement }) {
  parentElement.sbEnd?.();
  const watch = setInterval(() => {
    const plot = document.querySelector(PLOT);
    if (!plot?.on || !plot.layout?.meta?.whole || !plot._fullLayout?.xaxis || plot.sbSeen) return;
    plot.sbSeen = true;
    wholeAtReset(plot);
    plot.on("plotly_click", choose);
    plot.on("plotly_relayout", () => look(plot));
  }, 200);
  parentElement.sbEnd = () => clearInterval(watch);
  return parentElement.sbEnd;
}
