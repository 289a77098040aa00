"""The exceptions that memjax raises; the command line prints their one line and exits with `exit_code`."""

from __future__ import annotations


class MemjaxError(Exception):
    """Base of every error a person can cause or mend: one line that names the thing and the way out."""

    exit_code = 2


class InputError(MemjaxError):
    """A text, question or argument cannot be used as given."""


class ConfigError(MemjaxError):
    """A configuration key, value or file is wrong."""


class FetchError(MemjaxError):
    """Weights or data could not be fetched or verified."""


class WeightsError(MemjaxError):
    """Weights do not match the model: missing, unexpected or misshapen tensors, or an unsupported architecture."""


class BaseMismatchError(MemjaxError):
    """A memory, bank, router or gate belongs to another base; both ids are named."""


class ArtefactError(MemjaxError):
    """A memory's files are missing, damaged or do not say what the index says."""


class BankError(MemjaxError):
    """A bank cannot be opened, or a name in it cannot be found or used."""


class TrainingError(MemjaxError):
    """Training stopped: a loss that is not finite, or a checkpoint that cannot be used."""


class HostsError(MemjaxError):
    """A process of several did not come or is lost; the others stop. They may be started again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class DataError(MemjaxError):
    """A data file has the wrong shape: names file, line and field."""
