"""Sinkhorn-Knopp with a backward written by hand."""

from rlm_mhc.kernels.sinkhorn.mappings import mhc_mappings_by_op
from rlm_mhc.kernels.sinkhorn.op import sinkhorn, sinkhorn_backward
from rlm_mhc.kernels.sinkhorn.stage import sinkhorn_knopp, sinkhorn_stage

__all__ = ["mhc_mappings_by_op", "sinkhorn", "sinkhorn_backward", "sinkhorn_knopp", "sinkhorn_stage"]
