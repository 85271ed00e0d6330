"""Errors a person can act on: each message names the thing, what is allowed and what to do."""


class WorkbenchError(ValueError):
    """Base of every error that the command line prints as one message with exit code 2."""


class RecipeError(WorkbenchError):
    """A recipe has an unknown name, key or value."""


class ManifestError(WorkbenchError):
    """A manifest, or a file it describes, is not what it should be."""


class DataError(WorkbenchError):
    """A table or a text cannot be used."""


class RunError(WorkbenchError):
    """A run, its folder or its checkpoint cannot be used."""


class NotebookError(WorkbenchError):
    """A notebook was given wrong parameters, or did not reach its last cell."""
