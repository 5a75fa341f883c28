"""Every option of every service, declared once.

An option is one field of one block: its flag, variable, YAML key, bounds, default and help. A service's settings are
its blocks side by side (`coordinator.py`, `stage.py`, `gateway.py`, `serve.py`), so a block that two services have is
the same options, and `serve` hands it on as a whole. `loading.py` reads them: flags, then environment, then file.

Only declarations and their checks belong here. What a service makes of an option is the service's. Nothing in here
imports more than pydantic and YAML: `stagemesh --help` must be quick.
"""
