"""What a model costs on workers, and how layers and steps are divided by that. Pure.

The coordinator and `stagemesh plan` decide by these functions. They know values, no workers that are there or gone.
"""
