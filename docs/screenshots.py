"""Screenshots of the pages, for docs/pages.md and docs/preferences.md, by Playwright and the system's Chromium:

    python benchmarks/quickstart.py --seeds 0 1 2
    python docs/screenshots.py runs/quickstart-seeds/seed0 runs/quickstart-seeds/seed1 runs/quickstart-seeds/seed2

docs/images/report.png    the report of the first run
docs/images/compare.png   the comparison of all
docs/images/board.png     the board of their folder
docs/images/studio.png    the film of a group in the studio of the first run
docs/images/label.png     the label page with pictures of the built-in model; without runs, this one alone
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

OUT = Path("docs/images")
WIDTH = 1100
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def served(*command: str) -> Iterator[str]:
    """Run a command of progrpo that serves a page; its address."""
    with subprocess.Popen([sys.executable, "-m", "progrpo", *command], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if address := re.search(r"http://\S+", line):
                    yield address[0]
                    return
            raise SystemExit(f"progrpo {' '.join(command)} has named no address")
        finally:
            process.terminate()


def shoot(page: Page, name: str, height: int) -> None:
    """Save the upper part of a page with few colours, as small as a document wants it."""
    page.wait_for_timeout(1500)  # charts and pictures
    file = OUT / f"{name}.png"
    page.screenshot(path=file, clip={"x": 0, "y": 0, "width": WIDTH, "height": height}, full_page=True)
    Image.open(file).convert("RGB").quantize(192).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size // 1000} kB")


def opened(browser: Browser, address: str) -> Page:
    page = browser.new_page(viewport={"width": WIDTH, "height": 1400})
    page.goto(address)
    return page


def studio(browser: Browser, run: Path) -> None:
    with served("studio", str(run), "--port", "0") as address:
        page = opened(browser, address)
        page.get_by_role("tab", name="Film of a group").click()
        page.get_by_role("button", name="Show the group").click()
        page.wait_for_selector("iframe[title='film of a group']", timeout=60_000)
        shoot(page, "studio", 1150)


def label(browser: Browser, folder: Path) -> None:
    prompts = ("a large red circle", "two blue squares", "a green triangle above a yellow circle")
    words = ["sample", "shapes-flow", "--prompt", *prompts, "--count", "6", "--seed", "3", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "progrpo", *words], check=True, stdout=subprocess.DEVNULL)
    with served("label", str(folder), "--annotator", "ann", "--port", "0") as address:
        page = opened(browser, address)
        page.wait_for_selector("#ask:not([hidden])")
        for key in "ababtabatbba":
            page.keyboard.press(key)
            page.wait_for_timeout(2000)  # a person's speed, which the page shows
        shoot(page, "label", 760)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    runs = parser.parse_args().runs
    chromium = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if chromium is None:
        raise SystemExit(f"no browser is installed; install one of {', '.join(BROWSERS)}")
    progrpo = [sys.executable, "-m", "progrpo"]
    with sync_playwright() as playwright, TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        label(browser, Path(folder) / "pictures")
        if not runs:
            return
        subprocess.run([*progrpo, "report", str(runs[0])], check=True)
        shoot(opened(browser, (runs[0] / "report.html").resolve().as_uri()), "report", 1250)
        compared = Path(folder) / "compare.html"
        subprocess.run([*progrpo, "compare", *map(str, runs), "--out", str(compared)], check=True)
        shoot(opened(browser, compared.as_uri()), "compare", 1250)
        with served("board", str(runs[0].parent), "--port", "0") as address:
            shoot(opened(browser, address), "board", 500)
        studio(browser, runs[0])


if __name__ == "__main__":
    main()
