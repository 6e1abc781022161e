"""A recording: q, k, lse and the mask of each layer's calls, from which any weight follows.

On disk it is a folder: one safetensors file a layer and one JSON (`recording.json`); no pickles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..call.brief import Brief, shortened
from ..call.observers import Entropy, Observer
from ..engines.second_pass.pooled import Reduce
from ..errors import RegardError, reason
from . import reading
from .by_effect import EdgeEffects
from .by_words import ByWords
from .compared import Comparison
from .head_grid import grid, layers_box, plot
from .index_file import INDEX as INDEX
from .index_file import entry_of, layer_file, read_index, write_index
from .opened import layer_files, open_layers, verify
from .recorded_layer import RecordedLayer
from .rollout import rollout
from .saved_files import whole_folder
from .segments import Given, Segments, ranges_of
from .shard_files import parts_of
from .stored import read
from .stored_effect import effect_files, write_beside
from .stored_layer import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDGET = "regard.report.view.notebook"  # of a floor above: named, and imported where it is shown


@dataclass(eq=False)
class Recording(Brief):
    """The layers of a model on one input, in the model's order, and what is known of the input.

    about: JSON-able: "model", "text", "tokens" (strings), "offsets" (start and end character of
    each token), "special" (whether a token is one) and whatever else the recorder wrote.
    whole: False where the run that wrote it was stopped. damaged: what is wrong with its files, one
    sentence each; the other layers can be read. folder: where it was loaded from.
    """

    layers: list[RecordedLayer]
    about: dict[str, Any] = field(default_factory=dict)
    whole: bool = True
    damaged: list[str] = field(default_factory=list)
    folder: Path | None = None

    def __str__(self) -> str:
        heads = sorted({layer.heads for layer in self.layers if layer.pattern})
        said = [f"{len(self.layers)} layers"]
        said += [f"heads {heads[0]}" + (f" … {heads[-1]}" if heads[1:] else "")] if heads else []
        tokens, text = self.about.get("tokens"), self.about.get("text")
        said += [] if tokens is None else [f"{len(tokens)} tokens"]
        said += [] if text is None else [repr(shortened(str(text), 40))]
        return f"Recording({', '.join([str(self.about.get('model', 'no model named')), *said])})"

    def layer(self, which: int | str) -> RecordedLayer:
        """A layer by its place in `layers` or its name. RegardError where there is no pattern."""
        if isinstance(which, str):
            found = [layer for layer in self.layers if layer.name == which]
        else:
            found = self.layers[which : which + 1] if which >= 0 else []
        if not found:
            names = ", ".join(layer.name for layer in self.layers)
            raise RegardError(f"no layer {which!r} in the recording; it has {names}")
        if found[0].damage:
            raise RegardError(found[0].damage)
        if not found[0].pattern:
            raise RegardError(f"layer {found[0].name} has no pattern: {found[0].reason}")
        return found[0]

    def weights(
        self,
        layer: int | str,
        head: int | None = None,
        rows: slice | Sequence[int] | None = None,
        cols: slice | Sequence[int] | None = None,
        batch: int = 0,
    ) -> Tensor:
        """The exact weights of one layer: (rows, cols), or (heads, rows, cols) where head is None.

        float32. rows and cols are slices or lists of indices into the recorded queries and keys;
        None means all. Only those rows are computed, so memory is O(rows · k_len).
        """
        found = self._found(layer, head, batch)
        if rows is None or isinstance(rows, slice):
            out = found.weights(rows or slice(None), batch)
            if rows is not None and rows.step not in (None, 1):
                raise RegardError(f"rows {rows}: give a slice of step 1, or a list")
        else:
            n = found.q_len
            if any(not -n <= r < n for r in rows):
                raise RegardError(f"rows {list(rows)}: layer {found.name} has {n} queries")
            out = found.weights_of([r % n for r in rows], batch)
        if cols is not None:
            n = found.k_len
            if not isinstance(cols, slice) and any(not -n <= c < n for c in cols):
                raise RegardError(f"cols {list(cols)}: layer {found.name} has {n} keys")
            out = out[:, :, cols if isinstance(cols, slice) else list(cols)]
        return out if head is None else out[head]

    def norm_weights(
        self,
        layer: int | str,
        head: int | None = None,
        rows: slice | Sequence[int] | None = None,
        cols: slice | Sequence[int] | None = None,
        batch: int = 0,
    ) -> Tensor:
        """weight · ‖W_O v‖: how long a vector each key adds, as `weights` gives the weights.

        Kobayashi et al. 2020, section 3. RegardError where values were not kept.
        """
        norm = reading.norm_of(self._found(layer, head, batch), "value")
        weights = self.weights(layer, head, rows, cols, batch)
        mine = read(norm[batch] if head is None else norm[batch, head])
        if cols is not None:
            mine = mine[..., cols if isinstance(cols, slice) else list(cols)]
        return weights * mine[..., None, :].float()

    def segments(self, given: Given) -> Segments:
        """Ranges of tokens, and what each head reads of them: see `Segments.shares`.

        given: [(first, last + 1), …], {name: (first, last + 1)}, or a pattern (regular expression):
        each of its matches in the text begins a segment, which it names.
        """
        generated = self.about.get("generated")
        begin = generated if isinstance(generated, int) else None
        return Segments(ranges_of(given, self.about), self._found, begin)

    def to_words(self, words: Sequence[tuple[int, int]] | None = None) -> ByWords:
        """The same by words: sums over the tokens read, means over the tokens that read.

        words: the tokens (first, last + 1) of each; None: those that the recording names.
        """
        words = self.about.get("words") if words is None else words
        tokens = self.about.get("tokens")
        if words is None or tokens is None:
            raise RegardError(
                "the recording names no words; `regard record` does, or give to_words([(first, "
                "last + 1), …])"
            )
        text, offsets = self.about.get("text"), self.about.get("offsets")
        return ByWords(words, tokens, text, offsets, self._found)

    def compare(self, other: Recording) -> Comparison:
        """This and another side by side, aligned by their tokens: two prompts, or two models."""
        tokens = [recording.about.get("tokens") for recording in (self, other)]
        if tokens[0] is None or tokens[1] is None:
            raise RegardError("a recording names no tokens, so nothing aligns them")
        return Comparison(self.weights, other.weights, (tokens[0], tokens[1]))

    def rollout(
        self, row: int, layers: Sequence[int | str] | None = None, batch: int = 0
    ) -> Tensor:
        """Attention rollout (k_len,) of one token (Abnar & Zuidema 2020): see `rollout.rollout`.

        layers: those to go through, first to last; None: all with a pattern.
        """
        every = [n for n, layer in enumerate(self.layers) if layer.pattern]
        chosen = every if layers is None else layers
        return rollout([self._found(layer, None, batch) for layer in chosen], row, batch)

    def _found(self, layer: int | str, head: int | None, batch: int) -> RecordedLayer:
        """The layer, where it has that head and that batch item."""
        found = self.layer(layer)
        if head is not None and not 0 <= head < found.heads:
            raise RegardError(f"head {head} of layer {found.name}: it has {found.heads}")
        if not 0 <= batch < found.batch:
            raise RegardError(f"batch {batch}: the recording has {found.batch}")
        return found

    @property
    def valued(self) -> bool:
        """Whether values were kept, so that `norm_weights` and tiles by value can be read."""
        return any(layer.norms for layer in self.layers)

    @property
    def has_effects(self) -> bool:
        """Whether effects were measured, so that `effect` and tiles by effect can be read."""
        return any(layer.effects is not None for layer in self.layers)

    def zooms(self, layer: int | str) -> int:
        """How many zooms the layer's map has: 0 … zooms − 1; at zoom z a cell is 2**z tokens wide.

        At the last, the smallest such, the whole map fits into one tile.
        """
        return reading.zooms(self.layer(layer))

    def tile(
        self, layer: int | str, head: int, zoom: int, row: int, col: int, reduce: Reduce = "sum",
        batch: int = 0, by: reading.By = "weight",
    ) -> Tensor:  # fmt: skip
        """One tile (128, 128) of a head's map, float32: cells of 2**zoom queries × 2**zoom keys.

        They are the cells row · 128 … and col · 128 …, exact at every zoom; 0 beyond the edges.
        reduce: "sum", a cell's mass, or "max", its largest weight. by: "weight"; "value": each
        weight times ‖W_O v‖ of its key, as `norm_weights`, where values were kept; or "effect":
        |effect| of the edges that `effect` lists, 0 for the others, where it was measured.
        """
        return self.tiles(layer, [(head, zoom, row, col)], reduce, batch, by)[0]

    def tiles(
        self, layer: int | str, wanted: Sequence[Sequence[int]], reduce: Reduce = "sum",
        batch: int = 0, by: reading.By = "weight",
    ) -> Tensor:  # fmt: skip
        """Several tiles (n, 128, 128) of one layer, each (head, zoom, row, col): see `tile`."""
        return reading.tiles(self._found(layer, None, batch), wanted, reduce, batch, by)

    def top(
        self,
        layer: int | str,
        head: int | None = None,
        rows: slice | Sequence[int] | None = None,
        batch: int = 0,
        k: int = 8,
    ) -> reading.Top:
        """The k largest weights of each row, and what remains: (heads, rows, k), or (rows, k)."""
        found = reading.top(self._found(layer, head, batch), k, rows, batch)
        if head is None:
            return found
        return reading.Top(
            found.weights[head], found.indices[head], found.rest[head], found.sink[head]
        )

    def effect(
        self, layer: int | str, head: int | None = None,
        rows: slice | Sequence[int] | None = None, batch: int = 0,
    ) -> EdgeEffects:  # fmt: skip
        """What removing an edge would do to the target, of each row's edges that do most.

        (heads, rows, k), or (rows, k): see `EdgeEffects`; `about["effect"]` names the target.
        RegardError where it was not measured: `record(…, effect=True)`.
        """
        found = self._found(layer, head, batch)
        first, _, places = reading.span_of(found, rows)
        return reading.effects_of(found).of(batch, head, [first + place for place in places])

    def received(
        self, layer: int | str, head: int | None = None, batch: int = 0
    ) -> reading.Columns:
        """What each key receives: sum, count and mean, (heads, k_len), or (k_len,)."""
        found = reading.received(self._found(layer, head, batch), batch)
        return found if head is None else reading.Columns(found.sum[head], found.count[head])

    def entropy(self, layer: int | str, head: int | None = None, batch: int = 0) -> Tensor:
        """The entropy of each row in nats: (heads, q_len), or (q_len,)."""
        found = reading.entropy(self._found(layer, head, batch), batch)
        return found if head is None else found[head]

    def distances(
        self,
        layer: int | str,
        head: int | None = None,
        batch: int = 0,
        bins: int | tuple[int, ...] | None = None,
    ) -> reading.ByDistance:
        """Mass by distance between query and key: (heads, bins), or (bins,)."""
        found = reading.distances(self._found(layer, head, batch), batch, bins)
        if head is None:
            return found
        return reading.ByDistance(found.past[head], found.future[head], found.edges)

    def head_metrics(self, layer: int | str, batch: int = 0) -> dict[str, Tensor]:
        """Means over all queries, (heads,) each, at once: see `reading.head_metrics`.

        {} where nothing was read while recording.
        """
        return reading.head_metrics(self._found(layer, None, batch), batch)

    def plot(
        self, observer: Observer = Entropy(), ax: Axes | None = None, *, batch: int = 0
    ) -> Axes:
        """Layers × heads, as `plot` of a watched model, by one observer of the weights; the Axes.

        They are read again from q, k and lse. RegardError where matplotlib is missing.
        """
        observed = [x.observed(observer, batch) if x.pattern else None for x in self.layers]
        return plot(grid(self.layers, observed, 0), ax)

    def _repr_mimebundle_(self, **asked: Any) -> Any:
        """In a notebook: the page of `regard view`, where the extra "notebook" is installed."""
        if find_spec("anywidget") is None:
            return None  # the layers, as `_repr_html_` lists them
        return import_module(_WIDGET).mimebundle(self, **asked)

    def _repr_html_(self) -> str:
        return layers_box(repr(self), self.layers)

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the recording as a new folder, which is there once it is whole.

        RegardError if something is there already; overwrite: unless that is a recording.
        """
        with whole_folder(Path(folder), INDEX, overwrite) as part:
            entries = []
            for number, layer in enumerate(self.layers):
                file = layer_file(part, number) if layer.chunks else None
                effects = None
                if file is not None:
                    write_whole(file, layer)
                    effects = write_beside(file, layer)
                entries.append(entry_of(layer, file, effects))
            write_index(part, self.about, entries, self.whole)

    def verify(self) -> None:
        """Read every number once: RegardError that names each file not as it was written."""
        if self.folder is None:
            return
        both = (layer_files(self.folder), parts_of(self.folder))
        files = [path for named in both for mine in named.values() for path in mine]
        verify(files + effect_files(self.folder))

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """Open what `record` or `save` wrote, mapped into memory.

        RegardError if it is not there, or damaged. Layers that are whole can be read though others
        are not: `damaged` names those.
        """
        folder = Path(folder)
        try:
            index = read_index(folder)
            opened, damaged = open_layers(folder, index)
            return cls(opened, index.of(dict, "about"), index.of(bool, "whole"), damaged, folder)
        except RegardError:
            raise
        except RecursionError:
            raise RegardError(f"{folder} is not a whole recording: JSON too deep") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RegardError(f"{folder} is not a whole recording: {reason(error)}") from error
