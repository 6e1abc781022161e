"""Models on several processes, what is refused there and why, dropout, balance."""

import pytest
import torch

from distributed_jobs import numbers_of, own_modules, tensors_of, watched
from regard.call.edge_results import TopKSeen

JOBS = "distributed_jobs"
NEAR = {"rtol": 1e-8, "atol": 1e-10}


@pytest.mark.sample(0)
@pytest.mark.parametrize("how", ["heads", "gather", "ring"])
def test_a_llama_shaped_model_watched_under_two_ranks_equals_one(ranks, how):
    logits, loss, gradient, results = ranks.run(2, f"{JOBS}.watched", how)
    one = watched(None, how)
    keep = torch.ones(2, 23, dtype=torch.bool)
    keep[1, :6] = False  # of padding's rows each way computes what it likes
    torch.testing.assert_close(logits[keep], one[0][keep], **NEAR)
    torch.testing.assert_close(loss, one[1], rtol=3e-7, atol=0)  # transformers sums it in float32
    torch.testing.assert_close(gradient, one[2], **NEAR)
    for layer, exact in zip(results, one[3], strict=True):
        for a, b in zip(layer, exact, strict=True):
            assert numbers_of(a) == numbers_of(b)
            for name, tensor in tensors_of(a).items():
                torch.testing.assert_close(tensor, tensors_of(b)[name], **NEAR)


def test_what_sums_over_queries_leaves_padding_out(ranks):
    for mine, exact in ranks.run(2, f"{JOBS}.without_padding"):
        assert numbers_of(mine) == numbers_of(exact)
        for name, tensor in tensors_of(mine).items():
            if isinstance(exact, TopKSeen):  # padding's own rows are each way's own
                tensor, other = tensor[0], tensors_of(exact)[name][0]
            else:
                other = tensors_of(exact)[name]
            torch.testing.assert_close(tensor, other, **NEAR)


@pytest.mark.parametrize("how", ["heads", "ring"])
def test_our_modules_know_their_positions(ranks, how):
    torch.testing.assert_close(ranks.run(2, f"{JOBS}.own_modules", how), own_modules(None, how))


REFUSED = {
    "heads": "3 ranks do not divide kv_heads 4",
    "dropout by heads": "dropout counts heads",
    "effect of a norm": "Effect of a norm reads the keys after the backward",
    "effect of nothing": "Effect needs gradients: nothing here asks for one",
    "other masks": "the ranks' calls of attention differ in mask",
    "other lengths": "cut the sequence by regard.distributed.shard",
    "torch's attention": "sees this rank's part of the sequence alone",
    "positions that jump": "give an attention_mask",
    "decode steps": "to generate, the cache of regard.huggingface.prefill",
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_cannot_be_done_is_refused_in_every_rank(ranks, what):
    *first, last = ranks.all(3, f"{JOBS}.refused", what)
    for said in first:
        assert REFUSED[what] in said
    # The last rank's positions do not jump: it hears that the others' masks are others
    assert (REFUSED[what] if what != "positions that jump" else "differ in mask") in last


def test_explain_says_how_and_what_would_travel(ranks):
    said = ranks.run(3, f"{JOBS}.explained", "auto")
    assert said["by heads"] == ["3 ranks do not divide kv_heads 4"]
    assert said["by gather"] == said["by ring"] == []
    assert said["travels"][0] == "by gather: a rank sends 0.011 MiB in the forward"
    assert "in the backward" in said["travels"][1]
    assert said["tiled"] == []
    assert ranks.run(4, f"{JOBS}.explained", "auto")["travels"][0].startswith("by heads")


def test_dropout_does_not_depend_on_the_number_of_ranks(ranks):
    for size in (2, 3, 4):
        together, alone = ranks.run(size, f"{JOBS}.dropped")
        torch.testing.assert_close(together, alone)


def test_an_order_is_balanced_by_the_visible_pairs_of_any_mask(ranks):
    plain, zigzag, balanced = ranks.run(3, f"{JOBS}.in_balance")
    assert balanced < min(plain, zigzag)
    assert balanced < 1.05


def test_a_decode_step_over_keys_on_several_ranks(ranks):
    for size in (2, 3):
        for mine, exact in ranks.all(size, f"{JOBS}.decoded"):
            torch.testing.assert_close(mine[0], exact[0], **NEAR)
            for a, b in zip(mine[1:], exact[1:], strict=True):
                assert numbers_of(a) == numbers_of(b)
                for name, tensor in tensors_of(a).items():
                    torch.testing.assert_close(tensor, tensors_of(b)[name], **NEAR)
