"""Where a module keeps its output projection W_O, for those observers that need it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import RegardError
from .module_stack import module_of

_NAMES = ("o_proj", "out_proj", "c_proj", "out_lin", "o", "wo", "out", "dense", "to_out")


def output_projection(modules: Mapping[str, nn.Module], call: str, width: int) -> Tensor:
    """W_O (model_dim, heads · v_dim) of the attention call named `call`; RegardError if not found.

    It is the linear layer of one of the usual names that takes `width` = heads · v_dim inputs, in
    the module itself, or (BERT's way) in the one beside it, `output.dense`.
    """
    name = module_of(call)
    parent = name.rpartition(".")[0]
    places = [f"{name}.{n}" for n in _NAMES] + [f"{parent}.output.dense", f"{parent}.dense"]
    for place in places:
        found = modules.get(place)
        weight = getattr(found, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        if type(found).__name__ == "Conv1D":  # transformers' stores (in, out)
            weight = weight.mT
        if weight.shape[1] == width:
            return weight
    raise RegardError(
        f"{name}: no output projection of {width} inputs was found (looked for "
        f"{', '.join(places)}); give NormTopK a projection"
    )
