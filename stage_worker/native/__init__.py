"""The compiled CPU path: kernels in C++, and the shard that uses them. It does not import transformers."""
