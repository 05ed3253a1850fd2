"""The two error families of google.colab.errors."""


class Error(Exception):
    pass


class AuthorizationError(Error):
    pass
