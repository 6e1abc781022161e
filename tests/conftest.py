"""What every test shares: no network, no clock, and the folder of larger models and data."""

import os

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


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository: models and data that are not part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' (models and data) beside the repository")
    return folder
