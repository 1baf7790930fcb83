"""DynamoDB's refusals and the driver's exceptions, translated by one table into retry classes.

    service code (``__type`` of the answer)  ->  HTTP status, where there is no code  ->  exception type

The retry class says what helps (semantics, section 5). Anything that concerns one record is PERMANENT or UNKNOWN, so
that the shipper bisects; anything that a person has to mend (permissions, keys, clock, missing table) is BLOCKED and
never dead-letters a record. A reply that cannot be read tells nothing of the records: TRANSIENT, the call is repeated.

Reasons are fixed texts of this file. DynamoDB's own messages quote values of the record
(``One or more parameter values were invalid: ... value: ...``), so they are dropped here and nowhere else needed.
"""

import asyncio
import socket
import ssl
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import aiohttp
import botocore.exceptions
import msgspec

from sidecar.errors import RetryClass, StoreError
from sidecar.phase import DYNAMODB

_TRANSIENT, _THROTTLE, _PERMANENT, _CONFLICT, _BLOCKED, _UNKNOWN = (
    RetryClass.TRANSIENT,
    RetryClass.THROTTLE,
    RetryClass.PERMANENT,
    RetryClass.CONFLICT,
    RetryClass.BLOCKED,
    RetryClass.UNKNOWN,
)

CONDITION_FAILED: Final = "ConditionalCheckFailedException"
UNPROCESSED: Final = "UnprocessedItems"


class Verdict(NamedTuple):
    """What an answer means, and the text that people read."""

    retry_class: RetryClass
    reason: str


CODES: Final[Mapping[str, Verdict]] = MappingProxyType(
    {
        # slow down
        "ProvisionedThroughputExceededException": Verdict(_THROTTLE, "table or index throughput exceeded"),
        "ThrottlingException": Verdict(_THROTTLE, "throttled"),
        "Throttling": Verdict(_THROTTLE, "throttled"),
        "RequestLimitExceeded": Verdict(_THROTTLE, "account throughput limit exceeded"),
        "LimitExceededException": Verdict(_THROTTLE, "too many concurrent control-plane operations"),
        "SlowDown": Verdict(_THROTTLE, "throttled"),
        # passes by itself
        "InternalServerError": Verdict(_TRANSIENT, "internal error of the service"),
        "InternalFailure": Verdict(_TRANSIENT, "internal error of the service"),
        "ServiceUnavailable": Verdict(_TRANSIENT, "service unavailable"),
        "ServiceUnavailableException": Verdict(_TRANSIENT, "service unavailable"),
        "TransactionConflictException": Verdict(_TRANSIENT, "a transaction holds the item"),
        "TransactionInProgressException": Verdict(_TRANSIENT, "a transaction holds the item"),
        "ReplicatedWriteConflictException": Verdict(_TRANSIENT, "a replica writes the item"),
        "RequestTimeout": Verdict(_TRANSIENT, "the service gave up waiting for the request"),
        "RequestTimeoutException": Verdict(_TRANSIENT, "the service gave up waiting for the request"),
        "ResourceInUseException": Verdict(_TRANSIENT, "the table is being changed"),
        "TableInUseException": Verdict(_TRANSIENT, "the table is being changed"),
        "IDPCommunicationError": Verdict(_TRANSIENT, "the identity provider could not be reached"),
        # one record of the call, as data
        "ValidationException": Verdict(_PERMANENT, "refused as invalid"),
        "SerializationException": Verdict(_PERMANENT, "refused as unreadable"),
        "ItemCollectionSizeLimitExceededException": Verdict(_PERMANENT, "item collection too large"),
        CONDITION_FAILED: Verdict(_CONFLICT, "condition not met"),
        "TransactionCanceledException": Verdict(_CONFLICT, "transaction cancelled"),
        # somebody has to mend it
        "ResourceNotFoundException": Verdict(_BLOCKED, "table or index not found: create it or correct the name"),
        "TableNotFoundException": Verdict(_BLOCKED, "table not found: create it or correct the name"),
        "IndexNotFoundException": Verdict(_BLOCKED, "index not found: create it"),
        "AccessDeniedException": Verdict(_BLOCKED, "permission missing: check the role's policy"),
        "AccessDenied": Verdict(_BLOCKED, "permission missing: check the role's trust and policy"),
        "UnauthorizedOperation": Verdict(_BLOCKED, "permission missing: check the role's policy"),
        "UnrecognizedClientException": Verdict(_BLOCKED, "credentials not recognised: check key and region"),
        "InvalidClientTokenId": Verdict(_BLOCKED, "credentials not recognised: check key and region"),
        "MissingAuthenticationTokenException": Verdict(_BLOCKED, "the request arrived unsigned: check proxies"),
        "MissingAuthenticationToken": Verdict(_BLOCKED, "the request arrived unsigned: check proxies"),
        "ExpiredTokenException": Verdict(_BLOCKED, "credentials expired and could not be refreshed"),
        "ExpiredToken": Verdict(_BLOCKED, "credentials expired and could not be refreshed"),
        "InvalidIdentityToken": Verdict(_BLOCKED, "the web identity token was refused: check the role's trust"),
        "InvalidSignatureException": Verdict(_BLOCKED, "signature refused: check this machine's clock and the secret"),
        "SignatureDoesNotMatch": Verdict(_BLOCKED, "signature refused: check this machine's clock and the secret"),
        "IncompleteSignatureException": Verdict(_BLOCKED, "signature refused: check proxies"),
        "IncompleteSignature": Verdict(_BLOCKED, "signature refused: check proxies"),
        "RequestTimeTooSkewed": Verdict(_BLOCKED, "this machine's clock is too far off"),
        "RequestExpired": Verdict(_BLOCKED, "this machine's clock is too far off"),
        "OptInRequired": Verdict(_BLOCKED, "the account is not subscribed to the service"),
        "UnknownOperationException": Verdict(_BLOCKED, "the endpoint does not speak DynamoDB"),
        "KMSAccessDeniedException": Verdict(_BLOCKED, "the table's KMS key denies access"),
        "KMSDisabledException": Verdict(_BLOCKED, "the table's KMS key is disabled"),
        "KMSInvalidStateException": Verdict(_BLOCKED, "the table's KMS key is in a state that cannot be used"),
        "KMSInvalidKeyUsageException": Verdict(_BLOCKED, "the table's KMS key cannot encrypt"),
        "KMSNotFoundException": Verdict(_BLOCKED, "the table's KMS key was not found"),
        "KMSOptInRequired": Verdict(_BLOCKED, "the account is not subscribed to KMS"),
        "KMSThrottlingException": Verdict(_THROTTLE, "KMS throttles"),
        "InaccessibleEncryptionCredentialsException": Verdict(_BLOCKED, "the table's KMS key cannot be reached"),
    }
)
"""AWS error code (without its namespace) to verdict. Codes that are not here are judged by the HTTP status."""

EXPIRED: Final = frozenset({"ExpiredTokenException", "ExpiredToken"})
"""Codes after which fresh credentials are fetched before the next call."""

STATUSES: Final[Mapping[int, Verdict]] = MappingProxyType(
    {
        401: Verdict(_BLOCKED, "the endpoint asks for authentication: check proxies"),
        403: Verdict(_BLOCKED, "forbidden by something before DynamoDB: check proxies and the VPC endpoint's policy"),
        404: Verdict(_BLOCKED, "the endpoint does not speak DynamoDB"),
        407: Verdict(_BLOCKED, "a proxy asks for authentication"),
        408: Verdict(_TRANSIENT, "the request took too long to arrive"),
        413: Verdict(_PERMANENT, "the request is too large"),
        429: Verdict(_THROTTLE, "throttled"),
    }
)
"""HTTP status to verdict, where the answer carries no known code. Other 5xx are TRANSIENT, the rest UNKNOWN."""

_SERVER_ERROR: Final = 500
_REDIRECT: Final = range(300, 400)

EXCEPTIONS: Final[tuple[tuple[type[BaseException], Verdict], ...]] = (
    # first match wins: subclasses before their bases
    (aiohttp.ClientConnectorCertificateError, Verdict(_BLOCKED, "the endpoint's certificate is not trusted")),
    (ssl.SSLCertVerificationError, Verdict(_BLOCKED, "the endpoint's certificate is not trusted")),
    (aiohttp.ConnectionTimeoutError, Verdict(_TRANSIENT, "connecting took too long")),
    (aiohttp.ServerTimeoutError, Verdict(_TRANSIENT, "no answer in time")),
    (aiohttp.ServerDisconnectedError, Verdict(_TRANSIENT, "the connection was closed before the answer")),
    (aiohttp.ClientConnectorDNSError, Verdict(_TRANSIENT, "the endpoint's name does not resolve")),
    (socket.gaierror, Verdict(_TRANSIENT, "the endpoint's name does not resolve")),
    (aiohttp.ClientConnectorError, Verdict(_TRANSIENT, "cannot connect")),
    (aiohttp.ClientPayloadError, Verdict(_TRANSIENT, "the answer was cut short")),
    (aiohttp.InvalidURL, Verdict(_BLOCKED, "endpoint_url is not a URL")),
    (aiohttp.ClientError, Verdict(_TRANSIENT, "the connection failed")),
    (asyncio.TimeoutError, Verdict(_TRANSIENT, "no answer in time")),
    (botocore.exceptions.NoCredentialsError, Verdict(_BLOCKED, "no AWS credentials found")),
    (botocore.exceptions.PartialCredentialsError, Verdict(_BLOCKED, "AWS credentials are incomplete")),
    (botocore.exceptions.UnauthorizedSSOTokenError, Verdict(_BLOCKED, "the SSO session has expired")),
    (botocore.exceptions.SSOError, Verdict(_BLOCKED, "SSO credentials cannot be loaded")),
    (botocore.exceptions.CredentialRetrievalError, Verdict(_BLOCKED, "AWS credentials cannot be loaded")),
    (botocore.exceptions.ProfileNotFound, Verdict(_BLOCKED, "the AWS profile does not exist")),
    (botocore.exceptions.ConfigNotFound, Verdict(_BLOCKED, "the AWS configuration file does not exist")),
    (botocore.exceptions.NoRegionError, Verdict(_BLOCKED, "no region: set dynamodb.region or AWS_REGION")),
    (botocore.exceptions.SSLError, Verdict(_BLOCKED, "TLS to AWS failed")),
    (botocore.exceptions.ConnectionError, Verdict(_TRANSIENT, "AWS could not be reached")),
    (botocore.exceptions.HTTPClientError, Verdict(_TRANSIENT, "AWS could not be reached")),
    (botocore.exceptions.ParamValidationError, Verdict(_PERMANENT, "refused by the client's validation")),
    (botocore.exceptions.WaiterError, Verdict(_TRANSIENT, "waited too long")),
    (botocore.exceptions.BotoCoreError, Verdict(_BLOCKED, "the AWS client cannot be set up")),
    (FileNotFoundError, Verdict(_BLOCKED, "a file that the AWS configuration names does not exist")),
    (OSError, Verdict(_TRANSIENT, "the connection failed")),
)
"""Exception type to verdict, in order."""


class _ErrorBody(msgspec.Struct):
    type: str = msgspec.field(name="__type", default="")
    code: str = ""


_error_body = msgspec.json.Decoder(_ErrorBody)


def code_of(body: bytes) -> str:
    """The error code of an answer's body, without its namespace; empty where there is none."""
    try:
        parsed = _error_body.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    return (parsed.type or parsed.code).rpartition("#")[2].partition(":")[0]


def verdict(code: str, status: int) -> Verdict:
    """What an error answer means, by its code or else by its HTTP status."""
    known = CODES.get(code) or STATUSES.get(status)
    if known is not None:
        return known
    if status >= _SERVER_ERROR:
        return Verdict(_TRANSIENT, "server error")
    if status in _REDIRECT:
        return Verdict(_BLOCKED, "the endpoint redirects: check endpoint_url and proxies")
    return Verdict(_UNKNOWN, "refused for a reason that is not known")


def error(retry_class: RetryClass, reason: str, code: str = "") -> StoreError:
    """A StoreError of this store."""
    return StoreError(DYNAMODB, retry_class, reason, code)


def unreadable(operation: str) -> StoreError:
    """An answer that is not what the service says it is; nothing is known of any record."""
    return error(_TRANSIENT, f"{operation}: the answer, or an item in it, cannot be read", "UnreadableAnswer")


def from_answer(operation: str, status: int, body: bytes) -> StoreError:
    """The error that an answer other than 200 stands for."""
    code = code_of(body)
    found = verdict(code, status)
    return error(found.retry_class, f"{operation}: {found.reason}", _safe(code) or f"HTTP {status}")


def from_exception(operation: str, exc: BaseException) -> StoreError:
    """The error that a driver's exception stands for; its text is dropped, its type name kept as the code."""
    if isinstance(exc, StoreError):
        return exc
    if isinstance(exc, botocore.exceptions.ClientError):
        response = exc.response
        code = str(response.get("Error", {}).get("Code", ""))
        found = verdict(code, int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)))
        return error(found.retry_class, f"{operation}: {found.reason}", _safe(code))
    for kind, found in EXCEPTIONS:
        if isinstance(exc, kind):
            return error(found.retry_class, f"{operation}: {found.reason}", type(exc).__name__)
    return error(_UNKNOWN, f"{operation}: unexpected failure of the driver", type(exc).__name__)


def _safe(code: str) -> str:
    """A code is an identifier; anything else may be the echo of a value and is not repeated."""
    return code if code.isascii() and code.replace(".", "").isalnum() and len(code) <= 100 else ""  # noqa: PLR2004  (a bound, not a meaning)
