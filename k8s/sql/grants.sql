-- The role of the running sidecars: it adds log rows and reads them, and can change or remove none.
-- Run as the tables' owner after `sidecar init-stores`.

CREATE ROLE sidecar LOGIN; -- with a password, or `GRANT rds_iam TO sidecar;`

GRANT CONNECT ON DATABASE logs TO sidecar;
GRANT USAGE ON SCHEMA public TO sidecar;
GRANT SELECT, INSERT ON integration_logs TO sidecar;

-- The gap ledger: lines are opened and closed by merging counts, never removed.
GRANT SELECT, INSERT, UPDATE ON integration_logs_gaps TO sidecar;

-- The fleet: the record is compared and replaced, leases are passed on, what became of refused records is kept up to
-- date, and the trail is only added to. A heartbeat says that a process lives; an hour after the process is gone its row
-- is removed, as it was last seen. It is the only row that a sidecar can delete, and no promise rests on it by then.
GRANT SELECT, INSERT, UPDATE ON integration_logs_fleet, integration_logs_leases, integration_logs_fates TO sidecar;
GRANT SELECT, INSERT ON integration_logs_audit TO sidecar;
GRANT SELECT, INSERT, UPDATE, DELETE ON integration_logs_heartbeats TO sidecar;
