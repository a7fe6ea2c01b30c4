"""Uniform: every matrix is as sparse as the pattern says."""

from stages.pruning.entries import Allocation, NoParameters

UNIFORM = Allocation(name="uniform", budgeted=None, parameters=NoParameters, summary="every matrix as sparse as the pattern says")
