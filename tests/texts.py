"""The sentences that tests of `regard look` read."""

TROPHY = "The trophy didn't fit in the suitcase because it was too big."
CAT = "The cat sat on the mat because it was tired"
ANIMAL = "The animal didn't cross the road because it was tired"
HOSTILE = (
    "The \x1b[31mred\x1b[0m [red]fox[/red] \u202ejumped\u202c \x9b31m [bold]it[/bold] "
    "👩\u200d👩\u200d👧 日本語 end"
)
