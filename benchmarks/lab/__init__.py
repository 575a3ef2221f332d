"""The lab: claims about distillation across tokenizers as small experiments; ``python -m benchmarks.lab --help``."""
