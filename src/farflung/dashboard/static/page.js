// What the server cannot do alone: theme, local times, curves that move, and whether the link still holds.
"use strict";
const root = document.documentElement;
const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

// --- theme
const toggle = document.getElementById("theme");
toggle.hidden = false;
toggle.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch (_) { /* then it lasts until the page is left */ }
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());

// --- times in the viewer's own zone
function localise(scope) {
  for (const time of scope.querySelectorAll("time[datetime]")) {
    const moment = new Date(time.dateTime);
    time.textContent = moment.toLocaleTimeString([], { hour12: false });
    time.title = moment.toLocaleString();
  }
}
localise(document);
document.body.addEventListener("htmx:load", (event) => localise(event.target));

// --- curves
const holder = document.getElementById("curves");
const charts = {};
const passK = holder ? JSON.parse(holder.dataset.points).k : 0;
const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

// The values of one chart: steps, then for each of its lines the value and the ends of its interval.
function series(name, all) {
  const lines = name === "heldout" ? [all.heldout, all.passk] : [all[name]];
  const steps = [...new Set(lines.flat().map((p) => p[0]))].sort((a, b) => a - b);
  const columns = lines.flatMap((points) => {
    const at = new Map(points.map((p) => [p[0], p]));
    return (name === "heldout" ? [1, 2, 3] : [1]).map((i) => steps.map((step) => at.get(step)?.[i] ?? null));
  });
  return [steps, ...columns];
}

const shown = (_, v) => v == null ? "–" : v.toFixed(3);
function line(label, ink, isShort, dash) {
  return { label, stroke: () => colour(ink), width: 2, dash, spanGaps: true, points: { show: isShort, size: 6, fill: () => colour(ink) }, value: shown };
}
const edge = (label) => ({ label, stroke: "transparent", width: 0, spanGaps: true, points: { show: false }, value: shown });
const band = (high, low, ink) => ({ series: [high, low], fill: () => colour(ink) + "22" });

function lines(name, isShort) {
  if (name === "reward") return [line("reward", "--blue", isShort)];
  const second = `pass@${passK || "k"}`;
  return [line("pass@1", "--green", isShort), edge("from"), edge("to"), line(second, "--blue", isShort, [5, 4]), edge("from"), edge("to")];
}

function draw(name, all) {
  const box = holder.querySelector(`[data-curve="${name}"]`);
  const data = series(name, all);
  const width = Math.max(240, box.clientWidth);
  if (charts[name]) charts[name].destroy();
  box.replaceChildren();
  const axis = { stroke: () => colour("--dim"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
  charts[name] = new uPlot({
    width, height: 220, cursor: { points: { size: 6 } }, legend: { live: true },
    scales: { x: { time: false, range: [0, Math.max(1, all.until, ...data[0])] }, y: { range: [0, 1] } },
    axes: [{ ...axis, size: 30, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000] }, { ...axis, size: 44 }],
    series: [{ label: "step" }, ...lines(name, data[0].length <= 60)],
    bands: name === "heldout" ? [band(3, 2, "--green"), band(6, 5, "--blue")] : [],
  }, data, box);
  box.dataset.count = data[0].length;
}

function redraw() {
  if (!holder) return;
  const all = JSON.parse(holder.dataset.points);
  for (const name of ["reward", "heldout"]) draw(name, all);
}

if (holder) {
  redraw();
  let width = holder.clientWidth;
  new ResizeObserver(() => {
    if (holder.clientWidth === width) return;
    width = holder.clientWidth;
    redraw();
  }).observe(holder);
  holder.addEventListener("htmx:sseBeforeMessage", (event) => {
    event.preventDefault(); // figures, not HTML: nothing is to be swapped in
    if (event.detail.type !== "curves") return;
    holder.dataset.points = event.detail.data;
    const all = JSON.parse(event.detail.data);
    for (const name of ["reward", "heldout"]) {
      const box = holder.querySelector(`[data-curve="${name}"]`);
      if (Number(box.dataset.count) <= 60 && all[name].length > 60) { draw(name, all); continue; }
      charts[name].setData(series(name, all));
      box.dataset.count = all[name].length;
    }
  });
}

// --- the link
const link = document.getElementById("link");
function linked(text, isUp) {
  if (!link) return;
  link.hidden = false;
  link.textContent = text;
  link.classList.toggle("up", isUp);
}
document.body.addEventListener("htmx:sseOpen", () => linked("live", true));
document.body.addEventListener("htmx:sseError", () => linked("no answer, this is the last that was heard", false));
