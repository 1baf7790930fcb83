"""Shared fixtures; each part that tests need lives in its own module under ``tests/parts``."""

pytest_plugins = ["tests.parts.postgres", "tests.parts.adopted", "tests.parts.dynamodb"]
