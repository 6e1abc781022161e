"""The errors that `regard` raises on purpose."""


class RegardError(ValueError):
    """A request that cannot be met as it stands; the message shows the shapes and what to do."""


def reason(error: Exception) -> str:
    """What an error of another's says, in words: of an OSError without number and name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class NoEngine(RegardError):
    """No engine, or not the named one, can run a call; the message lists every refusal."""
