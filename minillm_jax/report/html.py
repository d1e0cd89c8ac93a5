"""report.html: one self-contained page, without scripts and without anything from elsewhere."""

from collections.abc import Sequence
from html import escape

from minillm_jax.report.plots import Picture
from minillm_jax.report.summary import FORMAT_WORDS, Figures, Row, advice, amount, printable, recipe, rows, short_name

NO_PICTURES = "There are no pictures because matplotlib is not installed; pip install minillm-jax[report] brings it."
ON_THE_WAY = (
    "The criterion obs chooses the groups while it removes them, so there are no scores to show a distribution of."
)

_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --muted: #5b6570; --line: #d7dce1; --kept: #2c6fae;
  --gone: #cfe0ef; --box: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --ink: #e6e9ec; --muted: #a0abb5; --line: #3a4249;
  --kept: #6aaee6; --gone: #2b3f50; --box: #1d2226; } }
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
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem; align-items: start; }
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
  .pictures { grid-template-columns: minmax(0, 1fr); } figure { padding: .75rem; }
  .recipe { grid-template-columns: minmax(0, 1fr); gap: 0; } .recipe dd { margin-bottom: .6rem; }
  th, td { padding: .4rem .3rem; font-size: .8125rem; } tbody th { white-space: normal; } }
"""


def page(figures: Figures, pictures: Sequence[Picture] | None) -> str:
    """The page of a finished job.

    Args:
      figures: `figures.result_json`.
      pictures: `pictures.draw` of it; None where they could not be drawn.
    """
    name = text(short_name(figures["base_model"]))
    title = f"{name}, pruned {text(amount(figures['settings']['budget']))}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="muted">Format {text(figures["format"])}: {text(FORMAT_WORDS[figures["format"]])}.</p>
{_tiles(figures)}
</header>
<main>
<h2>Before and after</h2>
{_table(figures)}
<h2>Pictures</h2>
{_pictures(figures, pictures)}
<h2>Recipe</h2>
{_recipe(figures)}
</main>
<footer>{_foot(figures)}</footer>
</body>
</html>
"""


def text(value: object) -> str:
    """Anything as text of the page: no markup in it is read as such."""
    return escape(printable(str(value))).replace(" %", "&nbsp;%")


def _tiles(figures: Figures) -> str:
    """What matters most, large."""
    wanted = ("parameters", "MACs", "memory", "perplexity")
    found = {
        word: row for row in rows(figures) for word in wanted if row.name.split(" for ")[0].split(" with ")[0] == word
    }
    return f'<dl class="tiles">{"".join(_tile(word, found[word]) for word in wanted if word in found)}</dl>'


def _tile(word: str, row: Row) -> str:
    return f'<div><dt>{word}</dt><dd>{row.change}</dd><dd class="muted">{row.before} → {row.after}</dd></div>'


def _table(figures: Figures) -> str:
    head = "".join(f'<th scope="col">{word}</th>' for word in ("", "before", "after", "change"))
    body = "".join(
        f'<tr><th scope="row">{text(row.name)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in row[1:]) + "</tr>\n"
        for row in rows(figures)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _pictures(figures: Figures, pictures: Sequence[Picture] | None) -> str:
    if pictures is None:
        return f"<p>{text(NO_PICTURES)}</p>"
    drawn = "\n".join(
        f"<figure><h3>{text(one.title)}</h3>\n{one.svg}\n<figcaption>{text(one.words)}.</figcaption></figure>"
        for one in pictures
    )
    on_the_way = figures["groups"] and figures["settings"]["scoring"]["criterion"] == "obs"
    note = f"<p>{text(ON_THE_WAY)}</p>" if on_the_way else ""
    return f'<div class="pictures">\n{drawn}\n</div>{note}'


def _recipe(figures: Figures) -> str:
    pairs = [("base model", short_name(figures["base_model"])), *recipe(figures)]
    return f'<dl class="recipe">{"".join(f"<dt>{text(a)}</dt><dd>{text(b)}</dd>" for a, b in pairs)}</dl>'


def _foot(figures: Figures) -> str:
    """How long it took, and with what."""
    stages = ", ".join(f"{stage} {seconds:,.1f}" for stage, seconds in figures["seconds"].items())
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    parts = [advice(figures), f"Seconds: {stages}.", f"Versions: {versions}."]
    parts.append("MACs are multiply-accumulates of one forward pass, memory is that of weights, keys and values.")
    parts.append("All figures are in report.json; what was kept is in pruning.json.")
    return "".join(f"<p>{text(part)}</p>" for part in parts if part)
