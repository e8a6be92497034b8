// The participants of a wing: a filter, a table, and from a participant to its rounds to what each screen said of one.
// Rows are made when they are looked at: 1,000 clients x 100 rounds would be 100,000 at once.
const PAGE = 50, ROUNDS = 120; // rows at first
const ROLES = ["honest", "malicious", "unknown"], LEVELS = ["", "of contributions that no screen marked down", "at full weight"];
const People = {};

// Per run and participant: the mean weight, how often refused, how often below full weight, when first, by which screens.
const tallied = (it) => it.runs.map((run) => new Map(run.who.map((who, row) => {
  const found = { row, role: run.roles[row], asked: 0, refused: 0, lost: 0, first: Infinity, sum: 0, screens: new Set(), why: new Map() };
  run.weights[row].forEach((w, j) => {
    if (w === null) return;
    found.asked += 1; found.sum += w; found.refused += w === 0; found.lost += w < 1;
    if (w < 1) found.first = Math.min(found.first, run.rounds[j]);
  });
  for (const [j, screen, ...rest] of run.why[row]) { found.why.set(j, [screen, ...rest]); found.screens.add(screen); }
  return [who, found];
})));

const people = (wing) => {
  const box = document.querySelector(`[data-people="${wing}"]`);
  if (!box) return null;
  const it = wings[wing].data().people, runs = wings[wing].data().runs, unit = wings[wing].unit, text = (i) => it.texts[i];
  const tallies = tallied(it), place = new Map(it.names.map((name, i) => [name, i]));
  const field = (name) => box.querySelector(`[data-filter="${name}"]`);
  const roleOf = (of) => { const roles = [...new Set(of.map((t) => t.role))].sort(); return roles.length > 1 && roles.includes(1) ? 1 : roles[0]; };
  let most = PAGE;

  const screens = [...new Set(tallies.flatMap((by) => [...by.values()].flatMap((t) => [...t.screens])))].map(text).filter(Boolean).sort();
  for (const name of screens) make(field("screen"), "option", name, { value: name });

  // Who passes the filter, with the tallies of the runs shown.
  const found = () => {
    const indices = shown(wing), find = said(wing, "find").toLowerCase(), role = said(wing, "role"), kept = said(wing, "kept"), screen = said(wing, "screen");
    const rows = it.names.map((name, who) => ({ name, who, of: indices.map((r) => tallies[r].get(who)) }));
    const left = rows.filter(({ name, of }) => {
      const those = of.filter(Boolean);
      if (!those.length || (find && !name.toLowerCase().includes(find)) || (role && ROLES[roleOf(those)] !== role)) return false;
      if (screen && !those.some((t) => [...t.screens].some((s) => text(s) === screen))) return false;
      if (kept === "refused") return those.some((t) => t.refused);
      if (kept === "lost") return those.some((t) => t.lost);
      if (kept === "full") return those.every((t) => !t.lost);
      if (kept === "unlike") return new Set(those.map((t) => (t.sum / t.asked).toFixed(2))).size > 1;
      return true;
    });
    const least = ({ of }) => Math.min(...of.filter(Boolean).map((t) => (t.asked ? t.sum / t.asked : 1)));
    const first = ({ of }) => Math.min(...of.filter(Boolean).map((t) => t.first));
    const by = { weight: least, first }[said(wing, "order")];
    if (by) left.sort((a, b) => by(a) - by(b) || a.who - b.who);
    else left.sort((a, b) => roleOf(a.of.filter(Boolean)) - roleOf(b.of.filter(Boolean)) || a.who - b.who);
    return { left, indices };
  };

  const opener = (cell, name, label, open, toggle) => {
    const button = make(cell, "button", name, { type: "button", class: "opener", "aria-expanded": open });
    if (label) button.setAttribute("aria-label", label);
    button.addEventListener("click", () => toggle(button));
    return button;
  };
  const under = (line, columns, name) => { // a row of its own under `line`, for what was opened
    const row = document.createElement("tr");
    line.after(row);
    row.className = "opened";
    return make(make(row, "td", undefined, { colspan: columns }), "div", undefined, { role: "group", "aria-label": name });
  };
  const table = (parent, caption, headings) => {
    const made = make(make(parent, "div", undefined, { class: "scroll", role: "region", "aria-label": caption, tabindex: 0 }), "table");
    make(made, "caption", caption, { class: "quiet" });
    const head = make(make(made, "thead"), "tr");
    for (const [name, kind] of headings) make(head, "th", name, { scope: "col", ...(kind ? { class: kind } : {}) });
    return make(made, "tbody");
  };

  // Evidence: every screen's verdict on what one participant sent in one round.
  const evidence = (parent, name, r, t, j) => {
    const run = it.runs[r], weightOf = run.weights[t.row][j], [screen, reason, sentence] = t.why.get(j) ?? [];
    const verdicts = run.said[t.row].find(([column]) => column === j)?.slice(1) ?? [];
    const fate = weightOf === 0 ? (wing === "swarm" ? "nothing was learnt from" : "refused") : weightOf === 1 ? "full weight" : `weight ${number(weightOf)}`;
    const line = make(parent, "p", undefined, { class: "fate" });
    make(line, "b", `${name}, ${unit} ${run.rounds[j]}, ${runs[r].name}: ${fate}`);
    if (reason !== undefined) { line.append(screen === undefined || !text(screen) ? " (" : `, by ${text(screen)} (`); make(line, "code", text(reason)); line.append(text(sentence) ? `): ${text(sentence)}.` : ")."); }
    else line.append(". No screen objected.");
    const sha = run.sha[t.row].slice(12 * j, 12 * j + 12).trim();
    if (verdicts.length) {
      const many = verdicts.some((v) => text(v[6]));
      const body = table(parent, `What the screens said${many ? " of single completions; not all of one reason are listed" : ", in their order"}`, [
        ...(many ? [["sha256"]] : []), ["Screen"], ["Verdict"], ["Weight", "number"], ["Numbers"], ["Score", "number"], ["Limit"], ["In words"]]);
      for (const [form, why, w, words, score, limit, other, ...values] of verdicts) {
        const [name_, mode, ...names] = it.forms[form].map(text), row = make(body, "tr");
        if (many) make(make(row, "td"), "code", text(other) || sha || "–");
        make(row, "th", name_, { scope: "row" });
        make(row, "td", `${w === 1 ? "passed" : w === 0 ? "refused" : "cut"}${mode === "monitor" ? ", recorded only" : ""}${text(why) && text(why) !== "ok" && text(why) !== name_ ? ` (${text(why)})` : ""}`);
        make(row, "td", number(w), { class: "number" });
        const list = make(make(row, "td"), "ul", undefined, { class: "numbers-list" });
        names.forEach((n, i) => make(list, "li", `${n.replace(/_/g, " ")} ${number(values[i])}`));
        if (!names.length) list.replaceWith("–");
        make(row, "td", number(score), { class: "number" });
        make(row, "td", text(limit) || "–", { class: "limit" });
        make(row, "td", text(words) || "–", { class: "text" });
      }
    } else if (run.level > 0 || run.cut) {
      make(parent, "p", run.cut && run.rounds[j] >= run.cut ? `This page is too full for the verdicts from ${unit} ${run.cut} on; the ledger has them.` : `This page leaves out verdicts ${LEVELS[run.level]}, there are too many; the ledger has them.`);
    } else if (wing === "swarm") make(parent, "p", "The ledger lists verdicts below full weight; here there were none.");
    else make(parent, "p", "The ledger has no verdicts of single screens for this.");
    const proof = make(parent, "p", undefined, { class: "proof" });
    if (sha) { proof.append("Contribution sha256 "); make(proof, "code", sha); proof.append(". "); }
    proof.append("In the ledger: ");
    make(proof, "code", sha ? `grep -n ${sha} ${runs[r].ledger}` : `grep -n '"round":${run.rounds[j]},' ${runs[r].ledger}`);
  };

  // Rounds: one table for all runs shown.
  const rounds = (parent, { name, of }, indices, all = false) => {
    parent.replaceChildren();
    const only = said(wing, "only") !== "", lines = [];
    of.forEach((t, k) => t && it.runs[indices[k]].rounds.forEach((round, j) => {
      const w = it.runs[indices[k]].weights[t.row][j];
      if ((w !== null || t.why.has(j)) && !(only && w === 1 && !t.why.has(j))) lines.push({ r: indices[k], t, j, w, round });
    }));
    const wanted = said(wing, "open") === name && said(wing, "round") !== "" ? { r: Number(said(wing, "run")), round: Number(said(wing, "round")) } : null;
    const least = wanted ? lines.findIndex((l) => l.r === wanted.r && l.round === wanted.round) + 1 : 0;
    if (!lines.length) { make(parent, "p", only ? `No ${unit} cost it any weight.` : `It took part in no ${unit}.`); return; }
    const caption = `${name}, ${unit} by ${unit}`;
    const body = table(parent, caption, [["Run"], [unit === "round" ? "Round" : "Iteration", "number"], [unit === "round" ? "Weight" : "Learnt from", "number"], ["Screen"], ["Reason"], ["In words"], ...(wing === "swarm" ? [] : [["sha256"]]), ["Evidence"]]);
    lines.slice(0, all ? lines.length : Math.max(ROUNDS, least)).forEach(({ r, t, j, w, round }) => {
      const row = make(body, "tr"), [screen, reason, sentence] = (t.why.get(j) ?? []).map(text);
      make(row, "th", runs[r].name, { scope: "row", class: "name" });
      make(row, "td", round, { class: "number" });
      make(row, "td", w === null ? "–" : weight(w), { class: "number" });
      make(row, "td", screen || "–");
      make(make(row, "td"), "code", reason || (w === 1 ? "ok" : "–"));
      make(row, "td", sentence || "–", { class: "text" });
      if (wing !== "swarm") make(make(row, "td"), "code", it.runs[r].sha[t.row].slice(12 * j, 12 * j + 12).trim() || "–");
      const label = `Evidence of ${unit} ${round} in ${runs[r].name}`, here = wanted && wanted.r === r && wanted.round === round;
      const show = () => evidence(under(row, 8, label), name, r, t, j);
      opener(make(row, "td"), "Evidence", label, Boolean(here), (button) => {
        const open = button.getAttribute("aria-expanded") === "true";
        button.setAttribute("aria-expanded", !open);
        if (open) { row.nextElementSibling.remove(); choose(wing, { run: "", round: "" }); } else { show(); choose(wing, { open: name, run: r, round }); }
      });
      if (here) show();
    });
    if (!all && lines.length > Math.max(ROUNDS, least)) make(parent, "button", `Show all ${lines.length} rows`, { type: "button" }).addEventListener("click", () => rounds(parent, { name, of }, indices, true));
  };

  const render = () => {
    const { left, indices } = found(), several = indices.length > 1;
    const open = place.has(said(wing, "open")) ? said(wing, "open") : null, first = open === null ? -1 : left.findIndex((p) => p.name === open);
    most = Math.max(most, first + 1);
    const list = box.querySelector(".list");
    list.replaceChildren();
    box.querySelector("output").textContent = `${left.length.toLocaleString("en")} of ${it.names.length.toLocaleString("en")} participants${left.length > most ? `, the first ${most} listed` : ""}`;
    if (!left.length) { make(list, "p", "Nobody fits this filter."); return; }
    const body = table(list, `${wing === "swarm" ? "Mean share learnt from" : "Mean weight"}${several ? " by run" : ""}, and the rounds in which all was refused`, [
      ["Participant"], ["Role"], ...indices.map((r) => [runs[r].name, "number"]), ["First below full weight", "number"], ["Screens that objected"]]);
    indices.forEach((r, k) => {
      const cell = body.parentNode.tHead.rows[0].cells[2 + k];
      cell.replaceChildren(key(wing, r));
      for (const part of runs[r].name.split(/(?<=[._])/)) cell.append(part, document.createElement("wbr"));
    });
    for (const person of left.slice(0, most)) {
      const { name, of } = person, those = of.filter(Boolean), row = make(body, "tr"), role = ROLES[roleOf(those)], columns = 4 + indices.length;
      const toggle = (button) => {
        const closing = button.getAttribute("aria-expanded") === "true";
        button.setAttribute("aria-expanded", !closing);
        if (closing) { row.nextElementSibling.remove(); choose(wing, { open: "", run: "", round: "" }); return; }
        choose(wing, { open: name, run: "", round: "" });
        rounds(under(row, columns, `${unit}s of ${name}`), person, indices);
      };
      opener(make(row, "th", undefined, { scope: "row" }), name, "", name === open, toggle);
      const mixed = new Set(those.map((t) => t.role)).size > 1;
      make(make(row, "td"), "span", role === "unknown" ? "role unknown" : mixed ? `${role} in some runs` : role, { class: `role ${role}` });
      for (const t of of) {
        const cell = make(row, "td", t && t.asked ? (t.sum / t.asked).toFixed(2) : "–", { class: "number" });
        if (t?.lost) make(cell, "small", t.refused ? `${t.refused} of ${t.asked} refused` : `${t.lost} of ${t.asked} cut`, { class: "state" });
      }
      const earliest = Math.min(...those.map((t) => t.first));
      make(row, "td", Number.isFinite(earliest) ? `${unit} ${earliest}` : "–", { class: "number" });
      make(row, "td", [...new Set(those.flatMap((t) => [...t.screens].map(text)))].filter(Boolean).join(", ") || "–");
      if (name === open) rounds(under(row, columns, `${unit}s of ${name}`), person, indices);
    }
    if (left.length > most) {
      const more = make(list, "button", `Show ${Math.min(PAGE, left.length - most)} more`, { type: "button" });
      more.addEventListener("click", () => { const from = most; most += PAGE; render(); list.querySelectorAll("th > .opener")[from]?.focus(); });
    }
  };

  const sync = () => {
    for (const node of box.querySelectorAll("[data-filter]")) if (node.type === "checkbox") node.checked = said(wing, node.dataset.filter) !== ""; else node.value = said(wing, node.dataset.filter);
    most = PAGE;
    render();
  };
  for (const node of box.querySelectorAll("[data-filter]")) {
    const name = node.dataset.filter, flag = node.type === "checkbox";
    node.addEventListener(node.type === "search" ? "input" : "change", () => { most = PAGE; choose(wing, { [name]: flag ? (node.checked ? "1" : "") : node.value }); render(); });
  }
  box.querySelector("[data-clear]").addEventListener("click", () => {
    choose(wing, { find: "", role: "", kept: "", screen: "", order: "", only: "", open: "", run: "", round: "" });
    sync();
  });
  sync();
  // from a cell of the heat map to its evidence
  const visit = (name, run, round) => {
    if (!place.has(name)) return;
    choose(wing, { find: "", role: "", kept: "", screen: "", only: "", open: name, run, round });
    sync();
    const opened = [...box.querySelectorAll(".opener[aria-expanded=true]")].at(-1);
    opened?.scrollIntoView({ block: "start" });
    opened?.focus({ preventScroll: true });
  };
  return { render, sync, visit };
};
