"""What a GPU decides, as one script: ``python -m benchmarks.gpu_check WORK``."""
