"""HTTP: the server, the application, middleware, bodies with bounds and deadlines, and the operators' routes.

The meaning of OpenAI's bodies belongs to `api/openai`.
"""
