"""`RecurrentTranslator`: the older way, with and without the attention that was added to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...call.checked import Call
from ...call.masks import Padding
from ...errors import RegardError
from ...ops.cache import tell
from ...ops.watches import watched
from .config import RECURRENT, ModelConfig
from .mixers import checked_tokens
from .stack import embedding_of, head_of


class ToldWeights(nn.Module):
    """What additive attention has read, told to `watch` as a call of attention.

    It has no queries and keys whose products are its scores: each query is the row of its scores
    here, and key j the j-th unit vector.
    """

    kind, additive = "cross", True  # what `watch` and `walk` ask of a module

    @torch.no_grad()
    def forward(self, weights: Tensor, values: Tensor, keep: Tensor) -> None:
        """weights (batch, q_len, k_len), values (batch, k_len, dim), keep (batch, k_len)."""
        # Scores but for a constant a row; hidden keys have −inf, whose product with 0 is NaN
        scores = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
        unit = torch.eye(keep.shape[1], dtype=scores.dtype, device=scores.device)
        keys = unit.expand(len(keep), 1, -1, -1)
        values = values.to(scores.dtype)
        shown = Padding(keep)
        call = Call.checked(
            scores[:, None], keys, values[:, None], mask=shown, scale=1.0, query_start=0
        )
        lse = scores.masked_fill(~keep[:, None], -torch.inf).logsumexp(-1)
        tell(call, lse[:, None], (weights @ values)[:, None])


class AdditiveAttention(nn.Module):
    """softmax over the source of vᵀ tanh(W query + U key). Bahdanau et al. 2015, section 3.1.

    Of keys (batch, k_len, key_dim); `project` makes them ready once for many steps.
    """

    def __init__(self, query_dim: int, key_dim: int, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, dim, bias=False)
        self.project = nn.Linear(key_dim, dim)
        self.score = nn.Linear(dim, 1, bias=False)
        self.told = ToldWeights()

    def forward(
        self, query: Tensor, projected: Tensor, values: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(context (batch, dim), weights (batch, k_len)) of one query (batch, query_dim).

        projected: `project(keys)`. values (batch, k_len, dim). keep: bool (batch, k_len).
        """
        scores = self.score(torch.tanh(self.query(query)[:, None] + projected))[..., 0]
        weights = scores.masked_fill(~keep, -torch.inf).softmax(-1)
        return torch.einsum("bk,bkd->bd", weights.to(values.dtype), values), weights


class RecurrentState:
    """What is known before the next target token.

    source: what the encoder made (batch, length, dim), what attention projected of it, and which
    tokens are real. hidden: of each layer, a tuple of tensors (batch, dim). context (batch, dim):
    what the last step read of the source.
    """

    def __init__(
        self,
        source: tuple[Tensor, Tensor, Tensor],
        hidden: list[tuple[Tensor, ...]],
        context: Tensor,
    ) -> None:
        self.source, self.hidden, self.context = source, hidden, context

    def select(self, rows: Tensor) -> None:
        """Keep these items of the batch, in this order."""
        values, projected, keep = self.source
        self.source = (values[rows], projected[rows], keep[rows])
        self.hidden = [tuple(part[rows] for part in layer) for layer in self.hidden]
        self.context = self.context[rows]


class RecurrentTranslator(nn.Module):
    """A bidirectional recurrent encoder and a recurrent decoder; mixer lstm, gru or rnn.

        model = RecurrentTranslator(ModelConfig(vocab=8000, mixer="lstm", cross="bahdanau", pad=0))
        logits = model(target, source)
        logits, weights = model(target, source, return_weights=True)  # (batch, target, source)

    cross "bahdanau": each step reads the source with the hidden state of the step before
    (Bahdanau et al. 2015); "none": the decoder begins with the encoder's last state, and that is
    all it knows (Sutskever et al. 2014). `begin` and `step` as in `Translator`.
    """

    kind = "recurrent-translator"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kind = config.mixers(1)[0]
        if kind not in RECURRENT or config.cross == "attention":
            raise RegardError(
                f"mixer {config.mixer!r}, cross {config.cross!r}: a recurrent translator takes "
                "one of lstm, gru and rnn, and cross bahdanau or none"
            )
        if config.dim % 2:
            raise RegardError(f"dim {config.dim} is odd; half of it reads each way")
        self.config, dim, depth = config, config.dim, config.decoder_depth or config.depth
        self.embedding = embedding_of(config)
        whole = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
        cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[kind]
        dropout = config.dropout if config.depth > 1 else 0.0
        self.encoder: nn.RNNBase = whole(
            dim, dim // 2, config.depth, batch_first=True, bidirectional=True, dropout=dropout
        )
        self.attention = AdditiveAttention(dim, dim, dim) if config.cross == "bahdanau" else None
        reads = 2 * dim if self.attention is not None else dim
        self.cells = nn.ModuleList(cell(reads if n == 0 else dim, dim) for n in range(depth))
        self.start = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.join = nn.Linear(reads, dim)
        self.dropout = nn.Dropout(config.dropout)
        self.head = head_of(config, self.embedding)

    def forward(self, target: Tensor, source: Tensor, *, return_weights: bool = False) -> Any:
        """Logits (batch, target_length, vocab); with return_weights, also (batch, target, source).

        Without attention the weights are empty: (batch, target, 0).
        """
        hidden, weights = self.hidden(target, source)
        logits = self.head(hidden)
        return (logits, weights) if return_weights else logits

    def hidden(self, target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors that `head` makes logits of (batch, target_length, dim), and the weights."""
        return self.vectors(target, self.begin(source))

    def begin(self, source: Tensor) -> RecurrentState:
        """The source read: what `step` needs."""
        keep = checked_tokens(source) != self.config.pad
        return self.state_of(*self.read(source, keep), keep)

    def read(self, source: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The source's vectors (batch, length, dim), and those it ends with (batch, dim).

        keep: bool (batch, length), false for padding, which stands behind the tokens.
        """
        lengths = keep.sum(-1)
        places = torch.arange(keep.shape[1], dtype=torch.int64, device=keep.device)
        if not bool(lengths.all()) or not torch.equal(keep, places < lengths[:, None]):
            raise RegardError(
                "a recurrent translator reads its source in order, so it needs a token, and "
                "padding behind the tokens: pad on the right"
            )
        packed = nn.utils.rnn.pack_padded_sequence(
            self._embedded(source), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        made, last = self.encoder(packed)
        values, _ = nn.utils.rnn.pad_packed_sequence(
            made, batch_first=True, total_length=source.shape[1]
        )
        # (layers · 2, batch, dim / 2): the last layer's two directions, side by side
        final = torch.cat(list((last[0] if isinstance(last, tuple) else last)[-2:]), -1)
        return values, final

    def state_of(self, values: Tensor, final: Tensor, keep: Tensor) -> RecurrentState:
        """What `step` needs, of what `read` gave."""
        hidden: list[tuple[Tensor, ...]] = []
        for layer in self.start:
            first = torch.tanh(layer(final))
            both = isinstance(self.encoder, nn.LSTM)
            hidden.append((first, torch.zeros_like(first)) if both else (first,))
        projected = values if self.attention is None else self.attention.project(values)
        return RecurrentState((values, projected, keep), hidden, torch.zeros_like(final))

    def step(self, target: Tensor, state: RecurrentState) -> Tensor:
        """Logits (batch, length, vocab) of the target tokens that follow those of the state."""
        logits: Tensor = self.head(self.vectors(target, state)[0])
        return logits

    def vectors(self, target: Tensor, state: RecurrentState) -> tuple[Tensor, Tensor]:
        """(vectors, weights) of each target token in turn; the state goes on with the last."""
        words = self._embedded(checked_tokens(target))
        values, projected, keep = state.source
        outs, read = [], [keep[:, :0].to(words.dtype)] * (0 if self.attention else target.shape[1])
        for word in words.unbind(1):
            x = word
            if self.attention is not None:
                state.context, weights = self.attention(
                    state.hidden[-1][0], projected, values, keep
                )
                read.append(weights)
                x = torch.cat([word, state.context], -1)
            for n, cell in enumerate(self.cells):
                after = cell(x, state.hidden[n] if len(state.hidden[n]) > 1 else state.hidden[n][0])
                state.hidden[n] = after if isinstance(after, tuple) else (after,)
                x = self.dropout(state.hidden[n][0])
            if self.attention is not None:
                x = torch.cat([x, state.context], -1)
            outs.append(torch.tanh(self.join(x)))
        weights = torch.stack(read, 1)
        if self.attention is not None and watched():
            self.attention.told(weights, values, keep)
        return self.dropout(torch.stack(outs, 1)), weights

    def _embedded(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.embedding(tokens) * self.config.dim**0.5)
