// What the reader has chosen: it stands in the page's address after #?, so that a link leads another reader to the same
// runs, the same filter, the same verdict; and a page that is loaded again looks as it did.
// Keys: f.* federated, s.* swarm. runs: shown ones ("0.2"), against: the run that others are compared with; find, role,
// kept, screen, order, only: the filter of participants; open, run, round: an opened participant, and its verdict.
const wings = { federated: { key: "f", data: () => data, unit: "round" }, swarm: { key: "s", data: () => data.swarm, unit: "iteration" } };
let chosen = new URLSearchParams();
const recall = () => { chosen = new URLSearchParams(location.hash.startsWith("#?") ? location.hash.slice(2) : ""); };
const said = (wing, name) => chosen.get(`${wings[wing].key}.${name}`) ?? "";
const choose = (wing, changes) => {
  for (const [name, value] of Object.entries(changes)) {
    const key = `${wings[wing].key}.${name}`;
    if (value === "" || value === null || value === false) chosen.delete(key); else chosen.set(key, value);
  }
  const text = chosen.toString();
  history.replaceState(null, "", text ? `#?${text}` : `${location.pathname}${location.search}`);
};

const shown = (wing) => { // indices of the runs that are shown; never none
  const every = wings[wing].data().runs.map((_, i) => i), named = said(wing, "runs").split(".").filter(Boolean).map(Number);
  const left = every.filter((i) => named.includes(i));
  return left.length ? left : every;
};
const isShown = (wing, i) => shown(wing).includes(i);

// Elements are only ever made with text in them: participants wrote it.
const make = (parent, tag, text, attributes = {}) => {
  const node = parent.appendChild(document.createElement(tag));
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};
const number = (value, digits = 4) => (value === null || value === undefined ? "–" : Number.isInteger(value) ? String(value) : Number(value.toPrecision(digits)).toString());
const key = (wing, i) => { // the run's line and marker, as the template drew it
  const known = document.querySelector(`[data-wing="${wing}"] .chooser [data-pick="${i}"] ~ .named .key`);
  return known ? known.cloneNode(true) : document.createTextNode("");
};

// Which runs are shown, and which one the figures of the others are compared with.
const compare = (wing) => {
  const area = document.querySelector(`[data-wing="${wing}"]`), runs = shown(wing);
  for (const node of area.querySelectorAll("[data-run]")) node.hidden = !runs.includes(Number(node.dataset.run));
  for (const box of area.querySelectorAll("[data-pick]")) box.checked = runs.includes(Number(box.dataset.pick));
  const against = said(wing, "against"), select = area.querySelector("[data-against]");
  if (select) select.value = against;
  const rows = new Map([...area.querySelectorAll("tr[data-figures]")].map((row) => [row.dataset.figures, row]));
  const base = against === "" ? undefined : rows.get(against);
  for (const old of area.querySelectorAll(".delta")) old.remove();
  if (!base) return;
  const figures = (row) => [...row.querySelectorAll("[data-value]")];
  for (const [index, row] of rows) {
    figures(row).forEach((cell, column) => {
      const [mine, its] = [cell, figures(base)[column]].map((c) => (c.dataset.value === "" ? null : Number(c.dataset.value)));
      if (mine === null || its === null) return;
      const places = Number(cell.dataset.places), difference = ((mine - its) * (1 + 1e-9)).toFixed(places); // half up, as the figures themselves
      const text = row === base ? "compared with" : Number(difference) === 0 ? "±0" : difference > 0 ? `+${difference}` : difference.replace("-", "−");
      if (row !== base || column === 0) make(cell, "small", text, { class: "delta" });
    });
  }
};
const comparing = (wing) => {
  const area = document.querySelector(`[data-wing="${wing}"]`), box = area?.querySelector(".chooser");
  if (!box) return;
  const changed = () => { compare(wing); People[wing]?.render(); draw(); };
  box.addEventListener("change", (event) => {
    if (event.target.matches("[data-against]")) { choose(wing, { against: event.target.value }); compare(wing); return; }
    const picks = [...box.querySelectorAll("[data-pick]")], left = picks.filter((p) => p.checked).map((p) => p.dataset.pick);
    choose(wing, { runs: left.length === picks.length ? "" : left.join(".") });
    changed();
  });
  box.querySelector("[data-all]")?.addEventListener("click", () => { choose(wing, { runs: "" }); changed(); });
};

// Light, dark, or what the reader's system says.
const theme = (name) => {
  if (name) root.dataset.theme = name; else delete root.dataset.theme;
  const button = document.querySelector("[data-theme-button]");
  if (button) button.textContent = `Colours: ${name || "as the system"}`;
};
const remembered = () => { try { return localStorage.getItem("assay-theme") ?? ""; } catch { return ""; } };
addEventListener("click", (event) => {
  if (!event.target.closest?.("[data-theme-button]")) return;
  const next = { "": "light", light: "dark", dark: "" }[root.dataset.theme ?? ""];
  try { localStorage.setItem("assay-theme", next); } catch { /* a page from a file may have no storage */ }
  theme(next);
  draw();
});
