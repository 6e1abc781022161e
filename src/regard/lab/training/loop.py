"""The training loop: one, plain, and the same bits however often it is killed and begun again.

Step n of a run depends on the plan, the parameters, the optimizer's tensors and n alone: the data's
order is a pure function of (seed, epoch), and every step seeds torch anew from (seed, n). So a
checkpoint that has those goes on as if nothing had been.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ...errors import RegardError
from ...nn.models import ModelConfig
from ...nn.models.saved import save_model, write_text
from .checkpoint import load_checkpoint, save_checkpoint
from .optimizers import SCHEDULES, optimizers_of, rate
from .run_log import RunLog, draw
from .tokenizer import save_tokenizer

Told = Callable[[str, float | None], None]


@dataclass(frozen=True)
class TrainingPlan:
    """How a run goes. What is None is decided at its beginning, by measuring, and kept.

    steps: how many; None: as many as fit into `budget` minutes. precision: "fp32", "bf16", or None:
    the one that is faster here. ema: the average of parameters that is saved decays by this
    (0: the last parameters). save_every: seconds between checkpoints; log_every, validate_every:
    steps (validate_every None: 20 times in all).
    """

    steps: int | None = None
    budget: float | None = None
    seed: int = 0
    lr: float = 2e-3
    warmup: int = 200
    schedule: str = "cosine"
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float = 0.999
    precision: str | None = None
    log_every: int = 10
    validate_every: int | None = None
    save_every: float = 60.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.budget is None):
            raise RegardError("give steps or a budget in minutes, one of them")
        if any(given is not None and given <= 0 for given in (self.steps, self.budget)):
            raise RegardError("steps and budget are positive")
        if self.schedule not in SCHEDULES:
            raise RegardError(f"schedule is {self.schedule!r}; give {' or '.join(SCHEDULES)}")
        if self.precision not in (None, "fp32", "bf16"):
            raise RegardError(f"precision is {self.precision!r}; give fp32 or bf16")


class _Loss(nn.Module):
    """A task's loss as a module, as DistributedDataParallel wants it."""

    def __init__(self, task: Any, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, *batch: Tensor) -> Tensor:
        loss: Tensor = self.task.loss(self.model, batch)
        return loss


def train(
    task: Any,
    config: ModelConfig,
    plan: TrainingPlan,
    out: str | Path,
    *,
    told: Told = lambda what, share: None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a task's model into the folder `out`; a run that was killed there goes on.

    `out` then has model.safetensors, config.json and the tokenizer (as Hugging Face has them),
    log.jsonl, run.json, run.png and the last checkpoint. about: what run.json also says. Under
    torchrun each process takes its share of the batches. Returns what run.json says.
    """
    out = Path(out)
    with _processes() as (rank, world, device):
        torch.manual_seed(plan.seed)
        model = task.model(config).to(device)
        plan = _decided(task, model, plan, out, config, about or {}, rank, world, device, told)
        run = _Run(task, model, plan, out, rank, world, device)
        run.resume()
        run.steps(told)
        said = run.finished() if rank == 0 else {}
        if world > 1:
            dist.barrier()
    return said


class _Run:
    """A run under way: what a step changes."""

    def __init__(
        self, task: Any, model: nn.Module, plan: TrainingPlan, out: Path, rank: int, world: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        assert plan.steps is not None
        self.task, self.model, self.plan, self.out = task, model, plan, out
        self.rank, self.world, self.device, self.total = rank, world, device, plan.steps
        self.optimizers = optimizers_of(plan.optimizer, model, plan.lr, plan.weight_decay)
        self.average: dict[str, Tensor] = {}
        if plan.ema:
            self.average = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.step, self.epoch, self.place, self.seconds = 0, 0, 0, 0.0
        self.log = RunLog(out / "log.jsonl")
        loss = _Loss(task, model)
        self.loss: nn.Module = loss
        if world > 1:
            self.loss = nn.parallel.DistributedDataParallel(loss)

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        said = load_checkpoint(self.out, self.model, self.average, self.optimizers)
        if said is not None:
            self.step, self.epoch = int(said["step"]), int(said["epoch"])
            self.place, self.seconds = int(said["place"]), float(said["seconds"])
        if self.rank == 0:
            self.log.cut(self.step)

    def save(self) -> None:
        said = {"step": self.step, "epoch": self.epoch, "place": self.place,
                "seconds": self.seconds}  # fmt: skip
        texts = {name: repr(value) for name, value in said.items()}
        save_checkpoint(self.out, self.model, self.average, self.optimizers, texts)

    def steps(self, told: Told) -> None:
        """All the steps that are left."""
        plan, saved, begun, spent = self.plan, time.monotonic(), time.monotonic(), self.seconds
        every = plan.validate_every or max(self.total // 20, 1)
        batches = self.task.epoch(plan.seed, self.epoch)
        recent = _Recent()
        while self.step < self.total:
            if self.place + self.world > len(batches):
                self.epoch, self.place = self.epoch + 1, 0
                batches = self.task.epoch(plan.seed, self.epoch)
                if len(batches) < self.world:
                    raise RegardError(f"an epoch has {len(batches)} batches for {self.world} ranks")
            batch = self.task.tensors(batches[self.place + self.rank], self.device)
            loss = self._one(batch)
            self.place, self.step = self.place + self.world, self.step + 1
            self.seconds = spent + time.monotonic() - begun
            recent.add(loss, self.task.tokens(batch) * self.world)
            if self.rank:
                continue
            last = self.step == self.total
            due = self.step % every == 0 or last
            if self.step % plan.log_every == 0 or due:
                loss_now, speed = recent.read()
                if loss_now != loss_now:
                    raise RegardError(f"the loss is no number at step {self.step}; lower lr")
                more = self.validate() if due else {}
                self.log.add(step=self.step, epoch=self.epoch, loss=loss_now,
                             lr=plan.lr * self._rate(self.step - 1), tokens_per_second=speed,
                             seconds=self.seconds, **more)  # fmt: skip
                left = (self.total - self.step) * self.seconds / self.step
                told(f"loss {loss_now:.3f} · {speed:,.0f} tokens/s · {_clock(left)} left",
                     self.step / self.total)  # fmt: skip
            if time.monotonic() - saved > plan.save_every or last:
                self.save()
                saved = time.monotonic()

    def _rate(self, step: int) -> float:
        return rate(self.plan.schedule, step, self.total, min(self.plan.warmup, self.total // 2))

    def _one(self, batch: tuple[Tensor, ...]) -> Tensor:
        """One step; the loss, still on its device."""
        plan = self.plan
        torch.manual_seed((plan.seed * 1_000_003 + self.step) * 1024 + self.rank)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * self._rate(self.step)
        self.model.train()
        with precision(plan.precision, self.device):
            loss = self.loss(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), plan.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.average:
            decay = min(plan.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                held = [self.average[n] for n, _ in self.model.named_parameters()]
                torch._foreach_lerp_(held, list(self.model.parameters()), 1 - decay)
        return loss.detach()

    def validate(self) -> dict[str, float]:
        """What the task measures with the averaged parameters."""
        with torch.no_grad(), self._averaged(), precision(self.plan.precision, self.device):
            measured: dict[str, float] = self.task.validate(self.model.eval(), self.device)
        return measured

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """While inside, the model has the averaged parameters."""
        held = {n: p.data for n, p in self.model.named_parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                parameter.data = self.average.get(name, parameter.data)
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.data = held[name]

    def finished(self) -> dict[str, Any]:
        """Write the model, and what became of the run."""
        with self._averaged():
            save_model(self.model, self.out)
        save_tokenizer(self.task.tokenizer, self.out)
        draw(self.log.lines, self.out / "run.png")
        path = self.out / "run.json"
        said: dict[str, Any] = json.loads(path.read_text("utf-8"))
        said["result"] = {"steps": self.step, "epochs": self.epoch, "seconds": self.seconds}
        said["result"] |= self.log.lines[-1] if self.log.lines else {}
        write_text(path, json.dumps(said, indent=2) + "\n")
        return said


class _Recent:
    """Loss and speed since they were last asked for."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.tokens, self.since = 0, time.monotonic()

    def add(self, loss: Tensor, tokens: int) -> None:
        self.losses.append(loss)
        self.tokens += tokens

    def read(self) -> tuple[float, float]:
        loss = float(torch.stack(self.losses).mean())
        speed = self.tokens / max(time.monotonic() - self.since, 1e-9)
        self.losses, self.tokens, self.since = [], 0, time.monotonic()
        return loss, speed


def precision(name: str | None, device: torch.device) -> Any:
    """Autocast to bfloat16, or nothing."""
    if name == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int, torch.device]]:
    """(rank, how many, device): under torchrun those of the group, else one process alone."""
    gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield 0, 1, torch.device("cuda" if gpu else "cpu")
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()


def _decided(
    task: Any, model: nn.Module, plan: TrainingPlan, out: Path, config: ModelConfig,
    about: dict[str, Any], rank: int, world: int, device: torch.device, told: Told,
) -> TrainingPlan:  # fmt: skip
    """The plan with nothing open: as it was begun in `out`, or measured now; then it stands in
    run.json, so that a run that is begun again does the same steps."""
    asked = {"plan": asdict(plan), "config": asdict(config), "processes": world} | about
    asked = json.loads(json.dumps(asked))
    path = out / "run.json"
    decided = None
    if rank == 0:
        if path.exists():
            before = json.loads(path.read_text("utf-8"))
            changed = [n for n in asked if before.get("asked", {}).get(n) != asked[n]]
            if changed:
                raise RegardError(
                    f"{out} has a run with another {', '.join(changed)}; give the same, or "
                    "another folder"
                )
            decided = before["decided"]
        else:
            told("measuring this machine", None)
            decided = asdict(_measured(task, model, plan, device))
            save_tokenizer(task.tokenizer, out)  # before run.json, which says that it is there
            said = {"asked": asked, "decided": decided, "machine": _machine(device)}
            write_text(path, json.dumps(said, indent=2) + "\n")
    if world > 1:
        held = [decided]
        dist.broadcast_object_list(held, 0)
        decided = held[0]
    assert decided is not None
    return TrainingPlan(**decided)


def _measured(
    task: Any, model: nn.Module, plan: TrainingPlan, device: torch.device
) -> TrainingPlan:
    """Precision and steps by trying some, on a copy of the model."""
    if plan.precision is None:
        if plan.steps is not None and plan.steps < 100:
            plan = replace(plan, precision="fp32")  # too short a run to measure for
        else:
            tried = [replace(plan, precision=name) for name in ("fp32", "bf16")]
            plan = min(tried, key=lambda one: _seconds(task, model, one, device, 4))
    if plan.steps is None:
        assert plan.budget is not None
        seconds = _seconds(task, model, plan, device, 24)
        # A twentieth is left for validation and checkpoints
        steps = max(int(plan.budget * 60 * 0.95 / seconds), 1)
        plan = replace(plan, steps=steps, budget=None)
    return plan


def _seconds(
    task: Any, model: nn.Module, plan: TrainingPlan, device: torch.device, count: int
) -> float:
    """Mean seconds of a step, over batches from all of an epoch."""
    trial = _Run(
        task, copy.deepcopy(model), replace(plan, steps=10**6, budget=None), Path(), 0, 1, device
    )
    batches = task.epoch(plan.seed, 0)
    chosen = [batches[n * len(batches) // count] for n in range(count)]
    trial._one(task.tensors(chosen[0], device))
    begun = time.perf_counter()
    for one in chosen:
        float(trial._one(task.tensors(one, device)))
    return (time.perf_counter() - begun) / count


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
