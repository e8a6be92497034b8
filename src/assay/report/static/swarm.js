// The charts of swarm runs.

// One attack: a marked line for held-out questions, a thin one for what honest nodes sent in training.
const course = (index, node) => {
  const it = data.swarm.charts[index], share = it.key !== "tokens", height = 270;
  const drawn = it.series.filter((s) => isShown("swarm", s.run)).filter((s) => s.line.length || s.marks.length);
  const look = (s) => ({ ...data.swarm.runs[s.run], color: colour(`c-${data.swarm.runs[s.run].colour}`) });
  const [xs, ys] = [0, 1].map((k) => drawn.flatMap((s) => [...s.line, ...s.marks].map((point) => point[k])));
  if (!ys.length) return [[], {}];
  const top = Math.max(...ys) * 1.12 || 1, [low, high] = share && top <= 1.13 ? [-0.04, 1.04] : [0, top];
  const labelled = drawn.length <= 6;
  const margin = { l: 44, r: labelled ? room(drawn.map((s) => look(s).name)) : 20, t: 10, b: 44 };
  const hover = (s, what) => `%{y:${share ? ".3f" : ".1f"}}<extra>${plain(look(s).name)}${what}</extra>`;
  const thin = drawn.map((s) => ({
    type: "scatter", mode: "lines", x: s.line.map((p) => p[0]), y: s.line.map((p) => p[1]), opacity: 0.5, cliponaxis: false,
    line: { color: look(s).color, width: 1.2 }, hovertemplate: hover(s, ", training"),
  }));
  const marked = drawn.map((s) => ({
    type: "scatter", mode: "lines+markers", x: s.marks.map((p) => p[0]), y: s.marks.map((p) => p[1]), cliponaxis: false,
    line: { color: look(s).color, width: 2.2, dash: look(s).dash },
    marker: { symbol: look(s).symbol, size: s.marks.length > 40 ? 5 : 8, color: look(s).color, line: { color: colour("paper"), width: 1 } },
    hovertemplate: hover(s, ""),
  }));
  const ends = drawn.map((s) => ({ end: (s.marks.length ? s.marks : s.line).at(-1)[1], text: plain(look(s).name), color: look(s).color }));
  const last = Math.max(1, ...xs), aside = 0.012 * last;
  return [[...thin, ...marked], {
    ...base(height, margin), hovermode: "closest",
    xaxis: { ...rounds([last], "iteration", node.clientWidth - margin.l - margin.r), range: [-aside, last + aside] },
    yaxis: axis({ range: [low, high], ...(share && high === 1.04 ? { tickvals: [0, 0.25, 0.5, 0.75, 1], tickformat: ".2f" } : { nticks: 5 }) }),
    annotations: labelled ? labels(ends, low, high, height - margin.t - margin.b, 17) : [],
  }];
};

// Bars side by side in bins of unequal width; hatching, not colour alone, tells honest from malicious.
const histogram = () => {
  const it = data.swarm.margins, margin = { l: 44, r: 24, t: 34, b: 62 };
  const hatches = ["/", "x", "\\", ".", "-"], at = it.bins.map((_, i) => i);
  const traces = it.series.map((s, n) => {
    const color = s.honest ? colour("c-ref") : n === 1 ? colour("c-bare") : colour(`c-${(n - 2) % 5}`);
    return {
      type: "bar", name: plain(s.name, 40), x: at, y: s.shares, customdata: s.counts.map((count, i) => [plain(it.bins[i]), count]),
      marker: { color, line: { color, width: 1 }, ...(s.honest ? {} : { pattern: { shape: hatches[(n - 1) % 5], fgcolor: color, bgcolor: colour("paper"), size: 6, solidity: 0.45 } }) },
      hovertemplate: `margin %{customdata[0]}: %{y:.1%} (%{customdata[1]})<extra>${plain(s.name, 40)}</extra>`,
    };
  });
  const lines = it.limits.map(([x]) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: colour("ink"), width: 1.6, dash: "dash" } }));
  return [traces, {
    ...base(330, margin), barmode: "group", bargap: 0.24, hovermode: "closest", shapes: lines,
    xaxis: axis({ title: { text: "largest margin of a completion (logits)", standoff: 6 }, tickvals: at, ticktext: it.bins, tickangle: -35, automargin: true, showgrid: false, range: [-0.6, it.bins.length - 0.4] }),
    yaxis: axis({ range: [0, 1.02], tickformat: ".0%", tickvals: [0, 0.25, 0.5, 0.75, 1] }),
    annotations: it.limits.map(([x, text]) => ({ x, yref: "paper", y: 0.98, xanchor: "left", yanchor: "top", xshift: 5, showarrow: false, text: `limit ${text}`, font: { color: colour("ink") } })),
    showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", itemclick: false, itemdoubleclick: false },
  }];
};

const grid = (index, node) => {
  const it = data.swarm.grids[index], middle = (it.step - 1) / 2, { l, r } = sides(it);
  const shifted = { ...it, rounds: it.rounds.map((round) => round + middle) };
  return cells(shifted, data.swarm.runs[it.run], {
    unit: "iteration", text: false, width: node.clientWidth - l - r, cell: (i, j) => `${plain(it.clients[i], 48)}, ${it.roles[i]}<br>iteration ${it.spans[j]}`,
    hover: "%{customdata}: %{z:.0%} learnt from<extra></extra>",
    marks: [{ name: "banned", symbol: "square-open", size: 14, at: it.banned }, { name: "struck", symbol: "triangle-down", size: 6, at: it.struck }],
  });
};
