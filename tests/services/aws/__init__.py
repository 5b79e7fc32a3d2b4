"""An AWS account in this process, over real HTTP: moto for what stands around training jobs, and a stand-in for
SageMaker's training jobs, Service Quotas, CloudWatch's GetLogEvents, IAM's simulator and the log-in by IAM Identity
Center.

As the real one: requests are held to botocore's model (unknown members too, maxima, patterns, words) and to what the
manual says of fields together; names are taken once; roles, buckets, images, data, quotas and capacity are asked for;
jobs pass through their states, run the image with podman under SageMaker's rules, get their data from S3 and leave
their results there, checkpoints all the time, with the agent's markers beside them; /opt/ml is root's, and no variable
names the region; spot machines are taken away; logs come as streams appear, in pages that
end early; a bucket of another region is a redirection; keys expire.

Otherwise than the real one: policies are nobody's, and any key will do that was not refused by name; the network is
this machine's, so that two jobs can't listen on the same port, and names of instances stand in /etc/hosts; the
platform takes no time, and quotas are 1000 unless set; FastFile copies, but can't be written; Pipe, EFS, FSx, KMS,
VPCs, augmented manifests, several instance groups, warm pools, profilers and debuggers are accepted without effect; a
crossed MaxPendingTimeInSeconds is told (`give_up`), as it is at least half an hour; containers have AWS_ENDPOINT_URL,
in place of the names that AWS's services have.

What moto lacks, or has otherwise than AWS, and this package has: its SageMaker checks nothing, runs nothing and can't
stop a job; its pages of logs are as large as asked for, with tokens that are places in a list; it knows no regions of
buckets; it has no simulator of policies, no addresses of layers and no portal for SSO; its dictionaries don't stand
two requests at once, so that they come one after the other here. Its FilterLogEvents passes over logStreamNamePrefix.
"""

from __future__ import annotations

from tests.services.aws.cloud import REGION, AwsCloud, aws_cloud
from tests.services.aws.faults import Call
from tests.services.aws.wire import AwsError

__all__ = ["REGION", "AwsCloud", "AwsError", "Call", "aws_cloud"]
