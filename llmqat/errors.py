"""Typed errors of the method package. All are `ValueError`s whose text is one line."""


class ConfigError(ValueError):
    """A setting, flag or recipe is wrong or contradicts another one."""


class CheckpointError(ValueError):
    """A checkpoint is truncated, altered, incomplete or not one of ours."""


class DataError(ValueError):
    """A dataset, record or text file is truncated, altered, incomplete or does not fit the run."""


class LockError(ConfigError):
    """The output folder is in use by another live process."""
