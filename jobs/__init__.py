"""What people type: ``python -m jobs.answer`` and ``python -m jobs.caption``."""
