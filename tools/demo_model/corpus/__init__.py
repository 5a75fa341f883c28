"""Makes the demo model's text from a seed. `tasks.py` draws examples. The other modules make kinds of tasks."""
