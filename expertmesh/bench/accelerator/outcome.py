"""How what is examined may end, other than well."""


class NotApplicable(Exception):
    """There is no such thing here; the message says why."""


class Wrong(Exception):
    """It ran, and gave what it must not give; the message says what."""
