"""Which words does "it" read? Prints what `regard look` prints, and writes the page."""

import regard

found = regard.look(
    "all-MiniLM-L6-v2",  # or a folder, a name on the hub, or (model, tokenizer)
    "The trophy didn't fit in the suitcase because it was too big.",
    from_words="it",
)
print(found)
print("page:", found.html("look.html"))
