"""HTTP in and out; no decisions here. ``parts`` is what the handlers are given, ``server`` puts them together.

* ``ingest``  POST /logs: media type, body, preferences -> intake -> the answer's words
* ``body``    the one bounded decoder of request bodies
* ``status``  GET /logs/{log_id}, /logs/{log_id}/status, /status
* ``ops``     /metrics /livez /readyz /healthz on their own listener: no control, no payload
* ``errors``  which error becomes which status: one table
* ``tokens``  bearer tokens from a mounted file
* ``server``  the applications and their one middleware
* ``listener`` connections, bounded in time and number
"""
