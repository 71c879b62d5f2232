"""Errors and warnings: one line that names what is wrong and proposes a fix.

``exit_status`` is that of the command line: 2 for a usage error, 3 for a failure while running.
"""


class PrunekitError(Exception):
    """Base of all errors that prunekit raises on purpose."""

    exit_status = 2


class RecipeError(PrunekitError):
    """A recipe or an override is invalid; the message has one line per problem."""


class PluginError(PrunekitError):
    """A plugin failed to import, took an existing name or built something that is not a module."""


class DataError(PrunekitError):
    """An image, a mask or a data folder is invalid."""


class CheckpointError(PrunekitError):
    """A weights file or a file of a run folder is missing, damaged or does not fit."""


class WriteError(CheckpointError):
    """The system refused to write because a disk is full or failing."""

    exit_status = 3


class RunFolderError(PrunekitError):
    """A run folder already exists, is in use, or is not a run folder."""


class PlanError(PrunekitError):
    """A plan does not fit its model, or the slim model is not equivalent to the dense one."""

    exit_status = 3


class TrainingError(PrunekitError):
    """Training cannot continue, for example because the loss is not finite."""

    exit_status = 3


class ExportError(PrunekitError):
    """A model cannot be exported, or the exported file is not equivalent to it."""

    exit_status = 3


class RunError(PrunekitError):
    """A run failed with an error that no other class covers, such as out of memory or an error of a library."""

    exit_status = 3


class Interrupted(KeyboardInterrupt):
    """A run was interrupted after it had started; it can be resumed."""


class PrunekitWarning(UserWarning):
    """Something was done differently than requested: nothing to prune, a tie, a count that could not be rounded."""
