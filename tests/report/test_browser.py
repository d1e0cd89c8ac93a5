"""The pages in a browser: nothing is wider than a telephone or a screen, and the rows follow the radio buttons."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from minillm_jax.report import plots, recovery, several
from minillm_jax.report.page import page
from minillm_jax.report.runs import groups_of, read_runs
from tests.report.pages import measured, pruned_report, recovered_report
from tests.report.test_page import ERRORS, GROUPS, RECOVERED, SAMPLES, TASKS, new

WIDTHS = (360, 1280)
LONG = "a-folder-with-a-very-long-name-" * 4

# Loads every page in frames of every width, and writes what it finds into itself. The pages have no scripts.
WRAPPER = """<!doctype html><body><pre id="found"></pre><script>
const found = {}, frames = [];
for (const name of NAMES) for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:800px;border:0`;
  frame.src = name;
  frames.push(new Promise(done => frame.onload = () => {
    const view = frame.contentWindow, root = view.document.documentElement;
    const tops = () => [...view.document.querySelectorAll(".sorted tbody tr")].map(
      row => [row.getBoundingClientRect().top, row.querySelector("th").textContent]).sort((a, b) => a[0] - b[0]);
    const orders = {};
    for (const input of view.document.querySelectorAll(".sort input")) {
      input.checked = true;
      orders[input.className] = tops().map(pair => pair[1]);
    }
    found[`${name} ${width}`] = {inner: view.innerWidth, width: root.scrollWidth, orders};
    done();
  }));
  document.body.append(frame);
}
Promise.all(frames).then(() => document.getElementById("found").textContent = JSON.stringify(found));
</script></body>"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the browser measures of each page at each width."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name)) is not None), None)
    if browser is None:
        pytest.skip("needs Chromium, which is not installed")
    folder = tmp_path_factory.mktemp("pages")
    full = {"samples": SAMPLES, "tasks": TASKS, "layer_errors": ERRORS, "speed": {"before": 900.0, "after": 1080.0}}
    summary = new(base_model=LONG, **full)
    pages = {
        "pruned": page(summary, plots.draw(summary)),
        "recovered": recovery.page(RECOVERED | full | {"groups": GROUPS, "layer_errors_after": ERRORS, "model": LONG}),
    }
    reports = [
        pruned_report(parameters_after=700, perplexity_after=measured(1234567.0)),
        pruned_report(parameters_after=900, perplexity_after=measured(21.0, None), seconds={"prune": 1e5}),
        recovered_report(),
        pruned_report(evaluation="other.txt", perplexity_after=measured(20.0, 1.0, "1")),
    ]
    folders = []
    for number, report in enumerate(reports):
        run = folder / f"{number}-{LONG if number == 2 else 'run'}"
        run.mkdir()
        (run / "report.json").write_text(json.dumps(report))
        folders.append(str(run))
    groups = groups_of(read_runs(folders))
    pages |= {"several": several.page(groups), "one": several.page(groups[:1])}
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)
    names_in_frames = json.dumps([f"{name}.html" for name in pages])
    wrapper = WRAPPER.replace("NAMES", names_in_frames).replace("WIDTHS", json.dumps(WIDTHS))
    (folder / "wrapper.html").write_text(wrapper)
    return measured_by(browser, folder / "wrapper.html", folder / "profile")


def measured_by(browser: str, wrapper: Path, profile: Path) -> dict[str, dict]:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    flags += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([browser, *flags, wrapper.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr
    return json.loads(unescape(match[1]))


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["pruned", "recovered", "several", "one"])
def test_no_page_is_wider_than_its_window(found: dict[str, dict], name: str, width: int) -> None:
    measured_here = found[f"{name}.html {width}"]
    assert measured_here["inner"] == width
    assert measured_here["width"] <= width


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_the_rows_follow_the_radio_buttons(found: dict[str, dict], width: int) -> None:
    """The checkbox comes last, after the button of the seconds."""
    orders = {key: [name[:2] for name in names] for key, names in found[f"one.html {width}"]["orders"].items()}
    assert orders == {
        "by-name": ["0-", "1-", "2-", "ba"],
        "by-parameters": ["0-", "2-", "1-", "ba"],
        "by-memory": ["0-", "1-", "2-", "ba"],
        "by-perplexity": ["ba", "1-", "2-", "0-"],
        "by-ratio": ["ba", "1-", "2-", "0-"],
        "by-seconds": ["0-", "2-", "1-", "ba"],
        "down": ["1-", "2-", "0-", "ba"],
    }
