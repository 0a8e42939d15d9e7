"""What the transports for httpx and httpx2 share; it imports neither of them.

The two packages have the same contract and not one class in common, so everything here works on a `Family`: the
classes of one of them. What users import is in `resilient.httpx` and `resilient.httpx2`.
"""
