"""Estimates all units from one backward pass a batch."""

from lq.sensitivity.exact import Exact


class Gradient(Exact):
    pass
