# syntax=docker/dockerfile:1
# The sidecar's image: Python, the locked dependencies, the package; nothing that builds, no embedded database.
# For a release, pin the base by digest:
#   docker build --build-arg PYTHON_IMAGE=python:3.13-slim-trixie@sha256:... --build-arg REVISION="$(git rev-parse HEAD)" .
ARG PYTHON_IMAGE=python:3.13-slim-trixie

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
COPY requirements.txt requirements-build.txt ./
# --without-pip: the environment that is shipped cannot install anything. Wheels only: no compiler is needed. Of the AWS
# descriptions (27 MB) only those stay that the sidecar and its credentials use.
RUN python3 -m venv --without-pip /opt/sidecar \
 && python3 -m pip --python /opt/sidecar/bin/python install --only-binary :all: --require-hashes -r requirements.txt \
 && python3 -m venv /opt/build \
 && /opt/build/bin/python -m pip install --only-binary :all: --require-hashes -r requirements-build.txt \
 && find /opt/sidecar/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
      ! -name dynamodb ! -name sts ! -name sso ! -name sso-oidc ! -name signin -exec rm -r {} +
COPY pyproject.toml README.md ./
COPY sidecar ./sidecar
# The bytecode is compiled once, here: the root file system is read-only when it runs.
RUN /opt/build/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/wheel . \
 && python3 -m pip --python /opt/sidecar/bin/python install --no-deps --no-index /tmp/wheel/*.whl \
 && python3 -m pip --python /opt/sidecar/bin/python check \
 && /opt/sidecar/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/sidecar/lib

FROM ${PYTHON_IMAGE}
ARG REVISION=unknown
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="hybrid-log-sidecar" \
      org.opencontainers.image.description="Durable dual-write sidecar that moves an application's logs from PostgreSQL to DynamoDB" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The base's own pip goes too. The spool's directory belongs to the fixed uid, so that a fresh named volume does.
RUN python3 -m pip uninstall --yes --no-input --root-user-action ignore pip \
 && groupadd --gid 10001 sidecar \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin sidecar \
 && install -d -m 0700 -o 10001 -g 10001 /var/lib/sidecar
COPY --from=build /opt/sidecar /opt/sidecar
ENV PATH=/opt/sidecar/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONHASHSEED=random
USER 10001:10001
VOLUME /var/lib/sidecar
EXPOSE 8080 9464
STOPSIGNAL SIGTERM
# Kubernetes ignores this and asks /livez and /readyz itself; it is for `docker run` and Compose.
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --retries=3 \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9464/readyz', timeout=2)"]
ENTRYPOINT ["sidecar"]
CMD ["serve"]
