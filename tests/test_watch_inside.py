"""A Hugging Face model inside another module is watched as it is alone, under its name there."""

import os
import re
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface

import regard
import regard.huggingface
import zoo
from regard import Cut, Edges, RegardError, Rows, TopK
from test_watch_models import BY_NAME, EVERY_KEY, dense, patched_state

EVERY_ROW = Rows(range(20))


def llama(implementation: str = "sdpa") -> nn.Module:
    return BY_NAME["Llama"].build(attn_implementation=implementation)


def bert() -> nn.Module:
    return BY_NAME["BERT"].build()


class Embedder(nn.Module):
    """As sentence encoders are: means of what the model inside gives."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.backbone(**inputs)[0].mean(1)


class Encode(nn.Module):
    """A link in a chain that hands on a dictionary."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, features: dict) -> dict:
        return features | {"hidden": self.model(**features)[0]}


class Pool(nn.Module):
    def forward(self, features: dict) -> Tensor:
        return features["hidden"].mean(1)


class Chain(nn.Sequential):
    """As SentenceTransformer is: a chain, run without calling it as a module."""

    def encode(self, **inputs: Tensor) -> Tensor:
        return self.forward(inputs)


class LowRank(nn.Module):
    """A linear layer with an adapter beside it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.A, self.B = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.B(self.A(x))


class Adapted(nn.Module):
    """As PeftModel is: two shells around a model whose projections are replaced."""

    def __init__(self, model: nn.Module):
        super().__init__()
        for block in model.model.layers:
            block.self_attn.q_proj = LowRank(block.self_attn.q_proj)
        self.base_model = nn.Module()
        self.base_model.model = model

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def forward(self, **inputs):
        return self.base_model.model(**inputs)


# how it stands there, the prefix of its names, how it is run
AROUND = {
    "a module": (Embedder, "backbone.", lambda outer, inputs: outer(**inputs)),
    "a chain": (
        lambda model: Chain(Encode(model), Pool()), "0.model.",
        lambda outer, inputs: outer.encode(**inputs),
    ),
    "an adapter": (Adapted, "base_model.model.", lambda outer, inputs: outer(**inputs)[0]),
    "DataParallel": (
        lambda model: nn.DataParallel(model), "module.", lambda outer, inputs: outer(**inputs)[0],
    ),
    "a list of models": (
        lambda model: nn.ModuleDict({"all": nn.ModuleList([nn.Identity(), model])}), "all.1.",
        lambda outer, inputs: outer["all"][1](**inputs)[0],
    ),
}  # fmt: skip


def own_attention(module, query, key, value, attention_mask, **more):
    """A function that a user registers: transformers makes no mask for it."""
    call = hf.integrations.sdpa_attention.sdpa_attention_forward
    return call(module, query, key, value, attention_mask, **more)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "regard", "own"])
@pytest.mark.parametrize("wrap, prefix, run", AROUND.values(), ids=AROUND)
def test_as_alone(wrap, prefix, run, implementation, monkeypatch):
    if implementation == "own":
        monkeypatch.setitem(AttentionInterface._global_mapping, "own", own_attention)
    if implementation == "flex_attention":  # uncompiled
        monkeypatch.setattr(torch, "compile", lambda function=None, **_: function)
    outer, inputs = wrap(llama(implementation)), BY_NAME["Llama"].inputs()
    if implementation in ("own", "flex_attention"):
        inputs = {"input_ids": inputs["input_ids"]}
    inner = outer.get_submodule(prefix[:-1])
    before = patched_state(outer)
    with torch.no_grad():
        alone = run(outer, inputs)
        with regard.watch(inner, observe=[EVERY_ROW]) as right:
            inner(**inputs)
        with regard.watch(outer, observe=[EVERY_ROW], verify=True) as seen:
            watched = run(outer, inputs)
    assert torch.equal(watched, alone)
    assert patched_state(outer) == before
    assert [x.name for x in seen] == [f"{prefix}model.layers.{i}.self_attn" for i in range(2)]
    for ours, theirs in zip(seen, right, strict=True):
        assert (ours.index, ours.kind, ours.q_len) == (theirs.index, theirs.kind, theirs.q_len)
        assert torch.equal(ours.seen[0].weights, theirs.seen[0].weights)


@pytest.mark.parametrize("wrap, prefix, run", AROUND.values(), ids=AROUND)
def test_layers_are_numbered_by_their_own_list(wrap, prefix, run):
    """Whatever numbers stand before it in the name."""
    outer, inputs = wrap(llama()), BY_NAME["Llama"].inputs()
    for which in ([1], [-1], ["*layers.1*"]):
        with torch.no_grad(), regard.watch(outer, observe=[TopK(2)], layers=which) as seen:
            run(outer, inputs)
        assert [layer.name for layer in seen] == [f"{prefix}model.layers.1.self_attn"]
        assert [layer.index for layer in seen] == [1]
    with torch.no_grad():
        alone = run(outer, inputs)
        with regard.watch(outer, cut=[Cut(1, Edges([(10, 9)]))]):
            cut = run(outer, inputs)
    assert not torch.equal(cut, alone)
    with (
        pytest.raises(RegardError, match=re.escape(f"{prefix}model.layers.0.self_attn")),
        regard.watch(outer, layers=[9]),
    ):
        run(outer, inputs)


class Answering(nn.Module):
    """A retriever and a generator; the retriever reads twice."""

    def __init__(self):
        super().__init__()
        self.retriever, self.generator = bert(), BY_NAME["T5"].build()
        self.head = zoo.plain()

    def forward(self, question: dict, text: dict) -> tuple[Tensor, ...]:
        both = [self.retriever(**question)[0], self.retriever(**text)[0]]
        return (*both, self.generator(**zoo.seq2seq())[0], self.head(both[0]))


def test_several_models():
    """Each by its names, in the order of the module; one that runs twice is told apart by runs."""
    model, texts = Answering(), [{"input_ids": zoo.ids()}, {"input_ids": zoo.ids(7, seed=1)}]
    with torch.no_grad():
        alone = model(*texts)
        with regard.watch(model, observe=[EVERY_KEY], verify=True) as seen:
            watched = model(*texts)
        with regard.watch(model.generator, observe=[EVERY_KEY]) as generator:
            model.generator(**zoo.seq2seq())
        with regard.watch(model.retriever, observe=[EVERY_KEY]) as retriever:
            model.retriever(**texts[1])
    assert all(map(torch.equal, watched, alone))
    layers = {layer.name: layer for layer in seen}
    blocks = [f"retriever.encoder.layer.{i}.attention.self{run}" for i in range(2)
              for run in ("", "#2")]  # fmt: skip
    assert list(layers) == [
        *blocks, *(f"generator.{x.name}" for x in generator), "head.blocks.0", "head.blocks.1",
    ]  # fmt: skip
    for layer in generator:
        ours = layers[f"generator.{layer.name}"]
        assert (ours.kind, ours.index) == (layer.kind, layer.index)
        assert torch.equal(dense(ours.seen[0], layer.k_len), dense(layer.seen[0], layer.k_len))
    for layer in retriever:
        ours = layers[f"retriever.{layer.name}#2"]
        assert (ours.index, ours.k_len) == (layer.index, 7)
        assert torch.equal(dense(ours.seen[0], 7), dense(layer.seen[0], 7))
    with torch.no_grad(), regard.watch(model, observe=[EVERY_KEY], layers="generator.*") as seen:
        model(*texts)
    assert len(seen) == len(generator)


def test_generation_inside():
    outer, prompt = Adapted(llama()), BY_NAME["Llama"].inputs()
    settings = dict(max_new_tokens=4, do_sample=False)
    alone = outer.generate(**prompt, **settings)
    with regard.watch(outer, observe=[EVERY_KEY], keep_qk=True) as seen:
        watched = outer.generate(**prompt, **settings)
    assert torch.equal(watched, alone)
    assert [layer.q_len for layer in seen] == [zoo.LENGTH + 3] * 2
    names = [layer.name for layer in seen.recording().layers]
    assert names == [f"base_model.model.model.layers.{i}.self_attn" for i in range(2)]


def test_layers_without_their_model():
    """Blocks that somebody took out of a model and put into one of theirs."""
    whole = llama("eager")
    block, x = whole.model.layers[1], zoo.random(2, 5, 32)
    places = whole.model.rotary_emb(x, torch.arange(5)[None])
    outer = nn.ModuleDict({"mine": block})
    with torch.no_grad(), regard.watch(outer, observe=[EVERY_ROW], verify=True) as seen:
        block(x, position_embeddings=places)
    assert [layer.name for layer in seen] == ["mine.self_attn"]
    with torch.no_grad():
        right = block.self_attn(block.input_layernorm(x), places, None)[1]
    torch.testing.assert_close(seen[0].seen[0].weights, right)


def test_what_cannot_be_read_as_source_is_watched():
    """A class of a notebook or of `python -c` has no source file."""
    made: dict = {"nn": nn, "__name__": "nowhere"}
    exec(
        "class Mine(nn.Module):\n"
        "    def __init__(self, m):\n        super().__init__()\n        self.m = m\n"
        "    def forward(self, **given):\n        return self.m(**given)[0]\n",
        made,
    )
    for model in (llama("eager"), llama("sdpa")):
        outer = made["Mine"](model)
        with torch.no_grad(), regard.watch(outer, observe=[TopK(2)], verify=True) as seen:
            outer(**BY_NAME["Llama"].inputs())
        assert [layer.name for layer in seen] == [f"m.model.layers.{i}.self_attn" for i in (0, 1)]


@contextmanager
def one_process():
    """A process group of this process alone, over loopback."""
    distributed = torch.distributed
    with TemporaryDirectory() as folder:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel():
    """Outputs and gradients are those unwatched, in train mode; names are those inside."""
    with one_process():
        model = nn.parallel.DistributedDataParallel(llama().train())
        inputs, gradients = BY_NAME["Llama"].inputs(), []
        for watching in (False, True):
            model.zero_grad()
            if watching:
                with regard.watch(model, observe=[TopK(2)]) as seen:
                    model(**inputs).logits.square().mean().backward()
            else:
                model(**inputs).logits.square().mean().backward()
            gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert [x.name for x in seen] == [f"module.model.layers.{i}.self_attn" for i in range(2)]


def several_gpus() -> nn.Module:
    model = nn.DataParallel(llama())
    model.device_ids = [0, 1]
    return model


def compiled_in_place() -> nn.Module:
    model = Embedder(llama())
    model.backbone.compile(backend="eager")
    return model


REFUSED = {
    "compiled": (
        lambda: Embedder(torch.compile(llama(), backend="eager")),
        r"backbone, a OptimizedModule, is compiled; watch the original, model\._orig_mod",
    ),
    "compiled in place": (compiled_in_place, "backbone, a LlamaForCausalLM, was compiled in place"),
    "several GPUs": (several_gpus, r"runs on copies; watch what it holds, its \.module"),
    "no attention": (lambda: nn.Sequential(zoo.mamba()), "Sequential cannot be watched"),
}


@pytest.mark.parametrize("build, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_watched_inside_says_so(build, said):
    with pytest.raises(RegardError, match=said), regard.watch(build()):
        pass


def test_the_parts_of_a_watched_model_are_taken():
    """Else one of the two would miss what the other records."""
    model = llama()
    outer = Embedder(model)
    for first, second in ((model, outer), (outer, model), (outer, model.model.layers[0])):
        with regard.watch(first):
            with pytest.raises(RegardError, match="being watched already"), regard.watch(second):
                pass
            with regard.watch(llama()):
                pass
    with regard.watch(outer):
        pass


@pytest.mark.slow  # with the extra peers
@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers():
    package = pytest.importorskip("sentence_transformers", reason="not installed")
    minilm = pytest.importorskip("regard_minilm", reason="needs packages/regard-minilm")
    model = package.SentenceTransformer(str(minilm.folder), device="cpu")
    texts = ["The trophy didn't fit in the suitcase", "because it was too big."]
    alone = model.encode(texts)
    with regard.watch(model, observe=[TopK(2)], layers=[3]) as seen:
        watched = model.encode(texts)
    assert (watched == alone).all()
    assert [layer.index for layer in seen] == [3]


@pytest.mark.slow  # with the extra peers
@pytest.mark.filterwarnings("ignore")
def test_peft():
    package = pytest.importorskip("peft", reason="not installed")
    config = package.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = package.get_peft_model(llama(), config).eval()
    prompt = BY_NAME["Llama"].inputs() | dict(max_new_tokens=3, do_sample=False)
    alone = model.generate(**prompt)
    with regard.watch(model, observe=[TopK(2)]) as seen:
        watched = model.generate(**prompt)
    assert torch.equal(watched, alone)
    assert [x.name for x in seen] == [
        f"base_model.model.model.layers.{i}.self_attn" for i in (0, 1)
    ]
