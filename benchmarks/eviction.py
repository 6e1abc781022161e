"""What eviction costs: the perplexity of a text read through caches of a half and a quarter of it.

    python benchmarks/eviction.py MODEL TEXT [--tokens 2048] [--texts 1] [--call 64 1] [--json]

MODEL is a folder or hub name of a causal model, TEXT a text file. What is read is the token with
which the model's texts begin, if it has one, and text up to `--tokens` tokens together; with
--texts as many pieces in a row, each by itself. Two protocols, both by teacher forcing:

- chunks of `--call` tokens. A call attends to all that the cache holds and to itself (causally);
  after it, the cache keeps its budget. SnapKV compresses prompts: each chunk is one.
- steps, `--call 1`: as in decoding. SnapKV evicts nothing there, so it has no figure.

Perplexity is exp of the mean −ln p of tokens 1 … N − 1; "second half" of those from N/2 on, where
also the cache of one half must have forgotten. MB are what the caches have allocated in the end,
in all layers, with everything that they keep about a key. Positions are the true ones throughout.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

import regard
from regard.cache import H2O, TOVA, KVCache, SnapKV, WindowCache
from regard.ops.cache import Cache

FIRST = 4  # StreamingLLM's attention sinks
Make = Callable[[], Cache]


def caches(tokens: int, budget: int) -> dict[str, Make]:
    """The caches that are compared, each of which keeps `budget` keys a kv head between calls."""
    if budget == tokens:
        return {"full": lambda: KVCache(capacity=tokens)}
    return {
        "window": lambda: WindowCache(budget + 1),
        f"window, first {FIRST}": lambda: WindowCache(budget + 1 - FIRST, first=FIRST),
        "H2O": lambda: KVCache(evict=H2O(budget)),
        "SnapKV": lambda: KVCache(evict=SnapKV(budget)),
        "TOVA": lambda: KVCache(evict=TOVA(budget)),
    }


def surprises(model: torch.nn.Module, ids: torch.Tensor, cache: object, chunk: int) -> torch.Tensor:
    """−ln p of tokens 1 … N − 1 (N − 1,), float64."""
    parts = []
    for start in range(0, ids.shape[1], chunk):
        given = ids[:, start : start + chunk]
        logits = model(given, past_key_values=cache, use_cache=True).logits[0].double()
        target = ids[0, start + 1 : start + 1 + chunk]
        parts.append(F.cross_entropy(logits[: len(target)], target, reduction="none"))
    return torch.cat(parts)


def measured(
    model: torch.nn.Module, texts: list[torch.Tensor], chunks: list[int]
) -> Iterator[dict[str, object]]:
    """One row a protocol, budget and cache."""
    tokens = texts[0].shape[1]
    for chunk in chunks:
        for budget in (tokens, tokens // 2, tokens // 4):
            for name, make in caches(tokens, budget).items():
                if chunk == 1 and name == "SnapKV":
                    continue
                found, second, size = [], [], 0
                for ids in texts:
                    cache = regard.huggingface.generation_cache(make)
                    nll = surprises(model, ids, cache, chunk)
                    found.append(float(nll.mean()))
                    second.append(float(nll[tokens // 2 - 1 :].mean()))
                    size = cache.nbytes
                yield {
                    "tokens a call": chunk, "keys held": budget, "cache": name,
                    "perplexity": math.exp(sum(found) / len(found)),
                    "second half": math.exp(sum(second) / len(second)),
                    "MB": size / 1e6,
                }  # fmt: skip


def main() -> None:
    """Print one table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--call", type=int, nargs="+", default=[64, 1], help="tokens a call")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(args.text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    size = args.tokens - len(start)
    pieces = [ids[n * size : (n + 1) * size] for n in range(args.texts)]
    texts = [torch.tensor([start + piece]) for piece in pieces]
    # Before the model is told to use it, so that "regard" is known to transformers
    regard.huggingface.generation_cache()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="regard"
    ).eval()
    print(
        f"{Path(args.model).name}, {args.text.name}: {args.texts} × {args.tokens} tokens; regard "
        f"{regard.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    with torch.no_grad():
        for number, row in enumerate(measured(model, texts, args.call)):
            if args.json:
                print(json.dumps(row), flush=True)
                continue
            if not number:
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
            cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
