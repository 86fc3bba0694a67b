"""Bad input gets one clear error, and a fault of ours is never told as the user's.

`checks` looks at what the public functions are given, `own_errors` tells whose fault an error is.
"""
