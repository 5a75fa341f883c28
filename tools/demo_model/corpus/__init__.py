"""The demo model's text, made here task by task from a seed: `tasks.py` draws, the others know one kind of task."""
