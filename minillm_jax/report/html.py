"""Parts of the pages: whole documents, sections, tables, plots. A page loads nothing and has no scripts."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from minillm_jax.report.plots import Plot
from minillm_jax.report.style import CSS
from minillm_jax.report.summary import FORMAT_WORDS, Summary, Tile, printable, with_error

NO_PLOTS = (
    "The plots are missing because matplotlib is not installed; pip install minillm-jax[report] installs matplotlib."
)
STANDARD_ERRORS = (
    "± is the standard error over the windows of the text, as if they were independent. All models read the same "
    "windows, so a ratio of two perplexities is more certain than the two errors suggest."
)

# The models of a sample, in the order of the columns.
_MODELS = ("dense", "pruned", "recovered")


def document(title: str, lead: str, head: str, parts: Iterable[str], footer: str, css: str = "") -> str:
    """A whole page.

    Args:
      title: plain text.
      lead: the sentence below the title, plain text.
      head: markup below it.
      parts: markup of each section; empty ones are left out.
      footer: markup.
      css: further style.
    """
    sections = "\n".join(filter(None, parts))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{CSS}{css}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<p class="muted">{text(lead)}</p>
{head}
</header>
<main>
{sections}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def of_format(form: str) -> str:
    """The sentence below the title about an output format."""
    return f"Format {form}: {FORMAT_WORDS[form]}."


def section(heading: str, body: str) -> str:
    """A heading and its markup; nothing without markup."""
    return f"<h2>{text(heading)}</h2>\n{body}" if body else ""


def text(value: object) -> str:
    """Any value as text of the page: markup characters in it are escaped."""
    return escape(printable(str(value))).replace(" %", "&nbsp;%").replace("± ", "±&nbsp;")


def prose(value: str) -> str:
    """A text of several lines as text of the page, with its line breaks."""
    return "\n".join(text(line) for line in value.splitlines())


def paragraphs(lines: Iterable[str]) -> str:
    """Plain sentences, one paragraph each; empty ones are left out."""
    return "".join(f"<p>{text(line)}</p>" for line in lines if line)


def tiles(shown: Sequence[Tile]) -> str:
    """The numbers that a reader looks for first, one box each."""
    return f'<dl class="tiles">{"".join(map(_tile, shown))}</dl>'


def _tile(tile: Tile) -> str:
    width = None if tile.share is None else min(100 * tile.share, 100)
    meter = (
        "" if width is None else f'<dd class="meter" aria-hidden="true"><span style="width:{width:.1f}%"></span></dd>'
    )
    detail = text(tile.detail).replace(" ±", "&nbsp;±")  # a narrow tile breaks at the arrow
    numbers = f'<dd>{text(tile.value)}</dd><dd class="muted">{detail}</dd>'
    return f"<div><dt>{text(tile.name)}</dt>{numbers}{meter}</div>"


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows. A table wider than the page scrolls in its box."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{text(line[0])}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in line[1:]) + "</tr>\n"
        for line in lines
    )
    box = '<div class="scroll" tabindex="0" role="region" aria-label="table">'
    return f"{box}<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"


def figures(plots: Iterable[Plot | None] | None) -> str:
    """Plots with their titles and captions; a sentence without matplotlib, nothing without a plot."""
    if plots is None:
        return f"<p>{text(NO_PLOTS)}</p>"
    each = "\n".join(
        f"<figure><h3>{text(plot.title)}</h3>\n{plot.svg}\n<figcaption>{text(plot.description)}.</figcaption></figure>"
        for plot in plots
        if plot is not None
    )
    return f'<div class="plots">\n{each}\n</div>' if each else ""


def samples(summary: Summary) -> str:
    """The texts that the models write from the same prompts, side by side; nothing without such texts."""
    return "\n".join(map(_sample, summary.get("samples") or ()))


def _sample(sample: Mapping[str, str]) -> str:
    texts = "".join(f"<div><h3>{name}</h3><p>{prose(sample[name])}</p></div>" for name in _MODELS if name in sample)
    prompt = f'<p class="prompt">{prose(sample["prompt"])}</p>'
    return f'<article class="sample">{prompt}<div class="texts">{texts}</div></article>'


def tasks(summary: Summary, plot: Plot | None) -> str:
    """The metrics of the tasks before and after, as a table and a plot; nothing without tasks."""
    found = summary.get("tasks")
    if not found:
        return ""
    lines = [
        (
            f"{one['task']}, {one['metric']}",
            with_error(one["before"], one.get("before_stderr")),
            with_error(one["after"], one.get("after_stderr")),
            f"{one['after'] - one['before']:+.3f}".replace("-", "−"),
        )
        for one in found
    ]
    return table(("", "before", "after", "change"), lines) + figures([plot])


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values as a list."""
    terms = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs)
    return f'<dl class="recipe">{terms}</dl>'


def footer(summary: Summary, lines: Iterable[str]) -> str:
    """Seconds of each stage and versions, between sentences about the page."""
    stages = ", ".join(f"{stage} {seconds:,.1f}" for stage, seconds in summary["seconds"].items())
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return paragraphs([f"Seconds: {stages}.", f"Versions: {versions}.", *lines])
