"""Settings that every test shares; they must come before anything imports jax or the library."""

import importlib.metadata
import os

from jaxtyping import install_import_hook

from tests import typechecker

# The models here are tiny and compiling dominates: without optimisation it takes a third of the time.
_FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # later versions know no such flag and would abort
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))
# Threads of an interpreted GPU kernel wait for each other in callbacks that each hold a thread of XLA's pool; a
# pool of as many threads as a small machine has cores would have them wait for ever.
os.environ.setdefault("NPROC", "16")

# From here on, each call checks shapes and types against the signatures.
install_import_hook(["toprovar_jax", "convert"], f"{typechecker.__name__}.check")
