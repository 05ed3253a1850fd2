"""With this folder on PYTHONPATH and TWIN=t4, every Python process of a command has the pretend card."""

import os

if os.environ.get("TWIN"):
    from tests.twin.twin import install

    install(os.environ["TWIN"])
