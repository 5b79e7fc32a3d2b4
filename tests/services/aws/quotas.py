"""Quotas of the account: what they are, what is used of them, and the operations of Service Quotas."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.services.aws.account import ACCOUNT
from tests.services.aws.jobs import Hardware, Jobs
from tests.services.aws.shapes import check_request, service_model
from tests.services.aws.wire import AwsError, Json

__all__ = ["LONGEST_RUN", "Quotas", "quota_name"]

LONGEST_RUN = "Longest run time for a training job"

_USUAL = 1000.0
_OTHERS = {LONGEST_RUN: 28 * 24 * 3600.0, "Number of instances across training jobs": 1000.0}
_WAY_OUT = (
    "Please use AWS Service Quotas to request an increase for this quota. If AWS Service Quotas is not available, "
    "contact AWS support to request an increase for this quota."
)


def quota_name(instance_type: str, spot: bool) -> str:
    return f"{instance_type} for {'spot ' if spot else ''}training job usage"


@dataclass
class Quotas:
    """values, running: name of a quota → instances allowed, and those in use by somebody else."""

    jobs: Jobs
    values: dict[str, float] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    offered: set[str] = field(default_factory=set)

    def clear(self) -> None:
        self.values.clear()
        self.running.clear()
        self.offered.clear()

    # -- what a job takes ---------------------------------------------------------------------------------------------

    def check(self, instance: Hardware, runtime_s: float, region: str, *, warm: bool) -> None:
        """AwsError ResourceLimitExceeded if the account may not have so much. warm: the instances stay a while."""
        name = quota_name(instance.type, instance.spot)
        used = self.running.get(name, 0) + self.jobs.in_use(instance.type, instance.spot, region)
        if used + instance.count > self.value(name):
            raise _exceeded(name, self.value(name), used, instance.count, "Instances")
        pool = f"{instance.type} for training warm pool usage"
        if warm and instance.count > self.value(pool):
            raise _exceeded(pool, self.value(pool), 0, instance.count, "Instances")
        if runtime_s > self.value(LONGEST_RUN):
            raise _exceeded(LONGEST_RUN, self.value(LONGEST_RUN), 0, round(runtime_s), "Seconds")

    def value(self, name: str) -> float:
        return self.values.get(name, _OTHERS.get(name, _USUAL))

    # -- Service Quotas -----------------------------------------------------------------------------------------------

    def answer(self, operation: str, body: Json, region: str) -> Json:
        if operation not in ("ListServiceQuotas", "GetServiceQuota"):
            raise AwsError("UnknownOperationException", f"this stand-in has no {operation}")
        check_request("service-quotas", operation, body)
        known = list(self._all(region)) if body["ServiceCode"] == "sagemaker" else []
        if not known:
            raise AwsError(
                "NoSuchResourceException", "The request failed because the specified service does not exist."
            )
        if operation == "GetServiceQuota":
            found = [quota for quota in known if quota["QuotaCode"] == body["QuotaCode"]]
            if not found:
                text = "The request failed because the specified quota code does not exist."
                raise AwsError("NoSuchResourceException", text)
            return {"Quota": found[0]}
        first = int(base64.b64decode(body.get("NextToken", "") or "MA=="))
        after = first + body.get("MaxResults", 100)
        more = {"NextToken": base64.b64encode(str(after).encode()).decode()} if after < len(known) else {}
        return {"Quotas": known[first:after], **more}

    def _all(self, region: str) -> Iterator[Json]:
        types = [*service_model("sagemaker").shape_for("TrainingInstanceType").enum, *sorted(self.offered)]
        names = [f"{name} for {use} usage" for name in types for use in _USES]
        for name in sorted([*names, *_OTHERS]):
            code = _code(name)
            yield {
                "ServiceCode": "sagemaker",
                "ServiceName": "Amazon SageMaker",
                "QuotaArn": f"arn:aws:servicequotas:{region}:{ACCOUNT}:sagemaker/{code}",
                "QuotaCode": code,
                "QuotaName": name,
                "Value": self.value(name),
                "Unit": "None",
                "Adjustable": True,
                "GlobalQuota": False,
                "QuotaAppliedAtLevel": "ACCOUNT",
            }


_USES = ("training job", "spot training job", "training warm pool")


def _code(name: str) -> str:
    return f"L-{hashlib.sha256(name.encode()).hexdigest()[:8].upper()}"


def _exceeded(name: str, value: float, used: int, delta: int, unit: str) -> AwsError:
    text = (
        f"The account-level service limit '{name}' is {value:.0f} {unit}, with current utilization of {used} {unit} "
        f"and a request delta of {delta} {unit}. {_WAY_OUT}"
    )
    return AwsError("ResourceLimitExceeded", text)
