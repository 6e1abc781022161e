"""A page in a headless Chromium, as a reader uses it."""

import os
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

os.environ |= {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}  # it is to download nothing

from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

from regard.analysis.look import (  # noqa: E402
    look,
    rows_of,
)
from regard.report import look_html as html  # noqa: E402

ATTACK = "</script><img src=x onerror=window.pwned=1><!--"

HOSTILE = (
    f"He wrote {ATTACK} \"'`${{window.pwned=1}} \u2028 \u2029 \x1b[31mred\x1b[0m \u202eevil\u202c "
    "&lt;b&gt; {{data}} {{script}} --> ]]> and left"
)

SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--window-size=1280,1000"
)


def chromium(folder):
    """A Chromium of this machine; the switches keep it from asking anyone anything."""
    found = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in found:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for switch in SWITCHES.split():
        options.add_argument(switch)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_argument(f"--user-data-dir={folder}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(found[1]))


class Found:
    """The element that a selector finds now, however often the page draws it anew."""

    def __init__(self, browser, selector):
        self.browser, self.selector = browser, selector

    def use(self, act):
        """What `act` gives of the element; once more where it was drawn anew meanwhile."""
        wait = WebDriverWait(self.browser, 30, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(
            lambda browser: [act(browser.find_element(By.CSS_SELECTOR, self.selector))],
            f"{self.selector} is drawn anew all the time",
        )[0]

    def click(self):
        self.use(lambda element: element.click())

    def clear(self):
        self.use(lambda element: element.clear())

    def send_keys(self, keys):
        self.use(lambda element: element.send_keys(keys))

    def get_attribute(self, name):
        return self.use(lambda element: element.get_attribute(name))

    def is_displayed(self):
        return self.use(lambda element: element.is_displayed())

    def is_enabled(self):
        return self.use(lambda element: element.is_enabled())

    @property
    def text(self):
        return self.use(lambda element: element.text)

    @property
    def size(self):
        return self.use(lambda element: element.size)

    @property
    def rect(self):
        return self.use(lambda element: element.rect)


class Page:
    """A page in the browser, as a reader uses it."""

    def __init__(self, browser, path, hash_=""):
        self.browser = browser
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(path.as_uri() + hash_)
        ready = "return 'ready' in document.documentElement.dataset"
        WebDriverWait(browser, 60).until(lambda b: b.execute_script(ready))

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def settled(self):
        """Once what is due has been drawn."""
        self.browser.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        )
        return self

    def find(self, selector):
        return Found(self.browser, selector)

    def all(self, selector, read):
        """What `read`, an expression of JavaScript in `e`, gives of each element, all at once."""
        return self.run(
            f"return [...document.querySelectorAll(arguments[0])].map((e) => {read})", selector
        )

    def cells(self, rows):
        """The text of each cell of some rows."""
        return self.all(rows, "[...e.querySelectorAll('td')].map((c) => c.innerText.trim())")

    def shown(self):
        """The panels of text that are displayed."""
        views = self.all(".view", "[e.dataset.view, e.checkVisibility()]")
        return [name for name, displayed in views if displayed]

    def word(self, number, view="raw"):
        return self.find(f".view[data-view={view}] .word[data-word='{number}']")

    def cell(self, head):
        return self.find(f"#grid button[data-head='{head}']")

    def hover(self, found, x=0, y=0):
        """The pointer at a place of an element, from its middle."""

        def point(element):
            self.run("arguments[0].scrollIntoView({block: 'center'})", element)
            chain = ActionChains(self.browser, duration=0)
            chain.move_to_element_with_offset(element, x, y).perform()

        found.use(point)
        return self.settled()

    def click(self, element):
        self.hover(element)
        ActionChains(self.browser, duration=0).click().perform()
        return self.settled()

    def press(self, *keys):
        for key in keys:
            ActionChains(self.browser, duration=0).send_keys(key).perform()
            self.settled()
        return self

    def weights(self, view="raw", reading=0):
        """The weight shown on each word; 0 where none is."""
        return self.run(
            "return [...document.querySelectorAll('.reading')[arguments[1]].querySelectorAll("
            "`.view[data-view=${arguments[0]}] .word`)].map(w => Number(w.dataset.weight ?? 0))",
            view,
            reading,
        )

    def grid(self):
        """The value of each head."""
        return self.run(
            "return Object.fromEntries([...document.querySelectorAll('#grid [data-head]')]"
            ".map(c => [c.dataset.head, Number(c.dataset.value)]))"
        )

    @property
    def focus(self):
        return int(self.find(".view[data-view=raw] .word.focus").get_attribute("data-word"))

    @property
    def fan(self):
        return self.run("return document.querySelector('.fan').innerHTML")

    @property
    def hash(self):
        return self.run("return location.hash")

    def text(self, selector):
        return self.find(selector).text

    def is_quiet(self):
        """Nothing was asked for, and nothing was complained of."""
        assert self.run("return performance.getEntriesByType('resource').length") == 0
        assert self.browser.get_log("browser") == []


class Written:
    """A text as `regard look` sees it, its page, and what the page must show."""

    def __init__(self, recording, path, readers=()):
        self.recording, self.path = recording, path
        self.found = look(recording, readers=readers)
        html.write_html(self.found, recording, path)

    def exact(self, word, head=None, part=0):
        """What a word reads: of a head (layer, head) or the mean; and the same, some apart."""
        of = self.found.parts[part]
        row = next(row for row in rows_of(self.recording, [of], word))
        at = None if head is None else of.heads.index(head)
        raw = row.mean if at is None else row.weights[at]
        aside = of.apart if at is None else of.special | of.sinks[at]
        rest = raw.masked_fill(aside, 0)
        return raw, rest / rest.sum()


def close(shown, exact):
    assert torch.tensor(shown) == pytest.approx(exact.double(), abs=1e-3)
