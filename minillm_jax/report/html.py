"""report.html: one page without scripts, which loads nothing from other files or hosts."""

from collections.abc import Sequence
from html import escape

from minillm_jax.report.plots import Plot
from minillm_jax.report.summary import FORMAT_WORDS, Row, Summary, advice, printable, recipe, rows, short_name
from minillm_jax.report.summary import title as title_of

NO_PLOTS = (
    "The plots are missing because matplotlib is not installed; pip install minillm-jax[report] installs matplotlib."
)
NO_SCORES = "The criterion obs chooses the groups while it removes them, so there is no plot of scores."

_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --muted: #5b6570; --line: #d7dce1; --kept: #2c6fae;
  --removed: #cfe0ef; --box: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --ink: #e6e9ec; --muted: #a0abb5; --line: #3a4249;
  --kept: #6aaee6; --removed: #2b3f50; --box: #1d2226; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.5rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .25rem; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.25rem; }
p { margin: .5rem 0; max-width: 44rem; }
.muted, figcaption, footer { color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
.tiles div { background: var(--box); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.tiles dt { color: var(--muted); font-size: .875rem; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.tiles dd + dd { font-size: .875rem; font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; overflow-wrap: normal; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; padding-left: 0; font-weight: 400; }
thead th { color: var(--muted); font-weight: 400; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem; align-items: start; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; }
figure h3 { margin: 0 0 .5rem; font-size: 1rem; }
figcaption { font-size: .875rem; margin-top: .5rem; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
.recipe { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .35rem 1.25rem; margin: 0; }
.recipe dt { color: var(--muted); }
.recipe dd { margin: 0; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .75rem; font-size: .875rem; }
@media (max-width: 700px) { body { padding: 1.25rem 1rem; } h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); } .tiles dd { font-size: 1.2rem; }
  .plots { grid-template-columns: minmax(0, 1fr); } figure { padding: .75rem; }
  .recipe { grid-template-columns: minmax(0, 1fr); gap: 0; } .recipe dd { margin-bottom: .6rem; }
  th, td { padding: .4rem .3rem; font-size: .8125rem; } tbody th { white-space: normal; } }
"""


def page(summary: Summary, plots: Sequence[Plot] | None) -> str:
    """The page of a finished job.

    Args:
      summary: the result of `summary.result_json`.
      plots: the result of `plots.draw`; None without matplotlib.
    """
    parts = [
        section("Before and after", _table(summary)),
        section("Plots", _plots(summary, plots)),
        section("Recipe", _recipe(summary)),
    ]
    return document(title_of(summary), of_format(summary["format"]), _tiles(summary), parts, _footer(summary))


def of_format(form: str) -> str:
    """The sentence below the title about an output format."""
    return f"Format {form}: {FORMAT_WORDS[form]}."


def document(title: str, lead: str, tiles: str, parts: Sequence[str], footer: str) -> str:
    """A whole page.

    Args:
      title: plain text.
      lead: the sentence below the title, plain text.
      tiles: markup below the title.
      parts: markup of each section.
      footer: markup.
    """
    sections = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<p class="muted">{text(lead)}</p>
{tiles}
</header>
<main>
{sections}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def section(heading: str, body: str) -> str:
    """A heading and its markup."""
    return f"<h2>{text(heading)}</h2>\n{body}"


def text(value: object) -> str:
    """Any value as text of the page: markup characters in it are escaped."""
    return escape(printable(str(value))).replace(" %", "&nbsp;%")


def _tiles(summary: Summary) -> str:
    """The changes of parameters, MACs, memory and perplexity, one tile each."""
    measures = ("parameters", "MACs", "memory", "perplexity")
    tiles = {}
    for row in rows(summary):
        measure = row.name.split(" for ")[0].split(" with ")[0]
        if measure in measures:
            tiles[measure] = _tile(measure, row)
    return f'<dl class="tiles">{"".join(tiles[measure] for measure in measures if measure in tiles)}</dl>'


def _tile(measure: str, row: Row) -> str:
    return f'<div><dt>{measure}</dt><dd>{row.change}</dd><dd class="muted">{row.before} → {row.after}</dd></div>'


def _table(summary: Summary) -> str:
    return table(("", "before", "after", "change"), rows(summary))


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{text(line[0])}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in line[1:]) + "</tr>\n"
        for line in lines
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _plots(summary: Summary, plots: Sequence[Plot] | None) -> str:
    if plots is None:
        return figures(plots)
    without_scores = summary["groups"] and summary["settings"]["scoring"]["criterion"] == "obs"
    note = f"<p>{text(NO_SCORES)}</p>" if without_scores else ""
    return figures(plots) + note


def figures(plots: Sequence[Plot] | None) -> str:
    """Plots with their titles and captions; a sentence without matplotlib."""
    if plots is None:
        return f"<p>{text(NO_PLOTS)}</p>"
    each = "\n".join(
        f"<figure><h3>{text(plot.title)}</h3>\n{plot.svg}\n<figcaption>{text(plot.description)}.</figcaption></figure>"
        for plot in plots
    )
    return f'<div class="plots">\n{each}\n</div>'


def _recipe(summary: Summary) -> str:
    pairs = [("base model", short_name(summary["base_model"])), *recipe(summary)]
    few = f"<p>{text(summary['few_tokens'])}.</p>" if summary["few_tokens"] else ""
    return definitions(pairs) + few


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values as a list."""
    terms = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs)
    return f'<dl class="recipe">{terms}</dl>'


def _footer(summary: Summary) -> str:
    """Advice on the gradient estimate, seconds of each stage, versions, and definitions."""
    stages = ", ".join(f"{stage} {seconds:,.1f}" for stage, seconds in summary["seconds"].items())
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    parts = [advice(summary), f"Seconds: {stages}.", f"Versions: {versions}."]
    parts.append("MACs are the multiply-accumulates of one forward pass. Memory is that of weights, keys and values.")
    parts.append("report.json holds all numbers of this page. pruning.json lists the kept groups.")
    return "".join(f"<p>{text(part)}</p>" for part in parts if part)
