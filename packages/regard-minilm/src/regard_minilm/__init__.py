"""all-MiniLM-L6-v2: its weights and its tokenizer, in ``folder``."""

from pathlib import Path

folder = Path(__file__).parent / "model"
"""What ``from_pretrained`` takes."""
