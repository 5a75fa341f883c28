"""Describes models for the kernels: in a process of its own, once for each model.

Belongs here: the process, its cache, and the proof that the kernels compute what transformers' modules do. Does not
belong here: how parts are read (model/parts).
"""
