"""How a page looks, and the few lines that show values under the pointer; nothing is loaded from anywhere."""

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --back: #f5f6f8; --card: #fff; --ink: #1d2126; --quiet: #6a717b; --rim: #e2e5ea;
  --grid: #eceef1; --c1: #2f6fc4; --c2: #d1603d; --c3: #2c9c83; --c4: #8a5fc2; --good: #1d7f4e; --bad: #c0362c;
  --busy: #2f6fc4; --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --back: #0f1216; --card: #181c22; --ink: #e6e9ed; --quiet: #949ca7;
  --rim: #282e37; --grid: #232932; --c1: #6aa5f0; --c2: #f0875f; --c3: #4fc3a6; --c4: #b391e8; --good: #4cc38a;
  --bad: #ff7b6e; --busy: #6aa5f0; --warn: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 32px 24px 40px; background: var(--back); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; display: grid; gap: 16px; }
header { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: baseline; padding: 0 2px 4px; }
h1 { margin: 0; font-size: 26px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 14px; font-weight: 600; }
.pill { font-size: 12px; font-weight: 600; padding: 2px 10px; border-radius: 99px; border: 1px solid currentColor;
  position: relative; top: -3px; color: var(--quiet); }
.pill.succeeded { color: var(--good); } .pill.failed { color: var(--bad); }
.pill.running, .pill.pending { color: var(--busy); }
.pill.interrupted, .pill.lost, .pill.cancelled { color: var(--warn); }
.facts { flex-basis: 100%; color: var(--quiet); }
.facts span + span::before { content: "·"; margin: 0 .55em; }
.card { background: var(--card); border: 1px solid var(--rim); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.figures { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); }
.figures .card { padding: 11px 12px 10px; }
.figures dt { color: var(--quiet); font-size: 12px; }
.figures dd { margin: 0; }
.figures .value { font-size: 20px; font-weight: 600; letter-spacing: -.015em;
  font-variant-numeric: tabular-nums; }
.figures .below { color: var(--quiet); font-size: 12px; min-height: 1.45em; }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.charts .wide { grid-column: 1 / -1; }
@media (max-width: 760px) { body { padding: 20px 12px; } .charts { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; position: relative; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: baseline; margin-bottom: 8px; }
figcaption .note { color: var(--quiet); font-size: 12px; }
.legend { margin-left: auto; display: flex; flex-wrap: wrap; gap: 0 14px; color: var(--quiet); font-size: 12px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; vertical-align: middle;
  margin-right: 6px; background: var(--c); }
.legend i.faint { opacity: .35; }
.legend i.dots { width: 7px; height: 7px; border-radius: 50%; }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--quiet); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
.grid { stroke: var(--grid); } .axis { stroke: var(--quiet); opacity: .6; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line.faint { opacity: .3; stroke-width: 1.1; }
.line.dots { stroke-width: 1.4; }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 1; }
.lost { stroke: var(--bad); stroke-width: 1.6; fill: none; }
.restart line { stroke: var(--warn); stroke-dasharray: 3 3; } .restart path { fill: var(--warn); }
.needle { stroke: var(--quiet); stroke-width: 1; pointer-events: none; }
.tip { position: absolute; z-index: 1; pointer-events: none; white-space: pre; padding: 6px 9px; border-radius: 6px;
  background: var(--ink); color: var(--card); font-size: 12px; font-variant-numeric: tabular-nums; }
[hidden] { display: none; }
.failure { border-color: var(--bad); } .failure h2 { color: var(--bad); }
.reason { margin: 4px 0 0; overflow-wrap: anywhere; }
pre { margin: 10px 0 0; padding: 12px; border-radius: 6px; background: var(--back); overflow-x: auto;
  font: 12px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
table { border-collapse: collapse; width: 100%; margin-top: 8px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-top: 1px solid var(--rim); vertical-align: top; }
th { color: var(--quiet); font-weight: 500; font-size: 12px; border-top: 0; white-space: nowrap; }
th:last-child, td:last-child { width: 100%; padding-right: 0; overflow-wrap: anywhere; }
td { white-space: nowrap; } td:last-child { white-space: normal; }
.empty { color: var(--quiet); text-align: center; padding: 40px; }
footer { color: var(--quiet); font-size: 12px; padding: 4px 2px; }
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-hovers]")) {
  const hovers = JSON.parse(svg.dataset.hovers), figure = svg.parentElement;
  if (!hovers.length) continue;
  const tip = document.createElement("div");
  const needle = document.createElementNS("http://www.w3.org/2000/svg", "line");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  needle.setAttribute("class", "needle");
  needle.setAttribute("y1", svg.dataset.top);
  needle.setAttribute("y2", svg.dataset.bottom);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const at = (event.clientX - box.left) / scale;
    const near = hovers.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    needle.setAttribute("x1", near[0]);
    needle.setAttribute("x2", near[0]);
    svg.append(needle);
    tip.textContent = near[1];
    tip.hidden = false;
    const left = near[0] * scale + 12, over = left + tip.offsetWidth > box.width;
    tip.style.left = (over ? near[0] * scale - 12 - tip.offsetWidth : left) + "px";
    tip.style.top = svg.offsetTop + 10 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; needle.remove(); });
}
"""
