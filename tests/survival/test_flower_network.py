"""A federation of real processes on this machine: encrypted, authenticated, and killed."""

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", exc_type=ImportError)

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fulgurite.models.fedsir.command import write_app
from fulgurite.testing.survival import find_free_port

pytestmark = pytest.mark.slow

CLIENTS = 3
SCRIPTS = Path(sys.executable).parent


def write_certificates(folder):
    """A certificate authority and the server's certificate, as PEM files."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        for name in ("test authority", "localhost")
    ]
    pem = serialization.Encoding.PEM
    now = datetime.now(UTC)
    for index, file in enumerate(("ca", "server")):
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[index])
            .issuer_name(names[0])
            .public_key(keys[index].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=index == 0, path_length=None), critical=True)
        )
        if index == 0:
            usage = dict.fromkeys(
                (
                    "digital_signature", "content_commitment", "key_encipherment",
                    "data_encipherment", "key_agreement", "encipher_only", "decipher_only",
                ),
                False,
            )  # fmt: skip
            builder = builder.add_extension(
                x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True
            )
        else:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName("localhost"), address]), critical=False
            )
        builder = builder.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(keys[index].public_key()), critical=False
        ).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False
        )
        certificate = builder.sign(keys[0], hashes.SHA256())
        (folder / f"{file}.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "server.key").write_bytes(
        keys[1].private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def write_key(folder, name):
    """A node's pair of keys; the private one is ``name``, the public one ``name.pub``."""
    key = ec.generate_private_key(ec.SECP384R1())
    (folder / name).write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    (folder / f"{name}.pub").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    return folder / name


class Network:
    """SuperLink and SuperNodes of one federation."""

    def __init__(self, folder):
        self.folder, self.port = folder, find_free_port()
        self.processes = {}
        write_certificates(folder)
        self.keys = [write_key(folder, f"node{k}") for k in range(CLIENTS)]
        self.environment = {
            **os.environ,
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{folder / "ca.pem"}"\n'
        )

    def start(self, name, *command):
        log = (self.folder / f"{name}.log").open("a")
        self.processes[name] = subprocess.Popen(
            [str(SCRIPTS / command[0]), *map(str, command[1:])], cwd=self.folder,
            env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def start_link(self):
        self.start(
            "link", "flower-superlink", "--port", self.port, "--database", "state.db",
            "--ssl-ca-certfile=ca.pem", "--ssl-certfile=server.pem", "--ssl-keyfile=server.key",
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        )  # fmt: skip
        self.wait(lambda: socket.create_connection(("127.0.0.1", self.port), 1).close() or True)

    def start_node(self, number, key=None, name=None):
        self.start(
            name or f"node{number}", "flower-supernode", f"--superlink=127.0.0.1:{self.port}",
            "--root-certificates=ca.pem", f"--port={find_free_port()}",
            f"--auth-supernode-private-key={key or self.keys[number]}",
            "--node-config", f"partition-id={number}",
        )  # fmt: skip

    def kill(self, name):
        """Kill a process and what it started."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def flwr(self, *command):
        done = subprocess.run(
            [str(SCRIPTS / "flwr"), *command], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run_app(self, app, **options):
        pairs = [
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
            for key, value in options.items()
        ]
        out = self.flwr("run", str(app), "here", "--format=json", f"--run-config={' '.join(pairs)}")
        return str(json.loads(out[out.index("{") :])["run-id"])

    def wait(self, happened, seconds=1800):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if happened():
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise AssertionError("\n".join(f"{f.name}: {f.read_text()[-3000:]}" for f in self.logs()))

    def logs(self):
        return sorted(self.folder.glob("*.log"))

    def end(self):
        for name in list(self.processes):
            self.kill(name)


@pytest.fixture
def network(tmp_path):
    network = Network(tmp_path)
    network.start_link()
    for key in network.keys:
        network.flwr("supernode", "register", f"{key}.pub", "here")
    yield network
    network.end()


def rounds_of(folder):
    """Clients that reported in each finished round, by the run's metrics."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return []
    header, *rows = [line.split(",") for line in file.read_text().splitlines()]
    column = header.index("fed/clients") if "fed/clients" in header else None
    return [] if column is None else [float(r[column]) for r in rows if r[column]]


def global_model(folder):
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    return torch.cat([t.flatten() for k, t in state.items() if k.startswith("network.")])


def write_three(folder, epochs):
    write_app(
        "fedsir/smoke.yaml",
        folder,
        overrides={"data": {"clients": CLIENTS}, "trainer": {"max_epochs": epochs}},
    )
    return folder


def simulate(app, folder, environment):
    config = app / app.name / "config.yaml"
    command = [str(SCRIPTS / "fulgurite"), "fit", "--config", str(config), f"--run.dir={folder}"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent, env=environment)
    return global_model(folder)


def test_processes_train_what_a_simulation_does_and_a_wrong_key_gets_nothing(network, tmp_path):
    app, run = write_three(tmp_path / "three", 3), tmp_path / "run"
    for number in range(CLIENTS):
        network.start_node(number)
    network.start_node(0, key=write_key(tmp_path, "foreign"), name="foreign")
    network.run_app(app, **{"run-dir": str(run)})
    network.wait(lambda: list(run.glob("test*/metrics.csv")))
    assert torch.equal(
        global_model(run), simulate(app, tmp_path / "simulated", network.environment)
    )
    assert not json.loads((run / "federation.json").read_text())["refused"]
    foreign = (tmp_path / "foreign.log").read_text()
    assert "answer" not in foreign
    assert "Received" not in foreign
    assert not list((tmp_path / "home" / "fulgurite").rglob("foreign*"))


def test_a_killed_node_drops_out_and_comes_back_and_a_killed_link_goes_on(network, tmp_path):
    app, run = write_three(tmp_path / "three", 6), tmp_path / "run"
    for number in range(CLIENTS):
        network.start_node(number)
    options = {"run-dir": str(run), "round-timeout": 240.0}
    network.run_app(app, **options)
    network.wait(lambda: len(rounds_of(run)) >= 1)
    network.kill("node2")
    network.wait(lambda: 2.0 in rounds_of(run))
    network.start_node(2)
    network.wait(lambda: rounds_of(run)[-1] == 3.0)
    network.kill("link")
    finished = len(rounds_of(run))
    network.start_link()
    network.run_app(app, **options)
    network.wait(lambda: list(run.glob("test*/metrics.csv")))
    rounds = rounds_of(run)
    assert len(rounds) == 6
    assert rounds[:finished].count(2.0) >= 1
