"""What users call the dtypes of states. Imports no torch: settings and messages name them, too."""

from typing import Literal, get_args

StateDType = Literal["float32", "bfloat16", "int8"]
"""A dtype that recurrent states may be served in, by the name that users give."""

STATE_DTYPES: tuple[StateDType, ...] = get_args(StateDType)
"""All of these dtypes, the widest first."""
