"""How the sidecar is rolled out: manifests, and the code that writes rules and dashboard."""
