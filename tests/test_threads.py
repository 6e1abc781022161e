"""Engine cpu's threads: after a fork, in a DataLoader's workers, from several threads at once."""

import multiprocessing
import os
import select
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cases import Case, at
from observer_truths import parts
from regard import Causal, Received, TopK, attention
from regard.engines.cpu import native

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="built without the compiled kernels")

PATIENCE = 300  # seconds until a process counts as hung: the machine may be busy


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def answer(seed: int = 0) -> list[Tensor]:
    """Everything of one call that has work for several threads: forward, observers, backward."""
    leaves = [t.requires_grad_() for t in Case("", at(150, 200)).tensors(seed, torch.float32)]
    out, lse, seen = attention(
        *leaves, mask=Causal(), engine="cpu", return_lse=True, observe=[TopK(3), Received()]
    )
    try:
        grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    except RuntimeError as error:
        # Where torch's own threads for gradients run, as builds for CUDA begin them, it refuses to
        # differentiate after a fork: the forward, which comes first, is compared alone
        if "Autograd-and-Fork" not in str(error):
            raise
        grads = tuple[Tensor, ...]()
    return [out.detach(), lse.detach(), *(t for s in seen for t in parts(s).values()), *grads]


def is_same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Ours may be without gradients: see `answer`."""
    assert ours
    assert len(theirs) - len(ours) in (0, 3)
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("again", [False, True], ids=["in a child", "in a child's child"])
def test_after_a_fork(again):
    """The threads that the parent's calls ran in do not exist there."""
    expected = answer()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # nothing of pytest may run here
        try:
            same = is_same(answer(), expected)
            if again and (grandchild := os.fork()):
                same = same and os.waitpid(grandchild, 0)[1] == 0
            elif again:
                os._exit(not is_same(answer(), expected))
            os.write(writing, b"same" if same else b"other")
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writing)  # so that reading ends where the child ends without a word
    ready, _, _ = select.select([reading], [], [], PATIENCE)
    if not ready:
        os.kill(child, 9)
    os.waitpid(child, 0)
    said = os.read(reading, 4000) if ready else b"nothing: it hangs"
    os.close(reading)
    assert said.decode() == "same"
    assert is_same(answer(), expected)


def _send(pipe, seed: int) -> None:
    torch.set_num_threads(2)
    pipe.send([t.float().tolist() for t in answer(seed)])  # no memory shared


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.sample(0)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_a_process_of_multiprocessing(method):
    expected = answer(3)
    context = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, 3))
    process.start()
    try:
        assert mine.poll(PATIENCE), "it hangs"
        received = mine.recv()
    finally:
        process.kill()
        process.join()
    assert is_same([torch.tensor(numbers) for numbers in received], [e.float() for e in expected])


class Attended(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, seed: int) -> list[Tensor]:
        return answer(seed)


def _two(worker: int) -> None:
    torch.set_num_threads(2)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("prepare", [None, _two], ids=["a thread each", "two threads each"])
def test_in_the_workers_of_a_data_loader(prepare):
    expected = [answer(seed) for seed in range(6)]
    loader = DataLoader(
        Attended(), batch_size=None, num_workers=2, worker_init_fn=prepare, timeout=PATIENCE,
        multiprocessing_context="fork",
    )  # fmt: skip
    received = list(loader)
    assert all(is_same(mine, e) for mine, e in zip(received, expected, strict=True))


def test_from_several_threads_at_once():
    expected = [answer(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            received = list(pool.map(answer, range(8)))
            assert all(is_same(mine, e) for mine, e in zip(received, expected, strict=True))


OPENMP = """
import sklearn.linear_model  # loads another OpenMP, before ours is looked for
import torch
from regard.engines.cpu import native

address = native._torch_threads()
for line in open("/proc/self/maps"):
    span, path = line.split()[0], line.split(maxsplit=5)[-1].strip()
    first, last = (int(end, 16) for end in span.split("-"))
    if first <= address < last:
        print(path)
"""


@pytest.mark.slow  # with the extra peers
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks /proc where code lies")
def test_the_threads_are_torchs_own():
    """A second team beside torch's would wait for cores on which the first still spins."""
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-c", OPENMP], capture_output=True, text=True, check=True
    )
    # Where torch is a link, as in a shared environment, the map names what it leads to
    assert os.path.dirname(os.path.realpath(torch.__file__)) in done.stdout
