"""What a public name takes, as help() and the reference show it."""

import inspect

import regard


def test_no_public_name_takes_what_is_private():
    """A value that a dataclass keeps for itself is none of its arguments."""
    taken = []
    for name in regard.public.__all__:
        thing = getattr(regard, name)
        if not callable(thing):
            continue
        try:
            found = inspect.signature(thing).parameters
        except ValueError:  # an exception's own signature is nowhere written down
            assert issubclass(thing, Exception), name
            continue
        taken += [f"{name}({one})" for one in found if one.startswith("_")]
    assert taken == []
