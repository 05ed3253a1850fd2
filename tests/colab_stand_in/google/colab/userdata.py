"""Secrets: SecretNotFoundError and TimeoutException are errors.Error, NotebookAccessError is not."""

import json
import os

from google.colab import errors


class NotebookAccessError(Exception):
    def __init__(self, key):
        super().__init__(f"Notebook does not have access to secret {key}")


class SecretNotFoundError(errors.Error):
    def __init__(self, key):
        super().__init__(f"Secret {key} does not exist.")


class TimeoutException(errors.Error):
    def __init__(self, key):
        super().__init__(
            f"Requesting secret {key} timed out. Secrets can only be fetched when running from the Colab UI."
        )


def get(key):
    secret = json.loads(os.environ.get("COLAB_SECRETS", "{}")).get(key)
    if secret is None:
        raise SecretNotFoundError(key)
    if secret.get("timeout"):
        raise TimeoutException(key)
    if not secret.get("access"):
        raise NotebookAccessError(key)
    return secret.get("payload", "")
