// The list of runs. It is asked for every two seconds, and only the rows that changed are written again.
const rows = new Map(); // name -> { run, text, tr, box }
const body = document.getElementById("runs");
let order = "";

// Texts come from run folders, which may be a stranger's: they are set as text, never as HTML.
function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(Math.round(seconds) / 60);
  if (minutes < 60) return `${minutes} min`;
  return minutes < 2880 ? `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min` : `${Math.floor(minutes / 1440)} days`;
}

function ago(updated) {
  const seconds = Math.max(0, Date.now() / 1000 - updated);
  return seconds < 60 ? `${Math.round(seconds)} s ago` : `${duration(seconds)} ago`;
}

function nameCell(run) {
  const cell = element("td");
  const link = element("a", run.name, "name");
  link.href = `/report?run=${encodeURIComponent(run.name)}`;
  link.dir = "auto";
  const what = run.error ? run.error : [run.recipe, run.model, run.reward, `seed ${run.seed}`].filter(Boolean).join(" · ");
  cell.append(link, element("small", what));
  return cell;
}

function statusCell(run) {
  const word = run.status.split(":")[0];
  const cell = element("td");
  const badge = element("span", word, `status ${["running", "stopped", "killed", "finished", "damaged"].includes(word) ? word : ""}`);
  badge.title = run.status;
  cell.append(badge);
  return cell;
}

function progressCell(run) {
  const cell = element("td", `${run.done} of ${run.iterations ?? "?"}`);
  const bar = element("progress");
  bar.max = Math.max(1, run.iterations ?? 1);
  bar.value = run.done;
  cell.append(bar);
  return cell;
}

function fromTo(before, after, write) {
  const cell = element("td");
  cell.append(write(before), element("em", " → "), write(after));
  return cell;
}

function rewardCell(run) {
  if (run.reward_after !== null || run.reward_now === null) return fromTo(run.reward_before, run.reward_after, number);
  const cell = element("td", number(run.reward_now));
  cell.append(element("small", `samples; ${number(run.reward_before)} before`));
  return cell;
}

function cellsOf(run) {
  if (run.error) {
    const rest = element("td");
    rest.colSpan = 5;
    return [nameCell(run), statusCell(run), rest];
  }
  return [
    nameCell(run), statusCell(run), progressCell(run), rewardCell(run), fromTo(run.accuracy_before, run.accuracy_after, percent),
    element("td", duration(run.seconds)), element("td", duration(run.wall_seconds)),
  ];
}

function update(run) {
  const text = JSON.stringify(run);
  const known = rows.get(run.name);
  if (known?.text === text) return;
  const box = known?.box ?? Object.assign(element("input"), { type: "checkbox", name: "run", value: run.name });
  box.setAttribute("aria-label", `compare ${run.name}`);
  const tr = known?.tr ?? element("tr");
  const first = element("td");
  first.append(box);
  const changed = element("td", ago(run.updated), "ago");
  tr.replaceChildren(first, ...cellsOf(run), changed);
  rows.set(run.name, { run, text, tr, box, changed });
}

function show(runs) {
  runs.forEach(update);
  const names = new Set(runs.map((run) => run.name));
  for (const [name, row] of rows) {
    if (names.has(name)) continue;
    row.tr.remove();
    rows.delete(name);
  }
  const now = runs.map((run) => run.name).join("\n");
  if (now !== order) body.append(...runs.map((run) => rows.get(run.name).tr));
  order = now;
  for (const { run, changed } of rows.values()) changed.textContent = ago(run.updated);
  const running = runs.filter((run) => run.status === "running").length;
  document.getElementById("count").textContent = `${runs.length} ${runs.length === 1 ? "run" : "runs"}, ${running} running.`;
  document.getElementById("none").hidden = runs.length > 0;
  filter();
  choose();
}

function filter() {
  const words = document.getElementById("find").value.toLowerCase().split(/\s+/);
  for (const { run, tr } of rows.values()) {
    const text = [run.name, run.recipe, run.model, run.reward, run.status].join(" ").toLowerCase();
    tr.hidden = !words.every((word) => text.includes(word));
  }
}

function choose() {
  const count = [...rows.values()].filter(({ box }) => box.checked).length;
  document.getElementById("compare").disabled = count < 2;
  document.getElementById("chosen").textContent = count ? `${count} selected` : "choose two runs or more";
}

async function ask() {
  const state = document.getElementById("state");
  if (!document.hidden) {
    try {
      const answer = await fetch("/runs.json");
      show((await answer.json()).runs);
      state.textContent = "";
    } catch {
      state.textContent = "the board does not answer; is progrpo board still running?";
    }
  }
  setTimeout(ask, 2000);
}

if (body) {
  document.getElementById("find").addEventListener("input", filter);
  body.addEventListener("change", choose);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.id === "find") event.preventDefault();
  });
  ask();
}
