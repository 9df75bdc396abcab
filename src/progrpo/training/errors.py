"""Reasons why a run stops itself, apart from the checks, so that the command line knows them without torch."""


class Interrupted(Exception):
    """A signal ended the run between two iterations; the message says how to go on."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class SelfCheckError(RuntimeError):
    """The run does not do what it should; the message names what was seen and the likely cause."""


class MissingScoresError(SelfCheckError):
    """A reward failed on more pictures than a run may lack. What was trained until then is not suspect."""


class MissingPicturesError(SelfCheckError):
    """A model returned numbers that are not finite in place of pictures; the message names the part that did."""


class LostProcessError(RuntimeError):
    """Another process of the run is gone, so this one cannot go on; the message says from where the run can."""
