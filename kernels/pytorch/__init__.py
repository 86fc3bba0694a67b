"""The pair of kernels in plain PyTorch, with bits packed into bytes and derivatives read off look-up tables."""
