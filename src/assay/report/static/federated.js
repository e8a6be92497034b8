// The charts of federated runs.
const lines = (metric, height) => {
  const some = shown("federated").map((i) => data.runs[i]), drawn = some.filter((run) => run[metric].some((v) => v !== null));
  const values = drawn.flatMap((run) => run[metric]).filter((v) => v !== null);
  const share = metric !== "benign_loss";
  const top = Math.max(0.001, ...values);
  const [low, high] = share ? [-0.04, 1.04] : [0, top * 1.12];
  const labelled = drawn.length <= 8;
  const margin = { l: 44, r: labelled ? room(drawn.map((r) => r.name)) : 20, t: 10, b: 44 };
  const traces = drawn.map((run) => {
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
  const ends = drawn.map((run) => ({ end: run[metric].filter((v) => v !== null).at(-1), text: plain(run.name), color: colour(`c-${run.colour}`) }));
  const layout = {
    ...base(height, margin), hovermode: "x unified",
    xaxis: { ...rounds(some.flatMap((r) => r.rounds)), range: [-0.15, Math.max(1, ...some.flatMap((r) => r.rounds)) + 0.15] },
    yaxis: axis({ range: [low, high], ...(share ? { tickvals: [0, 0.25, 0.5, 0.75, 1], tickformat: ".2f" } : { nticks: 5, rangemode: "tozero" }) }),
    annotations: labelled ? labels(ends, low, high, height - margin.t - margin.b, 17) : [],
  };
  if (!labelled) Object.assign(layout, { showlegend: true, legend: { orientation: "h", y: -0.22 }, height: height + 60 });
  return [traces, layout];
};

const heat = (index) => {
  const it = data.weights[index];
  return cells(it, data.runs[it.run], {
    unit: "round", text: true, cell: (i) => `${plain(it.clients[i], 48)}, ${it.roles[i]}`,
    hover: "%{customdata}<br>round %{x}: weight %{z:.3g}<extra></extra>",
  });
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
