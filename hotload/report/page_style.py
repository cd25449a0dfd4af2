"""The style sheet of the cycle report: paper and ink, one accent, dark where the reader's machine
is.
"""

STYLE = """
:root {
  --paper: #fcfbf8; --card: #ffffff; --ink: #1d1f21; --soft: #5c5f62; --faint: #6e7174;
  --line: #e4e1d9; --axis: #b9b5aa; --track: #efece5;
  --main: #1f6f78; --wash: #cfe3e4; --second: #6b8fb5; --third: #b9a46a; --fourth: #8d7aa5;
  --fifth: #a3a7a0; --warn: #b4532a; --warnwash: #f6e3d8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1b1e22; --ink: #e8e6e1; --soft: #a9abad; --faint: #8f9294;
    --line: #2b2f34; --axis: #4a4f55; --track: #24282d;
    --main: #6cb9bf; --wash: #254447; --second: #7fa3ca; --third: #c8b377; --fourth: #a793c0;
    --fifth: #7b8083; --warn: #e2895c; --warnwash: #3d2a20;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; color-scheme: light dark; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans",
    sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 980px; margin: 0 auto; padding: 44px 28px 64px; }
.over {
  margin: 0 0 10px; color: var(--faint); font-size: 12px; letter-spacing: .08em;
  text-transform: uppercase;
}
h1 {
  margin: 0 0 12px; font-size: 34px; line-height: 1.15; font-weight: 600; letter-spacing: -.015em;
  overflow-wrap: anywhere;
}
h1 .of { color: var(--faint); font-weight: 400; }
.lead { margin: 0; max-width: 44em; font-size: 17px; line-height: 1.5; color: var(--soft); }
.lead b { color: var(--ink); font-weight: 600; }
.facts {
  display: grid; grid-template-columns: repeat(6, auto); gap: 18px 26px;
  margin: 34px 0 0; padding: 20px 0 4px; border-top: 1px solid var(--line);
}
.facts div { min-width: 0; }
.facts dt { color: var(--faint); font-size: 12.5px; }
.facts dd {
  margin: 2px 0 0; font-size: 25px; line-height: 1.2; font-weight: 600; letter-spacing: -.01em;
  white-space: nowrap;
}
.facts dd small { font-size: 14px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.facts .sub { color: var(--soft); font-size: 12.5px; }
.facts .warn dd { color: var(--warn); }
dl { margin: 0; }
.grid { display: grid; grid-template-columns: 1fr 1fr; gap: 0 44px; }
section { margin-top: 40px; min-width: 0; }
h2 { margin: 0; font-size: 16px; line-height: 1.3; font-weight: 600; }
.why { margin: 2px 0 14px; color: var(--soft); font-size: 13.5px; }
.chart { display: block; overflow: visible; }
.chart text { font-size: 12px; fill: var(--soft); }
.chart .name { font-size: 13px; fill: var(--ink); }
.chart .value { font-size: 12.5px; fill: var(--soft); }
.chart .tick { font-size: 11px; fill: var(--faint); paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; stroke-linejoin: round; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .axis { stroke: var(--axis); stroke-width: 1; }
.chart .mark { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 3; opacity: .65; }
.chart .track { fill: var(--track); }
.main { fill: var(--main); background: var(--main); }
.wash { fill: var(--wash); background: var(--wash); }
.second { fill: var(--second); background: var(--second); }
.third { fill: var(--third); background: var(--third); }
.fourth { fill: var(--fourth); background: var(--fourth); }
.fifth { fill: var(--fifth); background: var(--fifth); }
.warn-fill { fill: var(--warn); background: var(--warn); }
.chart path { fill: none; stroke-width: 2; }
.chart .main-line { stroke: var(--main); }
.chart .wash-area { fill: var(--wash); stroke: none; }
ul.key { list-style: none; margin: 14px 0 0; padding: 0; font-size: 13.5px; }
ul.key li { display: flex; align-items: baseline; gap: 9px; padding: 3px 0; }
ul.key i { flex: none; width: 10px; height: 10px; border-radius: 2px; align-self: center; }
ul.key .what { min-width: 0; overflow-wrap: anywhere; }
ul.key .much { margin-left: auto; padding-left: 12px; color: var(--soft); white-space: nowrap; }
.inline-key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 0; padding: 0;
  list-style: none; font-size: 12.5px; color: var(--soft); }
.inline-key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 7px; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
td { padding: 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td + td { text-align: right; padding-left: 16px; color: var(--soft); }
tr:last-child td { border-bottom: 0; }
.none { margin: 0; color: var(--soft); font-size: 13.5px; }
article {
  margin-top: 18px; padding: 18px 20px 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px;
}
article header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; }
article h3 { margin: 0; font-size: 14.5px; font-weight: 600; overflow-wrap: anywhere; }
.chip {
  padding: 1px 9px 2px; border-radius: 99px; background: var(--wash); color: var(--ink);
  font-size: 12px; white-space: nowrap;
}
.chip.bad { background: var(--warnwash); color: var(--warn); }
.said { margin-top: 12px; padding-left: 12px; border-left: 2px solid var(--line); }
.said.model { border-left-color: var(--main); }
.said.bad { border-left-color: var(--warn); }
.said b {
  display: block; margin-bottom: 1px; color: var(--faint); font-size: 11.5px; font-weight: 500;
}
.said pre {
  margin: 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
}
.said em { color: var(--faint); font-style: normal; font-size: 12.5px; }
.foot { margin: 12px 0 0; color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere; }
.foot + .chart { margin-top: 12px; }
.notes { margin: 0; padding: 10px 14px; border-radius: 8px; background: var(--warnwash); }
.notes p { margin: 2px 0; font-size: 13.5px; overflow-wrap: anywhere; }
footer {
  margin-top: 48px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--faint);
  font-size: 12.5px;
}
footer td { border: 0; padding: 2px 0; overflow-wrap: anywhere; }
footer td:first-child { white-space: nowrap; padding-right: 18px; }
footer td + td { text-align: left; color: var(--soft); padding-left: 0; width: 100%; }
@media (max-width: 700px) {
  main { padding: 26px 18px 44px; }
  h1 { font-size: 26px; }
  .lead { font-size: 15.5px; }
  .grid { grid-template-columns: minmax(0, 1fr); }
  .facts { grid-template-columns: 1fr 1fr; gap: 16px 18px; margin-top: 24px; }
  .facts dd { font-size: 21px; }
  section { margin-top: 34px; }
  article { padding: 14px 14px 12px; }
}
@media print { body { background: none; } article { break-inside: avoid; } }
"""
