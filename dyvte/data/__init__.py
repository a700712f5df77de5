"""Questions about images: the built-in shapes task, LLaVA's files, Hugging Face data sets."""

from dyvte.data.base import Dataset, Sample, build_dataset
from dyvte.errors import BrokenSample

__all__ = ["BrokenSample", "Dataset", "Sample", "build_dataset"]
