"""What ranks do in tests of recordings: each writes its part; and every reading of a recording."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MistralConfig, MistralForCausalLM

import regard
from regard import Recording, context_parallel
from regard.distributed import shard

LENGTH, WINDOW, HEADS, KV_HEADS, DIM = 331, 200, 4, 2, 8  # cells of 64 meet no border of a part
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=DIM,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=2048,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, sliding_window=WINDOW,
)  # fmt: skip


def model() -> torch.nn.Module:
    import regard.huggingface  # noqa: F401 (makes the name valid)

    torch.manual_seed(0)
    made = MistralForCausalLM(MistralConfig(**SIZES)).eval().double()
    made.set_attn_implementation("regard")
    return made


def inputs(length: int = LENGTH) -> dict[str, Tensor]:
    """Two texts, of which the second is padded."""
    rng = torch.Generator().manual_seed(1)
    keep = torch.ones(2, length, dtype=torch.int64)
    keep[1, : length // 5] = 0
    ids = torch.randint(2, 64, (2, length), generator=rng)
    return {"input_ids": ids, "attention_mask": keep, "use_cache": False}


def record(mesh, folder: Path, how="auto", most=2**30, length=LENGTH, more=None):
    """Each rank its part; how many layers it opens afterwards, and the shapes that held numbers."""
    with Shapes() as shapes, context_parallel(mesh, how, most=most):
        made = regard.record(
            model(), shard(inputs(length), mesh), folder,
            **{"dtype": None, "values": True} | (more or {}),
        )  # fmt: skip
    return len(made.layers), shapes.found


def kept(mesh, how="auto", most=2**30):
    """What a watch that keeps q and k saw; its recording's readings, or why there are none here.

    Beside them the shapes that held numbers, and the temporary files that are left.
    """
    import tempfile

    folder = Path(tempfile.gettempdir())
    before = set(folder.glob("regard-*"))
    made, own = model(), shard(inputs(), mesh)
    with Shapes() as shapes, context_parallel(mesh, how, most=most), torch.no_grad():
        with regard.watch(made, observe=[regard.TopK(3)], keep_qk=True) as seen:
            made(**own)
        gathered = [layer[regard.TopK].gather().weights for layer in seen.layers]
    try:
        recording = seen.recording()
        found = {n: recording.weights(n) for n in range(len(recording.layers))}
    except regard.RegardError as error:
        found = str(error)
    left = [path for new in set(folder.glob("regard-*")) - before for path in new.iterdir()]
    return found, gathered, shapes.found, left


def kept_apart(mesh):
    """The same where a rank sees no folder of the first's, as on another machine."""
    from regard.capture import temporary_shards

    class Elsewhere(type(Path())):
        def is_dir(self) -> bool:
            return mesh.get_local_rank() == 0

    temporary_shards.Path, path = Elsewhere, temporary_shards.Path
    try:
        return kept(mesh)
    finally:
        temporary_shards.Path = path


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations make here, as far as they are stored whole."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                if held >= tensor.numel():
                    self.found.add(tuple(tensor.shape))
        return made


def readings(recording: Recording) -> dict[str, Tensor]:
    """Everything that a recording of `inputs` can be asked, by name."""
    found: dict[str, Tensor] = {}
    n = recording.layers[0].q_len
    for at, layer in enumerate(recording.layers):
        for batch in range(layer.batch):
            name = f"{at}.{batch}"
            found[f"{name} weights"] = recording.weights(at, batch=batch)
            found[f"{name} rows"] = recording.weights(at, 1, [n - 1, 0, n // 2], [3, n - 2], batch)
            found[f"{name} norms"] = recording.norm_weights(at, 2, slice(n // 3, n), None, batch)
            found[f"{name} entropy"] = recording.entropy(at, batch=batch)
            top = recording.top(at, batch=batch)
            listed = recording.top(at, batch=batch, k=11)  # more than was kept
            for kind, each in (("top", top), ("listed", listed)):
                found |= {f"{name} {kind} {f}": getattr(each, f) for f in vars(each)}
            received, far = (
                recording.received(at, batch=batch),
                recording.distances(at, None, batch),
            )
            found |= {f"{name} received": received.sum, f"{name} count": received.count}
            found |= {f"{name} past": far.past, f"{name} future": far.future}
            found |= {f"{name} {k}": v for k, v in recording.head_metrics(at, batch).items()}
            for zoom in range(recording.zooms(at)):
                for reduce in ("sum", "max"):
                    wanted = [(h, zoom, 0, c) for h in range(HEADS) for c in (0, 1)]
                    tiles = recording.tiles(at, wanted, reduce, batch)
                    found[f"{name} tile {zoom} {reduce}"] = tiles
            by_value = recording.tile(at, 3, 1, 0, 0, "sum", batch, "value")
            found[f"{name} by value"] = by_value
    found["rollout"] = recording.rollout(n - 1)
    found["segments"] = recording.segments([(0, 100), (100, n)]).shares(1)
    return found


def without(folder: Path, *names: str) -> Path:
    """A copy of a recording without some of its files."""
    import shutil

    copy = folder.with_name(f"{folder.name}-without")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=lambda _, found: [n for n in found if n in names])
    return copy


def stopped(mesh, folder: Path) -> None:
    """A run that ends, in every rank, in the second layer."""
    made = model()

    def ends(*_):
        raise KeyboardInterrupt

    made.model.layers[1].self_attn.q_proj.register_forward_pre_hook(ends)
    try:
        with context_parallel(mesh):
            regard.record(made, shard(inputs(), mesh), folder)
    except KeyboardInterrupt:
        dist.barrier(mesh.get_group())


def refused(mesh, folder: Path, what: str) -> str:
    """What each rank is told."""
    own, made = shard(inputs(20), mesh), model()

    def inside() -> None:
        with context_parallel(mesh):
            made(**own)

    try:
        if what == "inside":
            regard.record(made, inside, folder / str(mesh.get_local_rank()))
        else:
            with context_parallel(mesh):
                regard.record(made, own, folder)
    except regard.RegardError as error:
        return str(error)
    return ""
