// Keeps the page of this moment: fetches itself again and exchanges what is marked as live, and draws the charts.
"use strict";
(() => {
  const REFRESH_MS = 2000; // the board looks as often, unless it was told otherwise
  const live = [...document.querySelectorAll("[data-live]")].map((element) => element.id);
  const charts = [...document.querySelectorAll("[data-chart]")];
  const button = document.querySelector(".live");
  let stopped = false;
  let last = 0;
  let history = null;

  const show = (state, word) => {
    if (!button) return;
    button.className = `live ${state}`;
    button.querySelector(".word").textContent = word;
    button.setAttribute("aria-pressed", String(stopped));
  };

  // A person who has a control of that part under the fingers is not to lose it.
  const inUse = (element) => element.contains(document.activeElement) || !getSelection().isCollapsed && getSelection().containsNode(element, true);

  const exchange = async () => {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
    if (answer.redirected) return location.reload(); // the session is over
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const found = live.map((id) => [document.getElementById(id), page.getElementById(id)]);
    if (!answer.ok || found.every(([, fresh]) => !fresh)) throw new Error(String(answer.status));
    for (const [old, fresh] of found) {
      if (old && fresh && old.innerHTML !== fresh.innerHTML && !inUse(old)) old.innerHTML = fresh.innerHTML;
    }
  };

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  const clock = (s, digits) => new Date(s * 1000).toTimeString().slice(0, digits);

  // The keys above a chart tell what is under the pointer, else what is now.
  const tell = (plot, element) => {
    const at = plot.cursor.idx ?? plot.data[0].length - 1;
    element.parentElement.querySelectorAll("output").forEach((output, i) => {
      const value = plot.data[i + 1][at];
      const digits = value >= 100 || Number.isInteger(value) ? 0 : 1;
      output.textContent = value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits }) + element.dataset.unit;
    });
    element.parentElement.querySelector("time").textContent = plot.cursor.idx == null ? "" : clock(plot.data[0][at], 8);
  };

  const options = (element) => {
    const axis = { stroke: colour("dim"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const short = (value) => value >= 1e6 ? `${+(value / 1e6).toFixed(1)}M` : value >= 1e4 ? `${+(value / 1e3).toFixed(1)}k` : String(+value.toFixed(2));
    const times = (_, splits) => splits.map((s) => clock(s, splits.at(-1) - splits[0] < 240 ? 8 : 5));
    return {
      width: element.clientWidth, height: element.clientHeight, legend: { show: false },
      cursor: { y: false, points: { size: 6 }, drag: { x: false }, sync: { key: "time" } },
      scales: { y: { range: (_, __, most) => [0, Math.max(1, most * 1.12)] } },
      axes: [{ ...axis, size: 24, space: 70, values: times }, { ...axis, size: 46, space: 26, values: (_, splits) => splits.map(short) }],
      series: [{}, ...element.dataset.chart.split(",").map((one) => {
        const stroke = colour(one.split(":")[1]);
        return { stroke, width: 1.6, fill: `${stroke}1c`, points: { show: false } };
      })],
      hooks: { setCursor: [(plot) => tell(plot, element)], setData: [(plot) => tell(plot, element)], ready: [(plot) => tell(plot, element)] },
    };
  };

  const columns = (element) => [history.wall_s, ...element.dataset.chart.split(",").map((one) => history[one.split(":")[0]])];

  const draw = (anew) => {
    if (!history || history.wall_s.length < 2) return;
    for (const element of charts) {
      if (anew && element.plot) { element.plot.destroy(); element.plot = null; }
      if (element.plot) element.plot.setData(columns(element));
      else element.plot = new uPlot(options(element), columns(element), element);
    }
  };

  const grow = async () => {
    if (!charts.length) return;
    const fresh = await (await fetch(`/history.json?after=${last}`, { cache: "no-store" })).json();
    if (fresh.whole || !history) history = fresh;
    else for (const [name, values] of Object.entries(fresh)) if (Array.isArray(values)) history[name] = history[name].concat(values).slice(-900);
    last = fresh.last;
    draw(false);
  };

  const turn = async () => {
    if (!stopped && !document.hidden) {
      try {
        await Promise.all([grow(), live.length ? exchange() : null]);
        show("", "live");
      } catch (error) {
        show("lost", "no answer");
      }
    }
    setTimeout(turn, REFRESH_MS);
  };

  if (button && (live.length || charts.length)) {
    button.hidden = false;
    button.addEventListener("click", () => {
      stopped = !stopped;
      show(stopped ? "stopped" : "", stopped ? "stopped" : "live");
    });
    turn();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(true));
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(true); } });

  // Dead letters: tick all of the page, and let the buttons say how many they mean.
  const all = document.getElementById("all");
  if (all) {
    const ticks = [...document.querySelectorAll("#letters [name=at]")];
    const picks = [...document.querySelectorAll(".picks")];
    const words = picks.map((one) => one.textContent);
    const count = () => {
      const ticked = ticks.filter((one) => one.checked).length;
      all.checked = ticked === ticks.length && ticked > 0;
      all.indeterminate = ticked > 0 && ticked < ticks.length;
      picks.forEach((one, i) => { one.disabled = !ticked; one.textContent = ticked ? `${words[i]} (${ticked})` : words[i]; });
    };
    all.hidden = false;
    all.addEventListener("change", () => { ticks.forEach((one) => { one.checked = all.checked; }); count(); });
    ticks.forEach((one) => one.addEventListener("change", count));
    count();
  }
})();
