"""Our attention against its peers, timed in turns on a quiet machine, wrong results refused."""

from .runner import Outcome, Settings, measure, run
from .suites import SUITES, Entry, chosen

__all__ = ["SUITES", "Entry", "Outcome", "Settings", "chosen", "measure", "run"]
