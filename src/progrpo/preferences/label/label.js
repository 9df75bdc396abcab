// One pair at a time. A vote is shown as done when the server has it on its disk; the next pictures are loaded by then.
const byId = (id) => document.getElementById(id);
const loaded = new Map(); // address -> picture, of the pairs that the server has named
const times = []; // of the last votes, for the speed
let state = null;
let asked = null; // the pair that is shown
let busy = false;

const LONGEST_PAUSE = 60_000;
const SMALL = 256; // pictures of fewer pixels a side are shown with sharp pixels

function picture(address) {
  if (!loaded.has(address)) {
    const made = new Image();
    made.alt = "";
    made.draggable = false;
    made.addEventListener("load", () => made.classList.toggle("small", Math.max(made.naturalWidth, made.naturalHeight) < SMALL));
    made.src = address;
    loaded.set(address, made);
  }
  return loaded.get(address);
}

function speed() {
  const recent = times.slice(-30);
  if (recent.length < 3) return "";
  let active = 0;
  for (let i = 1; i < recent.length; i++) active += Math.min(recent[i] - recent[i - 1], LONGEST_PAUSE);
  return active ? `${((60_000 * (recent.length - 1)) / active).toFixed(0)} pairs a minute` : "";
}

function message() {
  if (state.follows) return state.waits ? "Thank you. The run has these votes; it goes on." : "Waiting for the run. Its pairs appear here by themselves.";
  const skipped = state.skipped ? ` ${state.skipped} skipped: start the page again to be asked about them.` : "";
  return `All pairs are done. The votes are in votes.jsonl.${skipped}`;
}

function show() {
  asked = state.next[0] ?? null;
  const needed = new Set(state.next.flatMap((pair) => [pair.left, pair.right]));
  for (const address of loaded.keys()) if (!needed.has(address)) loaded.delete(address);
  needed.forEach(picture);
  byId("ask").hidden = !asked;
  byId("rest").hidden = Boolean(asked);
  if (asked) {
    byId("prompt").textContent = asked.prompt; // texts may be a stranger's: never HTML
    byId("left").replaceChildren(picture(asked.left));
    byId("right").replaceChildren(picture(asked.right));
  } else {
    byId("message").textContent = message();
  }
  const total = state.total ?? state.done + state.next.length;
  byId("bar").max = Math.max(1, total);
  byId("bar").value = state.done;
  byId("count").textContent = state.total === null ? `${state.done} votes` : `${state.done} of ${state.total}`;
  byId("speed").textContent = speed();
  byId("agreement").textContent = state.agreement ?? "";
  for (const id of ["undo", "undo-rest"]) byId(id).disabled = !state.undo;
  document.querySelectorAll(".chosen").forEach((element) => element.classList.remove("chosen"));
  document.body.dataset.shown = asked ? asked.id : "";
}

const name = () => byId("annotator").value.trim();

async function answerOf(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  if (!answer.ok) throw new Error(answer.statusText);
  return answer.json();
}

const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Sent again until it is answered: the server counts a vote on a pair once, so nothing is lost or counted twice.
async function send(path, body) {
  busy = true;
  for (;;) {
    try {
      state = await answerOf(path, body);
      byId("state").textContent = "";
      break;
    } catch {
      byId("state").textContent = "not saved yet: the server does not answer; is progrpo label still running?";
      await wait(1000);
    }
  }
  busy = false;
  show();
}

function choose(choice) {
  if (busy || !asked) return;
  if (choice !== "skip") times.push(performance.now());
  for (const id of [choice, `choose-${choice}`]) byId(id)?.classList.add("chosen");
  send("/vote", { annotator: name(), id: asked.id, choice });
}

function undo() {
  if (busy || !state?.undo) return;
  times.pop();
  send("/undo", { annotator: name() });
}

const KEYS = {
  ArrowLeft: "left", a: "left", ArrowRight: "right", b: "right", ArrowDown: "tie", t: "tie", s: "skip", u: "undo", Backspace: "undo",
};

document.addEventListener("keydown", (event) => {
  if (event.target.id === "annotator") {
    if (event.key === "Enter") event.target.blur();
    return;
  }
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  if (action === "undo") undo();
  else choose(action);
});

async function look() {
  if (!busy && !document.hidden) {
    try {
      const now = await answerOf(`/state.json?annotator=${encodeURIComponent(name())}`);
      if (!busy) {
        state = now;
        byId("state").textContent = "";
        show();
      }
    } catch {
      byId("state").textContent = "the server does not answer; is progrpo label still running?";
    }
  }
}

async function follow() {
  await look();
  setTimeout(follow, asked ? 5000 : 400);
}

for (const [id, choice] of [["left", "left"], ["choose-left", "left"], ["right", "right"], ["choose-right", "right"], ["tie", "tie"], ["skip", "skip"]]) {
  byId(id)?.addEventListener("click", (event) => {
    event.currentTarget.blur();
    choose(choice);
  });
}
for (const id of ["undo", "undo-rest"]) byId(id)?.addEventListener("click", undo);

const field = byId("annotator");
if (field) {
  // each tab has a name of its own, so that two people can use one machine
  field.value = new URLSearchParams(location.search).get("annotator") ?? sessionStorage.getItem("annotator") ?? field.value;
  field.addEventListener("change", () => {
    sessionStorage.setItem("annotator", name());
    times.length = 0;
    look();
  });
  follow();
}
