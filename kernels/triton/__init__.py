"""Triton kernels; installed as wise_ext.triton_kernels."""
