"""The operator's verbs: wait, drain, spool, dead-letter, store.

While a sidecar runs they go through its control API, because it holds the spool; with it stopped they open the files
(``access``). Which one it is, is found out by asking: nobody listens means stopped, and the spool's lock says so again
before anything is changed.
"""
