"""The alert rules and the dashboard as code; ``python -m k8s.monitoring`` writes the committed files."""
