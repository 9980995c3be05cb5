"""What ``jobs.estimate`` makes of a cost model, a GPU's data sheet and, where there are any, measurements."""
