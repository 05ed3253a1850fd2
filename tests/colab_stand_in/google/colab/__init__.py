"""A stand-in for the package that Colab's kernel has: same names, arguments, messages and errors.

What the browser and the cloud would answer comes from the environment: COLAB_DRIVE (the folder that outlives the
session), COLAB_SECRETS (JSON: {name: {"access": bool, "payload": str}}), COLAB_UPLOAD (a file the user picks),
COLAB_DOWNLOADS (a file that gets a line a download).
"""
