"""Models that compute attention by themselves: their own weights, and their outputs to the bit."""

import inspect

import pytest
import torch
from torch import Tensor, nn

import regard
import tiny
import zoo
from regard import Entropy, Received, Rows, TopK

EVERY_ROW = Rows(range(128))
GIVING_NONE = ("levit", "maskformer-swin", "mobilevit")
# Architectures whose attention goes through no interface, with all their weights to compare to
DENSE = [
    "bloom", "canine", "codegen", "convbert", "data2vec-vision",
    "deberta", "deberta-v2", "donut-swin", "falcon", "flaubert", "fsmt", "funnel", "git", "glpn",
    "gpt_neo", "gpt_neox_japanese", "gptj", "ibert", "imagegpt", "layoutlmv3",
    "levit", "lilt", "luke", "lxmert", "maskformer-swin", "megatron-bert", "mgp-str", "mobilevit",
    "mpnet", "mpt", "mvp", "openai-gpt", "prophetnet", "pvt", "rembert", "roformer", "speecht5",
    "squeezebert", "swin2sr", "swinv2", "tapas", "timesformer", "trocr", "visual_bert", "vitdet",
    "xglm", "xlm", "xlnet",
]  # fmt: skip


@torch.no_grad()
def unwatched(model: nn.Module, given: dict[str, Tensor]):
    torch.manual_seed(0)
    return model(**given)


@torch.no_grad()
def watched(model: nn.Module, given: dict[str, Tensor], observe=(EVERY_ROW,), **settings):
    """(the output unwatched, the output watched, what was seen)."""
    alone = unwatched(model, given)
    torch.manual_seed(0)
    with regard.watch(model, observe=observe, verify=True, **settings) as seen:
        ours = model(**given)
    return alone, ours, seen


def tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [t for part in parts if isinstance(part, dict | tuple | list | Tensor)
            for t in tensors(part)]  # fmt: skip


def assert_bits(ours, theirs) -> None:
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert pairs
    for one, other in pairs:
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def assert_seen(seen, given: list[Tensor]) -> None:
    """Each of the weights that the model gives, in this layout, is those of some layer."""
    ours = {layer.name: layer.seen[0].weights for layer in seen}
    compared = 0
    for own in given:
        alike = [w for w in ours.values() if w.shape == own.shape]
        # Rows that see nothing are 0 here, and some models give scores
        off = [
            float((w - t.masked_fill(w.sum(-1, keepdim=True) == 0, 0)).abs().max())
            for w in alike
            for t in (own, own.softmax(-1))
        ]
        compared += bool(off)
        assert min(off, default=0) < 1e-5, own.shape
    assert compared


def attentions(output) -> list[Tensor]:
    return [t for name, part in output.items() if "attentions" in name for t in tensors(part)]


@pytest.mark.sample(every=5)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", DENSE)
def test_weights_are_the_models_own(kind, padded):
    model = tiny.build(kind, attn_implementation="eager")
    given = tiny.inputs(model, padded)
    alone, ours, seen = watched(model, given)
    assert_bits(ours, alone)
    seen = [layer for layer in seen if layer.pattern]
    if kind not in GIVING_NONE:
        assert_seen(seen, attentions(unwatched(model, given | {"output_attentions": True})))


GENERATING = [
    "bloom", "codegen", "falcon", "fsmt", "gpt_neo", "gpt_neox_japanese", "gptj",
    "led", "longt5", "mpt", "mvp", "openai-gpt", "pegasus_x", "prophetnet", "rembert",
    "roformer", "speecht5", "trocr", "xglm", "xlm",
]  # fmt: skip


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("kind", GENERATING)
def test_generate_writes_the_same_tokens(kind):
    model = tiny.build(kind)
    prompt = {n: t for n, t in tiny.inputs(model).items() if not n.startswith("decoder_")}
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1)
    alone = model.generate(**prompt, **settings)
    with regard.watch(model, observe=[EVERY_ROW], verify=True) as seen:
        ours = model.generate(**prompt, **settings)
    assert torch.equal(ours, alone)
    assert all(layer.pattern and layer.q_len for layer in seen)


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "xglm"])
def test_generate_appends_a_row_a_token(kind, cache):
    """As one forward over the final sequence gives them, padding on the left."""
    model = tiny.build(kind, attn_implementation="eager")
    if cache == "static" and not model._can_compile_fullgraph:
        pytest.skip("it takes no static cache")
    ids, keep = zoo.ids(seed=2) % 60, zoo.padding(left=3)
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    settings |= {"cache_implementation": "static"} if cache == "static" else {}
    with regard.watch(model, observe=[EVERY_ROW]) as seen:
        tokens = model.generate(input_ids=ids, attention_mask=keep, **settings)[:, :-1]
    mask = nn.functional.pad(keep, (0, 4), value=1)
    whole = {"input_ids": tokens, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        whole["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    own = unwatched(model, whole | {"output_attentions": True}).attentions
    for layer, weights in zip(seen, own, strict=True):
        assert layer.q_len == tokens.shape[1]
        rows = layer.seen[0].weights
        ours = rows[..., : tokens.shape[1]]
        assert not rows[..., tokens.shape[1] :].any()
        sees = mask.bool()[:, None, :, None]
        torch.testing.assert_close(ours * sees, weights * sees, **zoo.AS_MODELS)


def test_every_observer_reads_the_models_own_weights():
    model = tiny.build("gptj")
    given = tiny.inputs(model, padded=True)
    observe = [
        TopK(3), Received(), Entropy(), regard.Map(8, 8), regard.Distances(6), regard.MaxScore(),
        regard.LogSumExp(),
    ]  # fmt: skip
    _, _, seen = watched(model, given, observe, count_padding=True)
    own = attentions(unwatched(model, given | {"output_attentions": True}))
    for layer, p in zip(seen, own, strict=True):
        top, received, entropy, pooled, distances, highest, lse = layer.seen
        ranked = p.topk(3)
        torch.testing.assert_close(top.weights, ranked.values, rtol=0, atol=1e-6)
        torch.testing.assert_close(received.sum, p.sum(2), **zoo.AS_MODELS)
        assert torch.equal(received.count, (p > 0).sum(2).int())
        exact = -torch.special.xlogy(p, p).sum(-1)
        torch.testing.assert_close(entropy.values, exact, **zoo.AS_MODELS)
        cells = p.unflatten(-1, (8, 2)).sum(-1).unflatten(2, (8, 2)).sum(3)
        torch.testing.assert_close(pooled.weights, cells, **zoo.AS_MODELS)
        near = p.diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(distances.past[..., 0], near, **zoo.AS_MODELS)
        assert not distances.future.any()
        best = (highest.values - lse.values).exp()
        torch.testing.assert_close(best, p.amax(-1), **zoo.AS_MODELS)


def test_kinds():
    for kind, cross in [("fsmt", "encoder_attn"), ("perceiver", "cross_attention"),
                        ("blip", "crossattention"), ("speecht5", "encoder_attn")]:  # fmt: skip
        model = tiny.build(kind)
        _, _, seen = watched(model, tiny.inputs(model))
        assert {layer.kind for layer in seen} == {"self", "cross"}
        for layer in seen:
            assert layer.kind == ("cross" if cross in layer.name else "self")


def test_two_streams_and_a_memory():
    """XLNet: content and query stream; mems of an earlier segment are keys before the queries."""
    model = tiny.build("xlnet")
    ids = tiny.inputs(model)["input_ids"]
    target = torch.zeros(2, 1, 16)
    target[:, :, -1] = 1
    order = torch.zeros(2, 16, 16)
    order[:, :, -1] = 1
    given = {"input_ids": ids, "perm_mask": order, "target_mapping": target}
    alone, ours, seen = watched(model, given)
    assert_bits(ours, alone)
    assert [layer.name for layer in seen][:2] == [
        f"transformer.layer.0.rel_attn{n}" for n in ("", "~2")
    ]
    own = unwatched(model, given | {"output_attentions": True}).attentions
    streams = [stream.permute(2, 3, 0, 1) if stream.shape[-1] == 4 else stream
               for pair in own for stream in pair]  # fmt: skip
    for layer, weights in zip(seen, streams, strict=True):
        torch.testing.assert_close(layer.seen[0].weights, weights, **zoo.AS_MODELS)
    mems = unwatched(model, {"input_ids": ids, "use_mems": True}).mems
    _, _, seen = watched(model, {"input_ids": ids[:, :5], "mems": mems})
    assert [(layer.q_len, layer.k_len) for layer in seen] == [(5, 21)] * 2
    assert seen[0].seen[0].queries == tuple(range(16, 21))


class Handwritten(nn.Module):
    """Attention as people write it, in one of five ways to take a softmax."""

    def __init__(self, way: str, folded: bool):
        super().__init__()
        self.attn = HandwrittenAttention(way, folded)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class HandwrittenAttention(nn.Module):
    def __init__(self, way: str, folded: bool):
        super().__init__()
        self.way, self.folded, self.n_head = way, folded, 4
        self.qkv, self.softmax = nn.Linear(32, 96), nn.Softmax(-1)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        return (q @ k.mT / 8**0.5).masked_fill(hidden, -torch.inf), v

    def forward(self, x: Tensor) -> Tensor:
        scores, v = self.scores(x)
        if self.folded:
            scores, v = scores.flatten(0, 1), v.flatten(0, 1)
        weights = {
            "F": lambda: nn.functional.softmax(scores, dim=-1),
            "torch": lambda: torch.softmax(scores, scores.dim() - 1),
            "method": lambda: scores.softmax(-1),
            "module": lambda: self.softmax(scores),
            "special": lambda: torch.special.softmax(scores, dim=-1, dtype=torch.float32),
        }[self.way]()
        out = torch.bmm(weights, v).unflatten(0, (-1, 4)) if self.folded else weights @ v
        return out.transpose(1, 2).reshape(x.shape)


def handwritten(way: str = "F", folded: bool = False) -> Handwritten:
    return zoo.seeded(lambda: Handwritten(way, folded))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("way", ["F", "torch", "method", "module", "special"])
def test_ways_to_take_a_softmax(way, folded):
    model, x = handwritten(way, folded), zoo.random(2, 7, 32)
    exact = model.attn.scores(x)[0].softmax(-1)
    alone, ours, seen = watched(model, {"x": x}, [EVERY_ROW, Received()])
    assert_bits(ours, alone)
    (layer,) = seen
    assert (layer.name, layer.kind, layer.heads, layer.q_len) == ("attn", "self", 4, 7)
    torch.testing.assert_close(layer.seen[0].weights, exact, rtol=0, atol=1e-6)
    assert torch.equal(layer.seen[1].count[0, 0], torch.arange(7, 0, -1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model, x = handwritten().to(dtype), zoo.random(2, 7, 32).to(dtype)
    exact = model.attn.scores(x)[0].double().softmax(-1)
    alone, ours, seen = watched(model, {"x": x})
    assert_bits(ours, alone)
    weights = seen[0].seen[0].weights
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(weights.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("folded", [False, True])
def test_gradients_and_dropout_are_the_unwatched(folded):
    given = {"input_ids": zoo.ids() % 60}
    for kind in ("gptj", "trocr") if folded else ("gptj",):
        model, found = tiny.build(kind).train(), []
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        for watching in (False, True):
            torch.manual_seed(0)
            with regard.watch(model, observe=[TopK(2)]) if watching else torch.enable_grad():
                model(**given)[0].square().mean().backward()
            found.append([p.grad for p in model.parameters() if p.grad is not None])
            model.zero_grad(set_to_none=True)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("folded", [False, True])
def test_edges_are_cut(folded):
    model, x = handwritten(folded=folded), zoo.random(2, 7, 32)
    scores, v = model.attn.scores(x)
    scores[:, 1, 5, 2] = -torch.inf
    weights = scores.softmax(-1)
    weights[:, 3] = 0
    right = x + (weights @ v).transpose(1, 2).reshape(x.shape)
    edges = regard.Edges([(5, 2)]) & regard.Heads([1])
    cut = [regard.Cut("attn", edges), regard.Cut("attn", regard.Heads([3]))]
    with torch.no_grad(), regard.watch(model, observe=[EVERY_ROW], cut=cut) as seen:
        ours = model(x)
    torch.testing.assert_close(ours, right)
    torch.testing.assert_close(seen[0].seen[0].weights, weights)


@pytest.mark.parametrize("folded", [False, True])
def test_effect_is_what_removal_changes(folded):
    """To first order: measured against the scalar of the model with each edge removed."""
    model, x = handwritten(folded=folded).double(), zoo.random(1, 5, 32).double()
    direction = zoo.random(1, 5, 32).double() * 1e-3
    with regard.watch(model, observe=[regard.Effect(5)]) as seen:
        alone = (model(x) * direction).sum()
        alone.backward()
    effect = seen[0].seen[0]
    for key in range(4):
        cut = [regard.Cut("attn", regard.Edges([(4, key)]) & regard.Heads([2]))]
        with torch.no_grad(), regard.watch(model, cut=cut):
            changed = (model(x) * direction).sum() - alone
        at = (effect.indices[0, 2, 4] == key).nonzero()[0, 0]
        torch.testing.assert_close(effect.effects[0, 2, 4, at], changed.detach())
