"""Our models as transformers has them: saved, loaded, written on."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

import regard.huggingface  # noqa: F401  it registers them
from regard import RegardError
from regard.lab.training.tokenizer import save_tokenizer, train_tokenizer
from regard.models import (
    LanguageModel,
    ModelConfig,
    TextEncoder,
    Translator,
    beam_search,
    generate,
)
from regard.nn.models.saved import load_model, save_model

TEXTS = ["the cat sat on the mat", "le chat est sur le tapis"]


@pytest.fixture(scope="module", params=[LanguageModel, TextEncoder, Translator])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param.kind)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 300, ends=request.param is not LanguageModel)
    vocab = tokenizer.get_vocab_size()
    config = ModelConfig(vocab=vocab, dim=16, heads=2, depth=2, pad=0, bos=1, eos=2)
    save_model(request.param(config), path)
    save_tokenizer(tokenizer, path)
    return path


def test_transformers_gives_the_same_numbers(folder, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("the cat sat", return_tensors="pt").input_ids
    ours, theirs = load_model(folder), AutoModel.from_pretrained(folder).eval()
    theirs.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    target = torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        if isinstance(ours, Translator):
            got = theirs(input_ids=ids, decoder_input_ids=target).logits
            expected = ours(target, ids)
            assert torch.equal(expected, again(target, ids))
        else:
            out = theirs(input_ids=ids)
            got = out.logits if isinstance(ours, LanguageModel) else out.last_hidden_state
            expected = ours(ids)
            assert torch.equal(expected, again(ids))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("mixer", ["softmax", "window", "linear", "gru"])
def test_transformers_writes_the_same_tokens(tmp_path, mixer):
    """Greedy, by its own loop: without caches what ours gives with them."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = ModelConfig(vocab=40, dim=16, heads=2, depth=2, mixer=mixer, window=3, tie=False,
                         pad=0, bos=1, eos=2)  # fmt: skip
    ids, how = torch.tensor([[5, 6, 7, 9]]), {"max_new_tokens": 9, "do_sample": False}
    save_model(LanguageModel(config).eval(), tmp_path / "lm")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    expected = generate(load_model(tmp_path / "lm"), ids, 9)[0].tolist()
    assert theirs.generate(ids, **how)[0].tolist() == upto(expected, 2)
    assert len(set(expected)) > 5
    if mixer == "gru":  # its translators: test_own_recurrent_translators.py
        return
    save_model(Translator(config).eval(), tmp_path / "tr")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "tr").eval()
    (expected,) = beam_search(load_model(tmp_path / "tr"), ids, beams=1, limit=9)
    found = theirs.generate(ids, **how)[0].tolist()
    assert found[0] == 1
    assert [one for one in found[1:] if one != 2] == expected
    assert expected


def upto(tokens, end):
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.mark.parametrize("given", [{}, {"mixer": "gru"}, {"positions": "learned"}], ids=str)
def test_padding_on_the_left_is_right_or_refused(tmp_path, given):
    from transformers import AutoModelForCausalLM

    config = ModelConfig(vocab=40, dim=16, heads=2, depth=2, pad=0, **given)
    save_model(LanguageModel(config).eval(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 3]])
    if given:
        with pytest.raises(RegardError, match="pad on the right"):
            model(ids, attention_mask=ids != 0)
        return
    with torch.no_grad():
        padded = model(ids, attention_mask=ids != 0).logits
        torch.testing.assert_close(padded[:1, 2:], model(ids[:1, 2:]).logits)
