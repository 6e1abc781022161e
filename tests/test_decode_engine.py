"""Engine `decode`: few queries on CUDA, read in place; here interpreted, on the shared cases."""

import pytest
import torch

from regard import Dropout, TopK, explain
from regard.cache import Pages
from regard.call.checked import Call
from regard.engines import IN_PAGES, copying, preference
from regard.engines.decode import engine as decode
from test_triton_decode import CHOSEN


def jobs() -> dict[str, tuple]:
    """What the workers do: (module, function, arguments)."""
    where, found, n = "interpreted_attend", {}, 0
    for sizes, names in CHOSEN.items():
        for name in names:
            dtype = (torch.float32, torch.bfloat16, torch.float32, torch.float16)[n % 4]
            block_k, chunk = ((64, 64), (64, 512), (32, 64))[n % 3]
            found[f"{sizes}: {name}"] = (where, "check", sizes, name, dtype, block_k, chunk)
            n += 1
    found["one query: sinks"] = (where, "check", "one query", "sinks", torch.float32, 32, 32)
    found["pages: decode"] = (where, "pages", 1, 16, [100, 37])
    found["pages: few"] = (where, "pages", 5, 48, [0, 130])
    found["pages: one token each"] = (where, "pages", 2, 1, [70, 41])
    for name in ("neighbours", "bad_numbers", "observed"):
        found[name] = (where, name)
    return found


JOBS = jobs()


@pytest.mark.sample(0)
@pytest.mark.triton
@pytest.mark.parametrize("job", JOBS)
def test_interpreted(job, interpreting):
    assert not interpreting(JOBS[job])


def refused(q_len=1, v_dim=16, **request) -> list[str]:
    query, value = torch.zeros(1, 2, q_len, 16), torch.zeros(1, 2, 40, v_dim)
    call = Call.checked(query, torch.zeros(1, 2, 40, 16), value, **request)
    return [r for r in decode.why_not(call) if "triton" not in r]


def test_says_what_it_cannot_do():
    here = "query is on cpu; this engine runs on cuda"
    assert refused() == [here]
    for request, reason in (
        ({"q_len": 17}, "q_len is 17; beyond 16 it takes keys in pages alone"),
        ({"v_dim": 300}, "v_dim is 300; it takes 1 to 256"),
        ({"dropout": Dropout(0.1, 1)}, "dropout is given; this engine has none"),
        (
            {"sinks": torch.zeros(2, requires_grad=True)},
            "gradients are needed; this engine has no backward",
        ),
    ):
        assert refused(**request) == [here, reason]


def test_auto_tries_it_first_where_keys_lie_in_pages():
    query, pool = torch.zeros(1, 2, 1, 16), torch.zeros(5, 2, 16, 16)
    pages = Pages(torch.arange(4).view(1, 4), torch.tensor([50]))
    call = Call.checked(query, pool, pool, pages=pages)
    assert [e.name for e in preference(call)] == ["cpu", "decode", "sdpa", "tiled"]
    assert preference(call) is IN_PAGES
    assert copying(call) == ["tiled", "reference"]
    prompt = torch.zeros(1, 2, 50, 16)
    whole = Call.checked(prompt, pool, pool, pages=pages)
    assert [e.name for e in preference(whole)] == ["cpu", "sdpa", "decode", "tiled"]
    assert not decode.refusals(whole) or "triton" in decode.refusals(whole)[0]
    order = [e.name for e in preference(Call.checked(query, query, query))]
    assert order == ["cpu", "sdpa", "decode", "tiled"]
    assert list(explain(query, pool, pool, pages=pages, observe=[TopK(1)]))[:2] == ["cpu", "decode"]
