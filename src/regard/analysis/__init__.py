"""What can be asked of a text in a model: look, walk, versus, cut, effect."""
