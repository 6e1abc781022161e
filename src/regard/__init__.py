"""Fast attention, with its weights in sight at any length.

Functions   attention: softmax attention; observe: its weights again
            linear_attention: a state instead of a cache
            explain: which engine runs a call, and why not others
            merge, piecewise: keys in parts; context_parallel: on machines
In words    look: which words a text's words read; LookResult
            heads: what every head of a model does; HeadScores
In models   watch: a live model's attention; Cut: run without some of it
            record: streamed to a folder; Recording: any weight, exactly
Masks       Full, Causal, Window, First, Documents, Padding, Edges, Heads,
            Dense, Predicate; join them with & | ~; each is a Mask
Biases      ALiBi, RelativeBias: added to scores; Dropout: seeded
Observers   TopK, NormTopK, Effect: the telling keys of each query
            Entropy, MaxScore, LogSumExp: a number a query; Rows: whole
            Received: what each key gets; Map: pooled; Distances: how far
Errors      RegardError, NoEngine: no engine can run this

regard.sparse       BigBird, Longformer, TopBlocks …: sparse masks
regard.linear       Favor: random features; LinearState
regard.cache        KVCache, WindowCache, PagedCache; H2O …: evicting
regard.context      what a window no longer sees; chunks stitched
regard.distributed  a sequence on several ranks: shard, unshard, decode
regard.nn           modules: MultiHeadAttention, Transformer, Rotary …
regard.models       LanguageModel, Translator …: small, with any mixer
regard.huggingface  attn_implementation="regard"; needs transformers
"""

import typing as _typing
from importlib import import_module as _import
from importlib.util import find_spec as _find

__version__ = "0.2.0"

if _typing.TYPE_CHECKING:
    from . import cache, context, distributed, huggingface, linear, models, nn, sparse  # noqa: F401
    from .public import *  # noqa: F403
else:
    # All come with the first that is asked for: `regard --help` needs neither them nor torch.
    def __getattr__(name):
        if not name.startswith("__") and _find(f"{__name__}.{name}"):
            return _import(f".{name}", __name__)  # as its modules import each other
        public = _import(".public", __name__)
        names = getattr(public, "__all__", ())  # none while it is itself being imported
        globals().update({known: getattr(public, known) for known in names})
        if name == "__all__":
            # Left out, as `help` would write out all that it lists. `import *` then takes what
            # stands here: the public names, without the modules, which come back when asked for.
            for module in [n for n, held in globals().items() if type(held) is type(public)]:
                del globals()[module]
        elif name in globals() and names:
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        public = _import(".public", __name__)
        return sorted([*public.__all__, *public.NAMESPACES, "__doc__", "__version__"])
