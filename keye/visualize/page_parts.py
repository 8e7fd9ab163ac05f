"""Style and script of a plan's page."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#212529;--quiet:#5c636a;--line:#dee2e6;--tile:#f8f9fa;
--slow:#d9480f;--fast:#1c7ed6;--rate:#5f3dc4;--warn:#fff3bf;--warn-ink:#5c3c00}
@media(prefers-color-scheme:dark){:root{--paper:#16181b;--ink:#e9ecef;--quiet:#a3abb2;--line:#343a40;--tile:#1f2226;
--slow:#ff8a4c;--fast:#4dabf7;--rate:#9775fa;--warn:#3d3200;--warn-ink:#ffe8a1}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:20px 16px 40px}
h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}
p{margin:0}
.quiet{color:var(--quiet);font-size:.82rem}
.path{overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:8px;margin:16px 0}
.figures div{background:var(--tile);border-radius:8px;padding:8px 12px;display:flex;flex-direction:column-reverse;
justify-content:flex-end;border-top:3px solid var(--line)}
.figures .slow{border-color:var(--slow)}
.figures .fast{border-color:var(--fast)}
.figures dt{font-size:.78rem;color:var(--quiet)}
.figures dd{margin:0;font-size:1.25rem;font-weight:600;font-variant-numeric:tabular-nums}
.warnings{background:var(--warn);color:var(--warn-ink);border-radius:8px;margin:16px 0;padding:10px 12px 10px 30px;
overflow-wrap:anywhere}
.viewer{display:flex;flex-wrap:wrap;gap:16px;align-items:center;margin:16px 0}
.viewer img{height:200px;max-width:100%;object-fit:contain}
#facts{display:grid;grid-template-columns:auto auto;gap:2px 14px;margin:0;font-variant-numeric:tabular-nums}
#facts dt{color:var(--quiet)}
#facts dd{margin:0}
.strip{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(0,180px);gap:4px;margin-bottom:6px}
.strip img{width:100%;height:64px;object-fit:cover;border-bottom:3px solid var(--fast)}
.strip img.slow{border-color:var(--slow)}
.line{position:relative;cursor:crosshair;touch-action:pan-y;border-bottom:1px solid var(--line);user-select:none}
.line:focus-visible,.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--fast);outline-offset:4px}
.line p{margin-top:4px}
svg{display:block;width:100%}
path{vector-effect:non-scaling-stroke;fill:none}
path.slow{fill:var(--slow)}
path.fast{fill:var(--fast)}
path.rate{fill:var(--rate);fill-opacity:.25;stroke:var(--rate);stroke-width:1.2}
path.mean{stroke:var(--rate);stroke-dasharray:1 4}
path.curve{stroke:var(--quiet);stroke-opacity:.6}
path.threshold{stroke:var(--ink);stroke-dasharray:6 4}
path.dots{fill:none;stroke-width:7;stroke-linecap:round}
path.dots.small{stroke-width:3.5}
path.dots.slow{stroke:var(--slow)}
path.dots.fast{stroke:var(--fast)}
.cursor{position:absolute;top:0;bottom:0;background:var(--ink);opacity:.14;pointer-events:none;min-width:2px}
.axis{position:relative;height:1.6em;margin-top:2px;overflow:hidden}
.axis span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.axis span[style="left:0.000%"]{transform:none}
.axis span[style="left:100.000%"]{transform:translateX(-100%)}
.help{margin-bottom:16px}
details{margin-top:16px}
summary{cursor:pointer;font-weight:600;width:max-content}
.scroll{overflow:auto;max-height:420px;border:1px solid var(--line);border-radius:8px;margin-top:8px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:3px 12px;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{position:sticky;top:0;background:var(--tile)}
tbody tr:last-child>*{border-bottom:0}
th[scope=row]{width:1%;font-weight:500}
#frames tbody tr{cursor:pointer}
#frames td:nth-child(3)::before{content:"";display:inline-block;width:9px;height:9px;border-radius:50%;
margin-right:7px;background:var(--fast)}
#frames .slow td:nth-child(3)::before{background:var(--slow)}
#frames tr.here{background:var(--tile);box-shadow:inset 3px 0 var(--ink)}
footer{margin-top:24px}
@media(max-width:560px){.strip img:nth-child(even){display:none}.strip img{height:56px}
.viewer img{height:auto;max-height:240px}th,td{padding:3px 7px}.help{display:none}
.axis span:nth-child(even){display:none}#facts{grid-template-columns:repeat(4,auto)}table{font-size:.85rem}}
@media print{.scroll{max-height:none}.help{display:none}}
"""

SCRIPT = """
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const line = document.getElementById("line"), cursor = document.getElementById("cursor");
const picture = document.getElementById("picture"), facts = document.getElementById("facts");
const strip = document.getElementById("strip"), scroll = document.querySelector("#frames").parentNode;
const rows = [...document.querySelectorAll("#frames tbody tr")];
const heads = ["time", "frame", "type", "similarity", "size", "tokens"];
let here = -1;

const last = (values, limit) => {  // index of the last of ascending values that is at most the limit
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= limit) low = middle + 1; else high = middle;
  }
  return Math.max(0, low - 1);
};

const show = (entry, follow) => {
  entry = Math.max(0, Math.min(rows.length - 1, entry));
  if (entry === here) return;
  if (here >= 0) rows[here].classList.remove("here");
  here = entry;
  const row = rows[entry];
  row.classList.add("here");
  const cells = [...row.children].map(cell => cell.textContent);
  const texts = [cells[0] + " s", ...cells.slice(1)];
  facts.replaceChildren(...heads.flatMap((head, column) => {
    const term = document.createElement("dt"), value = document.createElement("dd");
    term.textContent = head; value.textContent = texts[column];
    return [term, value];
  }));
  if (picture) {
    const place = last(data.at, entry), shown = data.starts[data.at[place]];
    picture.src = data.pictures[place];
    picture.alt = "The picture at " + shown.toFixed(2) + " s";
  }
  const scale = 100 / (data.end - data.start);
  cursor.style.left = (data.starts[entry] - data.start) * scale + "%";
  cursor.style.width = (data.ends[entry] - data.starts[entry]) * scale + "%";
  line.setAttribute("aria-valuenow", entry + 1);
  line.setAttribute("aria-valuetext", heads.map((head, column) => head + " " + texts[column]).join(", "));
  if (follow) {
    const top = row.offsetTop - scroll.clientHeight / 2;
    scroll.scrollTop = Math.max(0, top);
  }
};

const point = event => {
  const box = line.getBoundingClientRect();
  const share = (event.clientX - box.left) / box.width;
  show(last(data.starts, data.start + share * (data.end - data.start)), true);
};
line.addEventListener("pointermove", point);
line.addEventListener("pointerdown", point);

const next = kind => {
  const ahead = rows.findIndex((row, entry) => entry > here && row.classList.contains(kind));
  return ahead < 0 ? rows.findIndex(row => row.classList.contains(kind)) : ahead;
};
line.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = event.shiftKey ? 10 : 1;
  const to = {ArrowRight: here + step, ArrowUp: here + step, ArrowLeft: here - step, ArrowDown: here - step,
    PageUp: here + 10, PageDown: here - 10, Home: 0, End: rows.length - 1}[event.key];
  const kind = {s: "slow", f: "fast"}[event.key.toLowerCase()];
  if (to === undefined && !kind) return;
  event.preventDefault();
  const entry = kind ? next(kind) : to;
  if (entry >= 0 || !kind) show(entry, true);
});
document.querySelector("#frames tbody").addEventListener("click", event => {
  const row = event.target.closest("tr");
  if (row) show(rows.indexOf(row), false);
});
if (strip) for (const place of data.strip) {
  const image = document.createElement("img");
  image.src = data.pictures[place];
  image.className = rows[data.at[place]].className;
  image.alt = "";
  strip.append(image);
}
const address = /^#(\\d+)$/.exec(location.hash);
show(address ? +address[1] - 1 : 0, !!address);
})();
"""
