"""The compiled CPU path: kernels in C++, and the shard that runs on them. It imports no transformers."""
