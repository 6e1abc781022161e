"""Maps of weight · ‖W_O v‖, how long a vector each key adds (Kobayashi et al. 2020, section 3).

exp(score − lse) · norm = exp(score + ln norm − lse): a bias of each key, added to the scores while
the lse stays, makes the same compiled tiles of them, exact at every zoom.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..call.biases import Added, Kind
from ..call.checked import Call


def by_norm(call: Call, norm: Tensor) -> Call:
    """The call whose weights, by the lse of this one, are each multiplied by its key's norm.

    norm (batch, heads, k_len) ≥ 0; ln 0 = −∞ makes a weight of 0.
    """
    place = call.place
    added = norm.to(call.working).log()[:, :, None]
    return replace(
        call,
        biases=(*call.biases, Added(Kind.DENSE, added, (), place.query_start, place.key_start)),
    )
