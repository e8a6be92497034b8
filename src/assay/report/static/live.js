// Only in `assay watch`: asks every two seconds whether there is something new, and puts it in place of what is shown.
// Never under the reader's hands: while the focus is in the page, or after Pause, a button waits instead.
const live = document.querySelector("[data-live]");
if (live) {
  const line = live.querySelector("output"), button = live.querySelector("button");
  let version = live.dataset.live, paused = false;
  const tell = (text) => { if (line.textContent !== text) line.textContent = text; };
  const swap = async () => {
    const fresh = new DOMParser().parseFromString(await (await fetch("page")).text(), "text/html");
    if (!fresh.getElementById("data")) return;
    for (const node of document.querySelectorAll(".js-plotly-plot")) Plotly.purge(node);
    for (const part of ["header", "main"]) document.querySelector(`body > ${part}`).replaceWith(document.adoptNode(fresh.querySelector(`body > ${part}`)));
    document.getElementById("data").textContent = fresh.getElementById("data").textContent;
    document.title = fresh.title;
    version = fresh.querySelector("[data-live]").dataset.live;
    start();
    draw();
  };
  const ask = async () => {
    try {
      const told = await (await fetch("version")).json(), inside = document.querySelector("main").contains(document.activeElement);
      const waits = told.version && told.version !== version;
      if (waits && !paused && !inside) await swap();
      button.textContent = waits && (paused || inside) ? "Show what is new" : paused ? "Go on" : "Pause";
      tell(told.problem ? `Shown as it was: ${told.problem}` : paused ? "Paused." : "Live: this page follows the run.");
    } catch { tell("assay watch has ended; this page stays as it is."); }
    setTimeout(ask, 2000);
  };
  button.addEventListener("click", async () => {
    if (button.textContent === "Show what is new") await swap(); else paused = !paused;
    button.textContent = paused ? "Go on" : "Pause";
  });
  addEventListener("DOMContentLoaded", ask);
}
