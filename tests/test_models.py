"""`regard.models`: shapes, what each mixer may see, decoding by states as without."""

from __future__ import annotations

import pytest
import torch

from regard import Padding, RegardError, TopK
from regard.models import (
    MIXERS,
    LanguageModel,
    ModelConfig,
    RecurrentTranslator,
    TextEncoder,
    Translator,
)

POSITIONS = ("rotary", "learned", "sinusoidal", "alibi", "none")
TWO_WAY = ("softmax", "window", "linear", "lstm", "gru", "rnn")


def tiny(**more) -> ModelConfig:
    return ModelConfig(**({"vocab": 19, "dim": 16, "heads": 2, "depth": 2, "window": 3} | more))


def drawn(*shape, low=3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, 19, shape, generator=generator)


def made(model, config):
    torch.manual_seed(0)
    return model(config).eval()


@pytest.mark.parametrize("mixer", [*MIXERS, "window softmax"])
def test_a_token_knows_the_past_alone(mixer):
    model = made(LanguageModel, tiny(mixer=mixer)).double()
    tokens = drawn(2, 9)
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] - 2) % 16 + 3
    a, b = model(tokens), model(other)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().min(-1).values.max() > 1e-6


@pytest.mark.sample(1)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_states_give_what_one_call_gives(mixer, positions):
    model = made(LanguageModel, tiny(mixer=mixer, positions=positions)).double()
    tokens = drawn(2, 9)
    states = model.states()
    with torch.no_grad():
        parts = [model(part, states=states) for part in tokens.split([4, 1, 1, 3], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens))
    assert {state.length for state in states} == {9}


@pytest.mark.parametrize("mixer", MIXERS)
def test_states_follow_their_rows(mixer):
    model = made(LanguageModel, tiny(mixer=mixer)).double()
    tokens, rows = drawn(3, 6), torch.tensor([2, 0, 0])
    with torch.no_grad():
        states = model.states()
        model(tokens[:, :5], states=states)
        for state in states:
            state.select(rows)
        after = model(tokens[rows, 5:], states=states)
        torch.testing.assert_close(after, model(tokens[rows])[:, 5:])


@pytest.mark.parametrize("mixer", TWO_WAY)
def test_an_encoder_sees_both_sides_but_no_padding(mixer):
    model = made(TextEncoder, tiny(mixer=mixer)).double()
    tokens = drawn(1, 9)
    keep = torch.arange(9)[None] < 6
    masked = model(tokens, mask=Padding(keep))[:, :6]
    torch.testing.assert_close(masked, model(tokens[:, :6]))
    other = tokens.clone()
    other[:, 2] = tokens[:, 2] % 16 + 3
    moved = (model(tokens) - model(other)).abs().amax(-1)[0]
    assert moved[1] > 0
    assert moved[3] > 0


def translators():
    for mixer in ("softmax", "window", "linear"):
        yield pytest.param(Translator, {"mixer": mixer}, id=mixer)
    for mixer in ("delta", "gated-delta", "gla"):
        yield pytest.param(Translator, {"mixer": mixer, "encoder_mixer": "softmax"}, id=mixer)
    for mixer in ("lstm", "gru", "rnn"):
        for cross in ("bahdanau", "none"):
            config = {"mixer": mixer, "cross": cross}
            yield pytest.param(RecurrentTranslator, config, id=f"{mixer}-{cross}")


@pytest.mark.parametrize("kind, config", translators())
def test_a_translator_by_steps_pads_and_selects(kind, config):
    model = made(kind, tiny(pad=0, **config)).double()
    source, target = drawn(2, 7), drawn(2, 5)
    source[1, 4:] = 0
    with torch.no_grad():
        whole = model(target, source)
        alone = model(target[1:], source[1:, :4])
        torch.testing.assert_close(whole[1:], alone)
        state = model.begin(source)
        parts = [model.step(target[:, :2], state), model.step(target[:, 2:4], state)]
        torch.testing.assert_close(torch.cat(parts, 1), whole[:, :4])
        rows = torch.tensor([1, 1, 0])
        state.select(rows)
        torch.testing.assert_close(model.step(target[rows, 4:], state), whole[rows, 4:])


def test_a_translator_reads_its_source():
    target = drawn(1, 4)
    for kind, config in [p.values for p in translators()]:
        model = made(kind, tiny(**config)).double()
        a, b = (model(target, drawn(1, 6) - n) for n in (0, 1))
        assert (a - b).abs().max() > 1e-6, config


def test_observers_see_own_and_cross_attention():
    model = made(Translator, tiny())
    _, seen = model(drawn(2, 5), drawn(2, 7), observe=[TopK(3)])
    assert seen.decoder[1].cross[0].indices.shape == (2, 2, 5, 3)
    assert seen.decoder[1].own[0].indices.shape == (2, 2, 5, 3)
    assert seen.encoder[0].own[0].indices.shape == (2, 2, 7, 3)
    assert seen.encoder[0].cross == ()


def test_weights_of_bahdanau_sum_to_one_over_the_source():
    model = made(RecurrentTranslator, tiny(mixer="lstm", cross="bahdanau", pad=0))
    source = drawn(2, 7)
    source[1, 4:] = 0
    _, weights = model(drawn(2, 5), source, return_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    assert (weights[1, :, 4:] == 0).all()


def test_gradients_reach_every_parameter():
    for kind, config in [(LanguageModel, {"mixer": m}) for m in MIXERS] + [
        p.values for p in translators()
    ]:
        model = made(kind, tiny(**config))
        given = (drawn(2, 6),) if kind is LanguageModel else (drawn(2, 6), drawn(2, 5))
        model(*given).square().mean().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not without, (config, without)


def test_a_config_goes_through_json():
    config = tiny(mixer="window softmax", kv_heads=1, pad=0)
    assert ModelConfig.from_json(config.to_json() | {"other": 1}) == config
    assert config.mixers(3) == ["window", "softmax", "window"]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"mixer": "mamba"}, "mixer is 'mamba'; give softmax"),
        ({"positions": "polar"}, "positions is 'polar'; give rotary"),
        ({"heads": 3}, "heads 3 do not divide dim 16"),
        ({"depth": 0}, "depth is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_what_is_wrong_is_said(given, said):
    with pytest.raises(RegardError, match=said):
        tiny(**given)


def test_one_way_mixers_make_no_encoder():
    with pytest.raises(RegardError, match="delta reads one way"):
        TextEncoder(tiny(mixer="delta"))
