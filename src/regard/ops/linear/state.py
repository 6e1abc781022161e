"""What a sequence leaves behind: all that later tokens need of it, in O(1) memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ...call.brief import Brief


@dataclass(frozen=True, eq=False)
class LinearState(Brief):
    """The sum over the keys so far; give it to the call with the tokens that follow.

    memory (batch, state_heads, features, v_dim): Σ φ(k) vᵀ, decayed and corrected. state_heads is
        kv_heads; or heads, where decay or beta is given per query head.
    normaliser (batch, state_heads, features): Σ φ(k), where the weights are normalised.
    document (batch,): the id of the last document, −1 before the first; None without documents.
    length: the tokens so far; the next call's positions begin there.
    shift (batch, state_heads, features): memory and normaliser lack the factor exp(shift), which
        would leave the dtype (random features of long keys); None: they lack none.
    float32; float64 where the call is float64. Gradients flow through it.
    """

    memory: Tensor
    normaliser: Tensor | None = None
    document: Tensor | None = None
    length: int = 0
    shift: Tensor | None = None

    def detach(self) -> LinearState:
        """Cut off from the graph of the tokens before: truncated backpropagation through time."""
        normaliser = None if self.normaliser is None else self.normaliser.detach()
        return replace(self, memory=self.memory.detach(), normaliser=normaliser)
