"""What `regard look` prints: gathered from a recording, as text or as JSON."""

from ..analysis.look import Look, look

__all__ = ["Look", "look"]
