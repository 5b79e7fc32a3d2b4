"""What a cluster says no with, as our errors: one table for answers, one for connections."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from launcher.errors import (
    AuthError,
    CapacityError,
    ConflictError,
    CvlaunchError,
    SpecError,
    UnreachableError,
    UnsupportedError,
)
from launcher.kube.access import Loaded

__all__ = ["NotSentError", "Refusal", "refusal_error", "transport_error"]

_LOGIN = "{login}"
_REFUSALS: tuple[tuple[str, str, type[CvlaunchError], str, str], ...] = (
    (r"401", r"", AuthError, "", _LOGIN),
    (r"403", r"system:anonymous", AuthError, "", _LOGIN),
    (r"403", r"exceeded quota", CapacityError, "",
     "wait until runs have ended, ask for less, or for a larger quota"),
    (r"4..|500", r"admission webhook .* denied the request|ValidatingAdmissionPolicy", SpecError, "",
     "change what it objects to; the target's `overlay` can add what the cluster wants"),
    (r"403", r"security context constraint", SpecError, "",
     "change what it objects to (with `backend: openshift` the project chooses user and group), or use a service "
     "account that may do so (`oc adm policy add-scc-to-user SCC -z ACCOUNT`)"),
    (r"403", r"violates PodSecurity", SpecError, "",
     "change what it objects to, or use a namespace where it may be so"),
    (r"403", r"because it is being terminated", SpecError, "namespace", "use another one, or make it anew"),
    (r"403", r"\bcannot [\w*]+ resource|\bcannot \w+ (path|on)", AuthError, "",
     "ask for a Role that allows it; on some clusters a namespace that is not there looks the same"),
    (r"403", r"no PriorityClass", SpecError, "priority_class", "make it, or correct the target"),
    (r"403", r"failed quota: .* must specify", SpecError, "resources",
     "write `resources.cpus` and `resources.memory`; a limit of cores comes by the target's `overlay`"),
    (r"403", r"service account|serviceaccount .* not found", SpecError, "service_account",
     "make it, or correct the target"),
    (r"403", r"is forbidden: (max|min)imum|limit", SpecError, "resources", "change what the job asks for"),
    (r"403", r"", AuthError, "", "ask for the permission"),
    (r"404", r"namespaces \".*\" not found", SpecError, "namespace",
     "make it (`kubectl create namespace`), or correct the target's `namespace`"),
    (r"404|405|406|415",
     r"could not find the requested resource|page not found|not allowed|no matches for kind|media type",
     UnsupportedError, "", "the cluster is too old for it, or lacks the operator that brings it"),
    (r"404", r"", SpecError, "", "correct the name"),
    (r"409", r"already exists", ConflictError, "", "the name is taken by something else"),
    (r"409", r"", ConflictError, "", "it has changed since it was read: try again"),
    (r"422", r"rejected our request due to an error|test operation|testing (value|path)", ConflictError, "",
     "it has changed since it was read: try again"),
    (r"422", r"must be less than or equal to (cpu|memory) limit", SpecError, "resources",
     "a LimitRange of the namespace has set that limit: write `resources.memory`, or ask for less; a limit of cores "
     "comes by the target's `overlay`"),
    (r"410|408|429|5..", r"", UnreachableError, "", "try again"),
    (r"3..", r"", SpecError, "kubeconfig", "the server's URL is not that of a cluster's API: correct it"),
    (r"400|422", r"", SpecError, "", "correct what it names (`cvlaunch render` shows what is sent)"),
    (r".*", r"", SpecError, "", "correct what it names"),
)  # fmt: skip
"""HTTP status, what the message holds, our error, its key, the way out. The first row that fits counts.

Reasons and texts: kubernetes/apimachinery pkg/api/errors, kubernetes/apiserver pkg/endpoints/handlers/responsewriters.
"""

_TRANSPORT: tuple[tuple[str, type[CvlaunchError], str], ...] = (
    (r"alert (unknown ca|bad certificate|certificate (expired|required|unknown|revoked))|certificate required",
     AuthError, "the cluster refuses our certificate: {login}"),
    (r"certificate verify failed|hostname .* doesn't match|CERTIFICATE_VERIFY", SpecError,
     "the cluster's certificate is not trusted: correct `certificate-authority` in the kubeconfig"),
    (r"WRONG_VERSION_NUMBER|record layer", SpecError,
     "what answers there does not speak TLS: correct `server` in the kubeconfig"),
    (r"LocationParseError|LocationValueError|Failed to parse|No host specified|URLSchemeUnknown", SpecError,
     "the server's URL is none: correct `server` in the kubeconfig"),
    (r"No such file|PEM lib|Could not load|KEY_VALUES_MISMATCH", SpecError,
     "the certificate or key in the kubeconfig can't be used: correct it, or log in again"),
    (r"Proxy(Error|Exception)|Tunnel connection failed", UnreachableError,
     "the proxy does not let us through: try again"),
    (r"NameResolutionError|Name or service not known|getaddrinfo|nodename nor servname|Temporary failure in name",
     UnreachableError, "there is no address for its name here: connect to its network, or correct the kubeconfig"),
    (r"", UnreachableError, "it does not answer: connect to its network, or try again"),
)  # fmt: skip
"""What the error's class and text hold → ours, from top to bottom."""


class NotSentError(UnreachableError):
    """No connection came about, so that the request may be sent again, whatever it is."""


@dataclass(frozen=True)
class Refusal:
    """An answer of 300 and above. causes: `field: message`. to: where a redirect points. known: by the API itself."""

    status: int
    message: str
    causes: tuple[str, ...] = ()
    kind: str = ""
    known: bool = False
    asked: str = ""

    @classmethod
    def parse(cls, status: int, data: bytes, *, method: str, path: str, to: str | None = None) -> Refusal:
        asked = f"{method} {path}"
        body = _status(data)
        if body is None:
            text = f"redirects to {to}" if to else _plain(data)
            return cls(status, f"HTTP {status}" + (f": {text}" if text else ""), asked=asked)
        details = body.get("details") or {}
        found = [cause for cause in details.get("causes") or () if cause.get("field")]
        causes = tuple(f"{cause['field']}: {cause.get('message', '')}" for cause in found)
        message = str(body.get("message") or body.get("reason") or f"HTTP {status}")
        return cls(status, message, causes, str(details.get("kind", "")), True, asked)

    @property
    def missing(self) -> bool:
        """What was asked for is not there, while the way there is right."""
        return self.status == 404 and self.asked.partition(" ")[0] != "POST"


def refusal_error(refusal: Refusal, loaded: Loaded, namespace: str) -> CvlaunchError:
    """where: names context and namespace."""
    status, message = str(refusal.status), refusal.message
    where = f"{loaded.what}, namespace {namespace}"
    kind, key, advice = next(
        (kind, key, advice)
        for pattern, text, kind, key, advice in _REFUSALS
        if re.fullmatch(pattern, status) and re.search(text, message, re.IGNORECASE)
    )
    words = "; ".join(dict.fromkeys(refusal.causes)) or message
    asked = "" if refusal.known and refusal.status not in (401, 404) else f" ({refusal.asked})"
    text = f"{where}: {words.rstrip('.')}{asked}: {advice.format(login=loaded.login)}"
    return kind(text, key=key) if issubclass(kind, SpecError) and key else kind(text)


def transport_error(error: Exception, loaded: Loaded) -> CvlaunchError:
    name = " ".join(kind.__name__ for kind in type(error).__mro__)
    text = f"{name}: {error}".replace("_", " ") + f" {error}"
    kind, advice = next((kind, advice) for pattern, kind, advice in _TRANSPORT if re.search(pattern, text, re.I))
    if kind is UnreachableError and re.search(r"NewConnectionError|ConnectTimeoutError|ConnectionRefused|Proxy", name):
        kind = NotSentError
    return kind(f"{loaded.what}: {advice.format(login=loaded.login)} ({_short(error)})")


def _status(data: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(data)
    except ValueError:
        return None
    return body if isinstance(body, dict) and body.get("kind") == "Status" else None


def _plain(data: bytes) -> str:
    """The beginning of a text; nothing of a page."""
    text = data.decode(errors="replace").strip()
    return "" if text.startswith("<") else " ".join(text.split())[:200]


def _short(error: Exception) -> str:
    """Without the representation of a Python object that urllib3 puts before it."""
    return re.sub(r"^.*?<[^>]*>: |^\('(.*?)',.*\)$", r"\1", str(error)).strip() or type(error).__name__
