"""The decorator that checks calls against their annotations while tests run."""

from beartype import BeartypeConf, beartype

# An int may stand where a float is asked for, as everywhere in Python's numeric tower.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
