"""What the slurm backend knows of clusters: SLURM's words, its commands, how containers run there, what is installed there."""
