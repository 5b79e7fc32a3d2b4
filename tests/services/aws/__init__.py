"""An AWS account in this process, over real HTTP: moto for what stands around training jobs, and a stand-in for
SageMaker's training jobs, Service Quotas and the log-in by IAM Identity Center.

moto's own SageMaker checks nothing, runs nothing and can't stop a job; it has no Service Quotas to speak of, and no
portal for SSO.
"""

from __future__ import annotations

from tests.services.aws.cloud import REGION, AwsCloud, aws_cloud
from tests.services.aws.faults import Call
from tests.services.aws.wire import AwsError

__all__ = ["REGION", "AwsCloud", "AwsError", "Call", "aws_cloud"]
