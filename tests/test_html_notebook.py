"""What `regard.look` returns, in a notebook: the page in a frame, in a headless Chromium."""

import pytest

pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

import regard
from browsing import ATTACK


def test_the_page_works_in_a_frame(browser, tmp_path):
    """It draws, its hands work, the console stays empty, and it cannot reach the notebook."""
    found = regard.look("all-MiniLM-L6-v2", f"The cat sat on {ATTACK} the mat", from_words="cat")
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset=utf-8>{found._repr_html_()}", "utf-8")
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(notebook.as_uri())
    browser.switch_to.frame(0)
    ready = "return 'ready' in document.documentElement.dataset"
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(ready))
    assert "cat reads" in browser.find_element(By.TAG_NAME, "body").text
    cell = browser.find_elements(By.CSS_SELECTOR, "button")[20]  # of the grid of heads
    before = browser.find_element(By.TAG_NAME, "body").text
    cell.click()
    WebDriverWait(browser, 60).until(lambda b: b.find_element(By.TAG_NAME, "body").text != before)
    reached = "try { return parent.document.title } catch { return 'kept out' }"
    assert browser.execute_script(reached) == "kept out"
    browser.switch_to.default_content()
    assert browser.execute_script("return window.pwned") is None
    assert [entry["message"] for entry in browser.get_log("browser")] == []
