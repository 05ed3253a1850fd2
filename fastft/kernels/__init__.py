"""The CPU's fast layers behind one door: attention over rows without padding, fused layers, native
code.
"""
