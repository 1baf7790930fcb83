"""Tests with the field's real tools; ``make ci-integration`` installs them and names this directory."""
