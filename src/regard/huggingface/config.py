"""`output_attentions=True` in the config of a Hugging Face model whose attention is regard's.

transformers lets a config ask for the weights only beside eager attention, as its other ways of
computing have none. Ours has them, so importing this widens that one check: by the name "regard",
and by nothing else. No model and no attention is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from transformers import PreTrainedConfig

NAME = "regard"
_SETTER, _VALIDATOR = "output_attentions", "validate_output_attentions"


def _returns_weights(config: PreTrainedConfig) -> bool:
    name = getattr(config, "_attn_implementation_internal", None)
    return isinstance(name, str) and "".join(name) == NAME  # a watched model's equals ours, too


def _classes(of: type) -> Iterator[type]:
    """A class and all that were derived from it so far."""
    yield of
    below: list[type] = of.__subclasses__()
    for derived in below:
        yield from _classes(derived)


def _admit() -> None:
    """Widen the check where a config is changed, and where one is made or saved."""
    own: property = getattr(PreTrainedConfig, _SETTER)
    check: Callable[[PreTrainedConfig], None] = getattr(PreTrainedConfig, _VALIDATOR)

    def given(config: PreTrainedConfig, value: bool) -> None:
        if value and _returns_weights(config):
            config._output_attentions = value
        else:
            own.__set__(config, value)

    def validate_output_attentions(config: PreTrainedConfig) -> None:
        if not _returns_weights(config):
            check(config)

    setattr(PreTrainedConfig, _SETTER, property(own.fget, given, own.fdel, own.__doc__))
    setattr(PreTrainedConfig, _VALIDATOR, validate_output_attentions)  # for classes to come
    for known in _classes(PreTrainedConfig):
        validators = vars(known).get("__class_validators__", [])
        validators[:] = [validate_output_attentions if v is check else v for v in validators]


_admit()
