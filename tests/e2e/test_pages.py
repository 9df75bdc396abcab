"""Pages in a browser: nothing fails, controls work, and they can be read in the dark, on paper and on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from progrpo.pages.board.server import BoardServer
from progrpo.pages.compare import compare, write_comparison
from progrpo.pages.report import write_report
from progrpo.pages.serving import listening
from tests.support.run_folders import written_run

WORD = """"><b>bold</b> 'q' `x` </script><script>alert(1)</script> \u05e9\u05dc\u05d5\u05dd \U0001f98a &amp; $&"""


@contextmanager
def report(folder: Path) -> Iterator[str]:
    yield write_report(written_run(folder / "run", WORD, members=12).path).as_uri()


@contextmanager
def comparison(folder: Path) -> Iterator[str]:
    runs = [written_run(folder / name, WORD) for name in ("a", "b")]
    runs[1].config.write({**runs[1].config.read(), "iterations": f"another {WORD}"})
    yield write_comparison(compare([run.path for run in runs]), folder / "compare.html").as_uri()


@contextmanager
def board(folder: Path) -> Iterator[str]:
    for name in ("a", "b & <i>c</i>"):
        written_run(folder / name, WORD)
    with listening(BoardServer, folder, "127.0.0.1", 0) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


PAGES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "report": report,
    "comparison": comparison,
    "board": board,
}
"""The address of each page, full of WORD, of runs in a folder."""


@pytest.fixture(scope="module", params=PAGES)
def opened(request: Any, browser: Any, tmp_path_factory: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page that is loaded once, and what has gone wrong in it so far."""
    with PAGES[request.param](tmp_path_factory.mktemp(request.param)) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        wrong: list[str] = []

        def refused(dialog: Any) -> None:
            wrong.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        own = ("file:", "data:", address if address.startswith("http") else "file:")
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", refused)
        page.on("request", lambda asked: None if asked.url.startswith(own) else wrong.append(asked.url))
        page.goto(address)
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


def becomes(page: Any, selector: str, name: str, low: float, high: float) -> None:
    """Wait until the mean of red, green and blue of an element's colour is in a range: charts are drawn anew."""
    page.wait_for_function(
        """([selector, name, low, high]) => {
            const element = document.querySelector(selector);
            const parts = element && getComputedStyle(element).getPropertyValue(name).match(/[0-9.]+/g);
            const mean = parts && parts.slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3;
            return parts && low <= mean && mean <= high;
        }""",
        arg=[selector, name, low, high],
    )


def hidden(page: Any, selector: str) -> bool:
    return not any(element.is_visible() for element in page.locator(selector).all())


def too_wide(page: Any) -> list[str]:
    """The charts that are wider than their cards."""
    wider = "(c) => c.querySelector('.main-svg').getBoundingClientRect().width > c.parentElement.clientWidth"
    return [chart.get_attribute("id") for chart in page.locator(".chart").all() if chart.evaluate(wider)]


def has_charts(page: Any) -> bool:
    return bool(page.locator(".chart").count())


def test_texts_of_strangers_are_shown_as_they_are(page: Any) -> None:
    draw_all(page)
    page.get_by_text(WORD).first.wait_for()
    assert page.locator("b", has_text="bold").filter(has_not_text="alert").count() == 0
    kinds = page.locator("#kinds")
    assert not kinds.count() or WORD in kinds.evaluate("(chart) => chart.textContent")


def test_charts_and_text_follow_the_colour_scheme(page: Any) -> None:
    draw_all(page)
    light, dark = ((255, 255), (0, 139), (195, 254)), ((0, 39), (131, 255), (1, 99))
    for scheme, (paper, ink, grid) in (("light", light), ("dark", dark), ("light", light)):
        page.emulate_media(color_scheme=scheme)
        becomes(page, "html", "background-color", *paper)
        becomes(page, "h1", "color", *ink)
        if has_charts(page):
            becomes(page, ".xtick text", "fill", *ink)
            # the grid can be seen, and does not stand out
            becomes(page, ".chart .ygrid", "stroke", *grid)


def test_on_paper_it_is_light_and_whole_and_without_controls(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.evaluate("addEventListener('beforeprint', () => { window.printed = true })")
    assert page.pdf().startswith(b"%PDF") and page.evaluate("window.printed")
    assert not page.evaluate("document.documentElement.classList.contains('paper')")  # it is over
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    becomes(page, "html", "background-color", 255, 255)
    becomes(page, ".xtick text" if has_charts(page) else "h1", "fill" if has_charts(page) else "color", 0, 139)
    assert hidden(page, "button, select, nav") and not too_wide(page)
    assert page.locator(".chart").count() == page.locator(".chart .main-svg:first-child").count()
    page.evaluate("dispatchEvent(new Event('afterprint'))")


def test_a_phone_shows_all_without_scrolling_sideways(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert not too_wide(page)


def controls_of_a_report(page: Any) -> None:
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


def controls_of_a_comparison(page: Any) -> None:
    for name in ("seconds", "nfe", "iteration"):
        page.locator(f"[data-axis={name}]").click()
        assert page.locator("[data-axis][aria-pressed=true]").get_attribute("data-axis") == name


def controls_of_a_board(page: Any) -> None:
    rows = page.locator("#runs tr")
    rows.nth(1).wait_for()
    page.locator("#find").fill("<i>c")
    assert [row.locator("a").inner_text() for row in rows.all() if row.is_visible()] == ["b & <i>c</i>"]
    page.locator("#find").fill("")
    for box in page.locator("#runs input[type=checkbox]").all():
        assert page.locator("#compare").is_disabled()
        box.check()
    page.locator("#compare").click()
    page.get_by_text("progrpo comparison").first.wait_for()
    page.go_back()
    rows.first.locator("a").first.click()
    page.get_by_text("progrpo run report").first.wait_for()
    page.go_back()
    rows.first.wait_for()


CONTROLS = {"report": controls_of_a_report, "comparison": controls_of_a_comparison, "board": controls_of_a_board}


def test_controls_work(page: Any, request: Any) -> None:
    CONTROLS[request.node.callspec.params["opened"]](page)
