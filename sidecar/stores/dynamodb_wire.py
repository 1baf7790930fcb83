"""DynamoDB over HTTP: one call is one signed POST, one answer, no hidden retry.

The session, the credential chain (environment, files, IRSA, Pod Identity), the region, the endpoint and the control
plane are aioboto3's. The data plane is ours, because the generic client costs several times what a batch is worth:
the caller hands over the body as bytes, ``SigV4`` signs it, ``http_exchange`` posts it (through a proxy of the
environment: aiohttp's client).

* One attempt per call: retries belong to the shipper, where they are visible and counted.
* Every call is bounded: ``connect_timeout`` for the connection, ``read_timeout`` for the rest.
* Credentials are asked for at each call (a frozen copy lives ``CREDENTIALS_SECONDS``), so that the chain's own refresh
  works. ExpiredToken applied nothing, so it is the one answer that is tried again: once, and only if the chain, read
  anew (at most once in that time), has other credentials by now.
* The answer's CRC-32 is checked where the service sends one: a damaged answer is TRANSIENT, never believed.
"""

import asyncio
import hashlib
import hmac
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Protocol
from urllib.request import getproxies_environment, proxy_bypass
from zlib import crc32

import aioboto3
import aiobotocore.session
import aiohttp
from botocore.config import Config
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import NoCredentialsError
from botocore.httpsession import get_cert_path
from botocore.loaders import Loader, create_loader
from yarl import URL

from sidecar import settings
from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores.http_exchange import Answer, Exchange

CREDENTIALS_SECONDS: Final = 5.0
KEEPALIVE_SECONDS: Final = 20.0
SERVICE: Final = "dynamodb"
_TARGET: Final = "DynamoDB_20120810."
_CONTENT_TYPE: Final = "application/x-amz-json-1.0"
_OK: Final = 200


class SigV4:
    """AWS Signature Version 4 of the one shape of request that is sent here: ``POST /`` with an x-amz-target.

    Equal, byte for byte, to what botocore's ``SigV4Auth`` computes (a test compares them); it costs a quarter, because
    nothing is parsed again and the day's signing key is kept. Decision record 0002 has the figures.
    """

    def __init__(self, credentials: ReadOnlyCredentials, region: str, host: str) -> None:
        if any(mark in part for mark in "\r\n" for part in (credentials.access_key, credentials.token or "", host)):
            raise ValueError("a line break in the credentials or in the host")  # it would begin another header
        self._access_key: str = credentials.access_key
        self._secret_key: str = credentials.secret_key
        self._token: str | None = credentials.token
        self._region = region
        self._host = host
        self._day = ""
        self._key = b""

    def headers(self, target: str, body: bytes, now: datetime) -> dict[str, str]:
        """All headers of a request but Host and Content-Length; ``now`` is UTC. No value contains a line break."""
        stamp = now.strftime("%Y%m%dT%H%M%SZ")
        day = stamp[:8]
        if day != self._day:
            self._key = self._derive(day)
            self._day = day
        names = "content-type;host;x-amz-date"
        lines = f"content-type:{_CONTENT_TYPE}\nhost:{self._host}\nx-amz-date:{stamp}\n"
        headers = {"Content-Type": _CONTENT_TYPE, "X-Amz-Date": stamp, "X-Amz-Target": target}
        if self._token:
            names += ";x-amz-security-token"
            lines += f"x-amz-security-token:{self._token}\n"
            headers["X-Amz-Security-Token"] = self._token
        names += ";x-amz-target"
        lines += f"x-amz-target:{target}\n"
        request = f"POST\n/\n\n{lines}\n{names}\n{hashlib.sha256(body).hexdigest()}"
        scope = f"{day}/{self._region}/{SERVICE}/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        signature = hmac.digest(self._key, text.encode(), "sha256").hex()
        headers["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self._access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        return headers

    def _derive(self, day: str) -> bytes:
        key = f"AWS4{self._secret_key}".encode()
        for part in (day, self._region, SERVICE, "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        return key


class Wire:
    """The connection to one DynamoDB endpoint. Opens at the first call, reopens after ``close``.

    Raises StoreError from every method, and nothing else.
    """

    def __init__(self, options: settings.DynamoDB, *, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._session = _new_session()
        self._transport: _Transport | None = None
        self._url: URL | None = None
        self._region = ""
        self._credentials: ReadOnlyCredentials | None = None
        self._signer: SigV4 | None = None
        self._signer_until = 0.0
        self._renew_after = 0.0
        self._opening = asyncio.Lock()
        self._config = Config(
            connect_timeout=options.connect_timeout,
            read_timeout=options.read_timeout,
            retries={"total_max_attempts": 1, "mode": "standard"},
        )

    async def call(self, operation: str, body: bytes) -> bytes:
        """POST one operation, e.g. ``PutItem``; ``body`` is its DynamoDB JSON. Returns the answer's body.

        Raises StoreError: any answer but 200, no answer in time, no connection, no credentials.
        """
        try:
            return await self._attempt(operation, body)
        except StoreError as failure:
            if failure.code not in errors.EXPIRED or not await self._renewed():
                raise
        return await self._attempt(operation, body)

    @asynccontextmanager
    async def control(self) -> AsyncIterator[Any]:
        """aioboto3's own client, for the control plane; what the block raises becomes a StoreError."""
        try:
            async with self._session.client(
                SERVICE,
                region_name=self._options.region,
                endpoint_url=self._options.endpoint_url,
                config=self._config,
            ) as client:
                yield client
        except StoreError:
            raise
        except Exception as exc:  # noqa: BLE001  (botocore raises generated classes; the table names what it knows)
            raise errors.from_exception("control", exc) from None

    async def close(self) -> None:
        """Release the connections; idempotent."""
        transport, self._transport, self._url, self._signer = self._transport, None, None, None
        if transport is not None:
            await transport.close()

    async def _attempt(self, operation: str, body: bytes) -> bytes:
        try:
            signer = self._signer
            if signer is None or self._clock.monotonic() >= self._signer_until:
                signer = await self._sign_anew()
            transport = self._transport
            if transport is None:
                transport, _ = await self._open()
            answer = await transport.post(signer.headers(_TARGET + operation, body, datetime.now(UTC)), body)
        except (aiohttp.ClientError, OSError, StoreError) as exc:  # TimeoutError is an OSError
            raise errors.from_exception(operation, exc) from None
        except (ValueError, RuntimeError) as exc:  # a malformed header or URL; a session closed meanwhile
            raise errors.error(
                RetryClass.TRANSIENT, f"{operation}: the request could not be sent", type(exc).__name__
            ) from None
        if answer.checksum is not None and answer.checksum != str(crc32(answer.body)):
            raise errors.error(RetryClass.TRANSIENT, f"{operation}: the answer is damaged", "CRC32")
        if answer.status != _OK:
            raise errors.from_answer(operation, answer.status, answer.body)
        return answer.body

    async def _renewed(self) -> bool:
        """True where the chain, read anew, holds other credentials than those that expired."""
        expired = self._credentials
        now = self._clock.monotonic()
        if now >= self._renew_after:
            self._renew_after = now + CREDENTIALS_SECONDS
            self._session = _new_session()
            self._signer_until = now
        await self._sign_anew()
        return self._credentials != expired

    async def _open(self) -> "tuple[_Transport, URL]":
        async with self._opening:
            if self._transport is None or self._url is None:
                async with self.control() as client:
                    self._url = URL(client.meta.endpoint_url).origin()
                    self._region = client.meta.region_name
                proxy = _proxy(self._url)
                self._transport = (
                    _Direct(self._url, self._options) if proxy is None else _Proxied(self._url, self._options, proxy)
                )
            return self._transport, self._url

    async def _sign_anew(self) -> SigV4:
        """A signer with the chain's present credentials, good for CREDENTIALS_SECONDS."""
        _, url = await self._open()
        async with self._opening:
            now = self._clock.monotonic()
            if self._signer is not None and now < self._signer_until:
                return self._signer
            credentials = await self._frozen()
            if self._signer is None or credentials != self._credentials:
                self._credentials = credentials
                self._signer = SigV4(credentials, self._region, url.host_port_subcomponent or "")
            self._signer_until = now + CREDENTIALS_SECONDS
            return self._signer

    async def _frozen(self) -> ReadOnlyCredentials:
        try:
            chain = await self._session.get_credentials()
            if chain is None:
                raise NoCredentialsError  # noqa: TRY301  (one seam translates it)
            frozen: Callable[[], Awaitable[ReadOnlyCredentials]] = chain.get_frozen_credentials
            return await frozen()
        except Exception as exc:  # noqa: BLE001  (providers raise botocore's, aiohttp's and plain RuntimeErrors)
            raise errors.from_exception("credentials", exc) from None


class _Transport(Protocol):
    """Posts a signed request to the endpoint."""

    async def post(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """One attempt. Raises OSError, aiohttp.ClientError, ValueError."""
        ...

    async def close(self) -> None:
        """Release the connections."""
        ...


class _Direct:
    """Straight to the endpoint."""

    def __init__(self, url: URL, options: settings.DynamoDB) -> None:
        self._head = f"POST / HTTP/1.1\r\nHost: {url.host_port_subcomponent}\r\nContent-Length: "
        self._exchange = Exchange(
            url.host or "",
            url.port or 0,
            tls=_tls(url),
            connect_timeout=options.connect_timeout,
            total_timeout=options.connect_timeout + options.read_timeout,
            keepalive=KEEPALIVE_SECONDS,
        )

    async def post(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """The request as bytes; ASCII, or a ValueError."""
        lines = [f"{self._head}{len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines.append("\r\n")
        return await self._exchange.post("\r\n".join(lines).encode("ascii") + body)

    async def close(self) -> None:
        """Release the connections."""
        await self._exchange.close()


class _Proxied:
    """Through an HTTP proxy: aiohttp's client, which knows how."""

    def __init__(self, url: URL, options: settings.DynamoDB, proxy: str) -> None:
        self._url = url
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS, ssl=_tls(url) or True),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
            timeout=aiohttp.ClientTimeout(
                total=options.connect_timeout + options.read_timeout, sock_connect=options.connect_timeout
            ),
            proxy=proxy,
        )

    async def post(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """By the session."""
        async with self._http.post(self._url, data=body, headers=headers, allow_redirects=False) as response:
            return Answer(response.status, response.headers.get("x-amz-crc32"), await response.read())

    async def close(self) -> None:
        """Close the session."""
        await self._http.close()


def _proxy(url: URL) -> str | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY name, looked up once: aiohttp would do it at every call."""
    host = url.host_port_subcomponent or ""
    return None if proxy_bypass(host) else getproxies_environment().get(url.scheme)


def _tls(url: URL) -> ssl.SSLContext | None:
    """Trust what the control plane trusts: AWS_CA_BUNDLE (or the profile's ca_bundle), else botocore's own bundle."""
    if url.scheme != "https":
        return None
    given = aiobotocore.session.get_session().get_config_variable("ca_bundle")
    return ssl.create_default_context(cafile=given or get_cert_path(True))


def _new_session() -> aioboto3.Session:
    """A session that resolves credentials anew but reads the service's description from memory (0.14 s otherwise)."""
    core = aiobotocore.session.get_session()
    core.register_component("data_loader", _loader(core.get_config_variable("data_path")))
    return aioboto3.Session(botocore_session=core)


@lru_cache(maxsize=1)
def _loader(data_path: str | None) -> Loader:
    return create_loader(data_path)
