"""Durable jobs: who may run what, for how long, and what became of it.

A job is one model run on one set of instances; its key is the hash of exactly that, and every UID of its results
derives from the key, so the same work done twice makes the same objects. `jobs` are made and listed, `leases` are how
a worker runs one, `untold` are those that gave no result and whose PACS is to hear so, and `withdrawal` takes results
back.
"""
