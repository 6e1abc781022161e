"""Which words are content words: what a first look lists, where it knows the others."""

from __future__ import annotations

from .words import Word

_ENGLISH = """
a an the this that these those some any no each every either neither both all such what which
who whom whose when where why how i me my mine myself you your yours yourself he him his himself
she her hers herself it its itself we us our ours ourselves they them their theirs themselves
one ones there here and or but nor so yet for if then else than because since although though
while as whether unless until once of in on at by with from to into onto over under about above
below between among through during before after against without within across along behind
beside near off out up down toward towards upon per via not very too also just only even still
again ever never be am is are was were been being do does did done doing have has had having
will would shall should can could may might must ought i'm you're he's she's it's we're they're
i've you've we've they've i'd you'd he'd she'd we'd they'd i'll you'll he'll she'll it'll we'll
they'll that's there's here's what's who's let's isn't aren't wasn't weren't don't doesn't
didn't haven't hasn't hadn't won't wouldn't shan't shouldn't can't cannot couldn't mayn't
mightn't mustn't needn't
"""
# The closed classes: determiners, pronouns, conjunctions, prepositions, auxiliaries, and adverbs of
# degree. In other languages only punctuation is known not to be content.
_FUNCTION = frozenset(_ENGLISH.split())


def is_content(word: Word) -> bool:
    """Whether the word says something by itself: no special token, punctuation, function word."""
    text = word.text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return not word.special and any(map(str.isalnum, text)) and text not in _FUNCTION
