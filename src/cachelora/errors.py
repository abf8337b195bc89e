"""Errors for the person at the keyboard: where, what is wrong, what to do."""


class CacheloraError(Exception):
    """A problem that the user can mend.

    Parameters
    ----------
    where : str
        The place to look at: a file (with a line, where there is one) or a key of the config.
    what : str
        What is wrong there, in a few words.
    remedy : str
        What to do about it, as an imperative sentence.
    """

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(where, what, remedy)
        self.where = where
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.remedy}."


class ConfigError(CacheloraError):
    """The configuration is wrong: an unknown key, a value out of range, a name that is not allowed."""


class InputError(CacheloraError):
    """An input file is missing, empty, or holds too many bad records."""


class StorageError(CacheloraError):
    """An object store cannot be reached, or refuses what is asked of it."""


class EngineError(CacheloraError):
    """An LLM engine cannot be used, or fails on too many queries."""


class ModelError(CacheloraError):
    """A base model cannot be found or is not the one that the config names."""


class DamagedError(CacheloraError):
    """An artefact is not what its manifest or its own header says it is."""


class TrainingError(CacheloraError):
    """Training cannot start or went wrong."""
