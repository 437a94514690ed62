"""The errors a user of the package can meet, each one sentence that names the field or the name at fault."""


class GorgoError(Exception):
    """Base of every error this package raises on purpose."""


class SettingsError(GorgoError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or names something that cannot be read."""


class PromptError(GorgoError, ValueError):
    """A request body cannot be turned into a prompt: not JSON, no prompt in it, or a field of the wrong shape."""


class NoCandidates(GorgoError, LookupError):
    """No replica may serve the request: none is configured for the model, or all were excluded."""
