"""Errors that a user can act on.

Every message is one line that says what was wrong, where, and what would be right. The commands print a
`DyvteError` as that line and exit with status 1 (see `dyvte.runs.config.command`); anything else is a bug and keeps
its stack trace.
"""


class DyvteError(Exception):
    """Base class of the errors this package raises on purpose.

    Example:
        >>> try:
        ...     dyvte.DynamicExit("a/folder/that/is/not/there")
        ... except dyvte.DyvteError as error:
        ...     print("a/folder" in str(error))
        True
    """


class DyvteWarning(UserWarning):
    """What goes on, though it may not be what was meant; commands show it as one line."""


class ConfigError(DyvteError, ValueError):
    """A setting is missing, unknown or out of range."""


class ModelError(DyvteError, ValueError):
    """A model cannot be found, loaded or read (weights missing, no image token, wrong width or depth).

    Example:
        >>> try:
        ...     dyvte.load("a/folder/that/is/not/there")
        ... except dyvte.ModelError as error:
        ...     print("a/folder" in str(error))
        True
    """


class UnsupportedError(DyvteError):
    """A model, cache or combination of methods that cannot be driven exactly, refused with the reason.

    Example:
        >>> try:
        ...     with dyvte.FixedExit(layer=6)(mllm):
        ...         mllm.model(inputs_embeds=torch.zeros(1, 4, mllm.hidden_size))
        ... except dyvte.UnsupportedError as error:
        ...     print("input_ids" in str(error))
        True
    """


class DataError(DyvteError):
    """A data set as a whole cannot be read (missing file, unknown column, not the expected format)."""


class RunFolderError(DyvteError):
    """A run folder holds the results of another model, other data or other settings."""


class BrokenSample(DyvteError):
    """One sample cannot be used; the run records it, leaves it out and goes on.

    Args:
        where: File and line, or data set and row, as a reader would look it up: `data/gqa.jsonl line 7`.
        why: What is wrong and what would be right:
            `image 'n1.jpg' not found under images/ (set data.image_folder)`.
    """

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why

    def __reduce__(self) -> tuple[type["BrokenSample"], tuple[str, str]]:
        return type(self), (self.where, self.why)  # data loader workers send exceptions between processes
