"""Real clients against a real sidecar; ``docs/clients`` shows the same configurations."""
