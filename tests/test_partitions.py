"""China, GovCloud and the sovereign cloud: hosts and ARNs as botocore has them."""

from __future__ import annotations

import json
import re
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore
import pytest

from launcher.credentials import aws
from launcher.credentials.partitions import ECR_HOST, partition_of
from launcher.errors import CvlaunchError, UnreachableError
from launcher.sagemaker.policy import ecr_image
from launcher.stores import StorageOptions, open_store

KNOWN: list[dict[str, Any]] = json.loads(
    Path(botocore.__file__).with_name("data").joinpath("partitions.json").read_text()
)["partitions"]
REGIONS = [(region, partition) for partition in KNOWN for region in partition["regions"] if "-global" not in region]


def test_every_region_is_in_botocore_s_partition() -> None:
    assert len({partition["id"] for _, partition in REGIONS}) == len(KNOWN) >= 8
    for region, partition in REGIONS:
        found = partition_of(region)
        assert (found.name, found.domain) == (partition["id"], partition["outputs"]["dnsSuffix"]), region


@pytest.mark.parametrize(("region", "partition"), REGIONS, ids=[region for region, _ in REGIONS])
def test_ecr_is_known_in_every_region(region: str, partition: dict[str, Any]) -> None:
    host = f"123456789012.dkr.ecr.{region}.{partition['outputs']['dnsSuffix']}"
    found = ecr_image(f"{host}/team/trainer:1")
    assert found is not None and (found.region, found.repository, found.tag) == (region, "team/trainer", "1")
    assert re.fullmatch(ECR_HOST, host)


class Proxy(socketserver.ThreadingTCPServer):
    """It lets nobody through, and keeps whom they asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Refusal)
        self.wanted: list[str] = []


class Refusal(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server = self.server
        assert isinstance(server, Proxy)
        server.wanted.append(self.rfile.readline().decode().split()[1])
        self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def proxy(clean_aws: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        yield server
        server.shutdown()
        thread.join()


HOSTS = {
    "cn-north-1": "s3.cn-north-1.amazonaws.com.cn:443",
    "eusc-de-east-1": "s3.eusc-de-east-1.amazonaws.eu:443",
    "us-gov-west-1": "s3.us-gov-west-1.amazonaws.com:443",
    "eu-west-1": "s3.eu-west-1.amazonaws.com:443",
}


def asked(proxy: Proxy, **options: str) -> set[str]:
    with pytest.raises(UnreachableError):
        open_store("s3://bucket/runs", StorageOptions(**options), patience_s=0).read("job.json")  # type: ignore[arg-type]
    return set(proxy.wanted)


@pytest.mark.parametrize("region", HOSTS)
def test_s3_is_asked_at_its_partition_s_host(proxy: Proxy, region: str) -> None:
    assert asked(proxy, region=region) == {HOSTS[region]}


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_may_be_the_environment_s(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """As in a container of SageMaker."""
    monkeypatch.setenv(variable, "cn-north-1")
    assert asked(proxy) == {HOSTS["cn-north-1"]}


def test_the_region_may_be_the_profile_s(proxy: Proxy, clean_aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    (clean_aws / ".aws").mkdir(exist_ok=True)
    (clean_aws / ".aws/config").write_text("[profile lab]\nregion = eusc-de-east-1\n")
    (clean_aws / ".aws/credentials").write_text("[lab]\naws_access_key_id = a\naws_secret_access_key = b\n")
    (clean_aws / ".aws/credentials").chmod(0o600)
    assert asked(proxy, profile="lab") == {HOSTS["eusc-de-east-1"]}


def test_an_endpoint_that_is_named_stays(proxy: Proxy) -> None:
    assert asked(proxy, region="cn-north-1", endpoint="https://s3.example.com") == {"s3.example.com:443"}


def test_a_log_in_for_ecr_of_the_sovereign_cloud(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(CvlaunchError):
        aws.ecr_login("123456789012.dkr.ecr.eusc-de-east-1.amazonaws.eu")
    assert set(proxy.wanted) == {"api.ecr.eusc-de-east-1.amazonaws.eu:443"}
