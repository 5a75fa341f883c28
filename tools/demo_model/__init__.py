"""Trains the model that ships with stagemesh: `python -m tools.demo_model`. See docs/demo-model.md.

`corpus/` makes the text. The modules here make tokens and batches from it, train the model, and measure its accuracy.
"""
