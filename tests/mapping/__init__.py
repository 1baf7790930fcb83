"""Mappings: events of other loggers -> records."""
