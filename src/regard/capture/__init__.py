"""The attention of a live model, caught; and recordings of it."""
