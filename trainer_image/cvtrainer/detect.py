"""Object detection with Ultralytics YOLO, through its Python API: read from top to bottom, in the order it happens.

Ultralytics writes into a scratch folder; its callbacks feed our metrics, and our checkpoints are copies of its last.pt
and best.pt, made when it has written them. It saves after each epoch, so a run stopped within an epoch begins that
epoch again; half-precision weights in its checkpoints make the result near, not equal, to the uninterrupted run's.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml

from cvtrainer import checkpoints, plots
from cvtrainer.run import Preempted, Recorder, Run, UserError, brief
from launcher.contract import WEIGHTS_CHANNEL, newest_checkpoint, write_json
from launcher.errors import nearest
from launcher.shm import ULTRALYTICS_PREFETCH, Loading, allowed_loading
from launcher.spec import DetectConfig

__all__ = ["train"]

_AGREE_EVERY = 8
"""Steps between two questions to all ranks whether one was asked to stop."""

_CONFIDENCE = 0.25
"""From which a box counts in the confusion matrix: what Ultralytics' own predict shows."""

_IMAGES = (".avif", ".bmp", ".dng", ".heic", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
_COPIED_PLOTS = (
    "results.csv",
    "results.png",
    "BoxPR_curve.png",
    "BoxF1_curve.png",
    "labels.jpg",
    "val_batch0_pred.jpg",
)
_METRICS = {
    "map50": "metrics/mAP50(B)",
    "map": "metrics/mAP50-95(B)",
    "precision": "metrics/precision(B)",
    "recall": "metrics/recall(B)",
}
"""Our name of a value → Ultralytics' name."""


@dataclass(frozen=True)
class Session:
    run: Run
    config: DetectConfig
    scratch: Path
    classes: tuple[str, ...]
    recorder: Recorder | None

    @property
    def loading(self) -> Loading:
        """As the job asks, or what the runner found to fit into /dev/shm."""
        return allowed_loading(os.environ, Loading(self.config.workers, ULTRALYTICS_PREFETCH))

    @property
    def work(self) -> Path:
        """Ultralytics' save_dir, the same for all ranks of the machine."""
        return self.scratch / "work"


@dataclass
class Clock:
    """batch: steps done in this epoch. best_step: the step whose checkpoint is the best one."""

    best_step: int | None
    batch: int = 0
    epoch_began: float = 0.0


def train(run: Run, config: DetectConfig) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    with scratch_folder(run) as scratch:
        quiet_ultralytics(scratch / f"rank-{run.ranks.rank}")
        classes = read_classes(run, config)
        session = Session(run, config, scratch, classes, Recorder(run.layout) if run.ranks.main else None)
        data = write_data_file(session)
        model, settings = resumed(session) or fresh(session)
        clock = Clock(checkpoints.best_step(run.layout.checkpoints))
        for event, callback in callbacks(session, clock).items():
            model.add_callback(event, callback)
        model.train(data=str(data), **settings, **machine_settings(session))
        if run.ranks.main:
            write_results(session, model)
        if dist.is_initialized():
            dist.barrier()


# The place to work in


@contextmanager
def scratch_folder(run: Run) -> Iterator[Path]:
    """Ranks of one machine share the folder: its name comes from torchrun's process, their parent."""
    if run.ranks.world == 1:
        with tempfile.TemporaryDirectory(prefix="cvtrainer-") as folder:
            yield Path(folder)
        return
    shared = Path(tempfile.gettempdir(), f"cvtrainer-{os.getuid()}-{os.getppid()}")
    shared.mkdir(mode=0o700, exist_ok=True)
    facts = shared.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise RuntimeError(f"{shared} belongs to someone else; set TMPDIR to a folder of your own")
    yield shared
    if run.ranks.local == 0:
        shutil.rmtree(shared, ignore_errors=True)


def quiet_ultralytics(folder: Path) -> None:
    """Before its import: settings in `folder`, no telemetry, no update check, no installing, no fonts fetched.

    YOLO_OFFLINE stops its own look-ups; weights that a job asks for are fetched all the same. Its fonts are looked
    for in the settings folder first, so matplotlib's font is put there under their names.
    """
    import matplotlib as mpl

    settings = folder / "settings" / "Ultralytics"
    settings.mkdir(parents=True, exist_ok=True)
    font = Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    for name in ("Arial.ttf", "Arial.Unicode.ttf"):
        shutil.copyfile(font, settings / name)
    os.environ |= {
        "YOLO_CONFIG_DIR": str(settings.parent),
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
        "YOLO_VERBOSE": "false",
        "ULTRALYTICS_SAFE_LOAD": "1",  # torch.load(weights_only=True) with its own classes allowed
    }
    from ultralytics import settings as preferences

    off = ("sync", "clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")
    known = {name: False for name in off if name in preferences}
    preferences.update(
        {**known, "runs_dir": str(folder), "datasets_dir": str(folder), "weights_dir": str(folder / "w")}
    )


# Data


def read_classes(run: Run, config: DetectConfig) -> tuple[str, ...]:
    """Names by class id, from the job or from `data.yaml` (names as a list or as id → name)."""
    if config.classes:
        return config.classes
    file = run.need_channel("train") / "data.yaml"
    try:
        names = yaml.safe_load(file.read_text(encoding="utf-8"))["names"]
    except OSError as error:
        raise UserError(f"the classes have no names: give train.classes, or {file} with `names:`") from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} has no usable `names:`; expected a list of class names, or id: name") from error
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(f"{file}: the ids under `names:` must be 0 to {len(names) - 1}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: `names:` must be a list of class names, or id: name")
    return tuple(str(name) for name in names)


def write_data_file(session: Session) -> Path:
    """Ultralytics' data yaml. It writes a cache beside the labels, so it gets links to them, not the channel itself."""
    folder = session.scratch / f"rank-{session.run.ranks.rank}" / "data"
    for channel in ("train", "val"):
        link_split(session.run.need_channel(channel), folder / channel)
    file = folder / "data.yaml"
    content = {"path": str(folder), "train": "train", "val": "val", "names": dict(enumerate(session.classes))}
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return file


def link_split(channel: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in ("images", "labels"):
        if not (channel / name).is_dir():
            raise UserError(f"{channel} has no folder {name}/; expected images/ and labels/ in YOLO's format")
    if not any(images_below(channel / "images")):
        raise UserError(f"{channel / 'images'} holds no images; expected {', '.join(_IMAGES)} files")
    if not any(True for _ in (channel / "labels").rglob("*.txt")):
        raise UserError(f"{channel / 'labels'} holds no labels; expected a .txt file an image: class x y width height")
    (target / "images").symlink_to(channel.resolve() / "images")
    mirror(channel.resolve() / "labels", target / "labels")


def images_below(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.lower().endswith(_IMAGES) and not name.startswith("."):
                yield str(Path(parent, name).relative_to(folder))


def mirror(source: Path, target: Path) -> None:
    """Links `source` at `target`, so that the folder above each folder of labels is ours to write in."""
    children = sorted(source.iterdir())
    if not any(child.is_dir() for child in children):
        target.symlink_to(source)
        return
    target.mkdir()
    for child in children:
        if child.is_dir():
            mirror(child, target / child.name)
        else:
            (target / child.name).symlink_to(child)


# Model


def fresh(session: Session) -> tuple[Any, dict[str, object]]:
    """A new training: the model, and what its recipe says."""
    config = session.config
    model, pretrained = new_model(session)
    settings: dict[str, object] = {
        "epochs": config.epochs,
        "batch": config.batch * session.run.ranks.world,
        "imgsz": config.image_size,
        "seed": config.seed,
        "patience": config.patience or 0,
        "deterministic": True,
        "pretrained": pretrained,
        "verbose": False,
        "amp": mixed_precision(session),
    }
    if config.learning_rate is not None:  # with optimizer=auto Ultralytics would choose its own
        settings |= {"optimizer": "AdamW", "lr0": config.learning_rate}
    return model, settings


def new_model(session: Session) -> tuple[Any, bool | str]:
    """The model, and Ultralytics' `pretrained`: whether, or from which file."""
    from ultralytics import YOLO

    name = session.config.model
    blank = blank_model(name)
    weights = session.run.channel(WEIGHTS_CHANNEL)
    if weights is not None:
        file = weights_file(weights)
        readable_weights(file)
        session.run.say(f"starting from {file}")
        return blank, str(file)
    if not session.config.pretrained:
        return blank, False
    try:
        return YOLO(session.scratch / f"rank-{session.run.ranks.rank}" / f"{name}.pt"), True
    except Exception as error:  # requests, urllib3 and Ultralytics each have their own
        raise UserError(
            f"train.model: the published weights of {name!r} can't be had ({brief(error)}); "
            "set train.pretrained: false, or give a data channel `weights` with the .pt file"
        ) from error


def blank_model(name: str) -> Any:
    from ultralytics import YOLO
    from ultralytics.utils.downloads import GITHUB_ASSETS_STEMS

    try:
        model = YOLO(f"{name}.yaml")
    except Exception as error:  # FileNotFoundError, or what reading another yaml as a model gives
        raise UserError(
            f"train.model: Ultralytics has no model {name!r}{nearest(name, GITHUB_ASSETS_STEMS)}"
        ) from error
    if model.task != "detect":
        raise UserError(f"train.model: {name!r} is a model for {model.task}, not for detection")
    return model


def weights_file(place: Path) -> Path:
    if place.is_file():
        return place
    found = [*place.glob("model.pt"), *sorted(place.glob("*.pt"))]
    if not found:
        raise UserError(f"the channel weights, {place}, holds no weights; expected model.pt or another .pt file")
    return found[0]


def readable_weights(file: Path) -> None:
    from ultralytics.nn.tasks import load_checkpoint

    try:
        load_checkpoint(file)
    except Exception as error:
        raise UserError(f"{file} can't be loaded as an Ultralytics model ({type(error).__name__})") from error


def mixed_precision(session: Session) -> bool | str:
    """bf16 where the GPU has it: Ultralytics tests float16 with a model that it downloads first."""
    if not session.config.amp or not session.run.job.gpus:
        return False
    return "bf16" if torch.cuda.is_bf16_supported() else True


def machine_settings(session: Session) -> dict[str, object]:
    """What may differ from attempt to attempt."""
    device = ",".join(map(str, range(session.run.ranks.world))) if session.run.job.gpus else "cpu"
    return {
        "device": device,
        "workers": session.loading.workers,
        "save_dir": str(session.work),
        "exist_ok": True,
        "plots": True,
    }


def resumed(session: Session) -> tuple[Any, dict[str, object]] | None:
    """The newest checkpoint's model, put where Ultralytics left it; the recipe comes from the checkpoint."""
    folder = newest_checkpoint(session.run.layout.checkpoints)
    if folder is None:
        return None
    from ultralytics import YOLO

    weights = session.work / "weights"
    if session.run.ranks.local == 0:
        weights.mkdir(parents=True, exist_ok=True)
        best = folder / "best.pt"
        shutil.copyfile(best if best.exists() else folder / "last.pt", weights / "best.pt")
        shutil.copyfile(folder / "results.csv", session.work / "results.csv")
    session.run.say(f"resuming from step {folder.name}")
    own = session.scratch / f"rank-{session.run.ranks.rank}" / "last.pt"  # last.pt itself is overwritten each epoch
    shutil.copyfile(folder / "last.pt", own)
    return YOLO(own), {"resume": True}


# Training


def callbacks(session: Session, clock: Clock) -> dict[str, Callable[[Any], None]]:
    """Ultralytics' events → what happens then. Each gets its trainer, in validation its validator."""
    return {
        "on_train_start": lambda trainer: check_labels(session, trainer),
        "on_train_epoch_start": lambda trainer: begin_epoch(session, clock, trainer=trainer),
        "on_train_batch_end": lambda trainer: end_batch(session, clock, trainer=trainer),
        "on_model_save": lambda trainer: end_epoch(session, clock, trainer=trainer),
        "on_val_batch_start": count_confident_boxes,
    }


def count_confident_boxes(validator: Any) -> None:
    """In the confusion matrix. In training Ultralytics counts every box of 0.1 % confidence: thousands of mistakes."""
    matrix = validator.confusion_matrix
    if "process_batch" not in vars(matrix):
        count = matrix.process_batch
        matrix.process_batch = lambda found, truth, **_: count(found, truth, conf=_CONFIDENCE)


def check_labels(session: Session, trainer: Any) -> None:
    """Ultralytics leaves broken files out and goes on; a data set with holes is the user's to know."""
    for channel, loader in (("train", trainer.train_loader), ("val", trainer.test_loader)):
        folder = session.run.need_channel(channel) / "images"
        good = {Path(file).name for file in loader.dataset.im_files}
        broken = sorted(name for name in images_below(folder) if Path(name).name not in good)
        if broken:
            raise UserError(
                f"{folder / broken[0]} or its label file is broken ({len(broken)} such in {channel}); "
                f"a label is `class x y width height`, class 0 to {len(session.classes) - 1}, the rest 0 to 1"
            )


def begin_epoch(session: Session, clock: Clock, *, trainer: Any) -> None:
    """Seeds by (seed, epoch), so that a resumed run does not repeat the first epoch's augmentation."""
    seeds = np.random.SeedSequence((session.config.seed, trainer.epoch, session.run.ranks.rank))
    first, second, third = (int(word) for word in seeds.generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third)
    if trainer.train_loader.generator is not None:
        trainer.train_loader.generator.manual_seed(third)
    for loader in (trainer.train_loader, trainer.test_loader):
        fit_into_shm(loader, session.loading.prefetch)
    clock.batch, clock.epoch_began = 0, time.monotonic()


def fit_into_shm(loader: Any, prefetch: int) -> None:
    """Before it begins. Ultralytics has no setting for it, and builds new loaders when a GPU's memory is too small."""
    if loader.num_workers and getattr(loader.collate_fn, "func", None) is not shared_batch:
        loader.prefetch_factor = min(loader.prefetch_factor, prefetch)
        loader.collate_fn = partial(shared_batch, loader.collate_fn)


def shared_batch(collate: Callable[[Any], dict[str, Any]], items: Any) -> dict[str, Any]:
    """The batch in shared memory, so that a full /dev/shm is an error of the worker.

    Left to the queue's thread, the batch would be lost and training would wait for it for ever.
    """
    batch = collate(items)
    for value in batch.values():
        if isinstance(value, torch.Tensor):
            value.share_memory_()
    return batch


def end_batch(session: Session, clock: Clock, *, trainer: Any) -> None:
    """With `stop` set, Ultralytics ends the epoch here: it validates, saves and is done."""
    stop_if_asked(session, clock, trainer=trainer)
    if steps_done(clock, trainer) >= session.run.max_steps:
        trainer.stop = True


def steps_done(clock: Clock, trainer: Any) -> int:
    return int(trainer.epoch * len(trainer.train_loader) + clock.batch)


def stop_if_asked(session: Session, clock: Clock, *, trainer: Any) -> None:
    asked = session.run.stop.asked()
    if dist.is_initialized():
        if clock.batch % _AGREE_EVERY:
            clock.batch += 1
            return
        vote = torch.tensor(int(asked), device=trainer.device)
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        asked = bool(vote.item())
    clock.batch += 1
    if asked:
        kept = newest_checkpoint(session.run.layout.checkpoints)
        until = f"the checkpoint of step {kept.name} is kept" if kept else "no epoch was complete yet"
        raise Preempted(f"preempted at step {steps_done(clock, trainer)}; {until}")


def end_epoch(session: Session, clock: Clock, *, trainer: Any) -> None:
    """Rank 0 alone, when last.pt has been written: metrics, a line, a checkpoint."""
    epoch = trainer.epoch + 1
    step = steps_done(clock, trainer)
    train_values, val_values = epoch_values(session, clock, trainer=trainer)
    if session.recorder:
        session.recorder.log(step, epoch, split="train", values=train_values)
        session.recorder.log(step, epoch, split="val", values=val_values)
    session.run.say(
        f"epoch {epoch}/{trainer.epochs}  loss {train_values['loss']:.4f}  val map50 {val_values['map50']:.4f}  "
        f"map {val_values['map']:.4f}  lr {train_values['lr']:.2e}  {train_values['images_per_second']:.0f} images/s"
    )
    root = session.run.layout.checkpoints
    fitness = float(trainer.fitness)
    if trainer.best_fitness == trainer.fitness:
        clock.best_step = step
    checkpoints.save(root, step, lambda folder: copy_checkpoint(trainer, folder), epoch=epoch, metric=fitness)
    checkpoints.prune(root, best=clock.best_step)


def epoch_values(session: Session, clock: Clock, *, trainer: Any) -> tuple[dict[str, float], dict[str, float]]:
    """(train, val) under our names."""
    losses = {name.removeprefix("train/"): float(v) for name, v in trainer.label_loss_items(trainer.tloss).items()}
    images = clock.batch * session.config.batch * session.run.ranks.world
    speed = round(images / max(time.monotonic() - clock.epoch_began, 1e-9), 2)
    rate = float(next(iter(trainer.lr.values())))
    train_values = {"loss": sum(losses.values()), **losses, "lr": rate, "images_per_second": speed}
    val_losses = {name.removeprefix("val/"): float(v) for name, v in trainer.metrics.items() if name.startswith("val/")}
    val_values = {ours: float(trainer.metrics.get(theirs, 0.0)) for ours, theirs in _METRICS.items()}
    return train_values, {**val_values, "loss": sum(val_losses.values()), **val_losses}


def copy_checkpoint(trainer: Any, folder: Path) -> None:
    """best.pt and results.csv go along: a run that resumes on another machine gets the newest checkpoint alone.

    No best.pt means that last.pt is the best.
    """
    best = () if trainer.best_fitness == trainer.fitness else (trainer.best,)
    for file in (trainer.last, trainer.csv, *best):
        shutil.copyfile(file, folder / file.name)


# Results


def write_results(session: Session, model: Any) -> None:
    layout, trainer, config = session.run.layout, model.trainer, session.config
    best = trainer.best if trainer.best.exists() else trainer.last
    layout.model.mkdir(parents=True, exist_ok=True)
    part = layout.model / ".model.pt.part"
    shutil.copyfile(best, part)
    part.replace(layout.model / "model.pt")
    metrics = {ours: float(trainer.metrics[theirs]) for ours, theirs in _METRICS.items() if theirs in trainer.metrics}
    card = {
        "task": config.task,
        "model": config.model,
        "classes": list(session.classes),
        "input_size": [3, config.image_size, config.image_size],
        "resize": "longer side, padded to a square",
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "metrics": metrics,
        "epochs": trainer.epoch + 1,
        "job_digest": session.run.job.job_digest,
        "run_id": session.run.job.run_id,
        "ultralytics": __import__("ultralytics").__version__,
    }
    write_json(layout.model / "model_card.json", card)
    write_plots(session, trainer)
    if session.recorder:
        session.recorder.close()
    session.run.say(f"best val map50 {metrics.get('map50', 0.0):.4f}; model/model.pt written")


def write_plots(session: Session, trainer: Any) -> None:
    folder = session.run.layout.output / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for name in _COPIED_PLOTS:
        if (session.work / name).exists():
            shutil.copyfile(session.work / name, folder / name)
    matrix = trainer.validator.confusion_matrix.matrix.T  # theirs is [predicted, true]
    names = [*session.classes, "background"]
    plots.write_confusion(folder, matrix, names)
    plots.write_per_class(folder, matrix, session.classes)
