"""A command that torchrun starts in several processes: they compute together, the first prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import click

from ..errors import RegardError


def over_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """A command that `torchrun --nproc-per-node 2 -m regard …` runs over its processes."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            command(*arguments, **options)
            return
        with _joined():
            command(*arguments, **options)

    return run


@contextmanager
def _joined() -> Iterator[None]:
    """Meet the other processes; what goes wrong is one line on stderr, and an end."""
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    sys.stdout.flush()
    sys.stderr.flush()
    told = os.fdopen(os.dup(2), "w")
    if rank:  # only the first prints
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from ..analysis.over_ranks import Done, over

    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):  # all on this machine: loopback alone
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("gloo")
        with over(init_device_mesh("cpu", (size,))):
            yield
    except Done:
        pass
    except (RegardError, click.ClickException, click.Abort):
        raise  # all processes say it, the first aloud
    except Exception as error:
        lost = isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("onnection", "gloo", "Gloo", "timed out")
        )
        said = " ".join(str(error).split()) or type(error).__name__
        what = "another process of this run has ended" if lost else f"{said}"
        told.write(f"regard: rank {rank} stops: {what}\n")
        told.flush()
        os._exit(1)  # at once: nobody waits for what the others do not send
    sys.stdout.flush()
    dist.destroy_process_group()
