"""What moto lacks of IAM and ECR: the policy simulator, and addresses where layers can be fetched."""

from __future__ import annotations

import fnmatch
import urllib.parse
from collections.abc import Iterator
from xml.sax.saxutils import escape

from tests.services.aws.wire import Answer, AwsError, Json, Request, json_answer

__all__ = ["Lookups"]


class Lookups:
    """denied: actions that the simulator says no to, for everybody. limited: action → resource that a policy names with
    `*`, the only one that it is allowed on. layers: digest → its content (JSON).

    asked: principals that were asked about.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.denied: set[str] = set()
        self.limited: dict[str, str] = {}
        self.layers: dict[str, Json] = {}
        self.asked: list[str] = []

    def answer(self, request: Request, endpoint: str) -> Answer | None:
        if request.operation == "SimulatePrincipalPolicy":
            return self._simulated(urllib.parse.parse_qs(request.body.decode()))
        if request.operation == "GetDownloadUrlForLayer":
            return self._address(request.json["layerDigest"], endpoint)
        digest = request.path.removeprefix("/layers/")
        return json_answer(self.layers[digest]) if digest in self.layers else None

    def _simulated(self, form: dict[str, list[str]]) -> Answer:
        self.asked.append(form["PolicySourceArn"][0])
        members = "".join(
            f"<member><EvalActionName>{escape(action)}</EvalActionName><EvalResourceName>{escape(resource)}"
            f"</EvalResourceName><EvalDecision>{self._decision(action, resource)}</EvalDecision>"
            "</member>"
            for action in _listed(form, "ActionNames")
            for resource in _listed(form, "ResourceArns")
        )
        text = (
            "<SimulatePrincipalPolicyResponse><SimulatePrincipalPolicyResult><IsTruncated>false</IsTruncated>"
            f"<EvaluationResults>{members}</EvaluationResults></SimulatePrincipalPolicyResult>"
            "</SimulatePrincipalPolicyResponse>"
        )
        return Answer(200, text.encode(), {"Content-Type": "text/xml"})

    def _decision(self, action: str, resource: str) -> str:
        """A `*` in what is asked about stands for itself, as for IAM."""
        there = fnmatch.fnmatchcase(resource, self.limited.get(action, "*"))
        return "allowed" if there and action not in self.denied else "implicitDeny"

    def _address(self, digest: str, endpoint: str) -> Answer:
        if digest not in self.layers:
            raise AwsError("LayersNotFoundException", f"The layer with digest '{digest}' does not exist")
        return json_answer({"downloadUrl": f"{endpoint}/layers/{digest}", "layerDigest": digest})


def _listed(form: dict[str, list[str]], name: str) -> Iterator[str]:
    yield from (values[0] for key, values in form.items() if key.startswith(f"{name}.member."))
