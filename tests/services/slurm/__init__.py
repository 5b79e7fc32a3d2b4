"""A real SLURM of two nodes, from Debian's packages, below one folder."""

from tests.services.slurm.cluster import NODES, SlurmCluster, slurm_cluster, slurm_works

__all__ = ["NODES", "SlurmCluster", "slurm_cluster", "slurm_works"]
