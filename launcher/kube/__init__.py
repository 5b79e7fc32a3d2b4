"""Kubernetes and OpenShift: the way to a cluster, what its words mean, its logs, volumes and shared memory."""
