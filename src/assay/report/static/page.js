// Draws all charts when the page is there; fills what is opened.
const kinds = {
  refusal_rate: () => lines("refusal_rate", 360), over_refusal_rate: () => lines("over_refusal_rate", 240), benign_loss: () => lines("benign_loss", 240), auroc: () => lines("auroc", 240),
  weights: heat, means, cost: () => cost(data),
  course, margins: histogram, grid, swarm_cost: () => cost(data.swarm),
};
const draw = async () => {
  let drawn = 0;
  for (const node of document.querySelectorAll("[data-chart]")) {
    try {
      const [traces, layout] = kinds[node.dataset.chart](Number(node.dataset.index), node);
      if (traces.length) await Plotly.react(node, traces, layout, config);
      else node.textContent = "Not measured.";
      drawn += 1;
    } catch (error) { note(`${node.dataset.chart}: ${error.message}`); }
  }
  root.dataset.charts = drawn;
  if (!errors.length) root.dataset.assay = "ready";
};

// A client's rounds are built when it is opened: 100 clients x 25 rounds x 4 runs would be 10,000 rows at once.
const fill = (details) => {
  if (!details.open || details.querySelector("table")) return;
  const rows = data.clients[Number(details.dataset.client)];
  const add = (parent, tag, text, name) => { const node = parent.appendChild(document.createElement(tag)); if (text !== undefined) node.textContent = text; if (name) node.className = name; return node; };
  const box = add(details, "div", undefined, "scroll"), table = add(box, "table");
  add(table, "caption", "Round by round", "hidden");
  const head = add(add(table, "thead"), "tr");
  for (const [text, name] of [["Run"], ["Round", "number"], ["Weight", "number"], ["Screen"], ["Reason"], ["Sentence"], ["sha256"]]) add(head, "th", text, name).scope = "col";
  const body = add(table, "tbody");
  for (const [run, round, w, ...texts] of rows) {
    const [screen, reason, sentence, hash] = texts.map((t) => data.texts[t]);
    const line = add(body, "tr");
    add(line, "th", data.runs[run].name, "name").scope = "row";
    add(line, "td", round, "number");
    add(line, "td", weight(w), "number");
    add(line, "td", screen || "–");
    add(add(line, "td"), "code", reason || "–");
    add(line, "td", sentence || "–", "text");
    add(add(line, "td"), "code", hash || "–");
  }
};

addEventListener("DOMContentLoaded", () => {
  data = JSON.parse(document.getElementById("data").textContent);
  for (const details of document.querySelectorAll("details[data-client]")) { details.addEventListener("toggle", () => fill(details)); fill(details); }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
});
