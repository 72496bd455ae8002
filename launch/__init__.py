"""The same command on every process: `launch.local` (this machine) and `launch.slurm` (a Slurm cluster).

Only the standard library is needed here, so that a login node without JAX can submit.
"""
