"""The methods as pure functions, edits as data, and the engine that applies them while the host samples.

Start at spec.py (what an edit is), cre.py, eiup.py, append.py and direction.py (what it computes), plan.py and run.py
(when and where it is applied) and binding.py (the only module that knows the host).
"""
