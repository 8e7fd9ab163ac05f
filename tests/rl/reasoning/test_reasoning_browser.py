"""The page of the review in a real browser, by keyboard and mouse."""

import os
import shutil
import time

import pytest

from rl.reasoning.review import Decision, Review
from tests.rl.reasoning.graded import HOSTILE, write_graded
from tests.rl.reasoning.test_reasoning_review import running

pytestmark = pytest.mark.slow
BROWSER = os.environ.get("KEYE_TEST_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def tab():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if BROWSER is None:
        pytest.skip("needs a Chromium; KEYE_TEST_BROWSER names one")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.faults = []
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda request: page.faults.append(request.url) if "127.0.0.1" not in request.url
                and not request.url.startswith("data:") else None)  # fmt: skip
        yield page
        browser.close()


def expect(tab, selector, text):
    """Wait until an element has this text; the page forbids scripts that wait."""
    end = time.monotonic() + 20
    while (found := tab.text_content(selector)) != text:
        assert time.monotonic() < end, f"{selector}: {found!r}, not {text!r}"
        time.sleep(0.05)


def test_a_person_reviews_the_queue_with_the_keyboard(tmp_path, tab):
    shots = os.environ.get("KEYE_TEST_SHOTS")
    review = Review(write_graded(tmp_path), tmp_path / "reviewed.jsonl")
    with running(review) as server:
        tab.goto(server.url)
        tab.wait_for_selector("#steps li")
        assert tab.locator("#steps li").count() == 3 and tab.inner_text("#count") == "3 of 3 open"
        assert tab.locator("#media img").count() >= 2
        assert all(tab.eval_on_selector_all("#media img", "found => found.map(i => i.naturalWidth > 0)"))
        if shots:
            tab.screenshot(path=f"{shots}/review1.png", full_page=True)
        tab.keyboard.press("a")  # the borderline A as it is
        expect(tab, "#count", "2 of 3 open")

        assert tab.locator("#steps li.flawed").count() == 2
        assert HOSTILE in tab.inner_text("#steps") and tab.title() == "Review of reasoning chains"
        tab.keyboard.press("d")  # the first step is deleted
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("d")
        tab.keyboard.press("j")
        tab.keyboard.press("e")
        tab.keyboard.press("Control+a")
        tab.keyboard.type("The square is blue, a and r are only letters.")
        if shots:
            tab.screenshot(path=f"{shots}/review2.png", full_page=True)
        tab.keyboard.press("Escape")
        tab.keyboard.press("n")
        tab.keyboard.type("So the answer is blue0.")
        tab.keyboard.press("Control+Enter")
        expect(tab, "#count", "1 of 3 open")
        last = "It is blue because it is blue."
        steps = ("The square is blue, a and r are only letters.", "So the answer is blue0.", last)
        assert review.decision(1) == Decision(True, steps)

        tab.keyboard.press("a")  # an empty chain is refused
        expect(tab, "#message", "an accepted chain needs a step; write one, or reject the chain")
        if shots:
            tab.screenshot(path=f"{shots}/review3.png", full_page=True)
        tab.click("#back")
        expect(tab, "#decision", "accepted")
        tab.click("#skip")
        expect(tab, "#decision", "")
        tab.click("#reject")
        tab.wait_for_selector("#done", state="visible")
        if shots:
            tab.screenshot(path=f"{shots}/review4.png", full_page=True)
        refused = [fault for fault in tab.faults if "400" in fault]
        assert len(tab.faults) == len(refused) == 1, tab.faults
    assert Review(review.source, review.out).open == []


def test_a_restarted_command_continues_and_a_narrow_window_has_no_sideways_scroll(tmp_path, tab):
    source, out = write_graded(tmp_path), tmp_path / "reviewed.jsonl"
    Review(source, out).decide(0, Decision(True, ("Fine.",)))
    with running(Review(source, out)) as server:
        tab.set_viewport_size({"width": 380, "height": 800})
        tab.goto(server.url)
        tab.wait_for_selector("#steps li")
        assert tab.inner_text("#id") == "q0/2" and tab.inner_text("#count") == "2 of 3 open"
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if shots := os.environ.get("KEYE_TEST_SHOTS"):
            tab.screenshot(path=f"{shots}/review5.png", full_page=True)
    assert tab.faults == []
