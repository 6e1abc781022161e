"""`regard bench`: turns, medians, discarded rounds, wrong results, and what it prints; no times."""

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("click", reason='needs pip install "regard[bench]"')

from click.testing import CliRunner  # noqa: E402
from rich.cells import cell_len  # noqa: E402

import regard.cli.bench as command  # noqa: E402
from regard import (  # noqa: E402
    BlockSparse,
    Causal,
    Documents,
    Entropy,
    First,
    Full,
    Map,
    Padding,
    Received,
    RegardError,
    TopK,
    Window,
)
from regard.bench import SUITES, Entry, Settings, chosen, machine, measure, run, suites  # noqa: E402
from regard.bench import checking, dense, peers, running, timing, written  # noqa: E402
from regard.bench.checking import Truth  # noqa: E402
from regard.bench.inputs import Inputs  # noqa: E402
from regard.bench.problems import TYPES, Problem  # noqa: E402
from regard.bench.sides import Refused, Side  # noqa: E402
from regard.bench.timing import NeverQuiet, Timing, alternate  # noqa: E402
from regard.cli import main  # noqa: E402
