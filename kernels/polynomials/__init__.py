"""The derivatives of two-sided curves as polynomials of the output, and the script that works them out."""
