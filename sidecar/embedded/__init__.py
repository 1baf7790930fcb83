"""The development stand: a private PostgreSQL and a local DynamoDB as child processes; never in the image."""
