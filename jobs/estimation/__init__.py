"""What ``jobs.estimate`` makes of a cost model, a GPU's data sheet and, where there is one, a measured run."""
