"""`generate` and `beam_search`: by caches as without, against brute force, whatever the batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from regard import RegardError
from regard.models import (
    MIXERS,
    LanguageModel,
    RecurrentTranslator,
    Translator,
    beam_search,
    generate,
)
from test_models import drawn, made, tiny, translators

BOS, EOS = 1, 2


def translator(kind, config, *, vocab=19, seed=0):
    """Drawn anew, with logits far enough apart that targets end at all lengths."""
    torch.manual_seed(seed)
    made_by = tiny(**{"pad": 0, "bos": BOS, "eos": EOS, "tie": False, "vocab": vocab} | config)
    model = kind(made_by).double().eval()
    with torch.no_grad():
        model.head.weight *= 3
    return model


def two_sources(vocab=19):
    source = drawn(2, 7) % (vocab - 3) + 3
    source[1, 4:] = 0
    return source


@pytest.mark.sample(1)
@pytest.mark.parametrize("mixer", [*MIXERS, "window softmax"])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.5, "top_k": 7, "seed": 4}], ids=str)
def test_a_cache_gives_the_same_tokens(mixer, how):
    model = made(LanguageModel, tiny(mixer=mixer)).double()
    tokens, told = drawn(2, 5), []
    cached = generate(model, tokens, 8, step=told.append, **how)
    assert torch.equal(cached, generate(model, tokens, 8, cache=False, **how))
    assert torch.equal(cached[:, :5], tokens)
    assert torch.equal(torch.stack(told, 1), cached[:, 5:])
    assert len(cached.unique()) > 4


def test_greedy_takes_the_likeliest_and_no_notice_of_the_batch():
    model = made(LanguageModel, tiny()).double()
    both = generate(model, drawn(2, 5), 6)
    logits = model(both[:, :-1])[:, 4:]
    assert torch.equal(both[:, 5:], logits.argmax(-1))
    assert torch.equal(both[1:], generate(model, drawn(2, 5)[1:], 6))


def test_draws_follow_the_seed_and_the_weights():
    model = made(LanguageModel, tiny(positions="none")).double()
    tokens = drawn(1, 5).expand(4000, -1)
    with torch.no_grad():
        logits = model(tokens[:1])[0, -1]
    drawn_tokens = generate(model, tokens, 1, temperature=0.7, top_k=4, seed=3)[:, -1]
    best = logits.topk(4)
    expected = (best.values / 0.7).softmax(-1)
    shares = (drawn_tokens[:, None] == best.indices).double().mean(0)
    assert torch.isin(drawn_tokens, best.indices).all()
    # Five standard deviations of a share
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()
    again = generate(model, tokens, 1, temperature=0.7, top_k=4, seed=3)
    assert torch.equal(drawn_tokens, again[:, -1])


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind, config", translators())
@pytest.mark.parametrize("beams", [1, 3])
def test_beams_by_steps_are_beams_without(kind, config, beams):
    model, source = translator(kind, config), two_sources()
    found = beam_search(model, source, beams=beams)
    assert found == beam_search(model, source, beams=beams, cache=False)
    assert not any(EOS in words for words in found)


def greedy(model, source, limit):
    """The likeliest token after each, without any of what is tested."""
    target = [BOS]
    while len(target) <= limit:
        with torch.no_grad():
            best = int(model(torch.tensor([target]), source)[0, -1].argmax())
        if best == model.config.eos:
            break
        target.append(best)
    return target[1:]


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("kind, config", translators())
def test_one_beam_is_greedy(kind, config):
    lengths, source = set(), two_sources()[:1]
    for seed in range(6):
        run = greedy(translator(kind, config | {"eos": 0}, seed=seed), source, 7)
        for eos in set(run):  # the same weights, ended by each of the tokens in turn
            model = translator(kind, config | {"eos": eos}, seed=seed)
            expected = run[: run.index(eos)]
            assert beam_search(model, source, beams=1, limit=7) == [expected]
            lengths.add(len(expected))
    assert len(lengths) > 1


@pytest.mark.sample(0)
@pytest.mark.parametrize("mixer, cross", [("softmax", "attention"), ("gru", "bahdanau")])
def test_enough_beams_find_the_best_of_all(mixer, cross):
    """Of every sequence of three other tokens that ends within the limit."""
    kind = Translator if cross == "attention" else RecurrentTranslator
    limit, others, lengths = 4, (0, 1, 3), set()
    everything = [w for n in range(limit) for w in itertools.product(others, repeat=n)]
    source = torch.tensor([[3, 1, 3, 3]])
    for seed, penalty in itertools.product(range(5), (0.0, 1.0)):
        model = translator(kind, {"mixer": mixer, "cross": cross}, vocab=4, seed=seed)

        def score(words, model=model, penalty=penalty):
            with torch.no_grad():
                logs = model(torch.tensor([[BOS, *words]]), source)[0].log_softmax(-1)
            total = logs[torch.arange(len(words) + 1), torch.tensor([*words, EOS])].sum()
            return float(total) / (len(words) + 1) ** penalty

        best = list(max(everything, key=score))
        beams = {"beams": 3**limit, "limit": limit, "length_penalty": penalty}
        assert beam_search(model, source, **beams) == [best]
        lengths.add(len(best))
    assert len(lengths) > 1


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("kind, config", translators())
def test_what_stands_beside_a_source_changes_nothing(kind, config):
    """Neither padding, nor a search that ends later, nor the longer limit of a longer source."""
    source = two_sources(6)
    model = translator(kind, config, vocab=6)
    both = beam_search(model, source, beams=3)
    alone = [beam_search(model, one, beams=3) for one in (source[:1], source[1:, :4])]
    assert both == [one for (one,) in alone]


def test_what_never_ends_is_given_up_to_the_limit():
    model, source = translator(Translator, {}), two_sources()
    model.head.weight.data[EOS] = 0
    model.head.register_forward_hook(lambda _, __, out: out.index_fill(
        -1, torch.tensor([EOS]), -torch.inf))  # fmt: skip
    for beams in (1, 3):
        found = beam_search(model, source, beams=beams)
        assert [len(words) for words in found] == [24, 18]
    assert beam_search(model, source[:0]) == []


def no_numbers():
    model = translator(Translator, {})
    model.head.weight.data.fill_(torch.nan)
    return model


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda lm, tr: generate(lm, drawn(1, 0), 3), "give at least one token"),
        (lambda lm, tr: generate(lm, drawn(1, 2), -1), "count -1"),
        (lambda lm, tr: generate(lm, drawn(1, 2), 1, temperature=-1.0), "temperature -1.0"),
        (lambda lm, tr: generate(lm, drawn(1, 2), 1, top_k=0), "top_k 0"),
        (lambda lm, tr: generate(lm.train(), drawn(1, 2), 1), "call eval"),
        (lambda lm, tr: beam_search(tr, drawn(1, 2), beams=0), "beams 0"),
        (lambda lm, tr: beam_search(tr, drawn(1, 2), limit=0), "limit 0"),
        (lambda lm, tr: beam_search(tr, drawn(1, 2), length_penalty=-1.0), "length_penalty -1.0"),
        (lambda lm, tr: beam_search(tr.train(), drawn(1, 2)), "call eval"),
        (lambda lm, tr: beam_search(made(Translator, tiny()), drawn(1, 2)), "no bos and eos"),
        (lambda lm, tr: beam_search(no_numbers(), drawn(1, 2)), "no numbers"),
    ],
)
def test_what_cannot_be_decoded_is_said(call, said):
    with pytest.raises(RegardError, match=said):
        call(made(LanguageModel, tiny()), translator(Translator, {}))
