"""Five fixed jobs, whose digests and renderings are kept from release to release."""

from __future__ import annotations

from launcher.backends.base import BaseTarget, Image, Job
from launcher.contract import Channel, Code
from launcher.resolve import digest_of, train_of
from launcher.spec import JobSpec

_PRINT = "a" * 64
_OTHER = "b" * 64

SPECS: dict[str, dict[str, object]] = {
    "classify": {
        "name": "Digits, fine-tuned",
        "train": {"task": "classify", "model": "resnet18", "epochs": 3},
        "data": {"train": "s3://bucket/digits/train", "val": "s3://bucket/digits/val"},
        "resources": {"gpus": 1, "timeout": "12h"},
        "retries": 2,
        "tags": {"team": "vision"},
    },
    "detect": {
        "name": "shapes",
        "train": {"task": "detect", "model": "yolo11n", "classes": ["circle", "square"]},
        "data": {"train": "s3://bucket/shapes/train", "val": "s3://bucket/shapes/val"},
    },
    "command": {"name": "echo", "command": ["python", "-c", "print('it''s')", "${CVLAUNCH_DATA_TRAIN}"]},
    "secrets": {
        "name": "with-secrets",
        "command": ["true"],
        "secrets": {"TOKEN": "env:MY_TOKEN"},
        "env": {"HOSTILE": 'a "b" \\ \n {{ c }} $(d)'},
    },
    "code": {
        "name": "own-code",
        "command": ["python", "train.py"],
        "code": {"root": ".", "requirements": "req.lock"},
        "resources": {"gpus": 2, "processes": 4, "grace": "5m"},
    },
}


def fixed_job(name: str, target: BaseTarget, target_name: str, output: str) -> Job:
    """The job without a look at anything: facts that resolve would have read are given here."""
    spec = JobSpec.model_validate(SPECS[name])
    channels = tuple(Channel(c, uri, "staged", _PRINT, 100, 12345) for c, uri in sorted(spec.data.items()))
    code = Code(_OTHER, 2048, "req.lock") if spec.code else None
    image = Image("registry/trainer", config_digest=_OTHER) if name == "detect" else None
    return Job(
        spec=spec,
        target_name=target_name,
        target=target,
        output=output,
        channels=channels,
        image=image,
        code=code,
        code_archive="code.tar.gz" if code else None,
        train=train_of(spec),
        command=spec.command,
        digest=digest_of(spec, channels=channels, code=code, image=image),
        shm=None,
        disk=20 << 30,
        version="0.0.0",
    )
