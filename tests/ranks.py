"""Processes that are ranks, kept alive: each job of a test runs in 2, 3 or 4 of them at once."""

import contextlib
import multiprocessing
import os
import pickle
from importlib import import_module

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

MOST = 4
PATIENCE = 60  # seconds that a job may take: ranks that wait for each other end then


class Ranks:
    """Four processes on gloo over loopback, met by a file; `run` answers with what rank 0 returns.

    run(size, "module.function", …): in the first `size` of them, function(mesh, …).
    """

    def __init__(self, folder) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ranks"])  # torch is imported once
        self._ends = []
        self._processes = []
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), theirs))
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, size: int, job: str, *arguments):
        """What the job returns on rank 0; its error, if it raised one in any."""
        return self.all(size, job, *arguments)[0]

    def all(self, size: int, job: str, *arguments) -> list:
        """What it returns on each rank."""
        said = pickle.dumps((size, job, arguments))
        for end in self._ends[:size]:
            end.send_bytes(said)
        answers = []
        for end in self._ends[:size]:
            assert end.poll(PATIENCE), f"{job}: a rank did not answer"
            answers.append(pickle.loads(end.recv_bytes()))
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def close(self) -> None:
        for end in self._ends:
            with contextlib.suppress(BrokenPipeError):
                end.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _serve(rank: int, store: str, end) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=MOST)
    meshes = {}
    for size in range(1, MOST + 1):
        group = dist.new_group(list(range(size)))
        if rank < size:
            meshes[size] = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    while (said := pickle.loads(end.recv_bytes())) is not None:
        size, job, arguments = said
        module, name = job.rsplit(".", 1)
        try:
            torch.manual_seed(0)
            answer = getattr(import_module(module), name)(meshes[size], *arguments)
        except Exception as error:  # whatever it is, the test that asked raises it
            answer = error
        end.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
