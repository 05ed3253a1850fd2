"""From a config to a trained adapter: the session, the loop, one step, and the proof that its rows
are exact.
"""
