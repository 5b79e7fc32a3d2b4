"""Image classification with timm: read from top to bottom, in the order it happens.

Random numbers: weights from `seed`, order from (seed, epoch), augmentation from (seed, epoch, index), dropout from
(seed, step, rank). None of them depends on what ran before, so a run resumed from the middle of an epoch computes what
the uninterrupted run computes; on a CPU with `threads` given, to the last digit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from PIL import Image
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cvtrainer import checkpoints, plots
from cvtrainer.data import Batches, ClassFolders, Samples, load, read_class_folders, same_classes
from cvtrainer.run import Preempted, Recorder, Run, UserError, brief
from launcher.contract import WEIGHTS_CHANNEL, newest_checkpoint, write_json
from launcher.errors import nearest
from launcher.shm import TORCH_PREFETCH, Loading, allowed_loading
from launcher.spec import ClassifyConfig

__all__ = ["train"]

_LOGS_AN_EPOCH = 10
_AGREE_EVERY = 8
"""Steps between two questions to all ranks whether one was asked to stop."""

_WEIGHTS_NAMES = ("model.pt", "model.safetensors", "pytorch_model.bin", "*.pth", "*.pt", "*.safetensors")


@dataclass(frozen=True)
class Session:
    """What stays as it is from the first step to the last."""

    run: Run
    config: ClassifyConfig
    device: torch.device
    train: Samples
    val: Samples
    mean: tuple[float, ...]
    std: tuple[float, ...]
    recorder: Recorder | None

    @property
    def batch(self) -> int:
        """Images per step and process: fewer than asked if there are fewer."""
        return min(self.config.batch, len(self.train) // self.run.ranks.world)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.train) // (self.batch * self.run.ranks.world)

    @property
    def loading(self) -> Loading:
        """As the job asks, or what the runner found to fit into /dev/shm."""
        return allowed_loading(os.environ, Loading(self.config.workers, TORCH_PREFETCH))

    @property
    def amp_type(self) -> torch.dtype | None:
        if not self.config.amp or self.device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


@dataclass(frozen=True)
class Progress:
    """Where training stands. epoch: epochs done; batch: steps done in the next one; best_*: after which epoch and step.

    window, total: sums of (loss, right answers, images) since the last logged line and since the epoch began.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    best_step: int | None = None
    window: tuple[float, ...] = (0.0, 0.0, 0.0)
    total: tuple[float, ...] = (0.0, 0.0, 0.0)


@dataclass
class Learner:
    """What changes with each step. window: [3] float64 on the device, this rank's share of Progress.window."""

    model: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.OneCycleLR
    scaler: torch.amp.GradScaler
    window: Tensor
    progress: Progress = Progress()
    best_weights: dict[str, Tensor] | None = None
    window_began: float = 0.0
    saved_at: float = 0.0


@dataclass(frozen=True)
class Pace:
    """rate: the last learning rate; images_per_second: over all ranks, of the part of the epoch done here."""

    rate: float
    images_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """confusion: [true, predicted] counts over all ranks."""

    loss: float
    confusion: Tensor

    @property
    def accuracy(self) -> float:
        return float(self.confusion.diag().sum() / self.confusion.sum())


def train(run: Run, config: ClassifyConfig) -> None:
    device = start_torch(run, config)
    folders, val_folders = read_channels(run)
    net = make_net(run, config, classes=len(folders.classes))
    session = make_session(run, config, device=device, folders=(folders, val_folders), net=net)
    check_net(session, net)
    learner = make_learner(session, net)
    resume(session, learner)
    while not finished(session, learner.progress):
        pace = train_epoch(session, learner)
        end_epoch(session, learner, pace=pace, evaluation=evaluate(session, learner))
        save(session, learner)
    write_results(session, learner)
    stop_torch(run)


def start_torch(run: Run, config: ClassifyConfig) -> torch.device:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(config.seed)
    device = torch.device("cpu")
    if run.job.gpus:
        if not torch.cuda.is_available():
            raise RuntimeError(f"the job has {run.job.gpus} GPUs per node, but torch {torch.__version__} sees none")
        device = torch.device("cuda", run.ranks.local)
        torch.cuda.set_device(device)
    if run.ranks.world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop_torch(run: Run) -> None:
    """Nobody leaves before rank 0 has written everything: torchrun kills the rest when the first one is gone."""
    if run.ranks.world > 1:
        dist.barrier()
        dist.destroy_process_group()


# Data


def read_channels(run: Run) -> tuple[ClassFolders, ClassFolders]:
    root, val_root = run.need_channel("train"), run.need_channel("val")
    folders = read_class_folders(root)
    if len(folders.classes) < 2:
        raise UserError(f"{root} has one class, {folders.classes[0]!r}; a classifier needs two or more class folders")
    if len(folders.paths) < run.ranks.world:
        raise UserError(f"{root} has {len(folders.paths)} images for {run.ranks.world} processes")
    return folders, same_classes(read_class_folders(val_root), folders, root=val_root)


def make_session(
    run: Run,
    config: ClassifyConfig,
    *,
    device: torch.device,
    folders: tuple[ClassFolders, ClassFolders],
    net: nn.Module,
) -> Session:
    recipe = timm.data.resolve_model_data_config(net)
    resampling = Image.Resampling[{"random": "bilinear"}.get(recipe["interpolation"], recipe["interpolation"]).upper()]
    train_set, val_set = (
        Samples(split, config.image_size, resampling, augment, config.seed)
        for split, augment in zip(folders, (config.augment, "none"), strict=True)
    )
    recorder = Recorder(run.layout) if run.ranks.main else None
    return Session(run, config, device, train_set, val_set, tuple(recipe["mean"]), tuple(recipe["std"]), recorder)


def to_input(session: Session, images: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] in host memory → normalised float32 on the device."""
    images = images.to(session.device, non_blocking=True)
    if session.device.type == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values, device=session.device).view(3, 1, 1) for values in (session.mean, session.std))
    return (images.float() / 255 - mean) / std


# Model


def make_net(run: Run, config: ClassifyConfig, *, classes: int) -> nn.Module:
    if not timm.is_model(config.model):
        hint = nearest(config.model, timm.list_models())
        raise UserError(f"train.model: timm {timm.__version__} has no model {config.model!r}{hint}")
    weights = run.channel(WEIGHTS_CHANNEL)
    options: dict[str, Any] = {"num_classes": classes, "in_chans": 3, "drop_rate": config.dropout}
    published = timm.get_pretrained_cfg(config.model)
    if published and published.fixed_input_size and published.input_size[-1] != config.image_size:
        options["img_size"] = config.image_size
    if weights is not None or not config.pretrained:
        net: nn.Module = timm.create_model(config.model, pretrained=False, **options)
        return net if weights is None else load_weights(run, net, weights=weights)
    try:
        net = timm.create_model(config.model, pretrained=True, **options)
    except Exception as error:  # timm, the hub client and three HTTP libraries each have their own
        raise UserError(
            f"train.model: the published weights of {config.model!r} can't be had ({brief(error)}); "
            "set train.pretrained: false, or give a data channel `weights` with the file"
        ) from error
    return net


def load_weights(run: Run, net: nn.Module, *, weights: Path) -> nn.Module:
    """Earlier weights; the last layer is left out where it has another number of classes."""
    path = _weights_file(weights)
    loaded, own = _read_weights(path), net.state_dict()
    head = _head_prefixes(net)
    misfits = [name for name, tensor in own.items() if name not in loaded or loaded[name].shape != tensor.shape]
    foreign = [name for name in misfits if not name.startswith(head)]
    if foreign:
        raise UserError(
            f"{path} does not fit this model: {len(foreign)} of {len(own)} tensors are missing or of another shape, "
            f"{foreign[0]!r} first; train.model must name the model they were made with"
        )
    net.load_state_dict({name: loaded[name] for name in own if name not in misfits}, strict=False)
    dropped = f", without its last layer ({len(misfits)} tensors: other classes)" if misfits else ""
    run.say(f"starting from {path}{dropped}")
    return net


def _weights_file(place: Path) -> Path:
    if place.is_file():
        return place
    for pattern in _WEIGHTS_NAMES:
        if found := sorted(place.glob(pattern)):
            return found[0]
    raise UserError(f"the channel weights, {place}, holds no weights; expected one of {', '.join(_WEIGHTS_NAMES)}")


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict, bare or under `state_dict` or `model`, with or without DDP's prefix."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and zip errors of half a dozen classes
        raise UserError(
            f"{path} can't be loaded as weights ({type(error).__name__}); expected tensors alone, saved by "
            "torch.save(model.state_dict(), …) or as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a state dict: name → tensor")
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def _head_prefixes(net: nn.Module) -> tuple[str, ...]:
    names = net.pretrained_cfg.get("classifier") or "head"  # type: ignore[union-attr, operator]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def check_net(session: Session, net: nn.Module) -> None:
    """One image through the net, so that an input it can't take is the user's message and not a crash."""
    size = session.config.image_size
    try:
        with torch.inference_mode():
            net.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"train.image_size: {session.config.model!r} can't take {size} px: {brief(error)}") from error


def make_learner(session: Session, net: nn.Module) -> Learner:
    config, device = session.config, session.device
    net = net.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    groups = param_groups_weight_decay(net, config.weight_decay)  # none on biases and norms
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    total = config.epochs * session.steps
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.learning_rate,
        total_steps=total,
        pct_start=config.warmup if config.warmup * total > 1 else 0.0,  # one step of warm-up divides by zero
    )
    scaler = torch.amp.GradScaler(device.type, enabled=session.amp_type is torch.float16)
    model: nn.Module = net
    if session.run.ranks.world > 1:
        model = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
    now = time.monotonic()
    window = torch.zeros(3, dtype=torch.float64, device=device)
    return Learner(model, net, optimizer, scheduler, scaler, window, window_began=now, saved_at=now)


# Training


def finished(session: Session, progress: Progress) -> bool:
    """As the recipe says, or earlier where nothing gets better or $CVLAUNCH_MAX_STEPS are done."""
    if progress.step >= session.run.max_steps:
        return True
    patience = session.config.patience
    bored = patience is not None and progress.epoch - progress.best_epoch >= patience
    return progress.epoch >= session.config.epochs or bored


def train_epoch(session: Session, learner: Learner) -> Pace:
    """From `progress.batch` to the end of the epoch or of all steps; Preempted, with a checkpoint, if asked to stop."""
    ranks, progress = session.run.ranks, learner.progress
    batches = Batches(
        count=len(session.train),
        size=session.batch,
        rank=ranks.rank,
        world=ranks.world,
        seed=session.config.seed,
        epoch=progress.epoch,
        start=progress.batch,
        shuffle=True,
    )
    every = -(-session.steps // _LOGS_AN_EPOCH)
    learner.model.train()
    rate, began = float(learner.scheduler.get_last_lr()[0]), time.monotonic()
    learner.window_began = began
    for images, labels in load(session.train, batches, loading=session.loading, pin=session.device.type == "cuda"):
        save_if_due(session, learner)
        rate = train_step(session, learner, images=images, labels=labels)
        batch = learner.progress.batch + 1
        learner.progress = replace(learner.progress, batch=batch, step=learner.progress.step + 1)
        last = batch == session.steps or learner.progress.step >= session.run.max_steps
        if batch % every == 0 or last:
            log_training(session, learner, rate=rate)
        if last:
            break
    speed = (learner.progress.batch - progress.batch) * session.batch * ranks.world / (time.monotonic() - began)
    save_if_due(session, learner, anyway=True)
    return Pace(rate, speed)


def train_step(session: Session, learner: Learner, *, images: Tensor, labels: Tensor) -> float:
    """Returns the learning rate that was used."""
    ranks = session.run.ranks
    seeds = np.random.SeedSequence((session.config.seed, learner.progress.step, ranks.rank))
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))  # dropout, stochastic depth
    labels = labels.to(session.device, non_blocking=True)
    with torch.autocast(session.device.type, dtype=session.amp_type, enabled=session.amp_type is not None):
        scores = learner.model(to_input(session, images))
        loss = nn.functional.cross_entropy(scores, labels, label_smoothing=session.config.label_smoothing)
    learner.optimizer.zero_grad(set_to_none=True)
    learner.scaler.scale(loss).backward()
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    rate = float(learner.scheduler.get_last_lr()[0])
    learner.scheduler.step()
    with torch.no_grad():
        right = (scores.argmax(1) == labels).sum()
        learner.window += torch.stack(
            [loss.double() * len(labels), right.double(), right.new_tensor(len(labels)).double()]
        )
    return rate


def log_training(session: Session, learner: Learner, *, rate: float) -> None:
    collect(session, learner)
    progress, now = learner.progress, time.monotonic()
    loss, right, images = progress.window
    values = {"loss": loss / images, "accuracy": right / images, "lr": rate}
    speed = images / max(now - learner.window_began, 1e-9)
    if session.recorder:
        values["images_per_second"] = round(speed, 2)
        session.recorder.log(progress.step, progress.epoch + 1, split="train", values=values)
    total = tuple(a + b for a, b in zip(progress.total, progress.window, strict=True))
    learner.progress = replace(progress, window=(0.0, 0.0, 0.0), total=total)
    learner.window_began = now


def collect(session: Session, learner: Learner) -> None:
    """Moves every rank's sums into Progress.window, where they can be saved. All ranks call it."""
    if session.run.ranks.world > 1:
        dist.all_reduce(learner.window)
    window = tuple(a + b for a, b in zip(learner.progress.window, learner.window.tolist(), strict=True))
    learner.progress = replace(learner.progress, window=window)
    learner.window.zero_()


@torch.inference_mode()
def evaluate(session: Session, learner: Learner) -> Evaluation:
    """Each image of `val` exactly once over all ranks. Preempted if asked to stop."""
    ranks, classes = session.run.ranks, len(session.train.folders.classes)
    share_buffers(session, learner.net)
    learner.net.eval()
    batches = Batches(count=len(session.val), size=session.batch, rank=ranks.rank, world=ranks.world)
    common = len(session.val) // ranks.world // session.batch
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=session.device)
    loss = torch.zeros((), dtype=torch.float64, device=session.device)
    loader = load(session.val, batches, loading=session.loading, pin=session.device.type == "cuda")
    for index, (images, labels) in enumerate(loader):
        if index < common and index % _AGREE_EVERY == 0 and agreed(session, session.run.stop.asked())[0]:
            preempt(session, learner)
        labels = labels.to(session.device, non_blocking=True)
        with torch.autocast(session.device.type, dtype=session.amp_type, enabled=session.amp_type is not None):
            scores = learner.net(to_input(session, images))
        loss += nn.functional.cross_entropy(scores.float(), labels, reduction="sum").double()
        confusion += torch.bincount(labels * classes + scores.argmax(1), minlength=classes * classes)
    if ranks.world > 1:
        dist.all_reduce(loss)
        dist.all_reduce(confusion)
    return Evaluation(loss.item() / len(session.val), confusion.view(classes, classes).cpu())


def share_buffers(session: Session, net: nn.Module) -> None:
    """Rank 0's batch-norm statistics for all: the ranks have gone apart since DDP last sent them."""
    if session.run.ranks.world > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def end_epoch(session: Session, learner: Learner, *, pace: Pace, evaluation: Evaluation) -> None:
    progress = learner.progress
    values = {"loss": evaluation.loss, "accuracy": evaluation.accuracy}
    if session.recorder:
        session.recorder.log(progress.step, progress.epoch + 1, split="val", values=values)
    loss, right, images = progress.total
    session.run.say(
        f"epoch {progress.epoch + 1}/{session.config.epochs}  loss {loss / images:.4f}  "
        f"acc {right / images:.4f}  val loss {evaluation.loss:.4f}  val acc {evaluation.accuracy:.4f}  "
        f"lr {pace.rate:.2e}  {pace.images_per_second:.0f} images/s"
    )
    better = evaluation.accuracy > progress.best
    learner.progress = replace(
        progress,
        epoch=progress.epoch + 1,
        batch=0,
        total=(0.0, 0.0, 0.0),
        best=evaluation.accuracy if better else progress.best,
        best_epoch=progress.epoch + 1 if better else progress.best_epoch,
        best_step=progress.step if better else progress.best_step,
    )
    if better and session.run.ranks.main:
        learner.best_weights = {name: value.cpu().clone() for name, value in learner.net.state_dict().items()}


# Stopping, saving, resuming


def agreed(session: Session, *wishes: bool) -> tuple[bool, ...]:
    """What any rank wishes, all do. All ranks call it at the same step, or they wait for each other for ever."""
    if session.run.ranks.world == 1:
        return wishes
    votes = torch.tensor(wishes, dtype=torch.int32, device=session.device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


def save_if_due(session: Session, learner: Learner, *, anyway: bool = False) -> None:
    """A checkpoint every `checkpoint_every` seconds; Preempted after one, if asked to stop."""
    if session.run.ranks.world > 1 and learner.progress.step % _AGREE_EVERY and not anyway:
        return
    late = time.monotonic() - learner.saved_at >= session.config.checkpoint_every
    stop, due = agreed(session, session.run.stop.asked(), late)
    if stop:
        preempt(session, learner)
    if due:
        collect(session, learner)
        save(session, learner)


def preempt(session: Session, learner: Learner) -> None:
    """Raises Preempted when the checkpoint is there."""
    collect(session, learner)
    save(session, learner)
    stop_torch(session.run)
    raise Preempted(f"preempted at step {learner.progress.step}")


def save(session: Session, learner: Learner) -> None:
    learner.saved_at = time.monotonic()
    if not session.run.ranks.main:
        return
    progress, root = learner.progress, session.run.layout.checkpoints
    metric = progress.best if progress.best_step == progress.step else None
    checkpoints.save(root, progress.step, _writer(learner), epoch=progress.epoch, metric=metric)
    checkpoints.prune(root, best=progress.best_step)


def _writer(learner: Learner) -> Callable[[Path], None]:
    """`best.pt` goes along: a run that resumes on another machine gets the newest checkpoint alone."""

    def write(folder: Path) -> None:
        state = {name: part.state_dict() for name, part in _stateful(learner).items()}
        torch.save({**state, "progress": asdict(learner.progress)}, folder / "state.pt")
        if learner.best_weights is not None:
            torch.save(learner.best_weights, folder / "best.pt")

    return write


def _stateful(learner: Learner) -> dict[str, Any]:
    return {
        "model": learner.net,
        "optimizer": learner.optimizer,
        "scheduler": learner.scheduler,
        "scaler": learner.scaler,
    }


def resume(session: Session, learner: Learner) -> None:
    folder = newest_checkpoint(session.run.layout.checkpoints)
    if folder is None:
        return
    state = torch.load(folder / "state.pt", map_location=session.device, weights_only=True)
    for name, part in _stateful(learner).items():
        part.load_state_dict(state[name])
    progress = Progress(**state["progress"])
    if not session.run.ranks.main:  # the sums are the whole run's: only one rank carries them on
        progress = replace(progress, window=(0.0, 0.0, 0.0), total=(0.0, 0.0, 0.0))
    learner.progress = progress
    best = folder / "best.pt"
    learner.best_weights = torch.load(best, map_location="cpu", weights_only=True) if best.exists() else None
    session.run.say(f"resuming from step {progress.step} (epoch {progress.epoch + 1}, step {progress.batch} in it)")


# Results


def write_results(session: Session, learner: Learner) -> None:
    """The best epoch's weights, their card, and what they get right and wrong."""
    evaluation = evaluate_best(session, learner)
    layout, progress = session.run.layout, learner.progress
    if not session.run.ranks.main or session.recorder is None:
        return
    layout.model.mkdir(parents=True, exist_ok=True)
    part = layout.model / ".model.pt.part"
    torch.save(learner.best_weights, part)
    part.replace(layout.model / "model.pt")
    write_json(layout.model / "model_card.json", model_card(session, progress, evaluation))
    names, matrix = session.train.folders.classes, evaluation.confusion.numpy()
    plots.write_confusion(layout.output / "plots", matrix, names)
    plots.write_per_class(layout.output / "plots", matrix, names)
    session.recorder.close()
    session.run.say(f"best val acc {evaluation.accuracy:.4f} after epoch {progress.best_epoch}; model/model.pt written")


def evaluate_best(session: Session, learner: Learner) -> Evaluation:
    if learner.best_weights is not None:
        learner.net.load_state_dict(learner.best_weights)
    if session.run.ranks.world > 1:
        for parameter in learner.net.parameters():
            dist.broadcast(parameter.data, 0)
    return evaluate(session, learner)


def model_card(session: Session, progress: Progress, evaluation: Evaluation) -> dict[str, object]:
    config, job = session.config, session.run.job
    accuracy = evaluation.accuracy if math.isfinite(evaluation.accuracy) else None
    return {
        "task": config.task,
        "model": config.model,
        "classes": list(session.train.folders.classes),
        "input_size": [3, config.image_size, config.image_size],
        "resize": f"largest centred square, {session.val.resampling.name.lower()}",
        "mean": list(session.mean),
        "std": list(session.std),
        "metrics": {"accuracy": accuracy, "loss": evaluation.loss},
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "job_digest": job.job_digest,
        "run_id": job.run_id,
        "timm": timm.__version__,
    }
