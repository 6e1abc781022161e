"""A recording in a notebook: the page of `regard view` in the output of a cell, by anywidget.

The page is the same, its modules bundled into one script in a frame of its own, so that several
stand in one notebook. What it asks comes over the kernel's connection instead of HTTP; answers are
made in a pool of threads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Event, Lock
from typing import Any

import anywidget
import traitlets

from ...capture.recording import Recording
from ...errors import RegardError
from .answers import Answers
from .export import inline
from .opened import Opened
from .page_files import page_file

_POOL = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="notebook")


def _file(name: str) -> str:
    found = page_file(name)
    if found is None:
        raise RegardError(f"the page has no file {name}; install regard again")
    return found.read_text("utf-8")


@cache
def _page() -> str:
    return inline({"bridged": True})


class RecordingWidget(anywidget.AnyWidget):
    """The page over some recordings; two are compared. height: of the frame, in pixels."""

    _esm = _file("notebook.js")
    page = traitlets.Unicode().tag(sync=True)
    height = traitlets.Int(900).tag(sync=True)

    def __init__(self, *recordings: Recording, **traits: Any) -> None:
        super().__init__(page=_page(), **traits)
        self._answers = Answers([Opened.of(recording) for recording in recordings])
        self._under_way: dict[int, Event] = {}
        self._lock = Lock()
        self.on_msg(self._asked)

    def _asked(self, _: Any, said: Any, buffers: Any) -> None:
        """A question {id, path, given}, or one that is taken back, {id, drop}."""
        if not isinstance(said, Mapping) or not isinstance(number := said.get("id"), int):
            return
        if "drop" in said:
            with self._lock:
                if (dropped := self._under_way.get(number)) is not None:
                    dropped.set()
            return
        given = said.get("given")
        texts = given if isinstance(given, Mapping) else {}
        dropped = Event()
        with self._lock:
            self._under_way[number] = dropped
        asked = {str(name): str(value) for name, value in texts.items()}
        _POOL.submit(self._answer, number, str(said.get("path")), asked, dropped)

    def _answer(self, number: int, path: str, given: dict[str, str], dropped: Event) -> None:
        """Send the answer; tiles one by one, until the question is taken back."""
        try:
            if path == "tiles":
                for data in self._answers.tiles(given):
                    if dropped.is_set():
                        break
                    self.send({"id": number, "more": True}, [data])
                self.send({"id": number})
            elif not dropped.is_set():
                self.send({"id": number, "answer": self._answers.answer(path, given)})
        except (RegardError, OSError) as error:
            self.send({"id": number, "error": " ".join(str(error).split())})
        finally:
            with self._lock:
                self._under_way.pop(number, None)


def mimebundle(recording: Recording, **asked: Any) -> Any:
    """What a notebook shows for a recording; None where no layer has weights to show."""
    try:
        widget = RecordingWidget(recording)
    except RegardError:
        return None  # `_repr_html_` lists the layers, and why
    return widget._repr_mimebundle_(**asked)
