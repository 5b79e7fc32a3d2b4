"""One world for each backend that the registry knows."""
