"""Facts of the backfill."""
