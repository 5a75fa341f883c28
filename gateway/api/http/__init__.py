"""HTTP as such: the application, bodies with bounds and deadlines, middleware, routes that are not a model's.

What a body means is `api/openai`'s business.
"""
