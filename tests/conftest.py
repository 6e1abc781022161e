"""What every test shares: no network, no clock, and the folder of larger models and data."""

import functools
import gc
import importlib.util
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor threads for a few words: they would only wait for each other
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from sampling import mark_others_slow

# A run is a function of the commit: the same examples each time, and no test fails for being slow.
settings.register_profile(
    "regard",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("regard")


# Tests are many small operations: threads would only wait for each other.
torch.set_num_threads(1)


# Twenty thousand items are made at once and stay: to look through them for garbage again and again
# takes a third of collecting, and each later collection would go through them anew.
gc.disable()


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()


def _poisoned(make):
    """`make`, whose tensors hold NaN, or a number beyond every index, where regard asks."""

    @functools.wraps(make)
    def poisoned(*arguments, **named):
        made = make(*arguments, **named)
        # Who compiles traces what regard does, not what this does to it
        if torch.compiler.is_compiling() or not _asked_by_regard(sys._getframe(1)):
            return made
        return made.fill_(torch.nan if made.is_floating_point() else _beyond(made.dtype))

    return poisoned


def _asked_by_regard(frame) -> bool:
    return frame.f_globals.get("__name__", "").startswith("regard.")


def _beyond(dtype: torch.dtype) -> int | float:
    if dtype == torch.bool or dtype.is_complex:
        return 1
    return torch.iinfo(dtype).max


# Which functions a device's context turns is asked once and remembered: these, not what stands in
# their place below, or each model that is loaded would first be filled with random numbers.
with torch.device("meta"):
    torch.empty(0)

# No buffer may be read before it is written, in no test.
torch.empty = _poisoned(torch.empty)
torch.empty_like = _poisoned(torch.empty_like)
torch.Tensor.new_empty = _poisoned(torch.Tensor.new_empty)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """Two processes for the whole suite; for some files none, as starting them takes longer."""
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    return min(2, os.cpu_count() or 1) if whole else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, and so do all of `TOGETHER`; what is long goes first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    config.option.loadscopereorder = False  # it would begin with the files of most tests
    return ByFile(config, log)


# Two processes that interpret, and four that are ranks: not as many for each process of tests
TOGETHER = ("test_triton", "test_distributed")


def scope_of(nodeid: str) -> str:
    """What one process of tests runs as a whole: a file, or those that need the same processes."""
    file = nodeid.split("::", 1)[0]
    return next((kind for kind in TOGETHER if kind in file), file)


# Files that take longest, measured, with or without what is slow: begun first, so that what is left
# for the end is short and two processes end together. A name stands for all that begin with it.
LONG = (
    "test_triton",
    "test_view_page",
    "test_html",
    "test_torch_features",
    "test_docs",
    "test_linear",
    "test_distributed",
    "test_attention",
    "test_fuzz",
    "test_pooled",
    "test_observers",
    "test_gradients",
    "test_look",
    "test_walk",
    "test_hidden",
)


def _turn(item) -> int:
    return next((n for n, name in enumerate(LONG) if item.path.name.startswith(name)), len(LONG))


@pytest.hookimpl(tryfirst=True)  # before -m takes its choice
def pytest_collection_modifyitems(config, items):
    nowhere = {id(item) for item in mark_others_slow(items)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in nowhere])
    items[:] = [item for item in items if id(item) not in nowhere]
    items.sort(key=_turn)  # stable: files stay whole
    if importlib.util.find_spec("triton") is None:
        missing = pytest.mark.skip('triton is not installed; pip install ".[dev,cuda]"')
        for item in items:
            if item.get_closest_marker("triton"):
                item.add_marker(missing)


@pytest.fixture(autouse=True)
def _seeded():
    """A test that draws without a seed of its own draws the same each time, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def interpreting(request):
    """What a job gives, computed by two processes in which Triton interprets, ahead of its turn.

    A test that takes it has a parameter `job`, a name in the JOBS of its module:
    (module, function, arguments …). With the first one all of its scope begin: each process of
    tests collects all of them, but runs only some scopes.
    """
    scopes: dict[str, dict[str, tuple]] = {}
    for item in request.session.items:
        if "interpreting" in item.fixturenames:
            job = item.module.JOBS[item.callspec.params["job"]]
            scopes.setdefault(scope_of(item.nodeid), {})[job_key(job)] = job
    futures = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:

        def result(job: tuple):
            key = job_key(job)
            if key not in futures:
                with pytest.MonkeyPatch.context() as patch:
                    # Before anything in the processes imports triton, which looks at it once
                    patch.setenv("TRITON_INTERPRET", "1")
                    jobs = next(jobs for jobs in scopes.values() if key in jobs)
                    futures.update((k, pool.submit(_work, *j)) for k, j in jobs.items())
            return futures[key].result()

        yield result


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


# Models and what else takes long to make: once a run, for all files


@pytest.fixture(scope="session")
def minilm():
    """The packaged model."""
    from regard.analysis.text_model import load

    return load()


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """Small random models on disk: `gpt2` and `t5`."""
    from small_tokenizers import write_models

    root = tmp_path_factory.mktemp("models")
    write_models(root)
    return root


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One Chromium."""
    from browsing import chromium

    driver = chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def trophy(minilm, tmp_path_factory):
    """A text read by the packaged model, and its page."""
    from browsing import Written
    from texts import TROPHY

    return Written(minilm.record(TROPHY), tmp_path_factory.mktemp("page") / "look.html", ["it"])


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four processes that compute together, for all files of distributed attention."""
    from ranks import Ranks

    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


# Benchmarks without their patience


@pytest.fixture
def quick_turns(monkeypatch):
    """Turns of one call, which wait for nothing."""
    from regard.lab.bench import timing

    monkeypatch.setattr(timing, "SETTLE", 0.0)
    monkeypatch.setattr(timing, "TIMED", 0.0)


@pytest.fixture
def small_suites(monkeypatch, quick_turns, tmp_path):
    """Two suites of tiny shapes, on a machine that is always quiet, where no run is saved."""
    import regard.lab.bench.tables as written
    from regard import Causal
    from regard.lab.bench import machine, suites
    from test_bench import quiet, tiny
    from test_bench_peers import OBSERVED

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def short():
        """tiny ones"""
        yield tiny("short", "fp32/n96", "sdpa", "eager")
        yield tiny("short", "bf16/n96", "onnxruntime", type="bf16")

    def observed():
        """with the weights in sight"""
        yield tiny("observed", "fp32/all/n96", "plain", "sdpa", mask=Causal(), observe=OBSERVED)

    monkeypatch.setattr(suites, "SUITES", {"short": short, "observed": observed})
    monkeypatch.setattr(written, "SUITES", suites.SUITES)
    monkeypatch.setattr(machine, "clock", quiet)
