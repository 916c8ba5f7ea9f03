"""The page of a run in a real browser: skipped where playwright or Chromium is not installed."""

from pathlib import Path

import pytest
from jinja2 import Environment, PackageLoader
from typer.testing import CliRunner

import drawn
from browser import chromium
from refilled.cli.app import app
from refilled.report.teachers import teacher_rows

COMPLETE = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A student of 30 classes with long names, in two stages, and a readout."""
    root = tmp_path_factory.mktemp("data")
    names = [f"<img src=x onerror=alert({number})> {'long' * 12} 文字" for number in range(30)]
    drawn.folder(root, dict.fromkeys(names, 8), size=12, tinted=True)
    found = []
    for words in ("--student wrn_10_1 --epochs 2", "--method nearest_neighbour"):
        folder = tmp_path_factory.mktemp("runs") / "run"
        words = f"--teacher refilled/letters --threads 1 --quiet {words} --out {folder}"
        result = CliRunner().invoke(app, ["distill", str(root), *words.split()])
        assert result.exit_code == 0, result.output
        assert "warning" not in result.output
        found.append(folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_is_whole_fits_and_asks_for_nothing(folders, width, scheme):
    with chromium() as browser:
        for folder in folders:
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            complaints, requests = [], []
            page.on("console", lambda message, to=complaints: to.append(message.text))
            page.on("pageerror", lambda error, to=complaints: to.append(str(error)))
            page.on("dialog", lambda dialog, to=complaints: to.append(dialog.message))
            page.on("request", lambda request, to=requests: to.append(request.url))
            address = (folder / "report.html").as_uri()
            page.goto(address)
            page.wait_for_function(COMPLETE)
            assert page.locator(".drawing svg g").count() > 0
            assert page.locator(".panels svg").count() == (3 if (folder / "model.json").exists() else 1)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.body.scrollWidth") <= width
            assert not complaints
            assert not [url for url in requests if url != address and not url.startswith("data:")]
            page.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
def test_a_wide_table_scrolls_in_its_own_box(tmp_path, width):
    names = [f"/home/somebody/teachers/{'a_long_name_' * 8}{n}" for n in (1, 2)]
    about = {"label_information": 0.3, "ignored": False, "weight": 0.5, "terms": ["regression", "local_kd"]}
    rows = teacher_rows([{"name": name, **about} for name in names], [{"regression": 0.1, "local_kd": 0.2}])
    environment = Environment(loader=PackageLoader("refilled.report"), autoescape=True)
    empty = {"pictures": {}, "worst": [], "notes": [], "data": [["class"], ["a"]], "provenance": {"command": "x" * 300}}
    text = environment.get_template("report.html").render(
        title="wide", sentences=["y" * 300], tables={"What each teacher brought": rows}, **empty
    )
    (tmp_path / "page.html").write_text(text)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto((tmp_path / "page.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator(".scroll").first
        assert box.evaluate("box => box.scrollWidth > box.clientWidth && box.clientWidth < innerWidth")
        assert box.evaluate("box => { box.scrollLeft = 50; return box.scrollLeft }") == 50
