// What all charts share. The files of this folder are parts of one function, joined in the order that __init__.py says.
// Draws the charts and fills the drill-down from the JSON in #data. Runs before plotly.js, so that errors in either are
// noted: <html data-assay="ready|failed" data-charts="N" data-errors="..."> says how it went.
const root = document.documentElement;
const errors = [];
const note = (text) => { errors.push(String(text)); root.dataset.errors = errors.join(" | "); root.dataset.assay = "failed"; };
addEventListener("error", (event) => note(event.message));
addEventListener("unhandledrejection", (event) => note(event.reason));
document.addEventListener("securitypolicyviolation", (event) => note(`refused by policy: ${event.violatedDirective} ${event.blockedURI}`));

const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
const mix = (from, to, share) => { // both #rrggbb
  const part = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  return `rgb(${[0, 1, 2].map((i) => Math.round(part(from, i) + (part(to, i) - part(from, i)) * share)).join(",")})`;
};
const cut = (text, longest) => { const chars = [...text]; return chars.length > longest ? chars.slice(0, longest - 1).join("") + "…" : text; };
// plotly reads a little HTML (links too) in its texts: participants' names are only text
const plain = (text, longest = 24) => cut(text.replace(/\s+/g, " "), longest).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const weight = (w) => (w === null ? "" : w === 0 ? "0" : w === 1 ? "1" : w.toFixed(2));

let data;
const config = { displayModeBar: false, responsive: true };
const base = (height, margin) => ({
  height, margin, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
  font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("soft") },
  hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12.5 }, align: "left" },
});
const axis = (more) => ({ gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, fixedrange: true, automargin: false, ...more });
const rounds = (numbers, unit = "round", width = Infinity) => {
  const last = Math.max(1, ...numbers), least = (last + 1) / Math.max(2, Math.min(14, width / 32)), power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least);
  return axis({ title: { text: unit, standoff: 6 }, showgrid: false, tick0: 0, dtick: step, ticks: "outside", tickcolor: colour("line") });
};

// Labels at the lines' ends instead of a legend; pushed apart where lines end together.
const labels = (series, low, high, inner, gap) => {
  const pixel = (y) => ((high - y) / (high - low)) * inner;
  const placed = series.filter((s) => s.end !== null).map((s) => ({ ...s, at: pixel(s.end) })).sort((a, b) => a.at - b.at);
  for (let pass = 0; pass < 60; pass++) {
    for (let i = 1; i < placed.length; i++) {
      const short = gap - (placed[i].at - placed[i - 1].at);
      if (short > 0) { placed[i].at += short / 2; placed[i - 1].at -= short / 2; }
    }
  }
  // all of them stay inside the plot: a pile-up at the bottom grows upwards
  for (let i = placed.length - 1, most = inner; i >= 0; i--) { placed[i].at = Math.min(placed[i].at, most); most = placed[i].at - gap; }
  return placed.map((s) => ({
    xref: "paper", yref: "paper", x: 1, xanchor: "left", xshift: 12, y: 1 - s.at / inner, yanchor: "middle", showarrow: false, align: "left",
    text: s.text, font: { color: s.color, size: 12.5 },
  }));
};
const room = (names) => Math.min(190, 34 + 7.4 * Math.max(3, ...names.map((n) => Math.min(24, [...n].length))));

// the heat map and the means under it share their sides, so that rounds stand in columns
const named = (it) => it.clients.length <= 50;
const sides = (it) => ({ l: named(it) ? 24 + 6.9 * Math.min(16, Math.max(...it.clients.map((n) => [...n].length))) : 44, r: 100 });

// Participants by round, groups set apart; `said` names the unit and what a cell says when pointed at.
const cells = (it, run, said) => {
  const cell = Math.max(5, Math.min(22, 560 / it.clients.length)), texts = said.text && cell >= 15 && it.rounds.length <= 26;
  const gap = named(it) ? 0.6 : 14 / cell; // between the groups, in rows
  let row = 0, before = it.roles[0];
  const at = it.roles.map((role) => { if (role !== before) { row += gap; before = role; } return row++; });
  const full = colour(`c-${run.colour}`);
  const every = [];
  it.z.forEach((ws, i) => ws.forEach((w, j) => every.push({ i, j, w })));
  const width = it.rounds.length, half = (it.step ?? 1) / 2;
  // one heat map per group: rows of a group are evenly spaced, groups are set apart
  const traces = [...new Set(it.roles)].map((role) => {
    const rows = it.clients.map((_, i) => i).filter((i) => it.roles[i] === role);
    return {
      type: "heatmap", meta: rows, x: it.rounds, y: rows.map((i) => at[i]), z: rows.map((i) => it.z[i]), zmin: 0, zmax: 1, showscale: false,
      xgap: width > 40 ? 0 : 2, ygap: cell < 8 ? 0.5 : 2, hoverongaps: false,
      colorscale: [[0, colour("cell")], [1e-6, mix(colour("paper"), full, 0.2)], [1, mix(colour("paper"), full, 0.88)]],
      ...(texts ? { text: rows.map((i) => it.z[i].map((w) => (w === 0 ? "×" : w === 1 ? "" : weight(w)))), texttemplate: "%{text}", textfont: { size: 11 } } : {}),
      customdata: rows.map((i) => it.z[i].map((_, j) => said.cell(i, j))),
      hovertemplate: said.hover,
    };
  });
  const idle = every.filter((c) => c.w === null);
  if (texts && idle.length) traces.push({
    type: "scatter", mode: "markers", x: idle.map((c) => it.rounds[c.j]), y: idle.map((c) => at[c.i]), hoverinfo: "skip", marker: { size: 3, color: colour("soft") },
  });
  for (const { name, symbol, size, at: marked } of said.marks ?? []) {
    if (marked.length) traces.push({
      type: "scatter", mode: "markers", name, x: marked.map(([, j]) => it.rounds[j]), y: marked.map(([i]) => at[i]), cliponaxis: false,
      marker: { symbol, size: Math.max(3, Math.min(1, cell / 22, said.width / width / 18) * size), color: colour("ink"), line: { width: 1.4, color: colour("ink") } },
      customdata: marked.map(([i, j]) => said.cell(i, j)), hovertemplate: `%{customdata}: ${name}<extra></extra>`,
    });
  }
  const groups = [...new Set(it.roles)].map((role) => {
    const rows = at.filter((_, i) => it.roles[i] === role);
    return { xref: "paper", x: 1, xanchor: "left", xshift: 10, y: (rows[0] + rows.at(-1)) / 2, yanchor: "middle", showarrow: false, text: `${it.count?.[role] ?? rows.length} ${role}`, font: { color: colour("ink") } };
  });
  const margin = { ...sides(it), t: 8, b: 44 };
  return [traces, {
    ...base(Math.round(cell * row) + margin.t + margin.b, margin),
    xaxis: { ...rounds(it.rounds, said.unit, said.width), range: [Math.min(...it.rounds) - half, Math.max(...it.rounds) + half], ticks: "" },
    yaxis: axis({ range: [row - 0.5, -0.5], showgrid: false, showline: false, ticks: "", tickvals: named(it) ? at : [], ticktext: named(it) ? it.clients.map((n) => plain(n, 16)) : [] }),
    annotations: groups,
  }];
};

const cost = (name) => {
  const wing = wings[name].data(), some = shown(name), runs = some.map((i) => wing.runs[i]), { stages, screening } = wing.cost;
  const seconds = wing.cost.seconds.map((row) => some.map((i) => row[i]));
  const names = runs.map((run) => plain(run.name, 20)), ys = names.map((_, i) => i);
  const accent = colour("c-0"), grey = colour("c-ref");
  const ranks = { true: 0, false: 0 }, counts = { true: screening.filter(Boolean).length, false: screening.filter((s) => !s).length };
  const traces = stages.map((stage, s) => {
    const rank = ranks[screening[s]]++, of = Math.max(1, counts[screening[s]] - 1);
    const share = screening[s] ? 1 - 0.45 * (rank / of) : 0.62 - 0.44 * (rank / of);
    return {
      type: "bar", orientation: "h", name: plain(stage), y: ys, x: seconds[s],
      marker: { color: mix(colour("paper"), screening[s] ? accent : grey, share), line: { color: colour("paper"), width: 1.5 } },
      text: seconds[s].map((v) => (v ? plain(stage) : "")), textposition: "inside", insidetextanchor: "middle", textangle: 0, constraintext: "none",
      hovertemplate: `%{x:.1f} s<extra>${plain(stage)}</extra>`,
    };
  });
  const sum = Math.max(...runs.map((_, i) => seconds.reduce((total, row) => total + row[i], 0)));
  traces.forEach((t, s) => { t.text = t.text.map((text, i) => (seconds[s][i] / sum > 0.016 * stages[s].length ? text : "")); }); // only where it fits
  const margin = { l: 24 + 7.2 * Math.max(...runs.map((r) => Math.min(20, [...r.name].length))), r: 24, t: 34, b: 44 };
  return [traces, {
    ...base(margin.t + margin.b + 40 * names.length + 10, margin), barmode: "stack", bargap: 0.34, hovermode: "closest",
    xaxis: axis({ title: { text: "seconds", standoff: 6 }, rangemode: "tozero" }),
    yaxis: axis({ tickvals: ys, ticktext: names, range: [names.length - 0.5, -0.5], showgrid: false, ticks: "" }),
    showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal", itemclick: false, itemdoubleclick: false },
  }];
};

