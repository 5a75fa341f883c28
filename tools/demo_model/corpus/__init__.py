"""Makes the demo model's text from a seed. `tasks.py` draws examples; each other module makes one kind of task."""
