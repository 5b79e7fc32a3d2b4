"""limits.json from the installed botocore: `python -m launcher.sagemaker.tables > launcher/sagemaker/limits.json`.

Its tree follows CreateTrainingJob: a structure has `members` and `required`, a list a `member`, a map `key` and
`value`; `min`, `max`, `pattern` and `enum` are botocore's. The names of instance types, which grow by the month, are no
limit and stand by themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["limits"]

_NAMES = ("TrainingInstanceType", "ProcessingInstanceType")


def limits() -> str:
    """The text of limits.json."""
    import botocore
    from botocore.session import get_session

    model = get_session().get_service_model("sagemaker")
    found = {
        "botocore": botocore.__version__,
        "instance_types": sorted(model.shape_for("TrainingInstanceType").enum),
        "request": dict(_limit(model.operation_model("CreateTrainingJob").input_shape)),
    }
    return json.dumps(found, indent=1) + "\n"


def _limit(shape: Any) -> Iterator[tuple[str, Any]]:
    yield "type", shape.type_name
    yield from ((key, shape.metadata[key]) for key in ("min", "max", "pattern") if shape.metadata.get(key) is not None)
    if shape.type_name == "structure":
        yield "required", list(shape.required_members)
        yield "members", {name: dict(_limit(member)) for name, member in shape.members.items()}
    elif shape.type_name == "map":
        yield "key", dict(_limit(shape.key))
        yield "value", dict(_limit(shape.value))
    elif shape.type_name == "list":
        yield "member", dict(_limit(shape.member))
    elif shape.type_name == "string" and shape.enum and shape.name not in _NAMES:
        yield "enum", list(shape.enum)


if __name__ == "__main__":
    sys.stdout.write(limits())
