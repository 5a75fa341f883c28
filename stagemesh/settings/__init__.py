"""Every option of every service, declared once.

An option is one field of one block, with its flag, variable, YAML key, bounds, default and help. A service's settings
combine several blocks (`coordinator.py`, `stage.py`, `gateway.py`, `serve.py`). Two services with the same block have
the same options, and `serve` passes a block on as a whole. `loading.py` reads flags, then environment, then file.

This folder has only declarations and their checks. The services decide what an option does. The modules import only
pydantic and YAML, because `stagemesh --help` must be quick.
"""
