"""What changes in what "it" reads when the sentence changes? The five largest changes."""

import regard

found = regard.look(
    "all-MiniLM-L6-v2",
    "The animal didn't cross the road because it was tired",
    versus="The animal didn't cross the road because it was wide",
    from_words="it",
    top=5,
)
print(found)
