"""One file per command of the command line, and what they share. None imports torch before it runs.

`patch`, `trial` and `bench` are the commands; `options` is what may be given to more than one, `adapters` and
`workload` what is asked for, `output` what is said.
"""
