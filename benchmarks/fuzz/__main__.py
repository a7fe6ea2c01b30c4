"""Feed every reader of what comes from outside with damaged and hostile inputs.

python -m benchmarks.fuzz                        100,000 inputs in all; writes benchmarks/fuzz.json and the table in SECURITY.md
python -m benchmarks.fuzz --reader deltas --inputs 500      a part of it: writes nothing

Prints the number of inputs and a table. Inputs are made by hypothesis from valid files, by seeds: every run has the same. What guard.py
states must hold for each; the first input of each kind for which it does not is printed, and the command fails.
"""
