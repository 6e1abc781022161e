"""Every view of the page of `regard view`, at three sizes, light and dark: to be looked at.

python docs/screens.py FOLDER [RECORDING]    needs chromedriver, regard's extras dev, look, view

RECORDING may be any, and is best a long one; without it, the README's sentence is recorded.
Pictures are named VIEW-SIZE-SCHEME.png. `docs/refresh.py` makes those that README and docs show.
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refresh import SWITCHES, TEXT
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

import regard

SIZES = {"wide": (1440, 900), "tablet": (1024, 1100), "phone": (390, 844)}
DONE = (
    "const busy = '.map canvas.pending, [data-waits], [aria-busy=true]';"
    "return document.querySelector('#error:not([hidden])') !== null ||"
    " 'ready' in document.documentElement.dataset && !document.querySelector(busy) &&"
    " (!location.hash.includes('word=') || document.querySelector('#list tbody tr'))"
)


def views(about: dict[str, Any]) -> dict[str, str]:
    """What the address of each view holds. about: of the recording."""
    count = len(about.get("tokens", ()))
    kept, half = max(0, 2 * count // 3 - 1), count // 2
    return {
        "map": "head=0.1",
        "map-middle": f"head=0.1&at=4,{kept},{kept // 2}&word={kept}",
        "map-cells": f"head=0.1&at=9,{kept},{kept}&word={kept}",
        "text": f"head=0.1&view=text&word={kept}",
        "text-read-by": f"head=0.1&view=text&word={kept // 2}&way=in&by=tokens",
        "segments": f"head=0.1&view=text&metric=segment&segments=0-{half},{half}-{count}",
        "finder": "head=0.1&metric=reads&from=it&reads=trophy",
        "side-by-side": "head=0.1&compare=both",
        "difference": "head=0.1&compare=change",
    }


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The address of `regard view`."""
    command = [sys.executable, "-m", "regard.cli", "view", *arguments, "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        yield next(word for word in line.split() if word.startswith("http"))
        server.terminate()


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser whose window has any size."""
    found = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in found:
        sys.exit("no chromium and chromedriver; Debian: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(found[0])
    for switch in SWITCHES.split():
        if "virtual-time" not in switch:
            options.add_argument(switch)
    browser = webdriver.Chrome(options=options, service=Service(found[1]))
    try:
        yield browser
    finally:
        browser.quit()


def shot(browser: webdriver.Chrome, address: str, size: tuple[int, int], scheme: str) -> bytes:
    """A view as PNG, once all of it is drawn."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    browser.get(address)
    WebDriverWait(browser, 120).until(lambda b: b.execute_script(DONE))
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return base64.b64decode(taken["data"])


def take(browser: webdriver.Chrome, address: str, picture: Callable[[str, str], Path]) -> None:
    """One view, at each size, light and dark."""
    for name, size in SIZES.items():
        for scheme in ("light", "dark"):
            picture(name, scheme).write_bytes(shot(browser, address, size, scheme))


def main() -> None:
    """Record what is to be seen, serve it, take the pictures."""
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work, chromium() as browser:
        first, second = Path(work) / "trophy", Path(work) / "other"
        for where, text in ((first, TEXT), (second, TEXT.replace("big", "small"))):
            command = [sys.executable, "-m", "regard.cli", "look", text, "--save", where]
            subprocess.run(command, check=True, capture_output=True)
        shown = Path(sys.argv[2]) if len(sys.argv) == 3 else first
        about = regard.Recording.load(shown).about
        with served(str(shown)) as one, served(str(first), str(second)) as two:
            for name, hash_ in views(about).items():
                address = two if name in ("finder", "side-by-side", "difference") else one
                take(browser, f"{address}#{hash_}",
                     lambda *of, name=name: folder / f"{'-'.join((name, *of))}.png")  # fmt: skip
                print(name)
        exported = Path(work) / "page.html"
        subprocess.run(
            [sys.executable, "-m", "regard.cli", "view", first, "--export", exported], check=True
        )
        take(browser, exported.as_uri(), lambda *of: folder / f"{'-'.join(('export', *of))}.png")
        print(f"{len(list(folder.glob('*.png')))} pictures in {folder}")


if __name__ == "__main__":
    main()
