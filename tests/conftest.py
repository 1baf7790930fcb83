"""Shared fixtures; each part that tests need lives in its own module under ``tests/parts``."""

import os

pytest_plugins = ["tests.parts.postgres", "tests.parts.adopted", "tests.parts.dynamodb"]

# Every core of the machine is busy here: what gives way to everybody would wait for the end of all other tests.
os.environ["SIDECAR_PRIORITY"] = "normal"
