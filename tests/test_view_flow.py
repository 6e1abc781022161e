"""The text of `regard view` flows through its blocks: nobody sees where one ends."""

import pytest

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from test_view_page import ViewPage
from viewing import recording, served

TOKENS = 1500
# Where each word in sight lies: its line, counted from the first in sight, and its place on it
PLACES = """
const words = [...document.querySelectorAll('.word')]
  .sort((a, b) => a.dataset.word - b.dataset.word);
const [first] = words;
const place = (word, top) => {
  const box = word.getClientRects()[0];
  return [Number(word.dataset.word), Math.round((box.top - top) / 33), Math.round(box.left)];
};
const top = first.getClientRects()[0].top;
const shown = words.map((word) => place(word, top));
// The same words in one box, which the browser alone breaks into lines
const text = document.querySelector('.block .text');
const block = text.parentNode.cloneNode(false);
const whole = text.cloneNode(false);
block.append(whole);
text.closest('.paper').append(block);
const begin = document.createElement('span');
begin.className = 'begin';
begin.style.width = `${first.getClientRects()[0].left - text.getBoundingClientRect().left}px`;
whole.append(begin, ' ');
whole.style.textIndent = '-0.25em';
const copies = words.map((word, i) => {
  const copy = word.cloneNode(true);
  if (i && word.previousSibling?.nodeName !== 'SPAN') whole.append(' ');
  if (i && word.dataset.word % 50 === 1) whole.append(document.createElement('br'));
  whole.append(copy);
  return copy;
});
const from = copies[0].getClientRects()[0].top;
const expected = copies.map((copy) => place(copy, from));
block.remove();
return [shown, expected];
"""


def lines(places):
    """The words of each line."""
    found = {}
    for word, line, _ in places:
        found.setdefault(line, []).append(word)
    return list(found.values())


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Paragraphs of 50 words in the first half, none in the second."""
    folder = tmp_path_factory.mktemp("flow") / "long"
    names = [f"word{'x' * (i * 7 % 11)}{i}" for i in range(TOKENS)]
    made = recording(TOKENS, layers=1, words=names)
    text, offsets = "", []
    for i, name in enumerate(names):
        gap = "" if not i else "\n" if i % 50 == 1 and i < TOKENS // 2 else " "
        offsets.append((len(text) + len(gap), len(text) + len(gap) + len(name)))
        text += gap + name
    made.about |= {"text": text, "offsets": offsets, "special": [False] * TOKENS}
    made.save(folder)
    with served(folder) as (address, _):
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("word", [300, 1300])
def test_the_text_breaks_where_one_paragraph_would(browser, address, word):
    page = ViewPage(browser, f"{address}#head=0.0&view=text&word={word}")
    page.until("document.querySelector('.word.locked')")
    page.settled()
    shown, expected = page.run(PLACES.replace("word.dataset.word % 50 === 1", "false")
                               if word > TOKENS // 2 else PLACES)  # fmt: skip
    assert {first // 128 for first, *_ in shown} > {word // 128}
    assert lines(shown) == lines(expected)
