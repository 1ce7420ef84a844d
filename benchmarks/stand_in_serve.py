"""`lowkey-serve` with `benchmarks/stand_in_engine.py` in place of its engines. Takes the same arguments.

STAND_IN_RATE=20 python benchmarks/stand_in_serve.py dense=demo/model
"""

import os
from pathlib import Path

from server.cli import app
from server.wire import supervisor

if __name__ == "__main__":
    # Engine processes don't look for modules beside this script, unless told to.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    supervisor.ENGINE_MODULE = "stand_in_engine"
    app()
