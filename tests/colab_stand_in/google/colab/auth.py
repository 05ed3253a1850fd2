"""Google sign-in, which the notebooks do not need."""


def authenticate_user(clear_output=True, project_id=None):
    raise AssertionError("the notebook asked for Google credentials")
