// Fills the page, then draws its charts one by one, so that it can be read and used meanwhile.
const kinds = {
  refusal_rate: () => lines("refusal_rate", 360), over_refusal_rate: () => lines("over_refusal_rate", 240), benign_loss: () => lines("benign_loss", 240), auroc: () => lines("auroc", 240),
  weights: heat, means, cost: () => cost("federated"),
  course, margins: histogram, grid, swarm_cost: () => cost("swarm"),
};
const paint = (node) => {
  const [traces, layout] = kinds[node.dataset.chart](Number(node.dataset.index), node);
  if (!traces.length) { node.textContent = "Not measured."; return; }
  Plotly.react(node, traces, layout, config);
  if (node.dataset.chart !== "weights" && node.dataset.chart !== "grid") return;
  node.removeAllListeners("plotly_click");
  node.on("plotly_click", ({ points: [point] }) => {
    const wing = node.dataset.chart === "grid" ? "swarm" : "federated", from = wing === "swarm" ? data.swarm.grids : data.weights;
    const drawn = from[Number(node.dataset.index)];
    if (point.data.meta && Array.isArray(point.pointNumber)) People[wing].visit(drawn.clients[point.data.meta[point.pointNumber[0]]], drawn.run, drawn.rounds[point.pointNumber[1]]);
  });
};
let turn = 0; // a later drawing takes over from an earlier one
const draw = async () => {
  const mine = ++turn;
  let drawn = 0;
  if (!errors.length) delete root.dataset.assay;
  for (const node of document.querySelectorAll("[data-chart]")) {
    if (!node.closest("[hidden]")) {
      try { paint(node); } catch (error) { note(`${node.dataset.chart}: ${error.message}`); }
      await new Promise((resume) => setTimeout(resume));
      if (mine !== turn) return;
    }
    drawn += 1;
  }
  document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true"); // where plotly measures its texts
  root.dataset.charts = drawn;
  if (!errors.length) root.dataset.assay = "ready";
};

const start = () => {
  data = JSON.parse(document.getElementById("data").textContent);
  recall();
  theme(remembered());
  for (const wing of Object.keys(wings)) {
    if (!document.querySelector(`[data-wing="${wing}"]`)) continue;
    compare(wing);
    comparing(wing);
    People[wing] = people(wing);
  }
};
const arrive = () => [...document.querySelectorAll(".opener[aria-expanded=true]")].at(-1)?.scrollIntoView({ block: "start" });

start(); // all it touches stands above this script; plotly.js, which takes longest, comes after it
performance.mark("assay:usable");
addEventListener("DOMContentLoaded", () => { draw(); if (location.hash.startsWith("#?")) arrive(); });
addEventListener("hashchange", () => { if (location.hash.startsWith("#?")) { recall(); for (const wing of Object.keys(People)) { compare(wing); People[wing]?.sync(); } draw(); arrive(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
// paper is white whatever the screen is; charts have their colours in them
const repaint = () => { for (const node of document.querySelectorAll(".js-plotly-plot")) if (!node.closest("[hidden]")) paint(node); };
let before;
addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; repaint(); });
addEventListener("afterprint", () => { if (before) root.dataset.theme = before; else delete root.dataset.theme; repaint(); });
