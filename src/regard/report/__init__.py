"""What `regard look` prints: gathered from a recording, as text or as JSON."""

from .looking import Look, look

__all__ = ["Look", "look"]
