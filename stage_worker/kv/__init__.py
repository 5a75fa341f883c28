"""What a rank keeps of sequences: KV pages, who holds which, the boundary journal, and copies to other workers.

No steps are run in here.
"""
