"""The page in a real browser: skipped where playwright or Chromium is not installed."""

import shutil

import pytest

from browser import chromium


@pytest.mark.slow
def test_a_picture_gives_bars_without_errors_or_external_requests(served, student, pictures, tmp_path):
    hostile = pictures / "<img src=x onerror=alert(1)>" / "03.png"
    picture = tmp_path / "<b onclick=alert(2)>.png"
    shutil.copy(hostile, picture)
    (tmp_path / "text.jpg").write_text("no picture")
    with served(student, "--teacher") as (address, _), chromium() as browser:
        page = browser.new_page(viewport={"width": 400, "height": 800})
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.set_input_files("#choose", str(picture))
        page.wait_for_selector("article progress")
        shown = page.inner_text("article")
        assert "<img src=x onerror=alert(1)>" in shown
        assert "<b onclick=alert(2)>.png" in shown
        assert "Nearest class means of the teacher" in shown
        assert page.locator("article progress").count() == 3
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.locator(".nearest img").count() == 5
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert not complaints
        page.set_input_files("#choose", str(tmp_path / "text.jpg"))
        page.wait_for_selector("article .error")
        assert "not a picture in a known format" in page.inner_text("article .error")
        outside = [url for url in requests if not url.startswith((address, "blob:", "data:"))]
        assert not outside
