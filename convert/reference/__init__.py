"""The published models in plain eager PyTorch, written from the specification: the judge of the JAX port.

Nothing here is fast or clever. `python -m convert check` runs it on a user's own files and the tests pin it to
the golden data; no part of generation imports it.
"""
