"""Where an identity of AWS comes from, and what has to be done when it has expired."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.credentials.aws import source_profile

__all__ = ["Way", "way_in"]


@dataclass(frozen=True)
class Way:
    """source: of the identity, for people. command: what logs in; empty: nothing does, `remedy` is what helps."""

    source: str
    remedy: str
    command: tuple[str, ...] = ()


def way_in(profile: str | None, environ: Mapping[str, str] | None = None) -> Way:
    """Reads AWS's files, asks nobody. A profile that isn't there is one without keys."""
    import botocore.session

    environ = os.environ if environ is None else environ
    if profile is None and environ.get("AWS_ACCESS_KEY_ID"):
        return Way("the keys in AWS_ACCESS_KEY_ID and its like", "set new ones")
    name = profile or environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or "default"
    profiles: Mapping[str, Any] = botocore.session.Session(profile=None).full_config.get("profiles", {})
    source = source_profile(name, profiles)
    return _way(source, profiles.get(source, {}))


def _way(name: str, keys: Mapping[str, Any]) -> Way:
    if "sso_session" in keys or "sso_start_url" in keys:
        return Way(f"the SSO login of profile {name}", "log in", ("aws", "sso", "login", "--profile", name))
    if "login_session" in keys:
        return Way(f"the console login of profile {name}", "log in", ("aws", "login", "--profile", name))
    if "credential_process" in keys:
        program = keys["credential_process"].split()[0]  # its arguments may be secrets
        return Way(f"the program of profile {name}", f"see why {program} gives none")
    if "aws_access_key_id" in keys:
        edit = f"write new ones into ~/.aws/credentials, below [{name}], or run `aws configure --profile {name}`"
        return Way(f"the keys of profile {name}", edit)
    if "web_identity_token_file" in keys:
        return Way(f"the token of profile {name}", f"bring a new one to {keys['web_identity_token_file']}")
    return Way("the role of this machine, if it has one", "attach a role, set AWS_ACCESS_KEY_ID, or name a profile")
