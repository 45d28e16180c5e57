"""Workers.

A supervisor claims steps and commits results; a runner, in a child process of its own, does the numerics.
"""
