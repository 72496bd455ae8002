"""The same command on every process: `launch.local` (this machine), `launch.slurm` (a Slurm cluster), `launch.tpu` (TPU
VMs by queued resources) and `launch.gke` (Google Kubernetes Engine).

All start one `launch.job.Job`; a launcher for another scheduler is one more file beside them. Only the standard library
is needed here, so that a login node without JAX can submit.
"""
