// Draws the charts and fills the drill-down from the JSON in #data. Runs before plotly.js, so that errors in either are
// noted: <html data-assay="ready|failed" data-charts="N" data-errors="..."> says how it went.
(() => {
  "use strict";
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
  const rounds = (numbers) => {
    const last = Math.max(1, ...numbers), step = Math.max(1, Math.ceil((last + 1) / 14));
    return axis({ title: { text: "round", standoff: 6 }, showgrid: false, tick0: 0, dtick: step, ticks: "outside", tickcolor: colour("line") });
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

  const lines = (metric, height) => {
    const shown = data.runs.filter((run) => run[metric].some((v) => v !== null));
    const values = shown.flatMap((run) => run[metric]).filter((v) => v !== null);
    const share = metric !== "benign_loss";
    const top = Math.max(0.001, ...values);
    const [low, high] = share ? [-0.04, 1.04] : [0, top * 1.12];
    const labelled = shown.length <= 8;
    const margin = { l: 44, r: labelled ? room(shown.map((r) => r.name)) : 20, t: 10, b: 44 };
    const traces = shown.map((run) => {
      const color = colour(`c-${run.colour}`);
      return {
        type: "scatter", mode: "lines+markers", name: plain(run.name), x: run.rounds, y: run[metric], connectgaps: true, cliponaxis: false,
        line: { color, width: 2.2, dash: run.dash },
        marker: {
          symbol: run.applied.map((a) => (a || run.symbol === "x" ? run.symbol : `${run.symbol}-open`) + (!a && run.symbol === "x" ? "-open" : "")),
          size: height > 250 ? 9 : 7, color, line: { color: run.applied.map((a) => (a ? colour("paper") : color)), width: run.applied.map((a) => (a ? 1 : 2)) },
        },
        hovertemplate: `%{y:.3f}<extra>${plain(run.name)}</extra>`,
      };
    });
    const ends = shown.map((run) => ({ end: run[metric].filter((v) => v !== null).at(-1), text: plain(run.name), color: colour(`c-${run.colour}`) }));
    const layout = {
      ...base(height, margin), hovermode: "x unified",
      xaxis: { ...rounds(data.runs.flatMap((r) => r.rounds)), range: [-0.15, Math.max(1, ...data.runs.flatMap((r) => r.rounds)) + 0.15] },
      yaxis: axis({ range: [low, high], ...(share ? { tickvals: [0, 0.25, 0.5, 0.75, 1], tickformat: ".2f" } : { nticks: 5, rangemode: "tozero" }) }),
      annotations: labelled ? labels(ends, low, high, height - margin.t - margin.b, 17) : [],
    };
    if (!labelled) Object.assign(layout, { showlegend: true, legend: { orientation: "h", y: -0.22 }, height: height + 60 });
    return [traces, layout];
  };

  // the heat map and the means under it share their sides, so that rounds stand in columns
  const named = (it) => it.clients.length <= 50;
  const sides = (it) => ({ l: named(it) ? 24 + 6.9 * Math.min(16, Math.max(...it.clients.map((n) => [...n].length))) : 44, r: 100 });

  const heat = (index) => {
    const it = data.weights[index], run = data.runs[it.run];
    const cell = Math.max(5, Math.min(22, 560 / it.clients.length)), texts = cell >= 15 && it.rounds.length <= 26;
    const gap = named(it) ? 0.6 : 14 / cell; // between the groups, in rows
    let row = 0, before = it.roles[0];
    const at = it.roles.map((role) => { if (role !== before) { row += gap; before = role; } return row++; });
    const full = colour(`c-${run.colour}`);
    const cells = [];
    it.z.forEach((ws, i) => ws.forEach((w, j) => cells.push({ i, j, w })));
    const width = it.rounds.length;
    // one heat map per group: rows of a group are evenly spaced, groups are set apart
    const traces = [...new Set(it.roles)].map((role) => {
      const rows = it.clients.map((_, i) => i).filter((i) => it.roles[i] === role);
      return {
        type: "heatmap", x: it.rounds, y: rows.map((i) => at[i]), z: rows.map((i) => it.z[i]), zmin: 0, zmax: 1, showscale: false,
        xgap: width > 40 ? 0 : 2, ygap: cell < 8 ? 0.5 : 2, hoverongaps: false,
        colorscale: [[0, colour("cell")], [1e-6, mix(colour("paper"), full, 0.2)], [1, mix(colour("paper"), full, 0.88)]],
        ...(texts ? { text: rows.map((i) => it.z[i].map((w) => (w === 0 ? "×" : w === 1 ? "" : weight(w)))), texttemplate: "%{text}", textfont: { size: 11 } } : {}),
        customdata: rows.map((i) => it.z[i].map((w) => `${plain(it.clients[i], 48)}, ${role}`)),
        hovertemplate: "%{customdata}<br>round %{x}: weight %{z:.3g}<extra></extra>",
      };
    });
    const idle = cells.filter((c) => c.w === null);
    if (texts && idle.length) traces.push({
      type: "scatter", mode: "markers", x: idle.map((c) => it.rounds[c.j]), y: idle.map((c) => at[c.i]), hoverinfo: "skip", marker: { size: 3, color: colour("soft") },
    });
    const groups = [...new Set(it.roles)].map((role) => {
      const rows = at.filter((_, i) => it.roles[i] === role);
      return { xref: "paper", x: 1, xanchor: "left", xshift: 10, y: (rows[0] + rows.at(-1)) / 2, yanchor: "middle", showarrow: false, text: `${rows.length} ${role}`, font: { color: colour("ink") } };
    });
    const margin = { ...sides(it), t: 8, b: 44 };
    return [traces, {
      ...base(Math.round(cell * row) + margin.t + margin.b, margin),
      xaxis: { ...rounds(it.rounds), range: [Math.min(...it.rounds) - 0.5, Math.max(...it.rounds) + 0.5], ticks: "" },
      yaxis: axis({ range: [row - 0.5, -0.5], showgrid: false, showline: false, ticks: "", tickvals: named(it) ? at : [], ticktext: named(it) ? it.clients.map((n) => plain(n, 16)) : [] }),
      annotations: groups,
    }];
  };

  const means = (index) => {
    const it = data.weights[index], color = colour(`c-${data.runs[it.run].colour}`);
    const looks = { honest: ["solid", "circle"], malicious: ["dot", "x"], unknown: ["dash", "square"] };
    const margin = { ...sides(it), t: 10, b: 44 }, height = 170;
    const traces = Object.entries(it.means).map(([role, y]) => ({
      type: "scatter", mode: "lines+markers", name: role, x: it.rounds, y, connectgaps: true, cliponaxis: false,
      line: { color, width: 2, dash: looks[role][0] }, marker: { symbol: looks[role][1], size: 7, color, line: { color: colour("paper"), width: 1 } },
      hovertemplate: `%{y:.3f}<extra>${role}</extra>`,
    }));
    const ends = Object.entries(it.means).map(([role, y]) => ({ end: y.filter((v) => v !== null).at(-1) ?? null, text: role, color }));
    return [traces, {
      ...base(height, margin), hovermode: "x unified",
      xaxis: { ...rounds(it.rounds), range: [Math.min(...it.rounds) - 0.5, Math.max(...it.rounds) + 0.5] },
      yaxis: axis({ range: [-0.08, 1.08], tickvals: [0, 0.5, 1], tickformat: ".1f" }),
      annotations: labels(ends, -0.08, 1.08, height - margin.t - margin.b, 17),
    }];
  };

  const cost = () => {
    const { stages, screening, seconds } = data.cost;
    const names = data.runs.map((run) => plain(run.name, 20)), ys = names.map((_, i) => i);
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
    const sum = Math.max(...data.runs.map((_, i) => seconds.reduce((total, row) => total + row[i], 0)));
    traces.forEach((t, s) => { t.text = t.text.map((text, i) => (seconds[s][i] / sum > 0.016 * stages[s].length ? text : "")); }); // only where it fits
    const margin = { l: 24 + 7.2 * Math.max(...data.runs.map((r) => Math.min(20, [...r.name].length))), r: 24, t: 34, b: 44 };
    return [traces, {
      ...base(margin.t + margin.b + 40 * names.length + 10, margin), barmode: "stack", bargap: 0.34, hovermode: "closest",
      xaxis: axis({ title: { text: "seconds", standoff: 6 }, rangemode: "tozero" }),
      yaxis: axis({ tickvals: ys, ticktext: names, range: [names.length - 0.5, -0.5], showgrid: false, ticks: "" }),
      showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal", itemclick: false, itemdoubleclick: false },
    }];
  };

  const kinds = {
    refusal_rate: () => lines("refusal_rate", 360), over_refusal_rate: () => lines("over_refusal_rate", 240), benign_loss: () => lines("benign_loss", 240),
    weights: heat, means, cost,
  };
  const draw = async () => {
    let drawn = 0;
    for (const node of document.querySelectorAll("[data-chart]")) {
      try {
        const [traces, layout] = kinds[node.dataset.chart](Number(node.dataset.index));
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
})();
