"""What the slurm backend knows of clusters: words and commands of SLURM, containers, what is installed there."""
