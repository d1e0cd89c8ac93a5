"""The style sheet of the pages: light and dark, wide and narrow, without scripts and files."""

# The width of a page below which tables become cards and columns stand one below the other.
NARROW = "700px"

_COLOURS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --muted: #5b6570; --line: #d7dce1; --kept: #2c6fae;
  --removed: #cfe0ef; --box: #f5f7f9; --mark: #b4530a; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --ink: #e6e9ec; --muted: #a0abb5; --line: #3a4249;
  --kept: #6aaee6; --removed: #2b3f50; --box: #1d2226; --mark: #e8a15c; } }
"""

_PAGE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.5rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .25rem; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.25rem; line-height: 1.3; }
p { margin: .5rem 0; max-width: 44rem; }
.muted, figcaption, footer { color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
.tiles div { background: var(--box); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.tiles dt { color: var(--muted); font-size: .875rem; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.tiles dd + dd { font-size: .875rem; font-weight: 400; }
.tiles .meter { height: .375rem; margin-top: .5rem; border-radius: .25rem; background: var(--removed);
  overflow: hidden; }
.tiles .meter span { display: block; height: 100%; background: var(--kept); }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--kept); }
table { border-collapse: collapse; width: 100%; overflow-wrap: normal; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; padding-left: 0; font-weight: 400; }
thead th { color: var(--muted); font-weight: 400; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem; align-items: start; }
* + .plots, .plots + p { margin-top: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; }
figure h3 { margin: 0 0 .5rem; font-size: 1rem; }
figcaption { font-size: .875rem; margin-top: .5rem; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
.sample { border: 1px solid var(--line); border-radius: .5rem; margin: 0 0 1rem; overflow: hidden; }
.sample .prompt { margin: 0; max-width: none; padding: .6rem 1rem; background: var(--box); font-weight: 600;
  border-bottom: 1px solid var(--line); white-space: pre-wrap; }
.texts { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); }
.texts div { padding: .6rem 1rem; }
.texts div + div { border-left: 1px solid var(--line); }
.texts h3 { margin: 0; font-size: .875rem; font-weight: 400; color: var(--muted); }
.texts p { margin: .25rem 0 0; white-space: pre-wrap; }
.recipe { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .35rem 1.25rem; margin: 0; }
.recipe dt { color: var(--muted); }
.recipe dd { margin: 0; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .75rem; font-size: .875rem; }
"""

_NARROW = f"""
@media (max-width: {NARROW}) {{ body {{ padding: 1.25rem 1rem; }} h1 {{ font-size: 1.4rem; }}
  .tiles {{ grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; }} .tiles div {{ padding: .6rem .75rem; }}
  .tiles dd {{ font-size: 1.2rem; }} .plots {{ grid-template-columns: minmax(0, 1fr); }} figure {{ padding: .75rem; }}
  .texts {{ grid-auto-flow: row; }} .texts div + div {{ border-left: 0; border-top: 1px solid var(--line); }}
  .recipe {{ grid-template-columns: minmax(0, 1fr); gap: 0; }} .recipe dd {{ margin-bottom: .6rem; }}
  th, td {{ padding: .4rem .3rem; font-size: .8125rem; }} tbody th, td {{ white-space: normal; }} }}
"""

CSS = _COLOURS + _PAGE + _NARROW
