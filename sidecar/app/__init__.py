"""THE wiring: builds every part once, starts them in order, stops them in reverse. Read this first."""

from sidecar.app.serve import init_stores, serve

__all__ = ["init_stores", "serve"]
