"""The exceptions tpjax raises on bad input.

Every message names the thing and, if two numbers disagree, both numbers. The command line prints the message
on one line and exits with status 2, or with 1 where the input was not what was wrong (:class:`EngineError`,
:class:`LostProcessError`); nothing half-written is left behind.
"""


class TpjaxError(Exception):
    """Base class: catch this to catch everything tpjax raises on purpose."""


class ConfigError(TpjaxError, ValueError):
    """A model configuration is missing a field, contradicts itself, or asks for something unsupported."""


class CheckpointError(TpjaxError):
    """A checkpoint cannot be found, read or trusted, or does not fit its configuration."""


class DeviceError(TpjaxError, RuntimeError):
    """The devices that JAX sees cannot form the requested mesh."""


class DistributedError(TpjaxError, RuntimeError):
    """Several processes cannot run one model together: they do not find each other, or differ."""


class LostProcessError(DistributedError):
    """A process of the model is missing, late, differs, has failed or was lost: all have to start again."""


class DownloadError(TpjaxError):
    """A model could not be downloaded, or the download is not the expected file."""


class RequestError(TpjaxError, ValueError):
    """A generation request or one of its sampling parameters is invalid."""


class EngineError(TpjaxError, RuntimeError):
    """Work on the devices failed: it is not done, and the state of its requests on them is lost."""


class ContextLengthError(RequestError):
    """A prompt, with the answer it asks for, is longer than the model's context."""
