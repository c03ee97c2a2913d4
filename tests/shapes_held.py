"""The type checker that holds calls to the shapes they are annotated with; an int is a float."""

from beartype import BeartypeConf, beartype

held = beartype(conf=BeartypeConf(is_pep484_tower=True))
