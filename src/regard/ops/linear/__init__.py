"""Linear attention: a state instead of a cache, and the weights that it implies in sight.

`linear_attention` is the door (`front`). A call is checked (`request`), its features computed
(`features`), and written as one recurrence (`flow`), which runs in chunks (`chunked`, over `chunks`
and `sums`; on CUDA `by_triton`) or token by token (`recurrent`); `reference` is the specification.
`implied` reads the weights, `observing` shows them to the observers.
"""

from .features import Favor
from .front import linear_attention
from .state import LinearState

__all__ = ["Favor", "LinearState", "linear_attention"]
