"""The HTML report in a real browser: what a person would see, measured in the rendered page."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hand_made
import pytest

from comet_compile.report import Report, advice_for

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on this machine")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=2000",
]
DARK = "--blink-settings=preferredColorScheme=0"

# Added to a copy of the page: measures the layout and leaves the numbers in an attribute.
PROBE = """<script>
const page = document.documentElement;
const outside = [...document.querySelectorAll('g.node')].filter(node => {
  const box = node.querySelector('rect').getBBox();
  return [...node.querySelectorAll('text')].some(text => {
    const b = text.getBBox();
    return b.x < box.x || b.x + b.width > box.x + box.width || b.y + b.height > box.y + box.height;
  });
});
page.dataset.probe = JSON.stringify({
  overflow: page.scrollWidth - page.clientWidth,
  hacked: 'hacked' in window,
  textOutsideBox: outside.map(node => node.textContent),
  widths: [...document.querySelectorAll('svg.picture')].map(e => e.getBoundingClientRect().width),
  overflows: [...document.querySelectorAll('.scroll')].map(e => getComputedStyle(e).overflowX),
  background: getComputedStyle(document.body).backgroundColor,
  arrow: getComputedStyle(document.querySelector('.links path')).markerEnd,
  requests: performance.getEntriesByType('resource').map(entry => entry.name),
});
</script></body>"""


class Page(HTMLParser):
    """The elements of a rendered page that the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.targets: set[str] = set()
        self.nodes_per_picture: list[int] = []
        self.probe: dict[str, Any] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        classes = values.get("class", "").split()
        self.tags.append(tag)
        self.ids.add(values.get("id", ""))
        if values.get("href", "").startswith("#"):
            self.targets.add(values["href"][1:])
        if tag == "svg" and "picture" in classes:
            self.nodes_per_picture.append(0)
        if tag == "g" and "node" in classes:
            self.nodes_per_picture[-1] += 1
        if "data-probe" in values:
            self.probe = json.loads(values["data-probe"])

    def handle_data(self, data: str) -> None:
        self.text += data


def chromium(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CHROMIUM or "", *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )


def render(report: Report, tmp_path: Path, *flags: str, width: int = 1360) -> Page:
    """Return the page as the browser built it, with what the probe measured."""
    path = tmp_path / "report.html"
    report.to_html(path)
    source = path.read_text(encoding="utf-8")
    assert source.count("</body>") == 1
    path.write_text(source.replace("</body>", PROBE), encoding="utf-8")
    done = chromium(tmp_path, f"--window-size={width},1200", *flags, "--dump-dom", path.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    page = Page()
    page.feed(done.stdout)
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The hand-made report at desktop width in the light scheme."""
    return render(hand_made.report(), tmp_path_factory.mktemp("page"))


def test_page_shows_every_region_its_source_line_and_what_to_change(page: Page) -> None:
    report = hand_made.report()
    for region in report.regions:
        assert region.name in page.text
        assert region.where in page.text
        assert region.detail in page.text
    assert advice_for("dynamic_splits") in page.text
    assert report.summary() in page.text
    for graph in report.graphs:
        assert graph.before_text in page.text
        assert graph.after_text in page.text
    assert len(page.targets) == len(report.regions)
    assert page.targets <= page.ids


def test_page_draws_every_picture_with_all_its_boxes(page: Page) -> None:
    report = hand_made.report()
    pictures = [p for r in report.regions for p in (r.before, r.after) if p is not None]
    assert page.nodes_per_picture == [len(picture.nodes) for picture in pictures]
    assert min(page.probe["widths"]) > 50
    assert page.probe["textOutsideBox"] == []
    assert "arrow" in page.probe["arrow"]


def test_page_runs_nothing_and_loads_nothing(page: Page) -> None:
    assert page.tags.count("script") == 1  # the probe
    assert page.probe["hacked"] is False
    assert hand_made.SCRIPT in page.text
    assert page.probe["requests"] == []


@pytest.mark.parametrize("width", [1360, 520])  # two columns, one column
def test_page_scrolls_its_pictures_and_not_itself(tmp_path: Path, width: int) -> None:
    probe = render(hand_made.report(), tmp_path, width=width).probe
    assert probe["overflow"] == 0
    assert set(probe["overflows"]) == {"auto"}


def test_page_follows_the_colour_scheme(page: Page, tmp_path: Path) -> None:
    light = page.probe["background"]
    dark = render(hand_made.report(), tmp_path, DARK).probe["background"]
    brightness = [
        sum(map(int, c.removeprefix("rgb(").rstrip(")").split(","))) for c in (light, dark)
    ]
    assert brightness[0] > 3 * 200
    assert brightness[1] < 3 * 60


def test_page_can_be_photographed(tmp_path: Path) -> None:
    hand_made.report().to_html(tmp_path / "report.html")
    shot = tmp_path / "report.png"
    uri = (tmp_path / "report.html").as_uri()
    chromium(tmp_path, "--window-size=1360,1800", f"--screenshot={shot}", uri)
    image = shot.read_bytes()
    assert image.startswith(b"\x89PNG")
    # a page without pictures and text compresses to a few kilobytes
    assert len(image) > 50_000
