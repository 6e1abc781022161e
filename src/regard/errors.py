"""The errors that `regard` raises on purpose."""


class RegardError(ValueError):
    """A request that cannot be met as it stands; the message shows the shapes and what to do."""


class NoEngine(RegardError):
    """No engine, or not the named one, can run a call; the message lists every refusal."""
