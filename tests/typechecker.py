"""beartype as the test command uses it: an int is a float, as type checkers read annotations (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
