"""Signatures, credentials and connections."""

import asyncio
import configparser
import ssl
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.dynamodb_wire import SigV4
from tests.parts.dynamodb import record
from tests.parts.fault_proxy import FaultProxy, Refuse
from tests.parts.tcp_proxy import TcpProxy

TARGET = "DynamoDB_20120810.BatchWriteItem"
_words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


def signed_by_botocore(
    credentials: ReadOnlyCredentials, region: str, host: str, body: bytes, now: datetime
) -> Mapping[str, str]:
    """The headers of botocore's own signer at a fixed time."""
    headers = {"Content-Type": "application/x-amz-json-1.0", "X-Amz-Target": TARGET}
    request = AWSRequest("POST", f"https://{host}/", headers=headers, data=body)
    with patch("botocore.auth.get_current_datetime", return_value=now):
        SigV4Auth(credentials, "dynamodb", region).add_auth(request)
    return dict(request.headers.items())


@given(
    body=st.binary(max_size=200),
    secret=_words,
    token=st.none() | _words,
    host=st.sampled_from(("dynamodb.eu-west-1.amazonaws.com", "127.0.0.1:8000", "localhost:4566")),
    now=st.integers(1_600_000_000, 2_200_000_000).map(lambda second: datetime.fromtimestamp(second, UTC)),
)
def test_the_signature_is_botocores(body: bytes, secret: str, token: str | None, host: str, now: datetime) -> None:
    """Byte for byte, with and without a session token, whatever the body, the host and the time."""
    credentials = ReadOnlyCredentials("AKIDEXAMPLE", secret, token)
    ours = SigV4(credentials, "eu-west-1", host)
    for _ in range(2):  # the second time with the day's key kept
        assert ours.headers(TARGET, body, now) == signed_by_botocore(credentials, "eu-west-1", host, body, now)


def test_the_key_of_a_day_is_not_used_on_the_next() -> None:
    """At midnight UTC the signature follows."""
    credentials = ReadOnlyCredentials("AKIDEXAMPLE", "secret", None)
    ours = SigV4(credentials, "eu-west-1", "localhost")
    for now in (datetime(2026, 1, 1, 23, 59, 59, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)):
        assert ours.headers(TARGET, b"", now) == signed_by_botocore(credentials, "eu-west-1", "localhost", b"", now)


def write_credentials(path: Path, token: str) -> None:
    """A shared credentials file, as tools that renew sessions write it."""
    parser = configparser.ConfigParser()
    parser["default"] = {"aws_access_key_id": "a", "aws_secret_access_key": "s", "aws_session_token": token}
    with path.open("w") as file:
        parser.write(file)


@pytest.fixture
def credentials_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Credentials from a file instead of the environment."""
    path = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    write_credentials(path, "first")
    return path


async def test_an_expired_token_is_renewed_and_the_call_sent_again(
    dynamodb_proxy: FaultProxy, dynamodb_settings: settings.DynamoDB, credentials_file: Path
) -> None:
    """Other credentials in the chain by now: the write succeeds, and the shipper sees no error."""
    options = msgspec.structs.replace(dynamodb_settings, endpoint_url=dynamodb_proxy.url)
    store = DynamoDBStore(options, clock=SystemClock())
    await store.ping()
    write_credentials(credentials_file, "second")
    dynamodb_proxy.on("BatchWriteItem", Refuse(400, "ExpiredTokenException"), None)
    value = record()
    await store.write([value])
    assert await store.get(value.log_id) == value
    assert dynamodb_proxy.calls["BatchWriteItem"] == 2
    await store.close()


async def test_an_expired_token_without_a_new_one_blocks(
    dynamodb_proxy: FaultProxy, dynamodb_settings: settings.DynamoDB, credentials_file: Path
) -> None:
    """The same credentials are not tried twice."""
    options = msgspec.structs.replace(dynamodb_settings, endpoint_url=dynamodb_proxy.url)
    store = DynamoDBStore(options, clock=SystemClock())
    await store.ping()
    dynamodb_proxy.on("BatchWriteItem", Refuse(400, "ExpiredTokenException"))
    with pytest.raises(StoreError) as caught:
        await store.write([record()])
    assert caught.value.retry_class is RetryClass.BLOCKED
    assert dynamodb_proxy.calls["BatchWriteItem"] == 1
    await store.close()


async def test_no_credentials_block(dynamodb_settings: settings.DynamoDB, credentials_file: Path) -> None:
    """Somebody has to give some; no record is blamed."""
    credentials_file.unlink()
    store = DynamoDBStore(dynamodb_settings, clock=SystemClock())
    with pytest.raises(StoreError) as caught:
        await store.ping()
    assert (caught.value.retry_class, caught.value.code) == (RetryClass.BLOCKED, "NoCredentialsError")
    await store.close()


async def test_no_region_blocks(dynamodb_settings: settings.DynamoDB, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names the setting."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    store = DynamoDBStore(msgspec.structs.replace(dynamodb_settings, region=None), clock=SystemClock())
    with pytest.raises(StoreError, match=r"dynamodb\.region") as caught:
        await store.ping()
    assert caught.value.retry_class is RetryClass.BLOCKED
    await store.close()


def test_a_store_is_made_without_connecting(dynamodb_settings: settings.DynamoDB) -> None:
    """No loop, no network, no credentials: a sidecar accepts records while a store is down."""
    DynamoDBStore(msgspec.structs.replace(dynamodb_settings, endpoint_url="http://127.0.0.1:1"), clock=SystemClock())


async def test_close_is_idempotent_and_the_next_call_connects_again(dynamodb_store: DynamoDBStore) -> None:
    """Nothing is left open, nothing is broken."""
    value = record()
    await dynamodb_store.write([value])
    await dynamodb_store.close()
    await dynamodb_store.close()
    assert await dynamodb_store.get(value.log_id) == value


async def test_a_proxy_of_the_environment_is_used(
    dynamodb_proxy: FaultProxy, dynamodb_settings: settings.DynamoDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY is honoured, NO_PROXY too."""
    monkeypatch.setenv("http_proxy", dynamodb_proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    store = DynamoDBStore(
        msgspec.structs.replace(dynamodb_settings, endpoint_url="http://x.invalid"), clock=SystemClock()
    )
    await store.ping()
    assert dynamodb_proxy.calls["PutItem"] == 1
    await store.close()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    store = DynamoDBStore(dynamodb_settings, clock=SystemClock())
    await store.ping()
    assert dynamodb_proxy.calls["PutItem"] == 1
    await store.close()


def self_signed(directory: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS for 127.0.0.1 and the file to trust it by."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    trusted, secret = directory / "certificate.pem", directory / "key.pem"
    trusted.write_bytes(certificate.public_bytes(Encoding.PEM))
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(trusted, secret)
    return context, trusted


async def test_tls_trusts_the_bundle_of_the_aws_configuration_and_nobody_else(
    dynamodb_store: DynamoDBStore,
    dynamodb_settings: settings.DynamoDB,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """An unknown certificate blocks; AWS_CA_BUNDLE mends it, for the data plane as for the control plane."""
    context, trusted = self_signed(tmp_path)
    async with FaultProxy(dynamodb_settings.endpoint_url or "", tls=context) as proxy:
        options = msgspec.structs.replace(dynamodb_settings, endpoint_url=proxy.url)
        store = DynamoDBStore(options, clock=SystemClock())
        with pytest.raises(StoreError) as caught:
            await store.ping()
        assert caught.value.retry_class is RetryClass.BLOCKED
        assert proxy.calls.total() == 0
        await store.close()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(trusted))
        store = DynamoDBStore(options, clock=SystemClock())
        value = record()
        await store.write([value])
        assert await store.get(value.log_id) == value
        await store.close()


class TestBrokenConnections:
    """The same store through a TCP proxy that breaks and heals."""

    @pytest.fixture
    async def tcp(self, dynamodb_server: str) -> AsyncIterator[TcpProxy]:
        """Before the server."""
        host, _, port = dynamodb_server.removeprefix("http://").rpartition(":")
        async with TcpProxy(host, int(port)) as proxy:
            yield proxy

    @pytest.fixture
    async def store(
        self, tcp: TcpProxy, dynamodb_store: DynamoDBStore, dynamodb_settings: settings.DynamoDB
    ) -> AsyncIterator[DynamoDBStore]:
        """Behind it, impatient."""
        options = msgspec.structs.replace(
            dynamodb_settings, endpoint_url=f"http://127.0.0.1:{tcp.port}", connect_timeout=0.3, read_timeout=0.5
        )
        store = DynamoDBStore(options, clock=SystemClock())
        await store.ping()
        yield store
        await store.close()

    async def refused(self, store: DynamoDBStore) -> RetryClass:
        """The class of a write's failure."""
        with pytest.raises(StoreError) as caught:
            await store.write([record()])
        return caught.value.retry_class

    async def test_refused_reset_and_silent_servers_are_transient_and_heal(
        self, store: DynamoDBStore, tcp: TcpProxy
    ) -> None:
        """After each fault the next write succeeds without a restart."""
        for fault in ("refuse", "blackhole", "cut", "lose"):
            match fault:
                case "refuse":
                    await tcp.refuse()
                case "blackhole":
                    tcp.blackhole()
                case "cut":
                    tcp.cut_replies(after=20)
                case "lose":
                    tcp.lose_reply(b"BatchWriteItem")
            assert await self.refused(store) is RetryClass.TRANSIENT, fault
            await tcp.normal()
            await store.write([record()])

    async def test_a_write_whose_reply_was_lost_happened_once(self, store: DynamoDBStore, tcp: TcpProxy) -> None:
        """Ambiguous: repeated, and there is one item."""
        value = record()
        tcp.lose_reply(b"BatchWriteItem")
        with pytest.raises(StoreError):
            await store.write([value])
        assert tcp.lost == 1
        assert await store.put_if_absent([value]) == [False]
        assert not (await store.write([value])).failures
        assert await store.get(value.log_id) == value

    async def test_connections_cut_while_idle_are_replaced(self, store: DynamoDBStore, tcp: TcpProxy) -> None:
        """A reset of pooled connections costs at most one failed call each."""
        tcp.kill_all()
        outcomes = await asyncio.gather(*(store.write([record()]) for _ in range(2)), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert len(failures) <= 1
        assert all(isinstance(f, StoreError) and f.retry_class is RetryClass.TRANSIENT for f in failures)
        assert not (await store.write([record()])).failures
