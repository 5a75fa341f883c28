"""How the model that ships with stagemesh is made: `python -m tools.demo_model`. See docs/demo-model.md.

`corpus/` makes the text; the modules here turn it into tokens and batches, train the model, and count how often it is
right.
"""
