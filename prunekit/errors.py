"""What prunekit raises for its users: one line that names what is wrong and proposes the mend.

``exit_status`` is what the command line ends with: 2 for the user's mistake, 3 for a failure while running.
"""


class PrunekitError(Exception):
    """Base of every error that prunekit raises on purpose."""

    exit_status = 2


class RecipeError(PrunekitError):
    """A recipe or an override cannot be used; the message holds one line for each mistake."""


class PluginError(PrunekitError):
    """A plugin failed to import, took a known name or built something that is no module."""


class DataError(PrunekitError):
    """An image, a mask or a data folder cannot be used."""


class CheckpointError(PrunekitError):
    """A file of weights or of a run folder is missing, damaged or does not fit."""


class WriteError(CheckpointError):
    """The system refused to write, for no fault of the user's: a disk is full or fails."""

    exit_status = 3


class RunFolderError(PrunekitError):
    """A run folder exists already, is in use, or is none."""


class PlanError(PrunekitError):
    """A plan does not fit its model, or the slim model does not compute what the dense one does."""

    exit_status = 3


class TrainingError(PrunekitError):
    """Training cannot go on, for example after a loss that is not finite."""

    exit_status = 3


class ExportError(PrunekitError):
    """A model could not be exported, or the file does not compute what the model does."""

    exit_status = 3


class RunError(PrunekitError):
    """A run was broken off by what none of the other errors foresees: too little memory, a library that fails."""

    exit_status = 3


class Interrupted(KeyboardInterrupt):
    """A run was stopped from outside, when it had begun; it can go on with ``resume``."""


class PrunekitWarning(UserWarning):
    """Something is done, but not as it was asked for: nothing to cut, a tie, a count that could not be rounded."""
