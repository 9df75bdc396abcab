"""Why a run stops itself; apart from the checks, so that the command line knows it without torch."""


class SelfCheckError(RuntimeError):
    """The run is not doing what it says; the message names what was seen and the likely cause."""
