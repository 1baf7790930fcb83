"""The error table line by line, through real HTTP answers and real broken connections."""

import logging
import re
import ssl

import aiohttp
import botocore.exceptions as aws
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores.dynamodb import DynamoDBStore
from tests.parts.dynamodb import record
from tests.parts.fault_proxy import CutReply, DamageReply, Fault, FaultProxy, Hang, LoseReply, Raw, Refuse, Reset

BLOCKED, CONFLICT, PERMANENT = RetryClass.BLOCKED, RetryClass.CONFLICT, RetryClass.PERMANENT
THROTTLE, TRANSIENT, UNKNOWN = RetryClass.THROTTLE, RetryClass.TRANSIENT, RetryClass.UNKNOWN
EXPECTED = {
    THROTTLE: "ProvisionedThroughputExceededException ThrottlingException Throttling RequestLimitExceeded SlowDown "
    "LimitExceededException KMSThrottlingException",
    TRANSIENT: "InternalServerError InternalFailure ServiceUnavailable ServiceUnavailableException "
    "TransactionConflictException TransactionInProgressException ReplicatedWriteConflictException RequestTimeout "
    "RequestTimeoutException ResourceInUseException TableInUseException IDPCommunicationError",
    PERMANENT: "ValidationException SerializationException ItemCollectionSizeLimitExceededException",
    CONFLICT: "ConditionalCheckFailedException TransactionCanceledException",
    BLOCKED: "ResourceNotFoundException TableNotFoundException IndexNotFoundException AccessDeniedException "
    "AccessDenied "
    "UnauthorizedOperation UnrecognizedClientException InvalidClientTokenId MissingAuthenticationTokenException "
    "MissingAuthenticationToken ExpiredTokenException ExpiredToken InvalidIdentityToken InvalidSignatureException "
    "SignatureDoesNotMatch IncompleteSignatureException IncompleteSignature RequestTimeTooSkewed RequestExpired "
    "OptInRequired UnknownOperationException KMSAccessDeniedException KMSDisabledException KMSInvalidStateException "
    "KMSInvalidKeyUsageException KMSNotFoundException KMSOptInRequired InaccessibleEncryptionCredentialsException",
}
CODES = {code: retry_class for retry_class, codes in EXPECTED.items() for code in codes.split()}
SECRET = "planted-secret-4711"


@pytest.fixture
def proxy(dynamodb_proxy: FaultProxy) -> FaultProxy:
    """What breaks."""
    return dynamodb_proxy


@pytest.fixture
def store(dynamodb_behind_proxy: DynamoDBStore) -> DynamoDBStore:
    """Who sees it break."""
    return dynamodb_behind_proxy


async def failure(store: DynamoDBStore) -> StoreError:
    """What a write raises."""
    with pytest.raises(StoreError) as caught:
        await store.write([record(request_data=SECRET, user_id=SECRET)])
    return caught.value


def test_the_table_has_no_line_that_is_not_tested() -> None:
    """A new code comes with its expectation."""
    assert {code: verdict.retry_class for code, verdict in errors.CODES.items()} == CODES


async def test_each_code_has_its_class(store: DynamoDBStore, proxy: FaultProxy) -> None:
    """Every error code of the table, as an HTTP answer to a write."""
    for code, retry_class in CODES.items():
        proxy.on("BatchWriteItem", Refuse(500 if retry_class is TRANSIENT else 400, code))
        seen = await failure(store)
        assert (seen.retry_class, seen.code) == (retry_class, code)


STATUSES = {
    **dict.fromkeys((301, 401, 403, 404, 407), BLOCKED),
    **dict.fromkeys((408, 500, 502, 503, 504), TRANSIENT),
    **dict.fromkeys((400, 418), UNKNOWN),
    413: PERMANENT,
    429: THROTTLE,
}


async def test_an_answer_without_a_known_code_is_judged_by_its_status(store: DynamoDBStore, proxy: FaultProxy) -> None:
    """Proxies and load balancers answer without DynamoDB's codes."""
    for status, retry_class in STATUSES.items():
        for body in (b"<html>no</html>", b'{"__type":"x#NeverHeardOf"}', b"", b"[1]", b"\xff"):
            proxy.on("BatchWriteItem", Raw(status, body))
            assert (await failure(store)).retry_class is retry_class, (status, body)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Reset(), "ConnectionResetError|ServerDisconnectedError"),
        (LoseReply(), "ConnectionResetError|ServerDisconnectedError"),
        (CutReply(after=1), "ClientPayloadError|ConnectionResetError"),
        (DamageReply(), "CRC32"),
        (Hang(), "TimeoutError"),
        (Raw(200, b"<html>welcome to the hotel</html>"), "UnreadableAnswer"),
        (Raw(200, b'{"UnprocessedItems": 5}'), "UnreadableAnswer"),
    ],
    ids=repr,
)
async def test_a_broken_exchange_is_transient(store: DynamoDBStore, proxy: FaultProxy, fault: Fault, code: str) -> None:
    """Nothing is known of the records: the call is repeated, no record is blamed."""
    proxy.on("BatchWriteItem", fault)
    seen = await failure(store)
    assert seen.retry_class is TRANSIENT
    assert re.fullmatch(code, seen.code)


async def test_nobody_listening_is_transient(dynamodb_settings: settings.DynamoDB, unused_tcp_port: int) -> None:
    """Connection refused passes by itself."""
    options = msgspec.structs.replace(dynamodb_settings, endpoint_url=f"http://127.0.0.1:{unused_tcp_port}")
    store = DynamoDBStore(options, clock=SystemClock())
    with pytest.raises(StoreError) as caught:
        await store.ping()
    assert caught.value.retry_class is TRANSIENT
    await store.close()


async def test_a_name_that_does_not_resolve_is_transient(dynamodb_settings: settings.DynamoDB) -> None:
    """DNS comes back."""
    options = msgspec.structs.replace(dynamodb_settings, endpoint_url="http://no-such-host.invalid:8000")
    store = DynamoDBStore(options, clock=SystemClock())
    with pytest.raises(StoreError) as caught:
        await store.ping()
    assert (caught.value.retry_class, caught.value.code) == (TRANSIENT, "gaierror")
    assert "does not resolve" in str(caught.value)
    await store.close()


async def test_one_call_is_one_attempt(store: DynamoDBStore, proxy: FaultProxy) -> None:
    """No retry is hidden below the shipper's."""
    for fault in (Refuse(500, "InternalServerError"), Refuse(400, "ThrottlingException"), Reset()):
        proxy.calls.clear()
        proxy.on("BatchWriteItem", fault)
        await failure(store)
        assert proxy.calls["BatchWriteItem"] == 1


async def test_a_reason_never_carries_a_value_of_the_record(
    store: DynamoDBStore, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The service's message quotes values; what we show does not, and neither do the logs."""
    caplog.set_level(logging.DEBUG)
    quoted = f"One or more parameter values were invalid: {SECRET}"
    for fault in (
        Refuse(400, "ValidationException", quoted),
        Refuse(400, f"Strange {SECRET}", quoted),
        Raw(400, f"<p>{SECRET}</p>".encode()),
        Raw(200, f'{{"UnprocessedItems": "{SECRET}"}}'.encode()),
    ):
        proxy.on("BatchWriteItem", fault)
        seen = await failure(store)
        assert SECRET not in f"{seen} {seen.reason} {seen.code} {seen!r} {seen.__cause__!r}"
    assert SECRET not in caplog.text


DRIVER = {
    BLOCKED: (
        *(aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError, aiohttp.InvalidURL),
        *(aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError, aws.ProfileNotFound),
        *(aws.ConfigNotFound, aws.NoRegionError, aws.SSLError, aws.UnauthorizedSSOTokenError, aws.SSOTokenLoadError),
        *(aws.InvalidConfigError, aws.UnknownServiceError, FileNotFoundError),
    ),
    TRANSIENT: (
        *(aiohttp.ConnectionTimeoutError, aiohttp.ServerTimeoutError, aiohttp.ServerDisconnectedError, TimeoutError),
        *(aiohttp.ClientConnectorDNSError, aiohttp.ClientConnectorError, aiohttp.ClientPayloadError),
        *(aiohttp.ClientOSError, aiohttp.ClientProxyConnectionError, ConnectionResetError, BrokenPipeError, OSError),
        *(aws.EndpointConnectionError, aws.ConnectTimeoutError, aws.ReadTimeoutError, aws.ConnectionClosedError),
        *(aws.ProxyConnectionError, aws.WaiterError),
    ),
    PERMANENT: (aws.ParamValidationError,),
    UNKNOWN: (ZeroDivisionError, RuntimeError),
}


@pytest.mark.parametrize(
    ("kind", "retry_class"), [(kind, retry_class) for retry_class, kinds in DRIVER.items() for kind in kinds]
)
def test_each_exception_of_the_drivers_has_its_class(kind: type[BaseException], retry_class: RetryClass) -> None:
    """Subclasses are judged before their bases."""
    seen = errors.from_exception("GetItem", kind.__new__(kind))
    assert (seen.retry_class, seen.code) == (retry_class, kind.__name__)


@pytest.mark.parametrize(("code", "retry_class"), [("AccessDenied", BLOCKED), ("Strange", UNKNOWN)])
def test_a_client_error_of_the_control_plane_is_judged_by_its_code(code: str, retry_class: RetryClass) -> None:
    """The same table as the data plane's."""
    response = {"Error": {"Code": code, "Message": SECRET}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    seen = errors.from_exception("control", aws.ClientError(response, "DescribeTable"))
    assert (seen.retry_class, seen.code) == (retry_class, code)
    assert SECRET not in str(seen)
