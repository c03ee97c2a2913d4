"""How far the numbers of a config reach. What lies beyond is a slip of the finger that would end a
run hours later, or never let it begin; a config that is read says so.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""torch's generator on a CPU keeps no more of a seed."""
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Side = Annotated[int, Field(le=2**14)]
"""Pixels along one side of a picture."""
Places = Annotated[int, Field(ge=3, le=999)]
"""Along the side of a picture."""
Count = Annotated[int, Field(ge=0, le=10**7)]
"""Things that are listed or drawn one by one."""
Copies = Annotated[int, Field(ge=0, le=10**4)]
"""Of each picture or caption."""
