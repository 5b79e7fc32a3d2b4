"""What the published schemas don't say and the API server refuses all the same (pkg/apis/{core,batch}/validation)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tests.services.kube.answers import Causes
from tests.services.kube.times import parse_quantity

__all__ = ["check_object", "check_update"]

Json = dict[str, Any]

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_KEY_NAME = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_DATA_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_DNS_1035_RULE = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    "'[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_VALUE_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_KEY_RULE = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    "character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_ENV_RULE = (
    "a valid environment variable name must consist of alphabetic characters, digits, '_', '-', or '.', and must not "
    "start with a digit (e.g. 'my.env-name',  or 'MY_ENV.NAME',  or 'MyEnvName1', regex used for validation is "
    "'[-._a-zA-Z][-._a-zA-Z0-9]*')"
)
_LONG = "must be no more than {} bytes"
_ANNOTATIONS, _DATA = 256 * 1024, 1024 * 1024
_FIELD_PATHS = re.compile(
    r"metadata\.(name|namespace|uid|labels\['[^']+'\]|annotations\['[^']+'\])|spec\.(nodeName|serviceAccountName)|"
    r"status\.(hostIPs?|podIPs?)"
)
_VOLUME_FIELD_PATHS = re.compile(r"metadata\.(name|namespace|uid|labels(\['[^']+'\])?|annotations(\['[^']+'\])?)")
_OWN = ("cpu", "memory", "ephemeral-storage", "storage", "pods")
_FIXED_POD = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"


def check_object(plural: str, obj: Json, causes: Causes) -> None:
    _metadata(plural, obj["metadata"], causes)
    if plural == "jobs":
        _job(obj, causes)
    elif plural == "pods":
        _pod_spec(obj["spec"], "spec", causes)
    elif plural in ("deployments", "statefulsets"):
        _template(obj, causes)
        policy = obj["spec"]["template"]["spec"]["restartPolicy"]
        if policy != "Always":
            causes.unsupported("spec.template.spec.restartPolicy", policy, ["Always"])
    elif plural == "notebooks":
        _notebook(obj, causes)
    elif plural in ("secrets", "configmaps"):
        _data(obj, causes)
    elif plural == "persistentvolumeclaims":
        _claim(obj["spec"], causes)


def check_update(plural: str, old: Json, new: Json, causes: Causes) -> None:
    if plural == "jobs":
        _job_update(old, new, causes)
    elif plural == "pods":
        allowed = ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "schedulingGates")
        if _without(old["spec"], allowed) != _without(new["spec"], allowed):
            causes.forbidden("spec", f"{_FIXED_POD}`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions …)")
    elif plural == "secrets" and old.get("type") != new.get("type"):
        causes.invalid("type", new.get("type"), "field is immutable")


# -- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(plural: str, meta: Json, causes: Causes) -> None:
    name = meta.get("name", "")
    if not name and not meta.get("generateName"):
        causes.required("metadata.name", "name or generateName is required")
    if name and plural == "services":
        _dns(name, "metadata.name", causes, (re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?"), 63, _DNS_1035_RULE))
    elif name and plural == "namespaces":
        _label_name(name, "metadata.name", causes)
    elif name:
        _dns(name, "metadata.name", causes, (_SUBDOMAIN, 253, _SUBDOMAIN_RULE))
    _labels(meta, "metadata", causes)
    for index, reference in enumerate(meta.get("ownerReferences", ())):
        for field in ("apiVersion", "kind", "name", "uid"):
            if not reference.get(field):
                causes.invalid(f"metadata.ownerReferences[{index}].{field}", "", f"{field} must not be empty")


def _dns(name: str, field: str, causes: Causes, rule: tuple[re.Pattern[str], int, str]) -> None:
    pattern, longest, words = rule
    if len(name) > longest:
        causes.invalid(field, name, _LONG.format(longest))
    if not pattern.fullmatch(name):
        causes.invalid(field, name, words)


def _label_name(name: str, field: str, causes: Causes) -> None:
    _dns(name, field, causes, (_LABEL, 63, _LABEL_RULE))


def _labels(meta: Json, path: str, causes: Causes) -> None:
    for key, value in meta.get("labels", {}).items():
        _key(key, f"{path}.labels", causes)
        _label_value(value, f"{path}.labels", causes)
    annotations = meta.get("annotations", {})
    for key in annotations:
        _key(key.lower(), f"{path}.annotations", causes)
    if sum(len(f"{key}{value}".encode()) for key, value in annotations.items()) > _ANNOTATIONS:
        causes.too_long(f"{path}.annotations", _ANNOTATIONS)


def _key(key: str, field: str, causes: Causes) -> None:
    prefix, slash, name = key.rpartition("/")
    if slash and (not prefix or len(prefix) > 253 or not _SUBDOMAIN.fullmatch(prefix)):
        causes.invalid(field, key, f"prefix part {_SUBDOMAIN_RULE}")
    if len(name) > 63:
        causes.invalid(field, key, f"name part {_LONG.format(63)}")
    if not _KEY_NAME.fullmatch(name):
        causes.invalid(field, key, _KEY_RULE)


def _label_value(value: str, field: str, causes: Causes) -> None:
    if len(value) > 63:
        causes.invalid(field, value, _LONG.format(63))
    if not _VALUE.fullmatch(value):
        causes.invalid(field, value, _VALUE_RULE)


def _data(obj: Json, causes: Causes) -> None:
    data = {**obj.get("data", {}), **obj.get("binaryData", {})}
    for key in data:
        if len(key) > 253 or not _DATA_KEY.fullmatch(key):
            causes.invalid(
                f"data[{key}]", key,
                "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or "
                "'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')",
            )  # fmt: skip
    if sum(len(value) * 3 // 4 for value in data.values()) > _DATA:
        causes.too_long("data", _DATA)


def _claim(spec: Json, causes: Causes) -> None:
    modes = ("ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod")
    if not spec.get("accessModes"):
        causes.required("spec.accessModes", "at least 1 access mode is required")
    for mode in spec.get("accessModes", ()):
        if mode not in modes:
            causes.unsupported("spec.accessModes", mode, modes)
    if "storage" not in spec.get("resources", {}).get("requests", {}):
        causes.required("spec.resources[storage]")


# -- jobs -------------------------------------------------------------------------------------------------------------


def _job(obj: Json, causes: Causes) -> None:
    spec, name = obj["spec"], obj["metadata"].get("name", "")
    for field in ("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        if spec.get(field, 0) < 0:
            causes.invalid(f"spec.{field}", spec[field], "must be greater than or equal to 0")
    if len(name) > 63:
        causes.invalid("spec.template.labels", name, _LONG.format(63))
    if spec["completionMode"] not in ("NonIndexed", "Indexed"):
        causes.unsupported("spec.completionMode", spec["completionMode"], ["Indexed", "NonIndexed"])
    if spec["completionMode"] == "Indexed":
        _indexed(spec, name, causes)
    if "backoffLimitPerIndex" in spec and spec["completionMode"] != "Indexed":
        causes.invalid("spec.backoffLimitPerIndex", spec["backoffLimitPerIndex"], "requires indexed completion mode")
    if "selector" in obj.get("spec", {}) and not spec.get("manualSelector") and "uid" not in obj["metadata"]:
        causes.invalid("spec.selector", spec["selector"], "`selector` not auto-generated")
    _restart_policy(spec, causes)
    if "podFailurePolicy" in spec:
        _failure_policy(spec, causes)
    elif spec["podReplacementPolicy"] not in (known := ("Failed", "TerminatingOrFailed")):
        causes.unsupported("spec.podReplacementPolicy", spec["podReplacementPolicy"], known)
    _template(obj, causes)


def _indexed(spec: Json, name: str, causes: Causes) -> None:
    if "completions" not in spec:
        causes.required("spec.completions", "when completion mode is Indexed")
    elif name and len(host := f"{name}-{spec['completions'] - 1}") > 63:
        causes.invalid("metadata.name", name, f"will not able to create pod with invalid DNS label: {host}")
    if spec["parallelism"] > 100_000:
        causes.invalid(
            "spec.parallelism", spec["parallelism"],
            "must be less than or equal to 100000 when completion mode is Indexed",
        )  # fmt: skip


def _restart_policy(spec: Json, causes: Causes) -> None:
    policy = spec["template"]["spec"]["restartPolicy"]
    field = "spec.template.spec.restartPolicy"
    if policy not in ("OnFailure", "Never"):
        causes.required(field, 'valid values: "OnFailure", "Never"')
    elif policy != "Never" and "podFailurePolicy" in spec:
        causes.invalid(field, policy, 'only "Never" is supported when podFailurePolicy is specified')


def _failure_policy(spec: Json, causes: Causes) -> None:
    if spec["podReplacementPolicy"] != "Failed":
        causes.unsupported("spec.podReplacementPolicy", spec["podReplacementPolicy"], ["Failed"])
    rules = spec["podFailurePolicy"].get("rules", [])
    names = {container.get("name") for container in spec["template"]["spec"].get("containers", ())}
    if len(rules) > 20:
        causes._add("FieldValueTooMany", f"Too many: {len(rules)}: must have at most 20 items", "spec.podFailurePolicy")
    for index, rule in enumerate(rules):
        path = f"spec.podFailurePolicy.rules[{index}]"
        if rule["action"] not in (known := ("Count", "FailIndex", "FailJob", "Ignore")):
            causes.unsupported(f"{path}.action", rule["action"], known)
        has = [kind for kind in ("onExitCodes", "onPodConditions") if rule.get(kind)]
        if len(has) != 1:
            what = "specifying one of OnExitCodes and OnPodConditions is required"
            both = "specifying both OnExitCodes and OnPodConditions is not supported"
            causes.invalid(path, rule, both if has else what)
        if "onExitCodes" in rule:
            _exit_codes(rule["onExitCodes"], f"{path}.onExitCodes", names, causes)
        for at, condition in enumerate(rule.get("onPodConditions", ())):
            if condition["status"] not in ("False", "True", "Unknown"):
                field = f"{path}.onPodConditions[{at}].status"
                causes.unsupported(field, condition["status"], ["False", "True", "Unknown"])


def _exit_codes(rule: Json, path: str, names: set[Any], causes: Causes) -> None:
    operator, values = rule.get("operator"), rule.get("values", [])
    if operator not in ("In", "NotIn"):
        causes.unsupported(f"{path}.operator", operator, ["In", "NotIn"])
    if "containerName" in rule and rule["containerName"] not in names:
        why = "must be one of the container or initContainer names in the pod template"
        causes.invalid(f"{path}.containerName", rule["containerName"], why)
    if not values:
        causes.invalid(f"{path}.values", values, "at least one value is required")
    elif operator == "In" and 0 in values:
        causes.invalid(f"{path}.values[{values.index(0)}]", 0, "must not be 0 for the In operator")
    if values != sorted(values):
        causes.invalid(f"{path}.values", values, "must be ordered")
    if len(set(values)) != len(values):
        causes.duplicate(f"{path}.values", values)


def _job_update(old: Json, new: Json, causes: Causes) -> None:
    before, after = old["spec"], new["spec"]
    started = not before.get("suspend") or "startTime" in old.get("status", {})
    fixed = ("selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy")
    elastic = after.get("completionMode") == "Indexed" and after.get("completions") == after.get("parallelism")
    for field in (*fixed, *(() if elastic else ("completions",))):
        if before.get(field) != after.get(field):
            causes.invalid(f"spec.{field}", after.get(field), "field is immutable")
    if (before["template"] if started else _unscheduled(before)) != (
        after["template"] if started else _unscheduled(after)
    ):
        causes.invalid("spec.template", after["template"], "field is immutable")


def _unscheduled(spec: Json) -> Json:
    """The template without what a queue may change as long as the job has never run."""
    pod = _without(spec["template"]["spec"], ("nodeSelector", "tolerations", "affinity", "schedulingGates"))
    return {"metadata": _without(spec["template"]["metadata"], ("labels", "annotations")), "spec": pod}


def _without(value: Json, keys: Sequence[str]) -> Json:
    return {key: item for key, item in value.items() if key not in keys}


# -- pods -------------------------------------------------------------------------------------------------------------


def _template(obj: Json, causes: Causes) -> None:
    template = obj["spec"]["template"]
    _labels(template.get("metadata", {}), "spec.template.metadata", causes)
    _pod_spec(template["spec"], "spec.template.spec", causes)


def _notebook(obj: Json, causes: Causes) -> None:
    """Its CRD's schema has the core of a PodSpec's."""
    spec = obj.get("spec", {}).get("template", {}).get("spec", {})
    for index, container in enumerate(spec.get("containers", ())):
        if "name" not in container:
            causes.required(f"spec.template.spec.containers[{index}].name")
    if not spec.get("containers"):
        causes.required("spec.template.spec.containers")


_ONE_OF = {
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "preemptionPolicy": ("Never", "PreemptLowerPriority"),
}
_CONTAINER_ONE_OF = {
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "terminationMessagePolicy": ("FallbackToLogsOnError", "File"),
}


def _pod_spec(spec: Json, path: str, causes: Causes) -> None:
    _words(spec, _ONE_OF, path, causes)
    if not spec.get("containers"):
        causes.required(f"{path}.containers")
    volumes = _volumes(spec, path, causes)
    names: set[str] = set()
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(kind, ())):
            at = f"{path}.{kind}[{index}]"
            if container.get("name") in names:
                causes.duplicate(f"{at}.name", container["name"])
            names.add(container.get("name", ""))
            _container(container, at, volumes, causes)
    for field in ("hostname", "subdomain"):
        if spec.get(field):
            _label_name(spec[field], f"{path}.{field}", causes)
    if spec.get("activeDeadlineSeconds", 1) < 1:
        causes.invalid(
            f"{path}.activeDeadlineSeconds",
            spec["activeDeadlineSeconds"],
            "must be between 1 and 2147483647, inclusive",
        )
    if spec["terminationGracePeriodSeconds"] < 0:
        why = "must be greater than or equal to 0"
        causes.invalid(f"{path}.terminationGracePeriodSeconds", spec["terminationGracePeriodSeconds"], why)
    for key, value in spec.get("nodeSelector", {}).items():
        _key(key, f"{path}.nodeSelector", causes)
        _label_value(value, f"{path}.nodeSelector", causes)
    _security(spec["securityContext"], f"{path}.securityContext", causes)
    _tolerations(spec, path, causes)
    _affinity(spec, path, causes)


def _words(owner: Json, table: Mapping[str, Sequence[str]], path: str, causes: Causes) -> None:
    for field, known in table.items():
        if field in owner and owner[field] not in known:
            causes.unsupported(f"{path}.{field}", owner[field], known)


def _container(container: Json, path: str, volumes: set[str], causes: Causes) -> None:
    if container.get("name"):
        _label_name(container["name"], f"{path}.name", causes)
    if not container.get("image"):
        causes.required(f"{path}.image")
    elif container["image"] != container["image"].strip():
        causes.invalid(f"{path}.image", container["image"], "must not have leading or trailing whitespace")
    _words(container, _CONTAINER_ONE_OF, path, causes)
    _env(container, path, causes)
    _mounts(container, path, volumes, causes)
    _resources(container["resources"], f"{path}.resources", causes)
    context = container.get("securityContext", {})
    _security(context, f"{path}.securityContext", causes)
    if context.get("allowPrivilegeEscalation") is False and context.get("privileged"):
        causes.invalid(
            f"{path}.securityContext",
            context,
            "cannot set `allowPrivilegeEscalation` to false and `privileged` to true",
        )


def _env(container: Json, path: str, causes: Causes) -> None:
    for index, variable in enumerate(container.get("env", ())):
        at = f"{path}.env[{index}]"
        if not variable.get("name"):
            causes.required(f"{at}.name")
        elif not _ENV_NAME.fullmatch(variable["name"]):
            causes.invalid(f"{at}.name", variable["name"], _ENV_RULE)
        source = variable.get("valueFrom", {})
        if source and variable.get("value"):
            causes.invalid(f"{at}.valueFrom", "", "may not be specified when `value` is not empty")
        if source and len(source) != 1:
            causes.invalid(f"{at}.valueFrom", "", "may not have more than one field specified at a time")
        field = source.get("fieldRef", {}).get("fieldPath")
        if field and not _FIELD_PATHS.fullmatch(field):
            _wrong_field(f"{at}.valueFrom.fieldRef.fieldPath", field, causes)
        for kind in ("secretKeyRef", "configMapKeyRef"):
            if kind in source and not source[kind].get("name"):
                causes.required(f"{at}.valueFrom.{kind}.name")


def _wrong_field(path: str, field: str, causes: Causes) -> None:
    causes.invalid(path, field, f"error converting fieldPath: field label not supported: {field}")


def _mounts(container: Json, path: str, volumes: set[str], causes: Causes) -> None:
    paths: set[str] = set()
    for index, mount in enumerate(container.get("volumeMounts", ())):
        at = f"{path}.volumeMounts[{index}]"
        if mount.get("name") not in volumes:
            causes.missing(f"{at}.name", mount.get("name"))
        if not mount.get("mountPath"):
            causes.required(f"{at}.mountPath")
        elif mount["mountPath"] in paths:
            causes.invalid(f"{at}.mountPath", mount["mountPath"], "must be unique")
        paths.add(mount.get("mountPath", ""))
        _relative(mount.get("subPath", ""), f"{at}.subPath", causes)


def _relative(text: str, field: str, causes: Causes) -> None:
    if text.startswith("/"):
        causes.invalid(field, text, "must be a relative path")
    if ".." in text.split("/"):
        causes.invalid(field, text, "must not contain '..'")


def _security(context: Json, path: str, causes: Causes) -> None:
    for field in ("runAsUser", "runAsGroup", "fsGroup"):
        if not 0 <= context.get(field, 0) <= 2**31 - 1:
            causes.invalid(f"{path}.{field}", context[field], "must be between 0 and 2147483647, inclusive")
    kind = context.get("seccompProfile", {}).get("type")
    if kind and kind not in (known := ("Localhost", "RuntimeDefault", "Unconfined")):
        causes.unsupported(f"{path}.seccompProfile.type", kind, known)


def _resources(resources: Json, path: str, causes: Causes) -> None:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for kind, values in (("limits", limits), ("requests", requests)):
        for name, value in values.items():
            _resource(name, value, f"{path}.{kind}", causes)
    for name, value in requests.items():
        limit = limits.get(name)
        if "/" in name and limit is None:
            causes.required(f"{path}.limits", "Limit must be set for non overcommitable resources")
        elif "/" in name and parse_quantity(limit) != parse_quantity(value):
            causes.invalid(f"{path}.requests", value, f"must be equal to {name} limit of {limit}")
        elif limit is not None and parse_quantity(value) > parse_quantity(limit):
            causes.invalid(f"{path}.requests", value, f"must be less than or equal to {name} limit of {limit}")


def _resource(name: str, value: str, path: str, causes: Causes) -> None:
    if "/" not in name and name not in _OWN and not name.startswith("hugepages-"):
        causes.invalid(f"{path}[{name}]", name, "must be a standard resource type or fully qualified")
    if parse_quantity(value) < 0:
        causes.invalid(f"{path}[{name}]", value, "must be greater than or equal to 0")
    if "/" in name and parse_quantity(value) % 1:
        causes.invalid(f"{path}[{name}]", value, "must be an integer")


_VOLUME_KINDS = (
    "emptyDir", "secret", "configMap", "downwardAPI", "projected", "persistentVolumeClaim", "hostPath", "nfs", "csi",
    "ephemeral", "image",
)  # fmt: skip


def _volumes(spec: Json, path: str, causes: Causes) -> set[str]:
    names: set[str] = set()
    for index, volume in enumerate(spec.get("volumes", ())):
        at, name = f"{path}.volumes[{index}]", volume.get("name", "")
        _label_name(name, f"{at}.name", causes)
        if name in names:
            causes.duplicate(f"{at}.name", name)
        names.add(name)
        kinds = [kind for kind in volume if kind != "name"]
        if not kinds:
            causes.required(at, "must specify a volume type")
        for kind in kinds[1:]:
            causes.forbidden(f"{at}.{kind}", "may not specify more than 1 volume type")
        for kind in kinds[:1]:
            _volume(volume[kind], kind, f"{at}.{kind}", causes)
    return names


def _volume(source: Json, kind: str, path: str, causes: Causes) -> None:
    medium = source.get("medium", "") if kind == "emptyDir" else ""
    if medium not in ("", "Memory") and not medium.startswith("HugePages"):
        causes.unsupported(f"{path}.medium", medium, ["", "Memory"])
    named = {"secret": "secretName", "configMap": "name", "persistentVolumeClaim": "claimName"}
    if kind in named and not source.get(named[kind]):
        causes.required(f"{path}.{named[kind]}")
    items = [(source, path)]
    for index, inner in enumerate(source.get("sources", ())):
        items += [(value, f"{path}.sources[{index}].{key}") for key, value in inner.items()]
    for owner, at in items:
        if not 0 <= owner.get("defaultMode", 0) <= 0o777:
            causes.invalid(
                f"{at}.defaultMode", owner["defaultMode"], "must be a number between 0 and 0777 (octal), both inclusive"
            )
        for number, item in enumerate(owner.get("items", ())):
            _relative(item.get("path", ""), f"{at}.items[{number}].path", causes)
            field = item.get("fieldRef", {}).get("fieldPath")
            if field and not _VOLUME_FIELD_PATHS.fullmatch(field):
                _wrong_field(f"{at}.items[{number}].fieldRef.fieldPath", field, causes)


def _tolerations(spec: Json, path: str, causes: Causes) -> None:
    for index, toleration in enumerate(spec.get("tolerations", ())):
        at, operator = f"{path}.tolerations[{index}]", toleration.get("operator", "Equal")
        if operator not in ("Equal", "Exists"):
            causes.unsupported(f"{at}.operator", operator, ["Equal", "Exists"])
        if operator == "Exists" and toleration.get("value"):
            causes.invalid(f"{at}.operator", operator, "value must be empty when `operator` is 'Exists'")
        if not toleration.get("key") and operator != "Exists":
            why = 'operator must be Exists when `key` is empty, which means "match all values and all keys"'
            causes.invalid(f"{at}.operator", operator, why)
        effect = toleration.get("effect", "")
        if effect not in (known := ("", "NoExecute", "NoSchedule", "PreferNoSchedule")):
            causes.unsupported(f"{at}.effect", effect, known)


def _affinity(spec: Json, path: str, causes: Causes) -> None:
    node = spec.get("affinity", {}).get("nodeAffinity", {})
    terms = node.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    known = ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt")
    base = f"{path}.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
    for index, term in enumerate(terms):
        for number, rule in enumerate(term.get("matchExpressions", ())):
            at = f"{base}[{index}].matchExpressions[{number}]"
            if rule.get("operator") not in known:
                causes.invalid(f"{at}.operator", rule.get("operator"), "not a valid selector operator")
            if rule.get("operator") in ("In", "NotIn") and not rule.get("values"):
                causes.required(f"{at}.values", "must be specified when `operator` is 'In' or 'NotIn'")
