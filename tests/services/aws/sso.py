"""The part of IAM Identity Center that hands out keys for a log-in, which moto lacks."""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets
import time
from pathlib import Path

from tests.services.aws.account import ACCOUNT, Account
from tests.services.aws.wire import Answer, AwsError, Json, Request

__all__ = ["SignIn"]

_START = "https://example.awsapps.com/start"
_HOURS = 8


class SignIn:
    def __init__(self, account: Account) -> None:
        self._account = account
        self._tokens: dict[str, str] = {}

    def log_in(self, home: Path, profile: str, role: str) -> str:
        """As `aws sso login` leaves it: a profile in ~/.aws/config, and its token, which this gives, in the cache.
        role: the name of the one that the profile takes."""
        region, token = self._account.region, secrets.token_urlsafe(24)
        self._tokens[token] = role
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=_HOURS)
        session = f"{profile}-session"
        config, cache = home / ".aws/config", home / ".aws/sso/cache"
        cache.mkdir(parents=True, exist_ok=True)
        with config.open("a") as file:
            file.write(
                f"[profile {profile}]\nsso_session = {session}\nsso_account_id = {ACCOUNT}\nsso_role_name = {role}\n"
                f"region = {region}\n[sso-session {session}]\nsso_start_url = {_START}\nsso_region = {region}\n"
                "sso_registration_scopes = sso:account:access\n"
            )
        cached = {"startUrl": _START, "region": region, "accessToken": token, "expiresAt": _stamp(until)}
        (cache / f"{hashlib.sha1(session.encode()).hexdigest()}.json").write_text(json.dumps(cached))
        return token

    def log_out(self, token: str) -> None:
        """It is refused from now on, whatever the cache says."""
        self._tokens.pop(token, None)

    def answer(self, request: Request) -> Answer:
        if request.operation != "GetRoleCredentials":
            raise AwsError("InvalidGrantException", "Invalid refresh token provided")
        role = self._tokens.get(request.headers.get("x-amz-sso-bearer-token", ""))
        if role is None:
            raise AwsError("UnauthorizedException", "Session token not found or invalid", 401)
        if (request.query.get("role_name"), request.query.get("account_id")) != (role, ACCOUNT):
            raise AwsError("ForbiddenException", "No access", 403)
        keys = self._account.assume(f"arn:aws:iam::{ACCOUNT}:role/{role}", "sso")
        said: Json = {
            "accessKeyId": keys.access_key,
            "secretAccessKey": keys.secret_key,
            "sessionToken": keys.token,
            "expiration": round((time.time() + 3600) * 1000),
        }
        return Answer(200, json.dumps({"roleCredentials": said}).encode(), {"Content-Type": "application/json"})


def _stamp(when: datetime.datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
