"""Instance types: EC2's facts, estimates near published prices, and the types that a job's resources mean."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import pytest

from launcher.errors import SpecError
from launcher.kube.gpus import MODELS as KUBE_MODELS
from launcher.sagemaker.catalogue import ELSEWHERE, INSTANCES, MODELS, InstanceType, choose, instance_type, words
from launcher.sagemaker.limits import instance_names

GB, GIB = 10**9, 2**30


def chosen(gpus: int, *models: str, cpus: int | None = None, memory: int | None = None, disk: int = 0) -> list[str]:
    return [found.name for found in choose(gpus=gpus, models=models, cpus=cpus, memory=memory, disk=disk)]


@pytest.fixture(scope="module")
def ec2() -> Mapping[str, Any]:
    """What EC2's DescribeInstanceTypes answers, as moto has it."""
    packed = files("moto.ec2").joinpath("resources/instance_types.json.gz").read_bytes()
    found: Mapping[str, Any] = json.loads(gzip.decompress(packed))
    return found


def test_sagemaker_has_all_types_of_the_catalogue() -> None:
    assert set(INSTANCES) <= instance_names()


def test_shapes_are_those_of_ec2(ec2: Mapping[str, Any]) -> None:
    missing: list[str] = []
    for name, ours in INSTANCES.items():
        theirs = ec2.get(name.removeprefix("ml."))
        if theirs is None:
            missing.append(name)
            continue
        gpu = theirs.get("GpuInfo", {"Gpus": [{"Name": "", "Count": 0}]})["Gpus"][0]
        disk = theirs.get("InstanceStorageInfo", {}).get("TotalSizeInGB")
        assert ours.gpus == gpu["Count"], name
        assert ours.gpu == {"RTX PRO Server 6000": "RTXPRO6000"}.get(gpu["Name"], gpu["Name"].replace(" ", "")), name
        assert ours.cpus == theirs["VCpuInfo"]["DefaultVCpus"], name
        assert ours.memory == theirs["MemoryInfo"]["SizeInMiB"] * 2**20, name
        assert ours.nvme == (disk and disk * GB), name
        assert ours.efa == theirs["NetworkInfo"]["EfaSupported"], name
        if ours.gpus:
            assert ours.gpu_memory * 0.92 <= gpu["MemoryInfo"]["SizeInMiB"] / 1024 <= ours.gpu_memory * 1.01, name
    assert len(missing) < 10, "moto's copy is of another time, but not of another world"


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("ml.g4dn.xlarge", 0.736),
        ("ml.g5.xlarge", 1.408),
        ("ml.g5.2xlarge", 1.515),
        ("ml.g5.4xlarge", 2.03),
        ("ml.g5.12xlarge", 7.09),
        ("ml.p3.2xlarge", 3.825),
        ("ml.m5.xlarge", 0.23),
        ("ml.m5.4xlarge", 0.922),
    ],
)
def test_estimates_meet_published_prices(name: str, published: float) -> None:
    assert INSTANCES[name].price == pytest.approx(published, abs=0.002)


def test_each_price_says_where_it_is_from() -> None:
    for found in INSTANCES.values():
        assert (found.price is None) == (found.priced == "")
        assert found.price is None or found.priced.startswith("EC2's price × ")


def test_the_cheapest_type_of_each_model_in_the_jobs_order() -> None:
    assert chosen(1, "L4", "A10G", "T4") == ["ml.g6.xlarge", "ml.g5.xlarge", "ml.g4dn.xlarge"]
    assert chosen(1) == ["ml.g4dn.xlarge"]
    assert chosen(8, "H200") == ["ml.p5en.48xlarge"]


def test_at_least_as_many_gpus_as_asked_for() -> None:
    assert chosen(2, "L4") == chosen(4, "L4") == ["ml.g6.12xlarge"]
    assert chosen(5, "L4") == ["ml.g6.48xlarge"]
    assert chosen(1, "A100") == ["ml.p4d.24xlarge"]
    assert chosen(1, "H100") == ["ml.p5.4xlarge"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("A10", "ml.g5.xlarge"),
        ("a10g-24gb", "ml.g5.xlarge"),
        ("A100-80GB", "ml.p4de.24xlarge"),
        ("A100-40GB", "ml.p4d.24xlarge"),
        ("V100", "ml.p3.2xlarge"),
        ("V100-32GB", "ml.p3dn.24xlarge"),
        ("RTX PRO 6000", "ml.g7e.2xlarge"),
        ("rtx-pro-6000", "ml.g7e.2xlarge"),
        ("B200", "ml.p6-b200.48xlarge"),
    ],
)
def test_models_as_people_write_them(model: str, expected: str) -> None:
    assert chosen(1, model) == [expected]


def test_cpus_memory_and_disk_make_it_larger() -> None:
    assert chosen(1, "A10G", cpus=5) == ["ml.g5.2xlarge"]
    assert chosen(1, "A10G", memory=16 * GIB) == ["ml.g5.xlarge"]
    assert chosen(1, "A10G", memory=16 * GIB + 1) == ["ml.g5.2xlarge"]
    assert chosen(1, "A10G", disk=250 * GB) == ["ml.g5.xlarge"]
    assert chosen(1, "A10G", disk=250 * GB + 1) == ["ml.g5.2xlarge"]
    assert chosen(1, "V100", disk=5000 * GB) == ["ml.p3.2xlarge"], "its volume is as large as asked for"


def test_a_job_without_gpus_gets_one_small_type() -> None:
    assert chosen(0) == ["ml.m5.large"]
    assert chosen(0, cpus=8, memory=16 * GIB) == ["ml.c5.2xlarge"]
    assert chosen(0, memory=300 * GIB, disk=900 * GB) == ["ml.m5.24xlarge"]


def test_at_most_five_and_none_twice() -> None:
    assert chosen(1, "A100", "A100-40GB", "a100") == ["ml.p4d.24xlarge"]
    assert len(chosen(1, "T4", "L4", "A10G", "L40S", "V100", "H100")) == 5


def test_models_of_other_platforms_are_passed_over_beside_ours() -> None:
    assert chosen(1, "MI300X", "L4", "RTX4090") == ["ml.g6.xlarge"]
    assert chosen(8, "H100", "L40S") == ["ml.p5.48xlarge", "ml.g6e.48xlarge"]
    assert chosen(2, "RTXPRO4500", "T4", cpus=40, memory=190 * GIB) == ["ml.g7.12xlarge", "ml.g4dn.12xlarge"]
    assert chosen(1, "T4", "A10G", disk=1500 * GB) == ["ml.g5.16xlarge"], "no type with T4 has such a disk"


def test_each_model_that_clusters_know_is_ours_or_elsewhere() -> None:
    known = {model for table in KUBE_MODELS.values() for model in table}
    ours = {model.upper() for found in INSTANCES.values() for model in found.models} | {"A10"}
    assert known <= ours | set(ELSEWHERE)
    assert not ours & set(ELSEWHERE)


@pytest.mark.parametrize(
    ("asked", "key", "named"),
    [
        ({"gpus": 1, "models": ["H10"]}, "resources.gpu", "did you mean 'H100'?"),
        ({"gpus": 1, "models": ["L4", "H10"]}, "resources.gpu", "'H10'"),
        ({"gpus": 1, "models": ["MI300X"]}, "resources.gpu", "T4, A10G, L4"),
        ({"gpus": 9, "models": ["H100", "L4"]}, "resources.gpus", "8 GPUs"),
        ({"gpus": 9, "models": []}, "resources.gpus", "8 GPUs"),
        ({"gpus": 1, "models": ["T4"], "cpus": 65}, "resources.cpus", "ml.g4dn.16xlarge with 64 vCPU"),
        ({"gpus": 1, "models": ["T4"], "memory": 300 * GIB}, "resources.memory", "256.0 GiB"),
        ({"gpus": 1, "models": ["T4"], "disk": 901 * GB}, "resources.disk", "900 GB"),
        ({"gpus": 0, "models": [], "cpus": 193}, "resources.cpus", "192 vCPU"),
    ],
)
def test_what_sagemaker_does_not_have_is_one_clear_error(asked: dict[str, Any], key: str, named: str) -> None:
    with pytest.raises(SpecError) as caught:
        choose(**{"cpus": None, "memory": None, "disk": 0, **asked})
    assert caught.value.key == key and named in caught.value.message


def test_words_say_shape_and_price() -> None:
    assert words(INSTANCES["ml.g5.2xlarge"]) == (
        "ml.g5.2xlarge: 1 × A10G (24 GB), 8 vCPU, 32 GiB, 450 GB NVMe;"
        " about $1.51/h (estimate: EC2's price × 1.25, us-east-1, 2026-11)"
    )
    assert words(INSTANCES["ml.m5.large"]).startswith("ml.m5.large: 2 vCPU, 8 GiB; about $0.12/h")
    assert words(INSTANCES["ml.p5e.48xlarge"]).endswith("; no price known")
    assert words(InstanceType("ml.g9.xlarge")) == "ml.g9.xlarge: nothing is known of it here"


def test_unknown_types_are_unknown_and_accelerated_by_family() -> None:
    assert instance_type("ml.g9.xlarge") is None
    for name, accelerated in {"ml.g9.xlarge": True, "ml.trn2.48xlarge": True, "ml.p2.xlarge": True}.items():
        assert InstanceType(name).accelerated is accelerated
    assert all(found.accelerated is bool(found.gpus) for found in INSTANCES.values())


def test_models_are_listed_once() -> None:
    assert len(set(MODELS)) == len(MODELS) and set(MODELS) == {found.gpu for found in INSTANCES.values() if found.gpus}
