"""The fault matrix: each row breaks one thing under a real sidecar, heals it, and asks an independent oracle.

A row (``rows.ROWS``) names the fault and its counts. A test of a row begins it (``begin("F1")``: seed, random numbers,
history), lets ``client.Client`` send while the fault happens, and ends with ``oracle.judge``, which reads everything
from both stores. Each row has at least one negative control: the same test on a sidecar with one guarantee taken out
(``sabotaged``), which the oracle must find guilty; otherwise the row proves nothing.

    make ci-faults                             the counts of CI
    make faults                                the long counts
    FAULTS_SEED=7 make faults ROWS=f3_         a row again, with the seed that the failure printed
    .run/faults/F3-*.jsonl                     what was sent, answered and broken, in order
"""
