"""Identities: who is found where, what others could read is refused, and every refusal says what to do."""

from __future__ import annotations

import datetime
import http.server
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launcher.credentials import aws, google
from launcher.errors import AuthError, SpecError, UnreachableError
from launcher.runner.secret import read_secrets
from launcher.secretfiles import require_private
from launcher.stores import StorageOptions, open_store
from tests.s3_fixtures import Bucket
from tests.services.s3 import ACCESS_KEY, SECRET_KEY, S3Server


def private(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    return path


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "fine"), [(0o600, True), (0o400, True), (0o640, False), (0o644, False), (0o602, False)]
)
def test_files_that_others_can_read_are_refused(tmp_path: Path, mode: int, fine: bool) -> None:
    path = private(tmp_path / "key", "secret")
    path.chmod(mode)
    if fine:
        assert require_private(path) == path
    else:
        with pytest.raises(AuthError, match="chmod 600") as caught:
            require_private(path)
        assert "secret" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_mounted_secret_may_be_read_through_its_group(tmp_path: Path) -> None:
    path = private(tmp_path / "key", "secret")
    os.chown(path, 65534, 0)
    path.chmod(0o440)
    assert require_private(path) == path
    path.chmod(0o444)
    with pytest.raises(AuthError):
        require_private(path)


# -- AWS ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"]
)
def test_the_environment_is_left_to_obstore(name: str, clean_aws: Path) -> None:
    assert aws.obstore_credentials(environ={name: "x"}) is None


def test_keys_in_the_environment_load_no_boto3(moto_bucket: Bucket) -> None:
    script = (
        "import sys, json\nfrom launcher.stores import StorageOptions, open_store\n"
        "open_store(sys.argv[1], StorageOptions(sys.argv[2])).check_writable()\n"
        "sys.exit('boto3' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, f"{moto_bucket.uri}/x", moto_bucket.server.endpoint]
    subprocess.run(command, check=True)


def test_a_missing_extra_is_one_sentence(clean_aws: Path) -> None:
    script = (
        "import sys\nsys.modules['boto3'] = sys.modules['google.auth'] = None\n"
        "from launcher.errors import UnsupportedError\nfrom launcher.stores import StorageOptions, open_store\n"
        "from launcher.credentials import google\n"
        "open_store('s3://bucket')\nopen_store('gs://bucket', StorageOptions(anonymous=True))\n"
        "from launcher.runner.secret import read_secrets\n"
        "secret = lambda: read_secrets({'T': 'store:ssm:x'}, {})\n"
        "for call in (lambda: open_store('s3://bucket', StorageOptions(profile='lab')), google.credentials, secret):\n"
        "    try:\n        call()\n    except UnsupportedError as error:\n        print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert shown.splitlines() == [
        "the AWS profile 'lab' needs boto3: pip install 'cvlaunch[s3]'",
        "Google credentials need google-auth: pip install 'cvlaunch[gcs]'",
        "the secret store:ssm:x needs boto3: pip install 'cvlaunch[s3]'",
    ]


def test_a_profile_works(rclone_s3: S3Server, clean_aws: Path) -> None:
    """rclone checks the signature; no variable is set."""
    keys = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    private(clean_aws / ".aws/credentials", f"[default]\n{keys}[lab]\n{keys}[wrong]\n{keys.replace('AKIA', 'AKIB')}")
    rclone_s3.make_bucket("profiles")
    options = StorageOptions(rclone_s3.endpoint, "us-east-1")
    for profile in ("lab", None):
        open_store("s3://profiles", StorageOptions(options.endpoint, "us-east-1", profile)).write("a", b"1")
    with pytest.raises(AuthError, match=r"s3://profiles.*refused the credentials"):
        open_store("s3://profiles", StorageOptions(options.endpoint, "us-east-1", "wrong")).check_writable()


def test_the_region_comes_from_the_profile(clean_aws: Path) -> None:
    private(clean_aws / ".aws/config", "[profile lab]\nregion = eu-west-3\n")
    private(clean_aws / ".aws/credentials", "[lab]\naws_access_key_id = a\naws_secret_access_key = b\n")
    provider = aws.obstore_credentials("lab")
    assert provider is not None
    assert provider.config == {"region": "eu-west-3"}
    assert aws.session("lab").region_name == "eu-west-3"
    assert aws.session("lab", "us-west-2").region_name == "us-west-2"


def test_a_role_is_assumed_and_renewed(moto_bucket: Bucket, clean_aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    private(clean_aws / ".aws/credentials", f"[base]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = x\n")
    role = "[profile lab]\nrole_arn = arn:aws:iam::123456789012:role/train\nsource_profile = base\nregion = us-east-1\n"
    private(clean_aws / ".aws/config", f"{role}endpoint_url = {moto_bucket.server.endpoint}\n")
    provider = aws.obstore_credentials("lab")
    assert provider is not None
    credential = provider()
    assert credential["access_key_id"].startswith("ASIA")
    assert credential["token"]
    assert credential["expires_at"] is not None
    store = open_store(moto_bucket.uri, StorageOptions(moto_bucket.server.endpoint, profile="lab"))
    store.check_writable()


class FakeAws(http.server.ThreadingHTTPServer):
    """Gives a container's role keys that are good for five minutes, takes objects, and else answers `refusal`."""

    refusal: tuple[int, str] = (400, "")

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _FakeAwsHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.given, self.used = 0, list[str]()


class _FakeAwsHandler(http.server.BaseHTTPRequestHandler):
    server: FakeAws

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "ETag": '"1"'}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.given += 1
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)
        keys = {"AccessKeyId": f"ASIA{self.server.given}", "SecretAccessKey": "s", "Token": "t"}
        self.answer(200, {**keys, "Expiration": f"{end:%Y-%m-%dT%H:%M:%SZ}"})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.used.append(self.headers["Authorization"].split("Credential=")[1].split("/")[0])
        self.answer(200, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, code = self.server.refusal
        self.answer(status, {"__type": code, "message": "User: arn:aws:sts::1:assumed-role/x is not authorized"})


@pytest.fixture
def fake_aws(clean_aws: Path) -> Iterator[FakeAws]:
    with FakeAws() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("token_file", [False, True])
def test_a_container_s_role_by_full_uri(
    fake_aws: FakeAws, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token_file: bool
) -> None:
    """Plain http on 127.0.0.1; with a file of a token (EKS) obstore asks by itself, without one boto3 does."""
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{fake_aws.url}/role")
    if token_file:
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(private(tmp_path / "token", "t")))
    provider = aws.obstore_credentials()
    assert (provider is None) == token_file
    open_store("s3://bucket/x", StorageOptions(fake_aws.url, "eu-west-1")).write("a", b"1")
    assert fake_aws.used[0] == f"ASIA{fake_aws.given}"
    if provider:  # keys that are about to expire are renewed before they are handed out
        first, second = provider(), provider()
        assert first["access_key_id"] != second["access_key_id"] == f"ASIA{fake_aws.given}"


# -- secrets of AWS -------------------------------------------------------------------------------

VALUE = "canary-value"


@pytest.fixture
def vault(moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> str:
    """Some secrets; the ARN of one of them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_bucket.server.endpoint)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    manager = aws.session(None, "eu-west-1").client("secretsmanager")
    ssm = aws.session(None, "eu-west-1").client("ssm")
    if "prod/db@x" not in [secret["Name"] for secret in manager.list_secrets()["SecretList"]]:  # others have some, too
        keys = json.dumps({"token": VALUE, "port": 5432})
        manager.create_secret(Name="prod/db@x", SecretString=keys)
        manager.create_secret(Name="plain", SecretString=VALUE)
        manager.create_secret(Name="binary", SecretBinary=VALUE.encode())
        ssm.put_parameter(Name="/prod/token", Value=VALUE, Type="SecureString")
        ssm.put_parameter(Name="json", Value=keys, Type="String")
    arn = str(manager.describe_secret(SecretId="prod/db@x")["ARN"])
    for client in (manager, ssm):
        client.close()
    return arn


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("secretsmanager:plain", VALUE),
        ("secretsmanager:prod/db@x#token", VALUE),
        ("secretsmanager:prod/db@x#port", "5432"),
        ("secretsmanager:ARN#token", VALUE),
        ("ssm:/prod/token", VALUE),
        ("ssm:json#token", VALUE),
    ],
)
def test_a_secret_of_aws_is_read_by_reference(vault: str, reference: str, value: str) -> None:
    names = {"TOKEN": f"store:{reference.replace('ARN', vault)}"}
    assert read_secrets(names, {}) == {"TOKEN": value}


@pytest.mark.parametrize("region", ["us-west-2", None])
def test_an_arn_says_its_region_itself(vault: str, monkeypatch: pytest.MonkeyPatch, region: str | None) -> None:
    monkeypatch.delenv("AWS_REGION") if region is None else monkeypatch.setenv("AWS_REGION", region)
    assert read_secrets({"TOKEN": f"store:secretsmanager:{vault}#token"}, {}) == {"TOKEN": VALUE}
    with pytest.raises(SpecError):
        read_secrets({"TOKEN": "store:secretsmanager:plain"}, {})


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("secretsmanager:plan", "Secrets Manager has no 'plan' in eu-west-1: correct the reference"),
        ("ssm:/prod/tokn", "SSM's Parameter Store has no '/prod/tokn' in eu-west-1"),
        ("secretsmanager:binary", "'binary' of Secrets Manager is binary; a variable takes text"),
        ("secretsmanager:plain#key", "'plain' of Secrets Manager is no JSON object, so it has no key 'key'"),
        ("secretsmanager:prod/db@x#tokn", "'prod/db@x' of Secrets Manager has no key 'tokn'"),
        ("ssm:json#tokn", "'json' of SSM has no key 'tokn'"),
        ("vault:x", "known here: store:secretsmanager:…, store:ssm:…"),
    ],
)
def test_a_secret_of_aws_that_is_not_there(vault: str, reference: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_secrets({"TOKEN": f"store:{reference}"}, {})
    assert message in str(caught.value)
    assert VALUE not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("reference", "refusal", "kind", "message"),
    [
        (
            "secretsmanager:a",
            (400, "AccessDeniedException"),
            AuthError,
            "secretsmanager:GetSecretValue on it, and kms:D",
        ),
        (
            "ssm:a",
            (400, "AccessDeniedException"),
            AuthError,
            "the job's role may not read 'a': it needs ssm:GetParameter",
        ),
        ("secretsmanager:a", (400, "DecryptionFailure"), AuthError, "kms:Decrypt"),
        ("secretsmanager:a", (400, "ExpiredTokenException"), AuthError, "ExpiredTokenException"),
        ("ssm:a", (400, "ThrottlingException"), UnreachableError, "did not give 'a' (ThrottlingException): try again"),
        ("ssm:a", (503, "ServiceUnavailable"), UnreachableError, "try again"),
        ("ssm:a", (400, "ValidationException"), SpecError, "refuses 'a'"),
    ],
)
def test_a_secret_that_aws_refuses(
    fake_aws: FakeAws,
    monkeypatch: pytest.MonkeyPatch,
    reference: str,
    refusal: tuple[int, str],
    kind: type[Exception],
    message: str,
) -> None:
    fake_aws.refusal = refusal
    environment = {"AWS_ENDPOINT_URL": fake_aws.url, "AWS_REGION": "eu-west-1", "AWS_ACCESS_KEY_ID": "a"}
    for name, value in {**environment, "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind) as caught:
        read_secrets({"TOKEN": f"store:{reference}"}, {})
    assert message in str(caught.value)


BAD_AWS: dict[str, tuple[str, str, type[Exception], str]] = {
    "nothing at all": ("", "", AuthError, "AWS_ACCESS_KEY_ID"),
    "no such profile": ("[profile lib]\nregion = x\n", "lab", SpecError, r"there: lib\); did you mean 'lib'"),
    "empty profile": ("[profile lab]\nregion = x\n", "lab", AuthError, "aws configure --profile lab"),
    "sso never": (
        "[profile lab]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\n"
        "[sso-session s]\nsso_region = eu-west-1\nsso_start_url = https://x.awsapps.com/start\n",
        "lab",
        AuthError,
        "aws sso login --profile lab",
    ),
    "source missing": ("[profile lab]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = y\n", "lab", SpecError, "y"),
    "sts away": (
        "[profile lab]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = base\nregion = us-east-1\n"
        "endpoint_url = http://127.0.0.1:1\n[profile base]\naws_access_key_id = a\naws_secret_access_key = b\n",
        "lab",
        UnreachableError,
        "did not answer",
    ),
    "process fails": ("[profile lab]\ncredential_process = /bin/false\n", "lab", AuthError, "profile 'lab'"),
}


@pytest.mark.parametrize("name", BAD_AWS)
def test_a_missing_aws_identity_says_what_to_do(name: str, clean_aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, profile, kind, words = BAD_AWS[name]
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    if config:
        private(clean_aws / ".aws/config", config)
    with pytest.raises(kind, match=words):
        open_store("s3://bucket/x", StorageOptions(profile=profile or None))


def test_an_open_key_file_is_refused(clean_aws: Path) -> None:
    path = private(clean_aws / ".aws/credentials", "[lab]\naws_access_key_id = a\naws_secret_access_key = b\n")
    path.chmod(0o644)
    with pytest.raises(AuthError, match=r"credentials holds credentials and others can read it"):
        open_store("s3://bucket/x", StorageOptions(profile="lab"))
    path.chmod(0o600)
    (private(clean_aws / ".aws/config", "[profile lab]\nregion = x\n")).chmod(0o644)  # no secret in it
    open_store("s3://bucket/x", StorageOptions(profile="lab"))


def test_a_login_that_expires_in_mid_run_is_told_in_our_words(
    moto_bucket: Bucket, clean_aws: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A credential process stops working after the store was opened."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    keys: dict[str, object] = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b"}
    keys["Expiration"] = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=1)).isoformat()
    script = private(
        tmp_path / "process", f"#!/bin/sh\n[ -e {tmp_path}/closed ] && exit 1\necho '{json.dumps(keys)}'\n"
    )
    script.chmod(0o700)
    private(clean_aws / ".aws/config", f"[profile lab]\nregion = us-east-1\ncredential_process = {script}\n")
    store = open_store(moto_bucket.uri, StorageOptions(moto_bucket.server.endpoint, profile="lab"))
    (tmp_path / "closed").touch()
    with pytest.raises(AuthError, match=r"can't write: AWS gave profile 'lab' no credentials"):
        store.write("a", b"1")


# -- Google ---------------------------------------------------------------------------------------


@dataclass
class FakeGoogle:
    """Gives tokens to a key file, and takes objects. `refuse` makes it turn keys away."""

    url: str = ""
    refuse: bool = False
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def key_file(self, path: Path) -> Path:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        key = rsa.generate_private_key(65537, 2048)
        none = serialization.NoEncryption()
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none).decode()
        facts = {"type": "service_account", "client_email": "me@p", "private_key": pem, "project_id": "vision"}
        return private(path, json.dumps(facts | {"token_uri": f"{self.url}/token"}))


def _handler(fake: FakeGoogle) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), "Content-Type": kind, "ETag": '"1"'}
            for name, value in (headers | {"Last-Modified": "Tue, 15 Nov 2022 12:45:26 GMT"}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def take(self) -> bytes:
            fake.seen.append((self.command, self.path, self.headers.get("Authorization", "")))
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            self.take()
            if fake.refuse:
                self.answer(400, b'{"error": "invalid_grant", "error_description": "Invalid JWT"}')
            else:
                self.answer(200, b'{"access_token": "the-token", "expires_in": 3600, "token_type": "Bearer"}')

        def do_PUT(self) -> None:
            fake.objects[self.path.split("?")[0]] = self.take()
            self.answer(200, b"")

        def do_GET(self) -> None:
            self.take()
            body = fake.objects.get(self.path.split("?")[0])
            self.answer(*((404, b"<Error><Code>NoSuchKey</Code></Error>") if body is None else (200, body)))

    return Handler


@pytest.fixture
def fake_google(clean_aws: Path) -> Iterator[FakeGoogle]:
    fake = FakeGoogle()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_key_file_opens_gs(fake_google: FakeGoogle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(fake_google.key_file(tmp_path / "key.json")))
    store = open_store("gs://bucket/runs", StorageOptions(fake_google.url))
    store.write("a", b"bytes")
    assert store.read("a") == b"bytes"
    with pytest.raises(FileNotFoundError):
        store.read("b")
    tokens = {token for method, path, token in fake_google.seen if path.startswith("/bucket")}
    assert tokens == {"Bearer the-token"}
    assert google.credentials()[1] == "vision"


def test_anonymous_asks_for_no_identity(fake_google: FakeGoogle) -> None:
    fake_google.objects["/bucket/a"] = b"public"
    store = open_store("gs://bucket", StorageOptions(fake_google.url, anonymous=True))
    assert store.read("a") == b"public"
    assert {token for _, _, token in fake_google.seen} == {""}


def _open_gs(url: str) -> Callable[[], object]:
    return lambda: open_store("gs://bucket", StorageOptions(url), patience_s=0).read("a")


def test_a_refused_google_key_says_what_to_do(
    fake_google: FakeGoogle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = fake_google.key_file(tmp_path / "key.json")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    fake_google.refuse = True
    with pytest.raises(AuthError, match=r"gs://bucket.*gcloud auth application-default login"):
        _open_gs(fake_google.url)()
    key.chmod(0o644)
    with pytest.raises(AuthError, match="chmod 600"):
        _open_gs(fake_google.url)()
    private(key, "{}")
    with pytest.raises(AuthError, match="gcloud auth application-default login"):
        _open_gs(fake_google.url)()
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "gone"))
    with pytest.raises(AuthError, match="which is not a file"):
        _open_gs(fake_google.url)()
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(AuthError, match="gcloud auth application-default login"):
        _open_gs(fake_google.url)()
