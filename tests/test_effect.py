"""Effect: against the closed form, autograd and cutting; of vectors; `look --effect`."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import regard
from cases import CASES
from regard import Causal, Effect, NormTopK, RegardError, attention
from regard.call.checked import Call
from regard.engines import reference

SMALL_CASES = [c for c in CASES if c.magnitude <= 100]


def dense(seen, k_len: int, start: int = 0) -> Tensor:
    """The effects of every edge listed, as (batch, heads, q_len, k_len)."""
    full = seen.effects.new_zeros(*seen.effects.shape[:-1], k_len + 1)
    keys = (seen.indices.long() - start).where(seen.indices >= 0, k_len)
    return full.scatter_(-1, keys, seen.effects)[..., :k_len]


def closed_form(case, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(effect, weights) of all edges: −p (dp − D) / (1 − p), with dp from autograd.

    dp is the derivative by a factor on each weight, at 1, over p: masks, GQA, softcap, biases and
    sinks are the reference's, dropout is a factor on the weight too.
    """
    tensors, request = case.exactly(torch.float64)
    call = Call.checked(*tensors, **request)
    scores = reference.scores(call)
    lse = reference.log_sum_exp(scores, call.sinks)
    blind = (lse == -torch.inf)[..., None]
    p = (scores - lse.masked_fill(blind[..., 0], 0)[..., None]).exp().masked_fill(blind, 0)
    used = p.clone()
    if call.dropout is not None:
        used = p * call.dropout.factor(reference.whole(call), call.place, p.dtype)
    used.requires_grad_()
    value = call.value.repeat_interleave(call.place.heads // call.place.kv_heads, 1)
    out = used @ value
    (dp,) = torch.autograd.grad((out * grad).sum(), used)
    if call.dropout is not None:
        dp = dp * call.dropout.factor(reference.whole(call), call.place, p.dtype)
    total = (out * grad).sum(-1, keepdim=True)
    effect = torch.where(p < 1, -p * (dp - total) / (1 - p), -total)
    return effect.masked_fill(scores == -torch.inf, 0).detach(), p


@pytest.mark.sample(every=7)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_effect_is_the_closed_form(case):
    """Every mask, bias, softcap, sink and dropout of the cases; all edges, then exact top-k."""
    tensors, request = case.exactly(torch.float64)
    place = Call.checked(*tensors, **request).place
    if not all(place.__dict__[n] for n in ("batch", "q_len", "k_len")):
        return
    rng = torch.Generator().manual_seed(2)
    shape = (place.batch, place.heads, place.q_len, tensors[2].shape[-1])
    grad = torch.randn(shape, generator=rng, dtype=torch.float64)
    truth, weights = closed_form(case, grad)
    for k in (place.k_len, 3):
        given = [t.clone().requires_grad_() for t in tensors]
        out, (seen,) = attention(*given, **request, engine="tiled", observe=[Effect(k)])
        (out * grad).sum().backward()
        if k == 3:
            best = truth.abs().sort(-1, descending=True).values[..., :3]
            listed = seen.effects.abs()[..., : best.shape[-1]]
            torch.testing.assert_close(listed, best, rtol=1e-8, atol=1e-10)
            continue
        found = dense(seen, k, place.key_start)
        # 1 − p loses digits where a weight is nearly 1: plain torch is so far off there that a bar
        # of the largest error would say nothing of the others. So each number by its own size
        sure = (1 - weights).abs() > 1e-6
        torch.testing.assert_close(found.where(sure, 0), truth.where(sure, 0), rtol=1e-8, atol=1e-9)


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.magnitude < 100], ids=str)
def test_the_kernels_effect_is_the_closed_form(case):
    """Engine cpu's own pass, in float32: what it lists, and how much."""
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    given = [t.clone().requires_grad_() for t in tensors]
    out, (seen,) = attention(*given, **request, engine="cpu", observe=[Effect(3)])
    place = Call.checked(*tensors, **request).place
    if not all(place.__dict__[n] for n in ("batch", "q_len", "k_len")):
        return
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(grad)
    truth, weights = closed_form(case, grad.double())
    best = truth.abs().sort(-1, descending=True).values[..., :3]
    # As above, by size
    sure = ((1 - weights).amin(-1) > 1e-3)[..., None]
    listed = seen.effects.abs()[..., : best.shape[-1]].double()
    torch.testing.assert_close(listed * sure, best * sure, rtol=1e-3, atol=1e-4)
    cols = (seen.indices.long() - place.key_start).clamp(min=0)
    shown = seen.indices >= 0
    torch.testing.assert_close(
        seen.weights.double(), weights.gather(-1, cols) * shown, rtol=1e-4, atol=1e-5
    )


def test_effect_is_the_derivative_of_removing_an_edge():
    """A whole model, not only one layer: the change by ε of an edge's removal, as ε goes to 0.

    A row that moves by ε towards what it is without the edge; the scalar's derivative there is
    the effect. Two layers and a nonlinear scalar.
    """
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    maps = [torch.randn(8, 8, dtype=torch.float64) * 0.5 for _ in range(6)]

    def run(first):
        hidden = x
        for layer in range(2):
            query, key, value = (hidden @ m for m in maps[3 * layer : 3 * layer + 3])
            hidden = hidden + first(layer, query, key, value)
        return hidden.tanh().square().sum()

    x.requires_grad_()
    seen = []

    def observed(layer, *tensors):
        out, (effect,) = attention(*tensors, mask=Causal(), observe=[Effect(6)])
        seen.append(effect)
        return out

    run(observed).backward()
    for layer, head, i, j in ((0, 0, 3, 1), (0, 1, 5, 5), (1, 1, 4, 0), (1, 0, 0, 0)):
        mask = Causal() & ~(regard.Edges([(i, j)]) & regard.Heads([head]))

        def moved(epsilon, at=layer, mask=mask):
            def attend(number, *tensors):
                out = attention(*tensors, mask=Causal())
                if number == at:
                    out = out + epsilon * (attention(*tensors, mask=mask) - out)
                return out

            return float(run(attend).detach())

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        found = dense(seen[layer], 6)[0, head, i, j]
        assert float(found) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("scalars", [6, 20], ids=["fewer than v_dim", "more"])
def test_norm_is_the_length_over_copies_and_passes(scalars):
    """Several scalars at once, or one after another: the root of the sum of their squares."""
    torch.manual_seed(0)
    one = [torch.randn(1, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    grads = torch.randn(scalars, 4, 7, 8, dtype=torch.float64)

    def effects(grad):
        given = [t.clone().requires_grad_() for t in one]
        out, (seen,) = attention(*given, mask=Causal(), observe=[Effect(7)])
        (out * grad).sum().backward()
        return dense(seen, 7)

    truth = torch.cat([effects(grad[None]) for grad in grads]).square().sum(0, True).sqrt()
    given = [t.expand(2, -1, -1, -1).clone().requires_grad_() for t in one]
    observed = [Effect(7, norm=True), Effect(2, norm=True)]
    out, (seen, few) = attention(*given, mask=Causal(), observe=observed)
    for number, some in enumerate(grads.split(2)):
        (out * some).sum().backward(retain_graph=2 * number + 2 < scalars)
    torch.testing.assert_close(dense(seen, 7), truth, rtol=1e-10, atol=1e-12)
    best = truth.sort(-1, descending=True).values[..., :2]
    torch.testing.assert_close(few.effects, best, rtol=1e-10, atol=1e-12)


def test_norm_needs_copies_without_dropout():
    tensors = [torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3)]
    with pytest.raises(RegardError, match="copies of one input"):
        attention(*tensors, observe=[Effect(2, norm=True)])
    copies = [t[:1].expand(2, -1, -1, -1) for t in tensors]
    with pytest.raises(RegardError, match="takes no dropout"):
        attention(*copies, dropout=0.1, observe=[Effect(2, norm=True)])


def test_not_ready_before_backward_and_not_without_gradients():
    zoo = pytest.importorskip("zoo", reason="needs transformers")
    model, inputs = zoo.FAMILIES[0].build(), zoo.FAMILIES[0].inputs()
    with regard.watch(model, observe=[Effect(2)]) as seen:
        out = model(**inputs).last_hidden_state
    assert not seen[0].seen[0].ready
    for name in ("indices", "effects", "weights"):
        with pytest.raises(RegardError, match=r"no effect yet: call backward\(\)"):
            getattr(seen[0].seen[0], name)
    out.sum().backward()
    assert all(layer.seen[0].ready for layer in seen)
    assert seen[0].seen[0].effects.shape == (2, 4, 11, 2)
    with (
        pytest.raises(RegardError, match="Effect needs gradients"),
        torch.no_grad(),
        regard.watch(model, observe=[Effect(2)]),
    ):
        model(**inputs)


@pytest.mark.parametrize("name", ["BERT", "Llama", "GPT-2", "T5"])
def test_norm_top_k_uses_the_model_s_projection(name):
    """weight · ‖W_O v‖ against the model's own: each head's share of what W_O adds."""
    zoo = pytest.importorskip("zoo", reason="needs transformers")
    family = {str(f): f for f in zoo.FAMILIES}[name]
    model, inputs = family.build(), family.inputs()
    where = {
        "BERT": ("encoder.layer.0.attention.self", "value",
                 "encoder.layer.0.attention.output.dense"),
        "Llama": ("model.layers.0.self_attn", "v_proj", "model.layers.0.self_attn.o_proj"),
        "GPT-2": ("transformer.h.0.attn", "c_attn", "transformer.h.0.attn.c_proj"),
        "T5": ("decoder.block.0.layer.1.EncDecAttention", "v",
               "decoder.block.0.layer.1.EncDecAttention.o"),
    }  # fmt: skip
    layer, made, projection = where[name]
    values = []
    hook = model.get_submodule(f"{layer}.{made}").register_forward_hook(
        lambda _, __, out: values.append(out.detach())
    )
    with torch.no_grad(), regard.watch(model, observe=[NormTopK(20)], layers=[layer]) as seen:
        model(**inputs)
    hook.remove()
    weights = zoo.eager_attentions(model, inputs)[layer].exact
    value = values[0][..., -32:] if name == "GPT-2" else values[0]
    value = value.unflatten(-1, (-1, 8)).transpose(1, 2)
    value = value.repeat_interleave(4 // value.shape[1], 1)
    matrix = model.get_submodule(projection).weight.detach()
    matrix = (matrix.T if name == "GPT-2" else matrix).unflatten(1, (4, 8))
    truth = weights * torch.einsum("mhd,bhkd->bhkm", matrix, value).norm(dim=-1)[:, :, None]
    (found,) = seen[layer].seen
    full = truth.new_zeros(*truth.shape[:-1], truth.shape[-1] + 1)
    keys = found.indices.long().where(found.indices >= 0, truth.shape[-1])
    full.scatter_(-1, keys, found.norms)
    torch.testing.assert_close(full[..., :-1], truth, rtol=1e-4, atol=1e-5)
    assert torch.all(found.norms.diff(dim=-1) <= 0)


# The ranking of links


pytest.importorskip("click", reason='needs pip install "regard[look]"')
from click.testing import CliRunner  # noqa: E402
from rich.cells import cell_len  # noqa: E402

from regard.cli import main  # noqa: E402

ANIMAL = "The animal didn't cross the road because it was tired"


def run(*arguments):
    result = CliRunner().invoke(main, ["look", *arguments], env={"COLUMNS": "80"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.slow
def test_all_directions_are_exact():
    """A link's effect on a vector, from as many directions as it has, is the first-order change."""
    from regard.analysis.effect import effects
    from regard.analysis.probe import Probe
    from regard.analysis.text_model import load

    probe = Probe(load(), "The cat sat because it was tired")
    word = next(i for i, w in enumerate(probe.words) if w.text == "it")
    found = effects(probe, word, top=6)
    few = effects(probe, word, top=6, directions=128)
    assert (found.directions, found.width, few.directions) == (384, 384, 128)
    assert found.links[0].effect == pytest.approx(few.links[0].effect, rel=0.3)
    assert [link[:4] for link in few.links[:2]] == [link[:4] for link in found.links[:2]]
    # In the last layer all is linear up to the norms after it: cut for real, and compare
    last = next(link for link in found.links if link.layer == 5)
    cut = regard.Cut(5, regard.Edges([(last.source, last.target)]) & regard.Heads([last.head]))
    with torch.no_grad():
        with probe.running() as before:
            pass
        with probe.running(cut=[cut]) as after:
            pass
    true = float((after.final - before.final)[0, word].norm())
    assert last.effect == pytest.approx(true, rel=0.25)
    assert all(p.requires_grad for p in probe.model.parameters())
    assert all(p.grad is None for p in probe.model.parameters())


@pytest.mark.slow
def test_the_command_ranks_links():
    result = run(ANIMAL, "--effect", "--from", "it", "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["effect"]
    assert (found["target"], found["word"]) == ("final vector", "it")
    first = found["links"][0]
    assert [first[n] for n in ("layer", "head", "from", "to")] == [5, 11, "it", "animal"]
    assert first["weight"] == pytest.approx(0.65, abs=0.005)
    assert first["value"] > 0
    sizes = [link["effect"] for link in found["links"]]
    assert sizes == sorted(sizes, reverse=True)
    hidden = run(ANIMAL, "--effect", "--from", "it", "--no-special", "--layer", "5", "--json")
    links = json.loads(hidden.stdout)["effect"][0]["links"]
    assert {link["layer"] for link in links} == {5}
    assert not {link["to"] for link in links} & {"[CLS]", "[SEP]"}
    page = run(ANIMAL, "--effect", "--from", "it").stdout
    assert max(map(cell_len, page.splitlines())) <= 80
    assert "it → animal" in page
    assert "none is truer" in " ".join(page.split())


def test_effect_on_the_next_token():
    """Signed, and the first-order change of the log-probability that cutting makes."""
    import test_cut
    from regard.analysis.effect import effects
    from regard.analysis.probe import Probe

    reader = test_cut.writer()
    probe = Probe(reader, "the cat sat on the mat it sat")
    found = effects(probe, top=200)
    with torch.no_grad(), probe.running() as before:
        logs = before.logits[0].log_softmax(-1)
    assert found.size == pytest.approx(float(logs.max()), abs=1e-5)
    assert {link.effect > 0 for link in found.links} == {True, False}
    assert len(found.links) > 20
    small = [link for link in found.links if abs(link.effect) > 0.001 and link.weight < 0.05][:12]
    assert small, "some edges are weak enough for the first order to hold"
    for link in small:
        cut = regard.Cut(
            f"model.layers.{link.layer}.*",
            regard.Edges([(link.source, link.target)]) & regard.Heads([link.head]),
        )
        with torch.no_grad(), probe.running(cut=[cut]) as after:
            true = float(after.logits[0].log_softmax(-1)[logs.argmax()] - logs.max())
        assert link.effect == pytest.approx(true, rel=0.3, abs=0.003)


def test_effect_refuses_what_it_cannot_measure():
    assert "--from" in run(ANIMAL, "--effect").stderr
    assert "leave --generate out" in run(ANIMAL, "--effect", "--generate", "3").stderr


@pytest.mark.slow
def test_effect_finds_what_matters(shared):
    """One sentence of the benchmark, of the edges with a weight above 0.1: each cut by itself."""
    path = Path(__file__).resolve().parents[1] / "benchmarks/effect.py"
    spec = importlib.util.spec_from_file_location("effect_benchmark", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.LEAST = 0.1
    from regard.analysis.text_model import load

    reader = load()
    text, pronoun = bench.sentences(shared / "data/dpr/test.c.txt", 2)[1]
    found = bench.measure(reader, bench.eager(reader), text, pronoun)
    assert found.effect >= 16
    assert found.effect > found.weight
