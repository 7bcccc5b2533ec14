"""The methods as pure functions, edits as data, and the engine that applies them while the host samples.

Start at edits/spec.py (what an edit is), methods/ (what it computes), engine/plan.py and engine/run.py
(when and where it is applied) and engine/host.py (the module that knows the host).
"""
