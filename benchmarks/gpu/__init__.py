"""The GPU benchmark: one module a section, run by ``python -m benchmarks.gpu`` or, watched, by ``benchmarks.gpu_kit``."""
