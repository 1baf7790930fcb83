-- The role of the running sidecars: it adds log rows and reads them, and can change or remove none.
-- Run as the tables' owner after `sidecar init-stores`.

CREATE ROLE sidecar LOGIN; -- with a password, or `GRANT rds_iam TO sidecar;`

GRANT CONNECT ON DATABASE logs TO sidecar;
GRANT USAGE ON SCHEMA public TO sidecar;
GRANT SELECT, INSERT ON integration_logs TO sidecar;

-- The gap ledger: lines are opened and closed by merging counts, never removed.
GRANT SELECT, INSERT, UPDATE ON integration_logs_gaps TO sidecar;
