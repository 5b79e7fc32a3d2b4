"""`targets setup`, `targets probe`, `targets policy`, `login`: making a cluster ready, looking at one, opening the way.

Each of them goes to the file of the cluster's kind: slurm.py, kubernetes.py, sagemaker.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.options import complete_targets, json_option, quiet_option
from launcher.cli.out import Out
from launcher.errors import SpecError

if TYPE_CHECKING:
    from launcher.targets import Selected

__all__ = ["login", "policy", "probe", "setup"]

_KUBERNETES = ("kubernetes", "openshift")
_SAGEMAKER = "sagemaker"
_POLICIES = ("submitter", "role", "trust")


@click.command()
@click.argument("name", shell_complete=complete_targets)
@click.option("--image", "images", metavar="IMAGE", multiple=True, help="Bring this image there, too. May be repeated.")
@click.option(
    "--requirements",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Lock file with hashes to make the environment from; else the trainer image's.",
)
@json_option
def setup(*, name: str, images: tuple[str, ...], requirements: Path | None, out: Out) -> None:
    """Make target NAME ready for jobs: cvlaunch itself, a Python environment, images.

    All of it stands below the target's `root`. May be repeated: it does what is missing. A target with `python`, or on
    this machine, gets no environment: its Python is checked. One with `container_command` needs none.
    """
    from launcher.cli import kubernetes, sagemaker, slurm

    selected = _select(name)
    if selected.backend.name in _KUBERNETES:
        raise kubernetes.nothing_to_set_up(selected)
    if selected.backend.name == _SAGEMAKER:
        raise sagemaker.nothing_to_set_up(selected)
    slurm.setup(selected, images, requirements=requirements, out=out)


@click.command()
@click.argument("name", required=False, shell_complete=complete_targets)
@click.option("--ssh", metavar="HOST", help="SLURM: a login node, as your ssh knows it.")
@click.option("--root", metavar="FOLDER", help="SLURM: folder for the new target: absolute, seen by all nodes.")
@click.option("--run-job", is_flag=True, help="SLURM: look at a compute node, too, in a job of a minute.")
@click.option(
    "--connect", metavar="HOST:PORT", default="pypi.org:443", show_default=True, help="What --run-job tries to reach."
)
@click.option("--context", metavar="NAME", help="Kubernetes: a context of the kubeconfig.")
@click.option("--kubeconfig", metavar="FILE", help="Kubernetes: instead of $KUBECONFIG and ~/.kube/config.")
@click.option("--namespace", metavar="NAME", help="Kubernetes: instead of the context's.")
@click.option("--profile", metavar="NAME", help="SageMaker: an AWS profile of this machine.")
@click.option("--region", metavar="NAME", help="SageMaker: instead of the profile's.")
@click.option("--write", is_flag=True, help="Add the target to targets.yaml.")
@json_option
def probe(
    *,
    name: str | None,
    ssh: str | None,
    root: str | None,
    run_job: bool,
    connect: str,
    context: str | None,
    kubeconfig: str | None,
    namespace: str | None,
    profile: str | None,
    region: str | None,
    write: bool,
    out: Out,
) -> None:
    """Look at a cluster or an account and write a target for it.

    That of target NAME; or the one that --ssh, --context, --kubeconfig, --namespace, --profile or --region name, or
    without any of these the SLURM cluster of this machine, and then NAME is the new target's name.
    """
    from launcher.cli import kubernetes, sagemaker, slurm

    of_kubernetes, of_aws = context or kubeconfig or namespace, profile or region
    known = name is not None and not (ssh or of_kubernetes or of_aws) and _is_there(name)
    selected = _select(name) if name is not None and known else None
    found = selected.backend.name if selected else "kubernetes" if of_kubernetes else _SAGEMAKER if of_aws else "slurm"
    if found != "slurm" and (ssh or root or run_job):
        raise SpecError("--ssh, --root and --run-job are for clusters of SLURM")
    if of_kubernetes and of_aws:
        raise SpecError(
            "--profile and --region are for SageMaker, --context, --kubeconfig and --namespace for clusters"
        )
    if found == _SAGEMAKER:
        target = sagemaker.target_of(selected) if selected else sagemaker.target_by(profile, region)
        sagemaker.probe(name, target, write=write, out=out)
        return
    if found in _KUBERNETES:
        access = kubernetes.access_of(selected) if selected else kubernetes.access(context, kubeconfig, namespace)
        account = kubernetes.target_of(selected).service_account if selected else None
        kubernetes.probe(name, access, service_account=account, write=write, out=out)
        return
    slurm.probe(name, selected, ssh=ssh, root=root, run_job=run_job, connect=connect, write=write, out=out)


@click.command()
@click.argument("name", shell_complete=complete_targets)
@click.option("--user", metavar="NAME", help="Kubernetes: whom to give it to.")
@click.option("--group", metavar="NAME", help="Kubernetes: a group of users instead.")
@click.option("--service-account", metavar="NAME", help="Kubernetes: a service account of the namespace instead.")
@click.option("--of", type=click.Choice(_POLICIES), help="SageMaker: this policy alone, as IAM takes it.")
@click.option(
    "--secret",
    "secrets",
    metavar="REFERENCE",
    multiple=True,
    help="SageMaker: the role may read it: secretsmanager:NAME, ssm:NAME. May be repeated.",
)
@click.option(
    "--key",
    "keys",
    metavar="ARN",
    multiple=True,
    help="SageMaker: a key of KMS that encrypts a bucket, a secret or a parameter. May be repeated.",
)
def policy(
    *,
    name: str,
    user: str | None,
    group: str | None,
    service_account: str | None,
    of: str | None,
    secrets: tuple[str, ...],
    keys: tuple[str, ...],
) -> None:
    """Print the least rights that target NAME needs.

    Kubernetes, OpenShift: a Role. Somebody who may give rights in the namespace applies it:
    cvlaunch targets policy NAME --user ME | kubectl apply -f -

    SageMaker: policies of IAM, for whoever submits (submitter), for the role of the jobs (role), and the role's trust
    policy (trust).
    """
    from launcher.cli import kubernetes, sagemaker

    selected = _select(name)
    if selected.backend.name == _SAGEMAKER:
        if user or group or service_account:
            raise SpecError("--user, --group and --service-account are for clusters of Kubernetes")
        sagemaker.policy(selected, of, secrets=secrets, keys=keys)
        return
    if of or secrets or keys:
        raise SpecError("--of, --secret and --key are for targets of SageMaker")
    click.echo(kubernetes.policy_text(selected, user=user, group=group, service_account=service_account), nl=False)


@click.command()
@click.argument("name", shell_complete=complete_targets)
@quiet_option
def login(name: str, out: Out) -> None:
    """Open the way to a cluster or an account that wants somebody to log in.

    SLURM: one that asks for a password or a code of a second factor, or whether its host key is right. All commands use
    the connection of target NAME then, until it has not been used for 12 hours. Kubernetes: runs the plugin of the
    kubeconfig, if there is one. SageMaker: runs `aws sso login`, if the profile is one of SSO.
    """
    from launcher.cli import kubernetes, sagemaker, slurm

    selected = _select(name)
    if selected.backend.name in _KUBERNETES:
        kubernetes.login(selected, out)
    elif selected.backend.name == _SAGEMAKER:
        sagemaker.login(selected, out)
    else:
        slurm.login(selected, out)


def _select(name: str) -> Selected:
    from launcher.targets import load_targets

    return load_targets(Path.cwd()).select(target=name)


def _is_there(name: str) -> bool:
    """False is a new name for the cluster of this machine; where there is none, it is a wrong one."""
    from launcher.targets import load_targets

    return name in load_targets(Path.cwd()).names() or shutil.which("sbatch") is None
