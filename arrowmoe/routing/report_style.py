"""The report's style sheet: one column of calm figures, light or dark as the reader's system is."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1b1d22; --soft: #5b616e; --rule: #e3e4e0; --good: #0f766e;
  --s0: #2563eb; --s1: #d9480f; --s2: #0f8a6d; --s3: #8b3fd1; --s4: #a16207; --s5: #c2255c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131417; --card: #1b1d21; --ink: #e9eaec; --soft: #a0a6b1; --rule: #2e3137; --good: #4fd1b5;
    --s0: #6ea8fe; --s1: #ff9152; --s2: #45cfa8; --s3: #c39bf5; --s4: #e0b341; --s5: #f783ac;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; font-variant-numeric: tabular-nums;
}
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 96px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 4px; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 56px 0 16px; overflow-wrap: anywhere; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0; }
.lead, figcaption p, .note { color: var(--soft); }
figcaption p, .note { font-size: 13.5px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 28px 0 0; }
.tiles div, figure, .panel { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.tiles div { padding: 14px 16px; display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.tiles dt { font-size: 13px; color: var(--soft); }
.tiles dd { margin: 0; font-size: 25px; font-weight: 600; letter-spacing: -0.02em; }
.grid-2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 18px 20px 14px; min-width: 0; }
@media (min-width: 1000px) {
  .grid-2 > figure:last-child:nth-child(odd) {
    grid-column: 1 / -1; display: grid; column-gap: 40px;
    grid-template-columns: 1fr 2fr; grid-template-rows: auto auto 1fr;
  }
  .grid-2 > figure:last-child:nth-child(odd) > svg { grid-column: 2; grid-row: 1 / 4; margin: 0; }
}
.panel { padding: 6px 20px; margin-top: 16px; }
svg { display: block; width: 100%; height: auto; margin-top: 12px; }
svg text { font-size: 11.5px; fill: var(--soft); }
svg .label { font-size: 12px; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .count { font-size: 10.5px; fill: var(--ink); }
svg .count.strong { fill: var(--card); font-weight: 600; }
.grid { stroke: var(--rule); }
.base { stroke: var(--soft); stroke-opacity: 0.6; }
.ideal { stroke: var(--soft); stroke-dasharray: 3 4; fill: none; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); }
.s3 { --c: var(--s3); } .s4 { --c: var(--s4); } .s5 { --c: var(--s5); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 6 4; }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.bar { fill: var(--c); fill-opacity: 0.62; }
.heat { fill: var(--s0); }
.cell { fill: var(--rule); fill-opacity: 0.45; }
.gap { stroke: var(--card); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; margin: 10px 0 0; list-style: none; }
.legend { font-size: 13px; }
.legend i { display: inline-block; width: 14px; border-top: 3px solid var(--c); margin-right: 7px; }
.legend i { vertical-align: 4px; }
.legend i.dashed { border-top-style: dashed; }
details { margin-top: 8px; font-size: 13px; }
summary { color: var(--soft); cursor: pointer; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
details table { font-size: 13px; }
caption { text-align: left; color: var(--soft); font-size: 13px; padding: 8px 0; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-top: 1px solid var(--rule); vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 13px; }
tbody th { font-weight: 500; }
tbody tr:last-child > * { padding-bottom: 12px; }
.prompt { overflow-wrap: anywhere; min-width: 260px; }
.gate { display: flex; align-items: center; gap: 8px; white-space: nowrap; }
.gate svg { width: 64px; height: 8px; margin: 0; flex: none; }
.gate .track { fill: var(--rule); }
.gate .fill { fill: var(--s0); }
.right, .wrong { white-space: nowrap; }
.right { color: var(--good); }
.wrong { color: var(--s1); }
@media print { figure, .tiles div { break-inside: avoid; } }
"""
