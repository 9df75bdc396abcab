"""Pages in a browser: nothing fails, controls work, and they can be read in the dark, on paper and on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from progrpo.pages.report import write_report
from tests.support.browser import chromium
from tests.support.run_folders import written_run

WORD = """"><b>bold</b> 'q' `x` </script><script>alert(1)</script> \u05e9\u05dc\u05d5\u05dd \U0001f98a &amp; $&"""


def report(folder: Path) -> Path:
    return write_report(written_run(folder / "run", WORD, members=12).path)


PAGES: dict[str, Callable[[Path], Path]] = {"report": report}
"""Who writes each page, full of WORD, into a folder."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module", params=PAGES)
def opened(request: Any, browser: Any, tmp_path_factory: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page that is loaded once, and what has gone wrong in it so far."""
    path = PAGES[request.param](tmp_path_factory.mktemp(request.param))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    wrong: list[str] = []

    def refused(dialog: Any) -> None:
        wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", refused)
    page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
    page.goto(path.as_uri())
    yield page, wrong
    page.close()


@pytest.fixture
def page(opened: tuple[Any, list[str]]) -> Iterator[Any]:
    page, wrong = opened
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(media="screen", color_scheme="light")
    yield page
    assert wrong == []


def draw_all(page: Any) -> None:
    """Bring every chart into view, where it is drawn."""
    for chart in page.locator(".chart").all():
        chart.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('.chart')].every((c) => c.querySelector('.main-svg'))")


def brightness(page: Any, selector: str, name: str) -> float:
    """The mean of red, green and blue of an element's colour, from 0 to 255."""
    colour = page.locator(selector).first.evaluate(f"(e) => getComputedStyle(e).getPropertyValue('{name}')")
    return sum(map(float, colour.strip("rgba()").split(",")[:3])) / 3


def hidden(page: Any, selector: str) -> bool:
    return not any(found.is_visible() for found in page.locator(selector).all())


def too_wide(page: Any) -> list[str]:
    """The charts that are wider than their cards."""
    wider = "(c) => c.querySelector('.main-svg').getBoundingClientRect().width > c.parentElement.clientWidth"
    return [chart.get_attribute("id") for chart in page.locator(".chart").all() if chart.evaluate(wider)]


def test_texts_of_strangers_are_shown_as_they_are(page: Any) -> None:
    draw_all(page)
    assert page.locator("h1").inner_text() == WORD
    assert page.locator("b", has_text="bold").filter(has_not_text="alert").count() == 0
    assert WORD in page.locator("#kinds").evaluate("(chart) => chart.textContent")


def test_charts_and_text_follow_the_colour_scheme(page: Any) -> None:
    draw_all(page)
    seen = {}
    for scheme in ("light", "dark", "light"):
        page.emulate_media(color_scheme=scheme)
        seen[scheme] = [brightness(page, "html", "background-color"), brightness(page, ".xtick text", "fill")]
        grid, line = brightness(page, ".chart .ygrid", "stroke"), seen[scheme][0]
        assert 0 < abs(grid - line) < 60  # it can be seen, and does not stand out
    (paper, tick), (dark_paper, dark_tick) = seen["light"], seen["dark"]
    assert paper == 255 and tick < 140
    assert dark_paper < 40 and dark_tick > 130


def test_on_paper_it_is_light_and_whole_and_without_controls(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.evaluate("addEventListener('beforeprint', () => { window.printed = true })")
    assert page.pdf().startswith(b"%PDF") and page.evaluate("window.printed")
    assert not page.evaluate("document.documentElement.classList.contains('paper')")  # it is over
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert brightness(page, "html", "background-color") == 255 and brightness(page, ".xtick text", "fill") < 140
    assert hidden(page, "button, select, nav") and not too_wide(page)
    assert page.locator(".chart").count() == page.locator(".chart .main-svg:first-child").count()
    page.evaluate("dispatchEvent(new Event('afterprint'))")


def test_a_phone_shows_all_without_scrolling_sideways(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert not too_wide(page)


def test_the_controls_of_a_report(page: Any, request: Any) -> None:
    if "report" not in request.node.callspec.id:
        return
    page.locator("[data-axis=seconds]").click()
    page.locator("#curves .chart").first.scroll_into_view_if_needed()
    page.wait_for_selector("#curves .chart .main-svg")
    assert page.locator("#curves .chart").first.evaluate("(chart) => chart.data[0].x") == [1, 2]
    assert page.locator("[data-axis][aria-pressed=true]").inner_text() == "Seconds"
    for button in page.locator("[data-show]").all():
        button.click()
        shown = [pair for pair in page.locator(".pair").all() if pair.is_visible()]
        assert len(shown) == int(button.locator("small").inner_text())
    page.locator("#choose-film").select_option("film-0")
    assert [film.get_attribute("id") for film in page.locator(".film").all() if film.is_visible()] == ["film-0"]
    rows = page.locator("#film-0 tbody tr")
    assert sum(row.is_visible() for row in rows.all()) == 10
    page.locator("#film-0 button.more").click()
    assert sum(row.is_visible() for row in rows.all()) == 12
