"""Small tokenizers, and models on disk that use them."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

import tokenizers  # noqa: E402
from tokenizers import decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

from texts import ANIMAL, CAT, TROPHY  # noqa: E402

PIECES = ["▁", "▁the", "▁it", "▁was", "▁cat", "▁big", "s", "ing", *map(chr, range(33, 127))]


def byte_tokenizer():
    """GPT-2's kind: bytes, merged where a few sentences say so; no token is added."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([TROPHY, CAT, ANIMAL], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )


def piece_tokenizer():
    """T5's kind: pieces, the space before a word as ▁, </s> at the end."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces = [(piece, -1.0 - (len(piece) == 1)) for piece in dict.fromkeys(PIECES)]
    made = tokenizers.Tokenizer(models.Unigram(special + pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def write_models(root):
    """Small random models on disk: a causal one of 32 heads, and an encoder-decoder."""
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=32, vocab_size=300, n_positions=128, bos_token_id=0,
        eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    t5 = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        vocab_size=len(piece_tokenizer()), decoder_start_token_id=0, initializer_factor=1.5,
    )  # fmt: skip
    made = {
        "gpt2": (transformers.GPT2LMHeadModel(gpt2), byte_tokenizer()),
        "t5": (transformers.T5ForConditionalGeneration(t5), piece_tokenizer()),
    }
    made["t5"][0].generation_config.suppress_tokens = [0, 1, 2, 3]  # words, and no end
    for name, (model, its_tokenizer) in made.items():
        model.save_pretrained(root / name)
        its_tokenizer.save_pretrained(root / name)
