"""What every test shares: no network, no clock, and the folder of larger models and data."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A run is a function of the commit: the same examples each time, and no test fails for being slow.
settings.register_profile("regard", deadline=None, derandomize=True)
settings.load_profile("regard")


# Tests are many small operations: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """A test that draws without a seed of its own draws the same each time, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def interpreting(request):
    """A future for each job that this run selects, by two processes in which Triton interprets.

    A test that takes it has a parameter `job`, a name in the JOBS of its module:
    (module, function, arguments …).
    """
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        items = [i for i in request.session.items if "interpreting" in i.fixturenames]
        with pytest.MonkeyPatch.context() as patch:
            # Before anything in the processes imports triton, which looks at it once
            patch.setenv("TRITON_INTERPRET", "1")
            futures = {}
            for item in items:
                job = item.module.JOBS[item.callspec.params["job"]]
                futures[job_key(job)] = pool.submit(_work, *job)
        yield lambda job: futures[job_key(job)].result()


def job_key(job: tuple) -> str:
    """Jobs hold lists."""
    return repr(job)


def _work(module: str, function: str, *arguments):
    return getattr(import_module(module), function)(*arguments)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository: models and data that are not part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' (models and data) beside the repository")
    return folder
