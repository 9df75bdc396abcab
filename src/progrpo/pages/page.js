// The x axis of all curves: each trace carries its other positions in `meta`.
for (const button of document.querySelectorAll("[data-axis]")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll("[data-axis]")) other.setAttribute("aria-pressed", String(other === button));
    for (const plot of document.querySelectorAll("#curves .js-plotly-plot")) {
      const x = plot.data.map((trace) => trace.meta[button.dataset.axis]);
      Plotly.update(plot, { x }, { "xaxis.title.text": button.dataset.title, "xaxis.autorange": true });
    }
  });
}

// Which pairs of pictures are shown.
for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll("[data-show]")) other.setAttribute("aria-pressed", String(other === button));
    const wanted = button.dataset.show;
    for (const pair of document.querySelectorAll(".pair")) pair.hidden = wanted !== "all" && pair.dataset.outcome !== wanted;
  });
}

// Which audit group's film is shown, and whether with all its members.
document.getElementById("choose-film")?.addEventListener("change", (event) => {
  for (const film of document.querySelectorAll(".film")) film.hidden = film.id !== event.target.value;
});
for (const button of document.querySelectorAll("button.more")) {
  const label = button.textContent;
  button.addEventListener("click", () => {
    const all = button.parentElement.classList.toggle("all");
    button.textContent = all ? "Show fewer members" : label;
  });
}
