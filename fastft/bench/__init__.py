"""`fastft bench`: a paired, isolated, parity-gated benchmark against plain peft, trl, Unsloth and
Liger.

case.py (what is measured) -> runner.py (a process a run, interleaved) -> worker.py (one run) ->
record.py (what it wrote) -> statistics.py and parity.py (what may be said) -> report.py (tables
and plots from committed results).
"""
