"""MQTT brokers in processes of their own, for the registries' bench and tests."""

import asyncio
import contextlib
import datetime
import ipaddress
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from treeswarm.registry.spec import Broker
from treeswarm_bench.benchmarks.tcp_relay import free_port

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
KINDS = ("mosquitto", "mosquitto tls", "amqtt")
START_S = 120.0


@dataclass(eq=False)
class BrokerProcess:
    """A broker in a process of its own, on a port of loopback that stays the same when it is restarted."""

    kind: str
    """Kind of broker: one of `KINDS`."""
    port: int = 0
    broker: Broker = field(init=False)
    process: "subprocess.Popen[bytes] | None" = None

    async def begin(self, folder: Path) -> None:
        """Start the broker; its configuration and certificates are written into `folder`.

        Raises TimeoutError if it does not listen within START_S seconds.
        """
        self.folder, self.port = folder, free_port()
        secure = "tls" in self.kind
        self.broker = Broker(
            "127.0.0.1",
            self.port,
            "swarms/test",
            tls=secure,
            user="alice" if secure else None,
            password="correct horse" if secure else None,
            ca=folder / "ca.pem" if secure else None,
        )
        self.command = self._amqtt() if self.kind == "amqtt" else self._mosquitto(secure)
        await self.restore()

    async def kill(self) -> None:
        """Kill the process, and wait for its end."""
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    async def restore(self) -> None:
        """Start the process again, and wait until it listens.  Raises TimeoutError."""
        self.process = subprocess.Popen(  # noqa: ASYNC220  # It does not block, as its output is not read.
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        async with asyncio.timeout(START_S):
            await self._until_it_listens()

    async def _until_it_listens(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.transport.abort()
                return
            await asyncio.sleep(0.05)

    def _amqtt(self) -> list[str]:
        config = {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{self.port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
        code = f"""
import asyncio
from amqtt.broker import Broker
async def serve():
    await Broker({config!r}).start()
    await asyncio.Event().wait()
asyncio.run(serve())
"""
        return [sys.executable, "-c", code]

    def _mosquitto(self, secure: bool) -> list[str]:
        lines = [f"listener {self.port} 127.0.0.1", f"allow_anonymous {str(not secure).lower()}", "persistence false"]
        if os.geteuid() == 0:
            lines.append("user root")  # Otherwise it could not read this folder.
        if secure:
            make_certificates(self.folder)
            passwords, access = self.folder / "passwords", self.folder / "access"
            passwords.write_text("alice:correct horse\nbob:battery staple\n")
            subprocess.run(["mosquitto_passwd", "-U", str(passwords)], check=True)
            access.write_text("user alice\ntopic readwrite #\nuser bob\ntopic read #\n")
            lines += [f"certfile {self.folder}/server.pem", f"keyfile {self.folder}/server.key"]
            lines += [f"password_file {passwords}", f"acl_file {access}"]
        config = self.folder / "mosquitto.conf"
        config.write_text("\n".join(lines) + "\n")
        assert MOSQUITTO is not None
        return [MOSQUITTO, "-c", str(config)]


def make_certificates(folder: Path) -> None:
    """Write the certificates of an authority, and of a server at 127.0.0.1 that it signs."""
    now = datetime.datetime.now(datetime.UTC)
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def certificate(name: str, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(authority_key, hashes.SHA256())

    authority = certificate("test authority", authority_key, x509.BasicConstraints(ca=True, path_length=None))
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(authority.public_bytes(pem))
    (folder / "server.pem").write_bytes(certificate("server", server_key, loopback).public_bytes(pem))
    (folder / "server.key").write_bytes(
        server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
