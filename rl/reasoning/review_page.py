"""The HTML page of the review."""

_STYLE = """
:root{color-scheme:light dark;--ink:#212529;--quiet:#666e76;--line:#d0d5da;--page:#fff;--box:#f4f6f8;--mark:#1c7ed6;
--bad:#c92a2a;--good:#2b8a3e}
@media(prefers-color-scheme:dark){:root{--ink:#e9ecef;--quiet:#a3abb3;--line:#495057;--page:#16181b;--box:#212529;
--mark:#74c0fc;--bad:#ff8787;--good:#69db7c}}
*{box-sizing:border-box}body{margin:0;font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page)}
main{max-width:1000px;margin:0 auto;padding:16px 20px 40px}
header{display:flex;gap:16px;align-items:baseline;flex-wrap:wrap}h1{font-size:1.15rem;margin:0}
.quiet{color:var(--quiet)}.grade{font-weight:700}progress{flex:1;min-width:120px;accent-color:var(--mark)}
#media{margin:12px 0;overflow-x:auto}#media table{font-size:.85rem;color:var(--quiet);border-spacing:12px 0}
#media td{overflow-wrap:anywhere}
#question{font-size:1.1rem;margin:12px 0 4px;white-space:pre-wrap}.answers{margin:0 0 12px}
ol{list-style:none;margin:0;padding:0}
li{display:grid;grid-template-columns:2.2em 1fr auto;gap:8px;padding:7px 10px;margin:4px 0;background:var(--box);
border:2px solid transparent;border-left:4px solid var(--line);border-radius:5px;cursor:pointer}
li.here{border-color:var(--mark)}li.flawed{border-left-color:var(--bad)}li.gone .text{text-decoration:line-through}
li.gone{opacity:.55}li .text{white-space:pre-wrap;overflow-wrap:anywhere}li textarea{width:100%;font:inherit;
min-height:4.5em;color:inherit;background:var(--page);border:1px solid var(--line);border-radius:4px;padding:5px}
.number,.sure{color:var(--quiet);font-variant-numeric:tabular-nums}.flag{color:var(--bad);font-weight:600}
.buttons{display:flex;gap:8px;flex-wrap:wrap;margin:16px 0 8px}
button{font:inherit;padding:7px 14px;border:1px solid var(--line);border-radius:6px;background:var(--box);
color:inherit;cursor:pointer}button:hover{border-color:var(--mark)}#accept{border-color:var(--good);
color:var(--good);font-weight:600}#reject{border-color:var(--bad);color:var(--bad);font-weight:600}
kbd{font:0.85em ui-monospace,monospace;border:1px solid var(--line);border-radius:4px;padding:0 5px}
#message{min-height:1.5em;color:var(--bad)}.decided{color:var(--good);font-weight:600}
#done{display:none;font-size:1.1rem;margin:40px 0}
"""

_SCRIPT = """
(() => {
const token = new URLSearchParams(location.search).get("token");
const $ = id => document.getElementById(id);
const say = text => { $("message").textContent = text; };
let item = null, steps = [], here = 0, editing = -1, busy = false;

const call = async (address, body) => {
  const options = {headers: {"X-Token": token}};
  if (body) Object.assign(options, {method: "POST", body: JSON.stringify(body)});
  const response = await fetch(address, options);
  const value = await response.json();
  if (!response.ok) throw new Error(value.error);
  return value;
};

const finish = () => {  // an edit takes effect when it is left
  if (editing < 0) return;
  const box = $("steps").querySelector("textarea");
  if (box) steps[editing].text = box.value.trim();
  if (!steps[editing].text) steps[editing].gone = true;
  editing = -1;
};

const measure = () => {
  const kept = steps.filter(step => !step.gone && step.text);
  $("length").textContent = kept.length + " steps, " + kept.reduce((sum, step) => sum + step.text.length, 0) +
    " characters";
};

const draw = () => {
  $("steps").replaceChildren(...steps.map((step, place) => {
    const line = document.createElement("li");
    line.classList.toggle("here", place === here);
    line.classList.toggle("gone", !!step.gone);
    line.classList.toggle("flawed", !!step.flawed);
    const number = document.createElement("span"), sure = document.createElement("span");
    number.className = "number"; number.textContent = place + 1 + ".";
    sure.className = step.flawed ? "flag" : "sure";
    sure.textContent = (step.flawed ? "flawed " : "") + (step.confidence == null ? "" : step.confidence.toFixed(2));
    sure.title = "mean log-probability of the step's tokens";
    let text;
    if (place === editing) {
      text = document.createElement("textarea"); text.value = step.text;
    } else {
      text = document.createElement("div"); text.className = "text"; text.textContent = step.text || "(empty)";
    }
    line.append(number, text, sure);
    line.addEventListener("click", () => { if (place !== editing) { finish(); here = place; draw(); } });
    line.addEventListener("dblclick", () => edit(place));
    return line;
  }));
  const box = $("steps").querySelector("textarea");
  if (box) { box.focus(); box.setSelectionRange(box.value.length, box.value.length); }
  if (box) box.addEventListener("input", () => { steps[editing].text = box.value.trim(); measure(); });
  measure();
};

const edit = place => { finish(); if (!steps.length) steps.push({text: ""}); here = editing = place; draw(); };
const remove = () => { finish(); if (steps[here]) { steps[here].gone = !steps[here].gone; draw(); } };
const insert = () => { finish(); steps.splice(steps.length ? here + 1 : 0, 0, {text: ""});
  edit(Math.min(here + 1, steps.length - 1)); };

const show = value => {
  item = value;
  if (value.place === null) {
    $("work").style.display = "none"; $("done").style.display = "block";
    $("progress").value = value.total; $("progress").max = value.total;
    $("count").textContent = "0 of " + value.total + " open";
    return;
  }
  $("work").style.display = ""; $("done").style.display = "none";
  $("progress").max = value.total; $("progress").value = value.total - value.open;
  $("count").textContent = value.open + " of " + value.total + " open";
  $("id").textContent = value.id;
  $("grade").textContent = value.grade;
  $("why").textContent = value.why + (value.process == null ? "" : "; process right in " +
    Math.round(value.process * 100) + " % of the judgements");
  $("decision").textContent = value.decision || "";
  $("media").innerHTML = value.media;  // made by the server from the clip alone
  $("question").textContent = value.question + (value.options.length ? "\\n" + value.options.join(" · ") : "");
  $("answer").textContent = value.answer;
  $("given").textContent = value.given;
  $("sure").textContent = value.confidence == null ? "" : " (mean log-probability " + value.confidence.toFixed(2) + ")";
  steps = value.steps.map((step, place) => ({...step, flawed: value.flawed.includes(place + 1)}));
  here = 0; editing = -1; say(""); draw(); scrollTo(0, 0);
};

const load = async place => {
  try { show(await call("/item" + (place === undefined ? "" : "?place=" + place))); }
  catch (error) { say(String(error.message)); }
};

const decide = async accept => {
  if (busy || !item || item.place === null) return;
  finish(); draw(); busy = true;
  try {
    const kept = steps.filter(step => !step.gone).map(step => step.text);
    const value = await call("/decide", {place: item.place, accept, steps: kept});
    await load(value.next === null ? undefined : value.next);
  } catch (error) { say(String(error.message)); }
  busy = false;
};
const go = step => {
  if (!item || item.place === null) return load(0);
  const to = item.place + step;
  if (to >= 0 && to < item.total) load(to); else say(step < 0 ? "this is the first chain" : "this is the last chain");
};

const keys = {
  a: () => decide(true), r: () => decide(false), e: () => edit(here), Enter: () => edit(here), d: remove, n: insert,
  j: () => { here = Math.min(here + 1, steps.length - 1); draw(); },
  k: () => { here = Math.max(here - 1, 0); draw(); }, b: () => go(-1), s: () => go(1),
};
keys.ArrowDown = keys.j; keys.ArrowUp = keys.k; keys.ArrowLeft = keys.b; keys.ArrowRight = keys.s;
document.addEventListener("keydown", event => {
  if (editing >= 0) {
    if (event.key === "Escape") { event.preventDefault(); finish(); draw(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); decide(true); }
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "BUTTON" && event.key === "Enter")
    return;
  const action = keys[event.key];
  if (action) { event.preventDefault(); action(); }
});
for (const [id, key] of [["accept", "a"], ["reject", "r"], ["edit", "e"], ["remove", "d"], ["insert", "n"],
  ["back", "b"], ["skip", "s"]])
  $(id).addEventListener("click", () => { $(id).blur(); keys[key](); });
load();
})();
"""


def page(nonce: str) -> str:
    """The page; nonce: of its script in the Content-Security-Policy."""
    buttons = (
        ("accept", "Accept", "a"), ("reject", "Reject", "r"), ("edit", "Edit step", "e"),
        ("remove", "Delete or restore step", "d"), ("insert", "New step", "n"), ("back", "Back", "b"),
        ("skip", "Skip", "s"),
    )  # fmt: skip
    row = "".join(f'<button type="button" id="{name}">{text} <kbd>{key}</kbd></button>' for name, text, key in buttons)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Review of reasoning chains</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header><h1>Review</h1><progress id="progress" value="0" max="1"></progress>
<span class="quiet" id="count"></span></header>
<p id="done">Every chain of the queue is decided. Stop the command with Ctrl-C; it writes the output.
Back <kbd>b</kbd> shows the first chain again.</p>
<div id="work">
<p><span class="grade">Grade <span id="grade"></span></span> <span class="quiet"><span id="why"></span> ·
<span id="id"></span></span> <span class="decided" id="decision"></span></p>
<div id="media"></div>
<p id="question"></p>
<p class="answers"><span class="quiet">correct</span> <b id="answer"></b> <span class="quiet">· given</span>
<b id="given"></b><span class="quiet" id="sure"></span></p>
<ol id="steps"></ol>
<p class="quiet" id="length"></p>
<p id="message" role="alert"></p>
<div class="buttons">{row}</div>
<p class="quiet"><kbd>↑</kbd> <kbd>↓</kbd> choose a step; while editing, <kbd>Esc</kbd> leaves the step and
<kbd>Ctrl</kbd> <kbd>Enter</kbd> accepts the chain. Every decision is on disk at once.</p>
</div>
</main>
<script nonce="{nonce}">{_SCRIPT}</script>
</body>
</html>
"""
