"""hybrid-log-sidecar: moves an application's logs from PostgreSQL to DynamoDB without losing one."""

__version__ = "0.1.0"
