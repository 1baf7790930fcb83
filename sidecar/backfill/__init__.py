"""Backfill: copies what one store holds and the other lacks, and proves afterwards that nothing is missing.

=================  ====================================================================================================
``job``            what a run copies: from where to where, which time, which shard
``checkpoint``     how far it has come, durable, and an operator's orders
``comparison``     both stores read side by side: what is missing, by hour
``hours``          the hours that have something to copy, compactly
``filler``         puts records into a store at the pace that it bears
``reading``        reads as fast as the copy's rate allows
``proof``          validated hours: figures and gaps
``run``            survey, copy, verify, close the gaps; resumable at any point
``gaps``           open lines of the gap ledger: which hours, and closing them
``evidence``       what the gates of a phase change ask (``sidecar.evidence.Copies``)
``clearing``       the guard before DynamoDB's records are thrown away to be made again
=================  ====================================================================================================
"""
