"""Pages for the tests: what every page must be, and reports to make pages from."""

import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

HOSTILE = 'a"b: `c`<script src=http://x>|d\n---\n# e & f\u2028\udc80'


class Page(HTMLParser):
    """The tags, attributes, ids and text of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed in the wrong order"

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(text: str, plots: int) -> Page:
    """A page is well nested, loads no file, has no scripts, and has that many plots with title and description."""
    page = Page(text)
    assert page.open == []
    assert page.tags["svg"] == page.tags["figure"] == page.tags["desc"] == plots
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "foreignobject"}
    loads = {"src", "href", "xlink:href", "srcset", "data", "action"}
    assert all(value.startswith("#") for name, value in page.attributes if name in loads and value is not None)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert all(fragment not in text for fragment in ("@import", "url(h", "url(/"))
    assert len(page.ids) == len(set(page.ids))
    referred = {value[1:] for name, value in page.attributes if name in loads and value is not None}
    assert referred | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    return page


def measured(value: float, stderr: float | None = 0.5, fingerprint: str | None = "0123456789abcdef") -> dict[str, Any]:
    """A perplexity as reports hold it."""
    more = {"stderr": stderr, "fingerprint": fingerprint} if fingerprint else {}
    return {"perplexity": value, "tokens": 11811, "window": 128, "windows": 93, "loss": 3.6, **more}


def pruned_report(**changes: Any) -> dict[str, Any]:
    """The report of a pruning, as far as several runs on one page need it."""
    return {
        "base_model": "/home/someone/base",
        "parameters_before": 1000,
        "parameters_after": 800,
        "costs": {"window": 128, "before": {"memory": 4000, "macs": 90}, "after": {"memory": 3000, "macs": 70}},
        "evaluation": "/home/someone/held-out.txt",
        "perplexity_before": measured(20.0),
        "perplexity_after": measured(22.0),
        "seconds": {"load": 1.0, "prune": 2.5},
    } | changes


def recovered_report(**changes: Any) -> dict[str, Any]:
    """The report of a recovery, as far as several runs on one page need it."""
    return {
        "base_model": "/home/someone/base",
        "parameters": 800,
        "parameters_dense": 1000,
        "costs": {"window": 128, "after": {"memory": 3000, "macs": 70}},
        "points": [],
        "evaluation": "/home/someone/held-out.txt",
        "perplexity_teacher": measured(20.0),
        "perplexity_before": measured(22.0),
        "perplexity_after": measured(21.0),
        "seconds": {"train": 10.0},
    } | changes
