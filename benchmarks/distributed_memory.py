"""Peak memory of each rank in an observed forward of one long sequence, for 1, 2 and 4 processes.

    python benchmarks/distributed_memory.py --length 131072 --ranks 1 2 4

Each number of ranks is a fresh set of processes on gloo over loopback. Printed: the peak of
resident memory beyond what the process held before the tensors were made, the largest of the
ranks; the wall time; and what the formulas of docs/distributed.md say travels.
"""

import argparse
import os
import resource
import time

from spawned import answers_of

HEADS, KV_HEADS, DIM = 4, 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--how", nargs="+", default=["heads", "ring"])
    parser.add_argument("--window", type=int, default=4096, help="keys that a query sees, causally")
    asked = parser.parse_args()
    print("ranks  how     peak a rank [MiB]  wall [s]  sent a rank [MiB]", flush=True)
    for size in asked.ranks:
        for how in asked.how if size > 1 else asked.how[:1]:
            peak, wall, sent = measured(size, how, asked.length, asked.window)
            print(f"{size:5}  {how:6}  {peak:17.0f}  {wall:8.1f}  {sent:17.1f}", flush=True)


def measured(size: int, how: str, length: int, window: int) -> tuple[float, float, float]:
    """Peak in MiB, seconds, MiB sent: the largest over the ranks."""
    answers = answers_of(size, _rank, how, length, window)
    return tuple(max(column) for column in zip(*answers, strict=True))


def _rank(rank: int, size: int, store: str, how: str, length: int, window: int, found) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import regard
    from regard.ops.distributed import formulas
    from regard.ops.distributed.layout import Layout, named

    torch.set_num_threads(max((os.cpu_count() or 1) // size, 1))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))["cp"]
    mask = regard.Causal() & regard.Window(window)
    observe = [regard.TopK(8), regard.Received(), regard.Entropy()]
    own = Layout(length, named("zigzag", size)).size(rank)

    def run(n: int):
        q, k, v = (torch.randn(1, h, n, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
        with torch.no_grad(), regard.context_parallel(mesh, how):
            return regard.attention(q, k, v, mask=mask, observe=observe)

    run(64)  # what is loaded once
    before = _peak()
    began = time.perf_counter()
    answer = run(own)
    wall = time.perf_counter() - began
    assert answer is not None
    sizes = formulas.Sizes(size, 1, HEADS, KV_HEADS, length, length, DIM, DIM, 4)
    sent = formulas.forward(how, sizes)
    if how == "ring":
        sent += formulas.second_ring(sizes)
    if how != "heads":
        sent += formulas.received(sizes)
    found.put(((_peak() - before) / 2**20, wall, sent / 2**20))
    dist.destroy_process_group()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
