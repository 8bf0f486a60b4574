"""How the status page looks: two colour schemes, one column on a phone, two on a desk."""

STYLE = """
:root { color-scheme: light dark; --page: #f4f6f8; --card: #ffffff; --ink: #16202b; --dim: #566272;
  --line: #dde3e9; --soft: #edf1f5; --accent: #0b63b6; --on-accent: #ffffff; --good: #17714a; --warn: #8a5a00;
  --bad: #b3271e; --notice: #eaf3fc; --good-soft: #e2f3ea; --warn-soft: #fbf0d9; --bad-soft: #fbe6e4; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1217; --card: #161c23; --ink: #e7ebf0; --dim: #9eabb9;
  --line: #2a333d; --soft: #212932; --accent: #74b6f7; --on-accent: #0b1a29; --good: #58c796; --warn: #e9b44c;
  --bad: #ff8f86; --notice: #142536; --good-soft: #14291f; --warn-soft: #2d2512; --bad-soft: #351b19; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
main { max-width: 70rem; margin: 0 auto; padding: 1.75rem 1.25rem 3rem; }
header { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: flex-start; margin-bottom: 1.5rem; }
header > :first-child { flex: 1 1 16rem; }
h1 { font-size: 1.65rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .2rem; }
h2 { font-size: .95rem; font-weight: 650; margin: 0 0 .8rem; }
h3 { font-size: .85rem; font-weight: 600; color: var(--dim); margin: 1.4rem 0 .6rem; }
p { margin: 0 0 .6rem; } p:last-child { margin-bottom: 0; }
small, .dim { color: var(--dim); font-size: .85rem; }
a { color: var(--accent); }
.pills { display: flex; gap: .4rem; flex-wrap: wrap; padding-top: .3rem; }
.pill { display: inline-block; white-space: nowrap; border-radius: 1rem; padding: .1rem .65rem; font-size: .82rem;
  font-weight: 600; background: var(--soft); color: var(--dim); }
.big + .pill { margin-bottom: .5rem; }
.pill.good { background: var(--good-soft); color: var(--good); }
.pill.warn { background: var(--warn-soft); color: var(--warn); }
.pill.bad { background: var(--bad-soft); color: var(--bad); }
.pill.accent { background: var(--notice); color: var(--accent); }
.grid { display: grid; gap: 0 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
section, .note { background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
  padding: 1.1rem 1.25rem 1.2rem; margin-bottom: 1rem; min-width: 0; }
.note { padding: .8rem 1.25rem; } .note.accent { background: var(--notice); border-color: transparent; }
.note.warn { background: var(--warn-soft); border-color: transparent; }
.note.bad { background: var(--bad-soft); border-color: transparent; }
section.wants { border-color: var(--accent); border-top-width: 3px; padding-bottom: 1.3rem; }
section.wants h2 { font-size: 1.2rem; letter-spacing: -.01em; margin-bottom: .3rem; }
.big { font-size: 1.9rem; line-height: 1.15; font-weight: 650; letter-spacing: -.02em; margin-bottom: .3rem; }
.big small { font-weight: 400; letter-spacing: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.5rem, 1fr)); gap: .9rem 1.25rem;
  margin: 0 0 .4rem; }
.figures.close { grid-template-columns: repeat(3, 1fr); gap: .6rem; }
.figures dt, .rows dt { color: var(--dim); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.2rem; font-weight: 600; line-height: 1.3; }
.figures dd.none { font-size: .95rem; font-weight: 400; color: var(--dim); padding-top: .2rem; }
.figures dd small { display: block; font-weight: 400; }
.rows { margin: .7rem 0 0; }
.rows > div { display: flex; justify-content: space-between; gap: 1rem; padding: .38rem 0;
  border-top: 1px solid var(--line); } .rows > div:first-child { border-top: 0; }
.rows dt { flex: none; } .rows dd { margin: 0; text-align: right; }
svg { display: block; width: 100%; height: .6rem; border-radius: .3rem; overflow: hidden; margin: .5rem 0; }
.track { fill: var(--soft); } .fill { fill: var(--accent); } .fill.warn { fill: var(--warn); }
.fill.bad { fill: var(--bad); } .mark { fill: var(--ink); }
.fill.gain { fill: var(--accent); } .fill.loss { fill: var(--warn); }
.change { display: grid; grid-template-columns: minmax(5rem, 10rem) 1fr 8.6rem 4rem; gap: .1rem .9rem;
  align-items: center; max-width: 56rem; }
.change svg { height: .8rem; border-radius: .15rem; margin: .28rem 0; }
.change span { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.change .number { text-align: right; } .change .head { color: var(--dim); font-size: .8rem; }
.change .ends { display: flex; justify-content: space-between; }
form { display: flex; gap: .6rem; flex-wrap: wrap; margin-top: 1.1rem; }
button { font: inherit; font-weight: 600; min-height: 2.6rem; padding: .4rem 1.15rem; border-radius: .5rem;
  border: 1px solid var(--line); background: var(--card); color: var(--ink); cursor: pointer; }
button:hover { border-color: var(--accent); } button:focus-visible { outline: 3px solid var(--accent);
  outline-offset: 2px; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { white-space: nowrap; text-align: left; font-size: .82rem; font-weight: 600; color: var(--dim); }
th, td { padding: .45rem 1rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
td:nth-child(2) { white-space: nowrap; } th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
ol { list-style: none; margin: 0; padding: 0; }
li { display: grid; grid-template-columns: 6.8rem 1fr; gap: .1rem 1rem; padding: .65rem 0;
  border-top: 1px solid var(--line); } li:first-child { border-top: 0; padding-top: 0; }
code { font: .85em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { display: flex; flex-wrap: wrap; gap: .8rem 1.5rem; align-items: center; justify-content: space-between;
  color: var(--dim); font-size: .85rem; padding: .4rem .2rem; }
@media (max-width: 36rem) { main { padding: 1.1rem .8rem 2rem; } .minor { display: none; }
  .change { grid-template-columns: 5.5rem 1fr 4rem; column-gap: .6rem; }
  section.wants form button { flex: 1 1 8rem; } li { grid-template-columns: 1fr; }
  section, .note { padding-left: 1rem; padding-right: 1rem; } }
"""
