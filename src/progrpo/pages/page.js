// Charts. Each figure stands as JSON beside its place. A text "var(--name)" in it is a colour of page.css.
const figures = new Map();
for (const place of document.querySelectorAll(".chart")) {
  figures.set(place, JSON.parse(place.parentElement.querySelector("script").textContent));
}

function coloured(part, style) {
  if (typeof part === "string") return part.replace(/^var\((--[a-z]+)\)$/, (text, name) => style.getPropertyValue(name).trim());
  if (Array.isArray(part)) return part.map((item) => coloured(item, style));
  if (part === null || typeof part !== "object") return part;
  return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, coloured(value, style)]));
}

function draw(place) {
  const { data, layout } = coloured(figures.get(place), getComputedStyle(document.documentElement));
  layout.width = place.clientWidth;
  return Plotly.react(place, data, layout, { displayModeBar: false });
}

function drawAgain() {
  for (const place of figures.keys()) if (place.classList.contains("js-plotly-plot")) draw(place);
}

// A chart is drawn when it comes near: a long run's page opens at once. Paper has them all, in the colours of paper.
const coming = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    coming.unobserve(target);
    draw(target);
  }
}, { rootMargin: "400px" });
for (const place of figures.keys()) coming.observe(place);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);
addEventListener("resize", drawAgain);
addEventListener("beforeprint", () => {
  document.documentElement.classList.add("paper");
  for (const place of figures.keys()) draw(place);
});
addEventListener("afterprint", () => {
  document.documentElement.classList.remove("paper");
  drawAgain();
});

// One of several buttons is pressed.
function press(button, all) {
  for (const other of document.querySelectorAll(all)) other.setAttribute("aria-pressed", String(other === button));
}

// The x axis of all curves: each trace carries its other positions in `meta`.
for (const button of document.querySelectorAll("[data-axis]")) {
  button.addEventListener("click", () => {
    press(button, "[data-axis]");
    for (const place of document.querySelectorAll("#curves .chart")) {
      const { data, layout } = figures.get(place);
      for (const trace of data) trace.x = trace.meta[button.dataset.axis];
      layout.xaxis.title.text = button.dataset.title;
    }
    drawAgain();
  });
}

// Which pairs of pictures are shown.
for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => {
    press(button, "[data-show]");
    const outcome = button.dataset.show;
    for (const pair of document.querySelectorAll(".pair")) pair.hidden = outcome !== "all" && pair.dataset.outcome !== outcome;
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
