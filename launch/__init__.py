"""The same command on every process: `launch.local` (this machine) and `launch.slurm` (a Slurm cluster).

Both start one `launch.job.Job`; a launcher for another scheduler is one more file beside them. Only the standard
library is needed here, so that a login node without JAX can submit.
"""
