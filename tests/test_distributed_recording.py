"""A recording that several ranks wrote, each its part, is the one that one process writes."""

import pytest
import torch

import regard
from distributed_recordings import DIM, KV_HEADS, LENGTH, inputs, model, readings, without
from regard import Recording, RegardError

JOBS = "distributed_recordings"


def of_one(folder, **more) -> Recording:
    """As `record` of distributed_recordings, in one process."""
    given = {"dtype": None, "values": True} | more
    return regard.record(model(), inputs(), folder, **given)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return readings(of_one(tmp_path_factory.mktemp("one") / "r"))


def assert_near(mine, exact, rtol=1e-6, atol=1e-7) -> None:
    """Every reading: results are kept in float32."""
    assert mine.keys() == exact.keys()
    for name, tensor in mine.items():
        if name.endswith("indices") and atol > 1e-6:
            continue  # weights as near as that stand in either order
        torch.testing.assert_close(
            tensor, exact[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("size, how", [
    (2, "ring"), *(pytest.param(*more, marks=pytest.mark.slow) for more in
                   ((3, "gather"), (4, "ring"))),
])  # fmt: skip
def test_every_reading_is_that_of_one_process(ranks, one, tmp_path, size, how):
    folder = tmp_path / "r"
    ranks.run(size, f"{JOBS}.record", folder, how)
    files = sorted(p.name for p in folder.iterdir())
    parts = [f"layer-{n:03}.rank{r}of{size}.safetensors" for n in range(2) for r in range(size)]
    assert files == [*parts, "recording.json"]
    recording = Recording.load(folder)
    assert_near(readings(recording), one)
    recording.verify()


@pytest.mark.parametrize("how, most", [
    ("ring", 2**30), pytest.param("gather", 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_no_rank_holds_the_whole(ranks, tmp_path, how, most):
    """No operation makes a tensor of all positions' queries, keys or values.

    By gather those of one kv head are, where no more may lie on a rank.
    """
    for _, shapes in ranks.all(2, f"{JOBS}.record", tmp_path / "r", how, most):
        whole = {s for s in shapes if len(s) == 4 and s[2] == LENGTH and s[3] in (DIM, 2 * DIM)}
        assert {s[1] for s in whole} <= ({1} if how == "gather" else set())
        own = {s for s in shapes if len(s) == 4 and s[1] == KV_HEADS and s[3] == DIM}
        assert own  # the mode sees what there is


@pytest.mark.slow
def test_saved_again_it_is_one_file_a_layer(ranks, one, tmp_path):
    ranks.run(2, f"{JOBS}.record", tmp_path / "r")
    Recording.load(tmp_path / "r").save(tmp_path / "s")
    assert len(list((tmp_path / "s").glob("layer-*"))) == 2
    assert_near(readings(Recording.load(tmp_path / "s")), one)


@pytest.mark.slow
@pytest.mark.parametrize("more, near", [
    ({"observe": False}, (1e-6, 1e-7)), ({"dtype": torch.bfloat16}, (1e-3, 1e-4)),
], ids=["bare", "bfloat16"])  # fmt: skip
def test_of_fewer_bits_or_bare(ranks, tmp_path, more, near):
    """The log-sum-exp belongs to the numbers that are kept: of others it is 1e-2 off."""
    ranks.run(3, f"{JOBS}.record", tmp_path / "r", "ring", 1, LENGTH, more)
    found = readings(Recording.load(tmp_path / "r"))
    assert_near(found, readings(of_one(tmp_path / "one", **more)), *near)


@pytest.mark.slow
def test_chunks_without_a_token(ranks, tmp_path):
    ranks.run(2, f"{JOBS}.record", tmp_path / "r", "auto", 2**30, 3)
    mine = Recording.load(tmp_path / "r")
    exact = regard.record(model(), inputs(3), tmp_path / "one", dtype=None)
    torch.testing.assert_close(mine.weights(1), exact.weights(1))


def test_a_missing_part_is_named(ranks, tmp_path):
    folder = tmp_path / "r"
    ranks.run(2, f"{JOBS}.record", folder)
    second = [f"layer-{n:03}.rank1of2.safetensors" for n in range(2)]
    said = f"{second[0]} is not there: rank 1 of 2 wrote it"
    with pytest.raises(RegardError, match=said) as error:
        Recording.load(without(folder, *second))
    assert "\n" not in str(error.value)
    some = Recording.load(without(folder, second[0]))  # the other layer can be read
    assert [said in wrong for wrong in some.damaged] == [True]
    assert some.weights(1).shape[-1] == LENGTH
    with pytest.raises(RegardError, match=said):
        some.weights(0)


@pytest.mark.slow
def test_parts_of_two_runs_are_not_put_together(ranks, tmp_path):
    for name in ("a", "b"):
        ranks.run(2, f"{JOBS}.record", tmp_path / name)
    name = "layer-000.rank1of2.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(RegardError, match="two runs"):
        Recording.load(tmp_path / "a").weights(0)


@pytest.mark.slow
def test_a_run_that_was_stopped_leaves_the_layers_of_all_ranks(ranks, tmp_path):
    folder = tmp_path / "r"
    ranks.run(2, f"{JOBS}.stopped", folder)
    recording = Recording.load(folder)
    assert (len(recording.layers), recording.whole) == (1, False)
    assert recording.weights(0).shape[-1] == LENGTH


@pytest.mark.parametrize("what, said", [
    ("held", "holds a recording already"),
    pytest.param("inside", "context_parallel begins inside", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_the_first_rank_refuses_is_raised_in_all(ranks, tmp_path, what, said):
    (tmp_path / "r").mkdir()
    if what == "held":
        (tmp_path / "r" / "recording.json").write_text("{}")
    for answer in ranks.all(2, f"{JOBS}.refused", tmp_path / "r", what):
        assert said in answer
