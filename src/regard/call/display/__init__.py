"""How results show themselves: a DataFrame, a plot, a small picture in a notebook.

A result says what it holds once (`Result._table`, `Result._picture`); pandas and matplotlib are
imported where they are asked for.
"""
