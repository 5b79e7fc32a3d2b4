"""What `targets probe`, `targets policy` and `login` do with clusters of Kubernetes, OpenShift among them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cli.out import Column, Out
from launcher.errors import SpecError, UnsupportedError

if TYPE_CHECKING:
    from launcher.kube.access import Access
    from launcher.kube.probe import Node, Probe
    from launcher.kube.target import KubernetesTarget
    from launcher.targets import Selected

__all__ = ["access", "access_of", "login", "nothing_to_set_up", "policy_text", "probe", "target_of"]

_DEFAULT_NAME = "cluster"


def access(context: str | None, kubeconfig: str | None, namespace: str | None) -> Access:
    """What options say."""
    from launcher.kube.access import Access

    return Access(context=context, kubeconfig=kubeconfig, namespace=namespace)


def access_of(selected: Selected) -> Access:
    """The way to a target's cluster. UnsupportedError for targets of other backends."""
    return target_of(selected).access


def target_of(selected: Selected) -> KubernetesTarget:
    """UnsupportedError for targets of other backends."""
    from launcher.kube.target import KubernetesTarget

    target = selected.target
    if not isinstance(target, KubernetesTarget):
        raise UnsupportedError(
            f"the {selected.backend.name} backend has no cluster of Kubernetes; those of kubernetes and openshift have",
            key=selected.name,
        )
    return target


def nothing_to_set_up(selected: Selected) -> UnsupportedError:
    return UnsupportedError(
        f"there is nothing to set up on a cluster of {selected.backend.name}: jobs bring all they need in their image;"
        f" `cvlaunch targets probe {selected.name}` says what the cluster lacks",
        key=selected.name,
    )


def login(selected: Selected, out: Out) -> None:
    """Asks one question as whoever the kubeconfig says: that runs its plugin."""
    from launcher.kube.client import Cluster

    cluster = Cluster(access_of(selected), selected.name)
    try:
        may = "may" if cluster.allowed("create", "jobs") else "may not"
        out.note(f"{cluster.where}: you are logged in, and {may} create Jobs there")
    finally:
        cluster.close()


def policy_text(selected: Selected, *, user: str | None, group: str | None, service_account: str | None) -> str:
    """YAML of a Role and its binding."""
    from launcher.kube.client import Cluster
    from launcher.kube.probe import Subject, policy

    named = {"User": user, "Group": group, "ServiceAccount": service_account}
    subjects = [Subject(kind, name) for kind, name in named.items() if name is not None]
    if len(subjects) > 1:
        raise SpecError("--user, --group and --service-account: choose one")
    subject = subjects[0] if subjects else Subject("User", "REPLACE-ME")
    cluster = Cluster(access_of(selected), selected.name)
    return policy(cluster.namespace, subject)


def probe(name: str | None, way: Access, *, service_account: str | None = None, write: bool, out: Out) -> None:
    from launcher.kube.client import Cluster
    from launcher.kube.probe import as_target
    from launcher.kube.probe import probe as look_at

    cluster = Cluster(way, name or "")
    try:
        found = look_at(cluster, service_account=service_account)
    finally:
        cluster.close()
    keys = as_target(found, context=way.context, kubeconfig=way.kubeconfig)
    name = name or _name(way.context)
    if out.as_json:
        out.document({"cluster": dataclasses.asdict(found), "target": {name: keys}})
    else:
        _show(found, name, out)
        out.data(f"\n{_yaml(name, keys)}".rstrip())
    if write:
        from launcher.cli.targetsfile import add_target

        lacking = "" if "output" in keys else "; it still lacks `output`, the place of the results"
        out.note(f"added to {add_target(Path.cwd(), name, keys)}{lacking}")


def _name(context: str | None) -> str:
    """`vision/api-ocp-example-org:6443/ada` → `vision`."""
    first = (context or "").rpartition("@")[2].partition("/")[0]
    return re.sub(r"[^a-z0-9]+", "-", first.lower()).strip("-")[:24].strip("-") or _DEFAULT_NAME


def _yaml(name: str, keys: Mapping[str, object]) -> str:
    from launcher.cli.targetsfile import target_block

    note = "" if "output" in keys else "    # output: s3://BUCKET/runs, or pvc://CLAIM/runs\n"
    return f"# targets.yaml\ntargets:\n{target_block(name, keys)}{note}"


# ---- what a probe has seen


def _show(found: Probe, name: str, out: Out) -> None:
    out.fields(dict(_facts(found)))
    lacking = [(r.verb, r.resource, r.purpose, "yes" if r.needed else "") for r in found.missing]
    columns = [Column("MISSING RIGHT"), Column("ON"), Column("FOR", whole=False), Column("NEEDED")]
    _section(out, columns, lacking)
    if lacking:
        user = f" --user '{found.user}'" if found.user else ""
        out.note(f"ask for the missing rights: cvlaunch targets policy {name}{user}")
    _section(out, _NODE_COLUMNS, list(_node_rows(found.nodes)))
    for columns, rows in _tables(found):
        _section(out, columns, rows)
    for limit in found.limits:
        if limit.kind == "Container" and limit.default and limit.resource in _UNLIMITED:
            given = _UNLIMITED[limit.resource].format(default=limit.default)
            out.warn(f"LimitRange {limit.name}: {given}")


_UNLIMITED = {
    "cpu": "runs, which have no limit of cores, get one of {default} here, and more resources.cpus are refused: write "
    "a limit with the target's `overlay`",
    "memory": "runs without resources.memory get a limit of {default} here, and need more: write resources.memory",
}
"""What a run's container has no limit of, always or without the key → what a default limit makes of it."""


def _section(out: Out, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        out.data("")
        out.table(columns, rows)


def _facts(found: Probe) -> Iterator[tuple[str, str]]:
    yield "cluster", found.where
    yield "version", found.version
    yield "distribution", found.distribution
    yield "user", found.user or ""
    yield "namespace", f"{found.namespace}{' (is not there)' if found.exists is False else ''}"
    if found.exists:
        yield "pod security", found.level or "the namespace enforces no level of its own"
    yield "rights", "all that cvlaunch uses" if not found.missing else f"{len(found.missing)} are missing"
    yield "SCCs", _sccs(found)
    yield "GPUs", _gpus(found)
    yield "hidden from you", ", ".join(found.hidden)


def _sccs(found: Probe) -> str:
    if not found.openshift:
        return ""
    whose = f"of service account {found.account}" if found.account else "of you, not of the pods' service account"
    return f"{', '.join(found.sccs) or 'none'} ({whose})"


def _gpus(found: Probe) -> str:
    """Nothing where there is a table."""
    if found.nodes:
        return ""
    return "unknown: nodes are hidden from you" if "nodes" in found.hidden else "none"


_NODE_COLUMNS = [
    Column("NODES", right=True),
    Column("READY", right=True),
    Column("GPU"),
    Column("LABEL"),
    Column("RESOURCE"),
    Column("A NODE", right=True),
    Column("FREE", right=True),
    Column("CPUS", right=True),
    Column("MEMORY", right=True),
    Column("TAINTS", whole=False),
]


def _node_rows(nodes: Sequence[Node]) -> Iterator[tuple[str, ...]]:
    """One for each kind of node."""
    kinds: dict[tuple[str, ...], list[Node]] = {}
    for node in nodes:
        kind = (node.model, node.product, node.resource, str(node.count), node.cpus, _size(node.memory))
        kinds.setdefault((*kind, ", ".join(node.taints)), []).append(node)
    for (model, product, resource, count, cpus, memory, taints), alike in kinds.items():
        ready = sum(node.ready for node in alike)
        counts = (str(len(alike)), str(ready), model, product, resource, count)
        yield (*counts, _free(alike), cpus, memory, taints)


def _free(nodes: Sequence[Node]) -> str:
    """Of nodes that take pods; unknown where one's is."""
    free = [node.free for node in nodes if node.ready]
    known = [number for number in free if number is not None]
    return str(sum(known)) if len(known) == len(free) else "unknown"


def _size(amount: str) -> str:
    """`32919512Ki` → `31.4 GiB`."""
    from launcher.kube.podspecs import parse_quantity
    from launcher.quantities import format_size

    size = parse_quantity(amount)
    return amount if size is None else format_size(size)


def _tables(found: Probe) -> Iterator[tuple[list[Column], list[tuple[str, ...]]]]:
    yield (
        [Column("QUOTA"), Column("RESOURCE"), Column("USED", right=True), Column("OF", right=True)],
        [(q.name, q.resource, q.used, q.hard) for q in found.quotas],
    )
    yield (
        [Column("LIMITS"), Column("OF A"), Column("RESOURCE"), Column("LEAST"), Column("MOST"), Column("DEFAULT")],
        [(x.name, x.kind, x.resource, x.least, x.most, x.default) for x in found.limits],
    )
    yield (
        [Column("QUEUE"), Column("CLUSTER QUEUE"), Column("WAITING", right=True), Column("ADMITTED", right=True)],
        [(q.name, q.cluster_queue, str(q.pending), str(q.admitted)) for q in found.queues],
    )
    yield (
        [Column("PRIORITY"), Column("VALUE", right=True), Column("OF"), Column("PREEMPTS")],
        [(_marked(p.name, p.default), str(p.value), p.of, "yes" if p.preempts else "no") for p in found.priorities],
    )
    yield (
        [Column("STORAGE CLASS"), Column("PROVISIONER", whole=False), Column("BINDS")],
        [(_marked(s.name, s.default), s.provisioner, s.binding) for s in found.storage_classes],
    )
    yield (
        [Column("CLAIM"), Column("PHASE"), Column("MODES"), Column("SIZE", right=True), Column("CLASS")],
        [(c.name, c.phase, ", ".join(c.modes), c.size, c.storage_class) for c in found.claims],
    )


def _marked(name: str, default: Any) -> str:
    return f"{name} *" if default else name
