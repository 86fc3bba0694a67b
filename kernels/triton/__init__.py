"""The kernels in Triton, for CUDA and ROCm. Imported when one is first needed: Triton need not be installed."""
