"""The inside of `eval.sandbox`: two locked-down processes, the program's and the tests'.

They run in an interpreter without site packages, so nothing here imports the rest of the project.
"""
