// Refreshes the page: fetches it again, replaces the elements with data-live and draws the charts.
"use strict";
(() => {
  const REFRESH_MS = 2000; // the default of --interval: the server has no newer numbers before
  const MAX_SAMPLES = 900; // as the server keeps
  const live = [...document.querySelectorAll("[data-live]")].map((element) => element.id);
  const charts = [...document.querySelectorAll("[data-chart]")];
  const button = document.querySelector(".live");
  let stopped = false;
  let last = 0; // number of the latest sample that was received
  let history = null;

  const showState = (state, word) => {
    if (!button) return;
    button.className = `live ${state}`;
    button.querySelector(".word").textContent = word;
    button.setAttribute("aria-pressed", String(stopped));
  };

  // An element with the focus or with selected text is not replaced.
  const inUse = (element) => element.contains(document.activeElement) || !getSelection().isCollapsed && getSelection().containsNode(element, true);

  const refreshElements = async () => {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
    if (answer.redirected) return location.reload(); // the session has ended: show the login form
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const pairs = live.map((id) => [document.getElementById(id), page.getElementById(id)]);
    if (!answer.ok || pairs.every(([, fresh]) => !fresh)) throw new Error(String(answer.status));
    for (const [old, fresh] of pairs) {
      if (old && fresh && old.innerHTML !== fresh.innerHTML && !inUse(old)) old.innerHTML = fresh.innerHTML;
    }
  };

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  const clock = (s, digits) => new Date(s * 1000).toTimeString().slice(0, digits);

  // The legend above a chart shows the values under the pointer, else the latest ones.
  const showValues = (plot, element) => {
    const at = plot.cursor.idx ?? plot.data[0].length - 1;
    element.parentElement.querySelectorAll("output").forEach((output, i) => {
      const value = plot.data[i + 1][at];
      const digits = value >= 100 || Number.isInteger(value) ? 0 : value >= 1 ? 1 : 3;
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
      hooks: { setCursor: [(plot) => showValues(plot, element)], setData: [(plot) => showValues(plot, element)], ready: [(plot) => showValues(plot, element)] },
    };
  };

  // A chart of a job type that has no samples yet is empty.
  const columns = (element) => {
    const series = element.dataset.type ? history.types[element.dataset.type] ?? {} : history;
    return [history.wall_s, ...element.dataset.chart.split(",").map((one) => series[one.split(":")[0]] ?? history.wall_s.map(() => null))];
  };

  const gaps = (count) => Array(count).fill(null);

  // Adds samples of all types. A type that is missing on one side has gaps there.
  const appendTypes = (fresh, before) => {
    const added = fresh.wall_s.length;
    for (const type of new Set([...Object.keys(history.types), ...Object.keys(fresh.types)])) {
      const [old, more] = [history.types[type] ?? {}, fresh.types[type] ?? {}];
      history.types[type] = Object.fromEntries(Object.keys({ ...old, ...more }).map((name) =>
        [name, [...(old[name] ?? gaps(before)), ...(more[name] ?? gaps(added))].slice(-MAX_SAMPLES)]));
    }
  };

  const draw = (recreate) => {
    if (!history || history.wall_s.length < 2) return;
    for (const element of charts) {
      if (recreate && element.plot) { element.plot.destroy(); element.plot = null; }
      if (element.plot) element.plot.setData(columns(element));
      else element.plot = new uPlot(options(element), columns(element), element);
    }
  };

  const loadHistory = async () => {
    if (!charts.length) return;
    const fresh = await (await fetch(`/history.json?after=${last}`, { cache: "no-store" })).json();
    if (fresh.whole || !history) history = fresh;
    else {
      appendTypes(fresh, history.wall_s.length);
      for (const [name, values] of Object.entries(fresh)) if (Array.isArray(values)) history[name] = history[name].concat(values).slice(-MAX_SAMPLES);
    }
    last = fresh.last;
    draw(false);
  };

  const refresh = async () => {
    if (!stopped && !document.hidden) {
      try {
        await Promise.all([loadHistory(), live.length ? refreshElements() : null]);
        showState("", "live");
      } catch (error) {
        showState("lost", "no answer");
      }
    }
    setTimeout(refresh, REFRESH_MS);
  };

  if (button && (live.length || charts.length)) {
    button.hidden = false;
    button.addEventListener("click", () => {
      stopped = !stopped;
      showState(stopped ? "stopped" : "", stopped ? "stopped" : "live");
    });
    refresh();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(true));
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(true); } });

  // "/" goes to the search box, as in other tools.
  const search = document.querySelector("[name=id][type=search]");
  addEventListener("keydown", (event) => {
    const isTyping = event.target.closest?.("input, textarea, select, [contenteditable]");
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || isTyping || !search) return;
    event.preventDefault();
    search.focus();
    search.select();
  });

  // Dead letters: a box selects all on the page, and the buttons show how many are selected.
  const all = document.getElementById("all");
  if (all) {
    const boxes = [...document.querySelectorAll("#letters [name=at]")];
    const buttons = [...document.querySelectorAll(".on-selected")];
    const labels = buttons.map((one) => one.textContent);
    const update = () => {
      const selected = boxes.filter((one) => one.checked).length;
      all.checked = selected === boxes.length && selected > 0;
      all.indeterminate = selected > 0 && selected < boxes.length;
      buttons.forEach((one, i) => { one.disabled = !selected; one.textContent = selected ? `${labels[i]} (${selected})` : labels[i]; });
    };
    all.hidden = false;
    all.addEventListener("change", () => { boxes.forEach((one) => { one.checked = all.checked; }); update(); });
    boxes.forEach((one) => one.addEventListener("change", update));
    update();
  }
})();
