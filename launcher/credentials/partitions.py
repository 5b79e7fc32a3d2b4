"""Partitions of AWS: what begins their ARNs and ends their hosts. A test holds them to botocore's partitions.json.

A table of our own, because images of jobs reach S3 without botocore, and policies are written without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ECR_HOST", "Partition", "partition_of"]


@dataclass(frozen=True)
class Partition:
    """name: as in an ARN, `aws-cn`. domain: of its services, as in `s3.cn-north-1.amazonaws.com.cn`."""

    name: str
    domain: str


_USUAL = Partition("aws", "amazonaws.com")
_OTHERS: Mapping[str, Partition] = {
    "cn-": Partition("aws-cn", "amazonaws.com.cn"),
    "eusc-": Partition("aws-eusc", "amazonaws.eu"),
    "us-gov-": Partition("aws-us-gov", "amazonaws.com"),
    "us-iso-": Partition("aws-iso", "c2s.ic.gov"),
    "us-isob-": Partition("aws-iso-b", "sc2s.sgov.gov"),
    "eu-isoe-": Partition("aws-iso-e", "cloud.adc-e.uk"),
    "us-isof-": Partition("aws-iso-f", "csp.hci.ic.gov"),
}
"""Beginning of a region → its partition; all others are in `aws`."""

_DOMAINS = "|".join(re.escape(domain) for domain in dict.fromkeys(p.domain for p in (_USUAL, *_OTHERS.values())))
ECR_HOST = rf"(?P<account>\d{{12}})\.dkr\.ecr(?:-fips)?\.(?P<region>[a-z0-9-]+)\.(?:{_DOMAINS})"
"""A regular expression: https://docs.aws.amazon.com/AmazonECR/latest/userguide/Registries.html"""


def partition_of(region: str) -> Partition:
    """The partition that a region is in."""
    return next((partition for start, partition in _OTHERS.items() if region.startswith(start)), _USUAL)
