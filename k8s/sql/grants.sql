-- The role of the running sidecars: it adds rows and reads them, and can change or remove none.
-- Run as the tables' owner after `sidecar init-stores`.

CREATE ROLE sidecar LOGIN; -- with a password, or `GRANT rds_iam TO sidecar;`

GRANT CONNECT, TEMPORARY ON DATABASE logs TO sidecar; -- TEMPORARY: batches are staged in a temporary table
GRANT USAGE ON SCHEMA public TO sidecar;
GRANT SELECT, INSERT ON integration_logs TO sidecar;
